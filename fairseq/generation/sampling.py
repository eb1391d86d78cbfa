"""Sampling in place of search: each of a sentence's ``beam`` rows is one independent sample.

The random numbers of a sentence come from the seed and its id alone, so samples do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sentence_noise(seed: int, ids: Sequence[int], steps: int, beam: int) -> Tensor:
    """Uniform numbers in [0, 1): (sentences, steps, beam), float64. More ``steps`` extend a sentence's numbers."""
    rows = [np.random.Generator(np.random.Philox(key=[seed % 2**64, i % 2**64])).random((steps, beam)) for i in ids]
    return torch.from_numpy(np.stack(rows))


def truncate(sorted_probs: Tensor, topk: int, topp: float) -> Tensor:
    """Zero all but the ``topk`` likeliest tokens (if > 0), and of these all after the sum passes ``topp`` (if > 0).

    sorted_probs: (..., vocab), descending. The token with which the sum reaches ``topp`` is kept.
    """
    if topk > 0:
        sorted_probs = sorted_probs[..., :topk]
    if topp > 0:
        before = sorted_probs.cumsum(-1) - sorted_probs
        before[..., 0] = 0  # the likeliest is always kept
        sorted_probs = sorted_probs.masked_fill(before >= topp, 0)
    return sorted_probs


def sample(lprobs: Tensor, noise: Tensor, topk: int, topp: float) -> Tensor:
    """One random token a row, by inverting the cumulative distribution.

    lprobs: (..., vocab); noise: (...), uniform in [0, 1) -> int64 (...). topk, topp: as ``truncate``'s.
    """
    order = None
    if topk > 0:
        lprobs, order = lprobs.topk(min(topk, lprobs.size(-1)), dim=-1)
    elif topp > 0:
        lprobs, order = lprobs.sort(dim=-1, descending=True)
    cumulative = truncate(lprobs.exp(), topk, topp).double().cumsum(-1)
    threshold = (noise * cumulative[..., -1])[..., None]
    # the first token whose cumulative probability exceeds the threshold: never one of probability 0
    index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.size(-1) - 1)
    return (index if order is None else order.gather(-1, index)).squeeze(-1)
