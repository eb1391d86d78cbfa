"""Cross entropy with and without label smoothing, from logits or, without ever making all of them, from features.

A registered factory is ``(config, padding_idx) -> criterion`` and a criterion ``(logits, target) -> (loss_sum,
nll_sum)``. One that also has ``from_features``, as `SmoothedCrossEntropy`, is given the decoder's features and the
projection's weight instead, and decides how many logits exist at a time.

The softmax is computed in float32, a slice of the batch at a time, and what the backward pass needs of it right after
the forward pass, while it is in the cache: the loss is a scalar, so that its gradient is known but for a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.registry import CRITERIONS
from fairseq.utils.flags import flag
from fairseq.utils.parts import part_size

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SLICE_ELEMENTS = 2**22  # logits in a slice: 16 MiB in float32
SLICE_ELEMENTS_GPU = 2**25  # a slice is 30 kernels to launch, and products of few rows leave most of a GPU idle


@dataclass
class LabelSmoothedCrossEntropyConfig:
    """Flags of label_smoothed_cross_entropy."""

    label_smoothing: float = flag(
        0.0, "weight of the uniform distribution, the target in it, in what is learned (0: none)"
    )


@CRITERIONS.register("cross_entropy")
def cross_entropy(config: None, padding_idx: int) -> Criterion:
    """Negative log-likelihood of the target; loss and nll are the same."""
    return SmoothedCrossEntropy(0.0, padding_idx)


@CRITERIONS.register("label_smoothed_cross_entropy", config=LabelSmoothedCrossEntropyConfig)
def label_smoothed_cross_entropy(config: LabelSmoothedCrossEntropyConfig, padding_idx: int) -> Criterion:
    """Cross entropy with label smoothing. Raises FairseqError unless 0 <= label_smoothing < 1."""
    epsilon = config.label_smoothing
    if not 0 <= epsilon < 1:
        raise FairseqError(f"--label-smoothing {epsilon}: must be at least 0 and below 1")
    return SmoothedCrossEntropy(epsilon, padding_idx)


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """The criterion of both names; see `smoothed_nll` and `smoothed_nll_of_features`."""

    epsilon: float
    padding_idx: int

    def __call__(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """logits: (batch, time, vocab); target: (batch, time) -> loss, nll."""
        return smoothed_nll(logits, target, self.epsilon, self.padding_idx)

    def from_features(
        self, features: Tensor, weight: Tensor, target: Tensor, grad_scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The same of the logits ``features @ weight.T``; see `smoothed_nll_of_features`."""
        return smoothed_nll_of_features(features, weight, target, self.epsilon, self.padding_idx, grad_scale)


def smoothed_nll(logits: Tensor, target: Tensor, epsilon: float, padding_idx: int) -> tuple[Tensor, Tensor]:
    """Summed losses over the target tokens that are not padding, in nats.

    logits: (batch, time, vocab); target: (batch, time) -> two scalars of at least float32: loss, which is
    differentiable (once), and nll, which is not. A token's nll is -log p(target), its loss
    ``(1 - epsilon) * nll + epsilon / vocab * sum_v -log p(v)`` (Szegedy et al. 2016, section 7; fairseq to 0.10).
    """
    loss, nll = _LossOfLogits.apply(logits.flatten(0, -2), target.flatten(), epsilon, padding_idx)
    return loss, nll


def smoothed_nll_of_features(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    epsilon: float,
    padding_idx: int,
    grad_scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`smoothed_nll` of the logits ``features @ weight.T``, which never exist but for a slice of the tokens.

    features: (batch, time, dim); weight: (vocab, dim); target: (batch, time). Under autocast the products are of its
    precision, as a linear layer's. grad_scale: the gradient that loss will be given by the backward pass, a number or a
    scalar on the device; another is as right, but in float16 small gradients are lost.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    features, target = features.flatten(0, -2), target.flatten()
    if device == "cpu":  # a GPU would have to wait for the number of rows
        features, target = without_padding(features, target, padding_idx)
    with torch.autocast(device, enabled=False):
        loss, nll = _LossOfFeatures.apply(features.to(dtype), weight, target, epsilon, padding_idx, grad_scale)
    return loss, nll


def without_padding(features: Tensor, target: Tensor, padding_idx: int) -> tuple[Tensor, Tensor]:
    """The rows of features (tokens, dim) and target (tokens,) that have a target."""
    rows = target.ne(padding_idx).nonzero().squeeze(-1)
    return features.index_select(0, rows), target.index_select(0, rows)


class _LossOfLogits(torch.autograd.Function):
    """logits: (tokens, vocab), target: (tokens,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, epsilon: float, padding_idx: int) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        ctx.grad = torch.empty_like(logits) if wants_grad else None
        sums = _Sums(logits, epsilon, padding_idx)
        for part in _slices(logits, logits.size(1)):
            grad = sums.add(logits[part], target[part], 1.0 if wants_grad else None)
            if grad is not None:
                ctx.grad[part] = grad
        ctx.mark_non_differentiable(sums.nll)
        return sums.loss, sums.nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _nll_grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.grad * loss_grad.to(ctx.grad.dtype), None, None, None


class _LossOfFeatures(torch.autograd.Function):
    """features: (tokens, dim), weight: (vocab, dim), target: (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        epsilon: float,
        padding_idx: int,
        grad_scale: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = any(ctx.needs_input_grad)
        features_grad, weight_grad = None, None
        if wants_grad:
            features_grad, weight_grad = torch.empty_like(features), torch.zeros_like(weight)
        matrix = weight.to(features.dtype)
        sums = _Sums(features, epsilon, padding_idx)
        for part in _slices(features, len(weight)):
            grad = sums.add(features[part] @ matrix.T, target[part], grad_scale if wants_grad else None)
            if features_grad is None or weight_grad is None or grad is None:
                continue
            grad = grad.to(features.dtype)
            features_grad[part] = grad @ matrix
            if weight_grad.dtype == grad.dtype:
                weight_grad.addmm_(grad.T, features[part])
            else:
                weight_grad += grad.T @ features[part]
        ctx.grads, ctx.grad_scale = (features_grad, weight_grad), grad_scale
        ctx.mark_non_differentiable(sums.nll)
        return sums.loss, sums.nll

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _nll_grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        factor = loss_grad / ctx.grad_scale
        features_grad, weight_grad = (grad * factor.to(grad.dtype) for grad in ctx.grads)
        return features_grad, weight_grad, None, None, None, None


class _Sums:
    """Losses of at least float32, added up slice by slice."""

    def __init__(self, like: Tensor, epsilon: float, padding_idx: int) -> None:
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.loss = torch.zeros((), dtype=self.dtype, device=like.device)
        self.nll = torch.zeros_like(self.loss)
        self.epsilon, self.padding_idx = epsilon, padding_idx

    def add(self, logits: Tensor, target: Tensor, grad_scale: Tensor | float | None) -> Tensor | None:
        """Add a slice's losses; returns the loss's gradient by the logits, times ``grad_scale`` unless that is None.

        logits: (tokens, vocab); target: (tokens,).
        """
        logits = logits.to(self.dtype)
        target = target[:, None]
        keep = target != self.padding_idx
        highest, likeliest = logits.max(-1, keepdim=True)
        probabilities = torch.softmax(logits, dim=-1)
        # the likeliest token's probability is at least 1 / vocab: its logarithm is exact
        normalizer = highest - probabilities.gather(-1, likeliest).log()
        nll = (normalizer - logits.gather(-1, target)).masked_fill(~keep, 0).sum()
        self.nll += nll
        self.loss += (1 - self.epsilon) * nll
        if self.epsilon:
            uniform = normalizer - logits.mean(-1, keepdim=True)
            self.loss += self.epsilon * uniform.masked_fill(~keep, 0).sum()
        if grad_scale is None:
            return None
        # d loss / d logit = softmax - epsilon / vocab - (1 - epsilon) at the target
        grad = probabilities
        if self.epsilon:
            grad -= self.epsilon / logits.shape[-1]
        grad.scatter_add_(-1, target, (self.epsilon - 1) * torch.ones_like(target, dtype=self.dtype))
        return grad.mul_(keep * grad_scale)


def _slices(rows: Tensor, vocab: int) -> Iterator[slice]:
    """Of ``rows`` in parts of like size, each with about so many logits."""
    step = part_size(len(rows), (SLICE_ELEMENTS if rows.device.type == "cpu" else SLICE_ELEMENTS_GPU) // vocab)
    return (slice(start, start + step) for start in range(0, len(rows), step))
