"""``--ddp-backend fully_sharded``: parameters, gradients and optimiser state divided among processes (torch's FSDP2).

Each process keeps its part of the rows of every tensor and gathers a layer's parameters when it computes with them.
Where training looks at the whole, it asks here: to validate, and for checkpoints, which are those of any other run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq.errors import FairseqError
from fairseq.models.transformer import Transformer
from fairseq.utils.sharded import is_sharded


def shard(model: Transformer, device: torch.device) -> Transformer:
    """Divide ``model``, the same in all processes, among them, in place, and move this process's part to ``device``.

    Its backward pass then averages gradients over the processes. The parameters are new: collect them afterwards.
    Raises FairseqError where this torch cannot average.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _check_averaging(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for stack in (model.encoder, model.decoder):
        for layer in stack.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # embeddings are needed at both ends
    return model


def _check_averaging(device: torch.device) -> None:
    """Average ones. On the CPU some versions of torch fail at it, and some add up without a word."""
    mean = torch.empty(1, device=device)
    with contextlib.suppress(RuntimeError, ValueError):
        ones = torch.ones(dist.get_world_size(), device=device)
        dist.reduce_scatter_tensor(mean, ones, op=dist.ReduceOp.AVG)
        if mean.item() == 1:
            return
    raise FairseqError(
        f"--ddp-backend fully_sharded: torch {torch.__version__} cannot average gradients on this device "
        f"({device.type}); use torch 2.11 or later, or --ddp-backend pytorch_ddp"
    )


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Within, a process computes with ``model`` as often as it likes, whatever the others do; all must enter and leave.

    Evaluation and decoding alone; does nothing for a model that is not sharded.
    """
    if not any(map(is_sharded, model.parameters())):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather(state: Any, keep: bool) -> Any:
    """Nested dicts and lists with sharded tensors whole, on the CPU; all processes must call it.

    keep: whether this process wants them; None is in their place otherwise. A tensor that occurs twice stays one.
    """
    found: dict[int, Tensor | None] = {}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, list):
            return [whole(item) for item in value]
        if not is_sharded(value):
            return value.detach() if isinstance(value, Tensor) else value
        if id(value) not in found:
            tensor = value.full_tensor().detach()
            found[id(value)] = tensor.cpu() if keep else None
        return found[id(value)]

    return whole(state)


def scatter_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's ``state_dict()``, the same in all processes, with what has a parameter's shape sharded like it."""

    def part(value: Any, parameter: Any) -> Any:
        if not is_sharded(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        from torch.distributed.tensor import DTensor

        mesh = parameter.device_mesh
        rows = value.chunk(mesh.size())
        own = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else value[:0]
        copy = own.to(parameter.device, copy=True)  # not a view, which would keep the whole
        return DTensor.from_local(
            copy, mesh, parameter.placements, run_check=False, shape=value.shape, stride=value.stride()
        )

    parts = {
        index: {key: part(value, parameters[index]) for key, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return state | {"state": parts}
