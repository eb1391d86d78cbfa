"""Mixed precision: parameters and their update in float32, the forward and backward pass in bf16 or fp16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.errors import FairseqError
from fairseq.options import TrainLogConfig


def autocast(device: torch.device, fp16: bool, bf16: bool) -> torch.autocast:
    """The context to run a model in; a no-op in float32."""
    dtype = torch.float16 if fp16 else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=fp16 or bf16, cache_enabled=True)


class ConvertedWeights:
    """A model whose linear layers find their weights converted to autocast's precision when it is called.

    autocast would convert them, and their gradients back, with a kernel each: a quarter of the kernels of an update.
    Here a few kernels convert all. The gradients come together at the end of the backward pass, so that what waits for
    single ones, as DistributedDataParallel does, is better off without.
    """

    def __init__(self, model: nn.Module, without: nn.Module) -> None:
        """without: a layer that sees to itself."""
        self.model = model
        linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not without]
        self._weights = {f"{n}.{key}": p for n, module in linear for key, p in module.named_parameters(recurse=False)}

    def __call__(self, **inputs: Any) -> Any:
        """As the model."""
        device = next(iter(self._weights.values())).device.type
        if not torch.is_autocast_enabled(device):
            return self.model(**inputs)
        converted = _Convert.apply(torch.get_autocast_dtype(device), *self._weights.values())
        named = dict(zip(self._weights, converted, strict=True))
        return torch.func.functional_call(self.model, named, (), inputs, tie_weights=False)


class _Convert(torch.autograd.Function):
    """float32 tensors in another precision."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _converted(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = iter(_converted([grad for grad in grads if grad is not None], torch.float32))
        return None, *(None if grad is None else next(there) for grad in grads)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    if copies:
        torch._foreach_copy_(copies, tuple(tensors))
    return copies


class DynamicLossScaler:
    """The loss scale of fp16 training: halved when gradients overflow, doubled after a quiet window.

    Micikevicius et al. 2018, section 3.2, with fairseq's flags. Multiply the loss by ``scale`` before the backward
    pass, then call ``update`` once an update.
    """

    def __init__(
        self,
        init_scale: float = 2.0**7,
        scale_window: int = 2**14,
        tolerance: float = 0.0,
        min_scale: float = 1e-4,
        threshold: float | None = None,
    ) -> None:
        """tolerance: share of overflows since the last change that is put up with. min_scale: give up below this.
        threshold: never go below this.
        """
        self.scale = float(init_scale)
        self.scale_window = scale_window
        self.tolerance = tolerance
        self.min_scale = min_scale
        self.threshold = threshold
        self._updates = 0
        self._overflows = 0  # since the scale changed
        self._last_overflow = -1
        self._last_change = -1

    def update(self, overflow: bool) -> None:
        """Adapt the scale. overflow: the gradients of this update are not finite, so it is skipped.

        Raises FairseqError when the scale would fall below ``min_scale``.
        """
        if not overflow:
            if (self._updates - self._last_overflow) % self.scale_window == 0:
                self.scale *= 2
                self._last_change = self._updates
            self._updates += 1
            return
        self._last_overflow = self._updates
        self._overflows += 1
        share = self._overflows / (self._updates - self._last_change)
        if share >= self.tolerance:
            self.scale /= 2
            if self.threshold is not None:
                self.scale = max(self.scale, self.threshold)
            self._last_change = self._updates
            self._overflows = 0
        self._updates += 1
        if self.scale < self.min_scale:
            raise FairseqError(
                f"the fp16 loss scale fell below --min-loss-scale {self.min_scale}: training diverges; lower --lr, "
                "warm up longer, use --bf16, or --init-type adaptive for a deep Post-LN model"
            )

    def state_dict(self) -> dict[str, float]:
        """Everything that ``load_state_dict`` needs to go on as if never stopped."""
        return {key: getattr(self, key) for key in ("scale", *self._counters)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from ``state_dict()``'s result, or from the scale alone, which is all that fairseq keeps."""
        self.scale = float(state["scale"])
        for key in self._counters:
            setattr(self, key, int(state.get(key, getattr(self, key))))

    _counters = ("_updates", "_overflows", "_last_overflow", "_last_change")


def make_loss_scaler(cfg: TrainLogConfig, micro_batches: int) -> DynamicLossScaler:
    """The scaler that the flags ask for. micro_batches: an update's, those of all processes."""
    window = cfg.fp16_scale_window or max(1, 2**14 // micro_batches)
    return DynamicLossScaler(
        cfg.fp16_init_scale, window, cfg.fp16_scale_tolerance, cfg.min_loss_scale, cfg.threshold_loss_scale
    )
