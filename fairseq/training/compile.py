"""``--compile``: torch.compile on layers, from outside the model.

Each encoder and decoder layer is compiled by itself, in place: names in checkpoints stay, and layers of one class and
kind share the compiled code. Shapes are dynamic. What cannot be compiled runs as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable

import torch
from torch import nn

from fairseq.errors import first_line, is_out_of_memory

logger = logging.getLogger("fairseq.train")


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Have ``layers`` compiled when they first run; when that fails, log one line and go on without."""
    layers = list(layers)
    # of backward passes, too, while the forward pass can still go on without
    with contextlib.suppress(AttributeError):  # older versions have no such setting
        torch._functorch.config.force_non_lazy_backward_lowering = True
    for layer in layers:
        layer.compile(dynamic=True)
        layer._compiled_call_impl = _Fallback(layer, layers)


class _Fallback:
    """A layer's compiled call, until compiling fails: then all ``layers`` are as if never compiled."""

    def __init__(self, layer: nn.Module, layers: list[nn.Module]) -> None:
        self._layer, self._layers, self._compiled = layer, layers, layer._compiled_call_impl

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            return self._compiled(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:  # one that is not the compiler's comes again
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            logger.warning(f"--compile failed, going on without: {type(error).__name__}: {reason}")
            for layer in self._layers:
                layer._compiled_call_impl = None
            return self._layer._call_impl(*args, **kwargs)
