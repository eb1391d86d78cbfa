"""Activation checkpointing: a layer keeps its input alone and runs again in the backward pass (Chen et al. 2016).

Applied to a finished model from outside, by giving layers another ``forward``: modules, parameters and their names stay
as they are. The second run repeats the first one's random numbers and autocast, so that nothing but time and memory
changes. Evaluation and decoding do not notice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from fairseq.errors import FairseqError
from fairseq.models.transformer import Transformer
from fairseq.options import MemoryConfig


def apply_memory_flags(model: Transformer, cfg: MemoryConfig, device: torch.device) -> None:
    """Checkpoint the layers of ``model``, which is to train on ``device``, as the flags say.

    Raises FairseqError for ``--offload-activations`` on the CPU.
    """
    if cfg.offload_activations and device.type == "cpu":
        raise FairseqError(
            "--offload-activations needs a GPU: on the CPU all activations are in host memory; "
            "use --checkpoint-activations"
        )
    if cfg.checkpoint_activations or cfg.offload_activations:
        checkpoint_layers(model, cfg.checkpoint_activations_every, cfg.offload_activations)


def checkpoint_layers(model: Transformer, every: int = 1, offload: bool = False) -> None:
    """Checkpoint each ``every``-th layer of encoder and decoder; call once, before sharding or wrapping the model.

    offload: keep these layers' inputs in host memory, pinned where the model is on a GPU, until they are needed again.
    """
    for stack in (model.encoder, model.decoder):
        for layer in stack.layers[every - 1 :: every]:
            layer.forward = partial(_checkpointed, layer, layer.forward, offload)


def _checkpointed(layer: nn.Module, forward: Callable[..., Tensor], offload: bool, x: Tensor, *rest: Tensor) -> Tensor:
    """``forward(x, *rest)``. x: the stream (batch, time, dim); rest: what all layers of a stack share."""
    if not (layer.training and torch.is_grad_enabled()):
        return forward(x, *rest)

    def run(stream: Tensor) -> Tensor:
        # autocast would keep its low-precision copies of the weights until the loss, for a use that never comes
        kind = x.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return forward(stream, *rest)  # not as arguments of checkpoint: every layer would offload its own copies

    with save_on_cpu(pin_memory=x.is_cuda) if offload else contextlib.nullcontext():
        return checkpoint(run, x, use_reentrant=False)
