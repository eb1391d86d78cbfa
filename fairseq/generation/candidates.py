"""From the logits of a step to what it ends and what it goes on with: functions of tensors alone.

Scores are float32 logarithms to base 2, whatever the model computes in: exp2 costs half of exp on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.generation.constraints import NEVER
from fairseq.generation.sampling import sample
from fairseq.options import GenerationConfig
from fairseq.utils.symbols import EOS

GROUP_SIZE = 16
LOG2_E = math.log2(math.e)


def average_probabilities(lprobs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the models' mean probability, from their log-probabilities, all of one shape."""
    if len(lprobs) == 1:
        return lprobs[0]
    return torch.logsumexp(torch.stack(list(lprobs)), dim=0) - math.log(len(lprobs))


def log2_sum_exp2(x: Tensor) -> Tensor:
    """The logarithm of the sum of 2**x over the last dimension, all to base 2: (rows, n) -> (rows, 1)."""
    if x.device.type == "cpu":
        # Without the passes that guard against overflow, which trained models are far from; here it can be looked at.
        sums = torch.cat([part.exp2().sum(1, keepdim=True) for part in x.split(64)])
        if sums.numel() == 0 or (sums.max() < 2.0**120 and sums.min() > 2.0**-60):
            return sums.log2_()
    # not exp2, which torch compiles when a GPU first needs it
    return torch.logsumexp(x / LOG2_E, 1, keepdim=True) * LOG2_E


def best_candidates(lprobs: Tensor, offsets: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``count`` continuations of each sentence, best first.

    lprobs: (sentences, beam, vocab), to which offsets, (sentences, beam), are added; scores: (sentences, beam), summed
    so far. Returns scores, tokens and the beams they continue, each (sentences, count); where there are not as many,
    the last have the score -inf.
    """
    _, beam, vocab = lprobs.shape
    found = min(count, beam * vocab)
    # The best k are in the k groups with the largest maxima, and maxima are found much faster than the best k.
    size = math.gcd(vocab, GROUP_SIZE) if vocab > GROUP_SIZE else 1
    groups = vocab // size  # token t is in group t % groups
    maxima = lprobs.unflatten(2, (size, groups)).amax(2).add_((scores + offsets)[:, :, None])
    best = maxima.flatten(1).topk(min(found, beam * groups), dim=1).indices
    first = best // groups * vocab + best % groups
    index = (first[:, :, None] + torch.arange(0, vocab, groups, device=first.device)).flatten(1)
    beams = index // vocab
    totals = lprobs.flatten(1).gather(1, index) + offsets.gather(1, beams) + scores.gather(1, beams)
    totals, chosen = totals.topk(found, dim=1)
    index = index.gather(1, chosen)
    if found < count:
        missing = index.new_zeros(index.size(0), count - found)
        index = torch.cat([index, missing], dim=1)
        totals = torch.cat([totals, torch.full_like(missing, NEVER, dtype=totals.dtype)], dim=1)
    return totals, index % vocab, index // vocab


def sampled_candidates(
    lprobs: Tensor, offsets: Tensor, scores: Tensor, noise: Tensor, cfg: GenerationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``best_candidates``, but one random continuation of each beam: (sentences, beam). noise: same shape.

    lprobs, offsets and scores may be of one beam only: it is that of all.
    """
    beams = torch.arange(lprobs.size(1), device=lprobs.device).expand_as(noise)
    lprobs = (lprobs + offsets[:, :, None]).expand(-1, noise.size(1), -1)
    tokens = sample(lprobs / LOG2_E, noise, cfg.sampling_topk, cfg.sampling_topp)
    return scores + lprobs.gather(2, tokens[:, :, None]).squeeze(2), tokens, beams


@dataclass
class Choice:
    """What a step ends and what it goes on with, each (sentences, beam). ends: bool."""

    ends: Tensor
    scores: Tensor
    tokens: Tensor
    rows: Tensor


def choose(scores: Tensor, tokens: Tensor, rows: Tensor, counts: Tensor, beam: int) -> Choice:
    """Split the candidates, each (sentences, at least beam): those among the first ``beam`` that end, as long as there
    are not ``beam`` of the sentence, and the first ``beam`` of the rest. counts: (sentences,), ended so far; updated.
    """
    real = scores.isfinite()
    ends = tokens.eq(EOS) & real
    # the best beam that do not end, in order; where there are fewer, others fill up as rows that stand for nothing
    others = ends.byte().argsort(dim=1, stable=True)[:, :beam]
    other_scores = scores.masked_fill(ends | ~real, NEVER).gather(1, others)
    ends = ends[:, :beam]
    ends &= ends.cumsum(1) + counts[:, None] <= beam
    counts += ends.sum(1)
    return Choice(ends, other_scores, tokens.gather(1, others), rows.gather(1, others))
