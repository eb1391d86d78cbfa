"""Cross entropy with and without label smoothing, for logits of any precision.

A registered factory is ``(config, padding_idx) -> criterion`` and a criterion ``(logits, target) -> (loss_sum,
nll_sum)``. The softmax is computed in float32, a slice of the batch at a time, forwards and again backwards: neither
logits nor log-probabilities exist in float32 for the whole batch, and on the CPU a slice stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.registry import CRITERIONS
from fairseq.utils.flags import flag

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
SLICE_ELEMENTS = 2**22  # logits in a slice: 16 MiB in float32


@dataclass
class LabelSmoothedCrossEntropyConfig:
    """Flags of label_smoothed_cross_entropy."""

    label_smoothing: float = flag(0.0, "weight of the uniform distribution in the target (0: none)")


@CRITERIONS.register("cross_entropy")
def cross_entropy(config: None, padding_idx: int) -> Criterion:
    """Negative log-likelihood of the target; loss and nll are the same."""
    return lambda logits, target: smoothed_nll(logits, target, 0.0, padding_idx)


@CRITERIONS.register("label_smoothed_cross_entropy", config=LabelSmoothedCrossEntropyConfig)
def label_smoothed_cross_entropy(config: LabelSmoothedCrossEntropyConfig, padding_idx: int) -> Criterion:
    """Cross entropy with label smoothing, see `smoothed_nll`. Raises FairseqError unless 0 <= label_smoothing < 1."""
    epsilon = config.label_smoothing
    if not 0 <= epsilon < 1:
        raise FairseqError(f"--label-smoothing {epsilon}: must be at least 0 and below 1")
    return lambda logits, target: smoothed_nll(logits, target, epsilon, padding_idx)


def smoothed_nll(logits: Tensor, target: Tensor, epsilon: float, padding_idx: int) -> tuple[Tensor, Tensor]:
    """Summed losses over the target tokens that are not padding, in nats.

    logits: (batch, time, vocab); target: (batch, time) -> two float32 scalars: loss, which is differentiable, and nll,
    which is not. A token's nll is -log p(target), its loss
    ``(1 - epsilon) * nll + epsilon / vocab * sum_v -log p(v)`` (Szegedy et al. 2016, section 7; fairseq to 0.10).
    """
    loss, nll = _SmoothedNll.apply(logits.flatten(0, -2), target.flatten(), epsilon, padding_idx)
    return loss, nll


class _SmoothedNll(torch.autograd.Function):
    """logits: (tokens, vocab), target: (tokens,). Keeps the logits and one number a token for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, epsilon: float, padding_idx: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # For each token: log of the softmax's denominator, nll, mean over the vocabulary of -log p.
        normalizer, nll, uniform = torch.empty(3, len(target), dtype=dtype, device=logits.device)
        for part in _slices(logits):
            log_probs = F.log_softmax(logits[part], dim=-1, dtype=dtype)
            normalizer[part] = logits[part, 0].to(dtype) - log_probs[:, 0]
            nll[part] = -log_probs.gather(-1, target[part, None])[:, 0]
            if epsilon:
                uniform[part] = -log_probs.mean(-1)
        padding = target == padding_idx
        nll_sum = nll.masked_fill_(padding, 0).sum()
        loss_sum = nll_sum.clone()
        if epsilon:
            loss_sum = (1 - epsilon) * nll_sum + epsilon * uniform.masked_fill_(padding, 0).sum()
        ctx.save_for_backward(logits, target, normalizer, padding)
        ctx.epsilon = epsilon
        ctx.mark_non_differentiable(nll_sum)
        return loss_sum, nll_sum

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _nll_grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target, normalizer, padding = ctx.saved_tensors
        grad = torch.empty_like(logits)
        weight = loss_grad * ~padding
        for part in _slices(logits):
            # d loss / d logit = softmax - epsilon / vocab - (1 - epsilon) at the target
            row = (logits[part].to(normalizer.dtype) - normalizer[part, None]).exp_()
            row -= ctx.epsilon / logits.shape[-1]
            row.scatter_add_(-1, target[part, None], row.new_full((len(row), 1), ctx.epsilon - 1))
            grad[part] = row.mul_(weight[part, None])
        return grad, None, None, None


def _slices(logits: Tensor) -> list[slice]:
    rows = max(1, SLICE_ELEMENTS // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
