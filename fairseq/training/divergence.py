"""Where training broke: the first sub-layer whose output, or the first parameter whose gradient, is not finite.

The bad update's batches run once more, with the dropout that they had, and hooks look at what every module takes in and
gives out. Nothing that training goes on with is touched: no gradient, no random number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq.data.reading import describe_batch
from fairseq.data.translation import Batch
from fairseq.errors import FairseqError, is_out_of_memory
from fairseq.models.config import TransformerConfig
from fairseq.training.distributed import World
from fairseq.training.sharding import local

_Finding = tuple[int, int, str]  # kinds are told in this order, the first one's first; in words
DEEP = 6  # layers; Post-LN with more of them is known for not training


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is; a sharded tensor's on this process. Waits for the device."""
    return bool(torch.isfinite(local(tensor)).all())


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise FairseqError for the first of ``tensors`` that is not finite. where: the checkpoint they come from."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise FairseqError(
                f"{where}: {name} is not finite (it holds NaN or infinity): the training that saved it had diverged; "
                "continue from an earlier checkpoint with --restore-file"
            )


class ForwardTrace:
    """Watches ``model`` run, as a context manager: which modules ran, and the first one that broke.

    broken: the first module, in the order in which modules finish, that made something not finite of finite inputs;
    the parent, where that happened between its parts. None: all was finite. finished: the names of all that ran.
    """

    def __init__(self, model: nn.Module) -> None:
        self.broken: str | None = None
        self.finished: list[str] = []
        self._model = model
        self._compiled: list[tuple[nn.Module, Any]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> ForwardTrace:
        for name, module in self._model.named_modules():
            if getattr(module, "_compiled_call_impl", None) is not None:  # compiled code runs no hooks of its parts
                self._compiled.append((module, module._compiled_call_impl))
                module._compiled_call_impl = None
            self._hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, call in self._compiled:
            module._compiled_call_impl = call

    def _hook(self, name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.finished.append(name)
            if self.broken is not None or _all_finite(output):
                return
            # an input that no module has put out comes from what the parent does between its parts
            self.broken = name if _all_finite((args, kwargs)) else name.rpartition(".")[0]

        return look


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or is_finite(value)
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    return not isinstance(value, (tuple, list)) or all(map(_all_finite, value))


def first_nonfinite_gradient(model: nn.Module, finished: list[str]) -> tuple[int, str] | None:
    """The first parameter in the order of the backward pass with a gradient that is not finite, and its place there.

    finished: `ForwardTrace.finished`. A module that was never called, as the projection to the vocabulary under a
    criterion that makes the logits, comes first.
    """
    place = {name: len(finished) - i for i, name in enumerate(finished)}
    bad = [
        (place.get(name.rpartition(".")[0], 0), name)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not is_finite(parameter.grad)
    ]
    return min(bad, key=lambda found: found[0], default=None)


def find_break(
    model: nn.Module,
    world: World,
    micro_batches: Sequence[Batch | None],
    loss_again: Callable[[Batch | None, int], Tensor],
) -> str:
    """Where an update whose gradients are still there first broke, in words; all processes call this and agree.

    micro_batches: this process's, None for one that does not count. loss_again: runs one of them, and its number, as
    the update did. Leaves gradients and random numbers as they are.
    """
    found: list[_Finding] = []
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            found.append((0, 0, f"parameter {name} is not finite"))
            break
    finished: list[str] = []
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        for index, batch in enumerate(micro_batches):
            trace = ForwardTrace(model)
            try:
                with trace:
                    loss = loss_again(batch, index)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                continue
            finished = finished or trace.finished
            if batch is not None and trace.broken is not None:
                words = f"the first output that is not finite is that of {trace.broken or 'the whole model'}"
                found.append((1, index, f"{words}, on {describe_batch(batch)}"))
            elif batch is not None and not is_finite(loss):
                found.append((1, index, f"the decoder's output is finite, the loss is not, on {describe_batch(batch)}"))
    if gradient := first_nonfinite_gradient(model, finished):
        place, name = gradient
        words = (
            "the forward pass is finite; the first gradient that is not, in the order of the backward pass, is that of"
        )
        found.append((2, place, f"{words} {name}"))
    parts: list[Any] = [found]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, found)
    return min((finding for part in parts for finding in part), default=(3, 0, "a second run was finite"))[2]


def advice(cfg: TransformerConfig, clip_norm: float) -> str:
    """What to try. clip_norm: that of ``--clip-norm``, 0 for none."""
    layers = {
        "encoder": 0 if cfg.encoder_normalize_before else cfg.encoder_layers,
        "decoder": 0 if cfg.decoder_normalize_before else cfg.decoder_layers,
    }
    general = "lower --lr or warm up longer" + ("" if clip_norm > 0 else ", or clip gradients with --clip-norm")
    if cfg.init_type != "default" or max(layers.values()) <= DEEP:
        return general
    depth = " and ".join(f"{count} {stack}" for stack, count in layers.items() if count)
    return f"Post-LN with {depth} layers amplifies every change: train it with --init-type adaptive; else {general}"
