"""Measuring omega: one forward pass, hooks on the residuals, nothing left behind in the model.

``omega`` of a sub-layer is the standard deviation accumulated before it (Liu et al. 2020):

    omega_1 = 1,    omega_{i+1}^2 = Var(omega_i * x_{i-1}) + Var(f_i(x_{i-1}))

Var is the population variance over all elements of the tensor, padding included, dropout of the branch applied. Of a
variant of Admin, f_i stands for whatever its rule adds to ``omega_i * x_{i-1}`` before its LayerNorm. Each omega takes
effect before the next sub-layer is measured, since it changes what that sub-layer sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.admin.omega import OmegaProfile, admin_residuals
from fairseq.admin.residual import AdminResidual
from fairseq.errors import FairseqError


class _StackProfiler:
    """Hooks on one stack; ``omegas`` fills up while a forward pass runs through it."""

    def __init__(self, residuals: list[AdminResidual]) -> None:
        self.omegas: list[float] = []
        self._next_omega: float | None = 1.0
        self._shortcut = torch.empty(0)
        self._handles = []
        for residual in residuals:
            self._handles.append(residual.register_forward_pre_hook(self._before))
            self._handles.append(residual.norm.register_forward_pre_hook(self._before_norm))

    def _before(self, residual: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(residual, AdminResidual)
        if self._next_omega is None:
            raise FairseqError(
                f"{type(residual).__name__} cannot be profiled: it has not called self.norm; end its forward with "
                "self.norm(self.omega * x + ...), or give the class measured = False"
            )
        residual.omega.fill_(self._next_omega)
        self.omegas.append(self._next_omega)
        self._shortcut, self._next_omega = residual.omega * inputs[0], None

    def _before_norm(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        branch = inputs[0] - self._shortcut
        self._next_omega = math.sqrt(_variance(self._shortcut) + _variance(branch))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _variance(x: Tensor) -> float:
    return torch.var(x.float(), correction=0).item()


Batch = Mapping[str, Any]


def profile(model: nn.Module, batches: Batch | Sequence[Batch], deterministic: bool = False) -> OmegaProfile:
    """Run a batch through ``model`` (of an init type with omega) and return every sub-layer's omega.

    batches: src_tokens (batch, src_len), src_lengths (batch,), prev_output_tokens (batch, tgt_len); of several, each is
    profiled by itself and the variances accumulated before a sub-layer, omega^2, are averaged. Training mode, dropout
    on, unless ``deterministic``; float32 whatever autocast says. No autograd graph: one layer's activations at a time.
    Parameters and mode are left as they were; the random number generator is not. Raises FairseqError for a model
    without omega.
    """
    several = [batches] if isinstance(batches, Mapping) else batches
    runs = [_profile_batch(model, batch, deterministic) for batch in several]
    if len(runs) == 1:
        return runs[0]
    return OmegaProfile(_root_mean_square(run.encoder for run in runs), _root_mean_square(run.decoder for run in runs))


def _root_mean_square(runs: Iterable[list[float]]) -> list[float]:
    return [math.sqrt(sum(value * value for value in values) / len(values)) for values in zip(*runs, strict=True)]


@torch.no_grad()
def _profile_batch(model: nn.Module, batch: Batch, deterministic: bool) -> OmegaProfile:
    stacks: list[list[AdminResidual]] = [admin_residuals(model.encoder), admin_residuals(model.decoder)]  # type: ignore[arg-type]
    if not all(stacks):
        raise FairseqError("this model has no omega to profile; build it with --init-type adaptive-profiling")
    saved = [residual.omega.clone() for stack in stacks for residual in stack]
    was_training = model.training
    profilers = [_StackProfiler(stack) for stack in stacks]
    device_type = next(model.parameters()).device.type
    try:
        model.train(not deterministic)
        with torch.autocast(device_type, enabled=False):
            # without the projection to the vocabulary, whose logits would be the largest tensor by far
            model.decoder(batch["prev_output_tokens"], model.encoder(batch["src_tokens"]))  # type: ignore[operator]
    finally:
        for profiler in profilers:
            profiler.remove()
        for residual, omega in zip((r for stack in stacks for r in stack), saved, strict=True):
            residual.omega.copy_(omega)
        model.train(was_training)
    return OmegaProfile(profilers[0].omegas, profilers[1].omegas)
