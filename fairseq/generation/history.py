"""The choices of a search, step by step, and the outputs that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq.generation.constraints import EOS, PAD
from fairseq.options import GenerationConfig


@dataclass
class Hypothesis:
    """One output.

    tokens: int64 (length,), ``</s>`` included. score: natural logarithm, sum / length ** lenpen (or the plain sum).
    positional_scores: float32 (length,), log-probability of each token. attention: (src_len, length) over the source's
    real tokens, averaged over heads (and models), or None. All on the CPU.
    """

    tokens: Tensor
    score: float
    positional_scores: Tensor
    attention: Tensor | None = None


class History:
    """Of a batch. Tensors stay on their device until the outputs are wanted. Scores are logarithms to base 2."""

    def __init__(self, src_tokens: Tensor, cfg: GenerationConfig) -> None:
        self.src_tokens = src_tokens
        self.cfg = cfg
        self._ended: list[tuple[list[int], Tensor, Tensor, Tensor]] = []
        self._went_on: list[tuple[Tensor, Tensor, Tensor]] = []
        self._attention: list[Tensor] = []

    def end(self, sentences: list[int], ends: Tensor, scores: Tensor, rows: Tensor, attn: Tensor | None) -> None:
        """First of each step: hypotheses that end, where ``ends`` is True.

        sentences: the batch's, by their numbers in the first; ends, scores, rows: (sentences, beam), rows being those
        of the model's batch that they end. attn: (rows, src_len), the step's attention, or None.
        """
        self._ended.append((sentences, ends, scores, rows))
        if attn is not None:
            self._attention.append(attn)

    def go_on(self, scores: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Then: with what the next step's rows go on, each (sentences, beam); rows as in ``end``."""
        self._went_on.append((scores, tokens, rows))

    def hypotheses(self) -> list[list[Hypothesis]]:
        """Of each sentence of the first batch, best first."""
        ended = [(n, e.cpu().numpy(), s.cpu().numpy(), r.cpu().numpy()) for n, e, s, r in self._ended]
        places = [ends.nonzero() for _, ends, _, _ in ended]
        lengths = np.repeat(np.arange(1, len(ended) + 1), [len(columns) for _, columns in places])[::-1]
        total = len(lengths)
        tokens = np.full((total, len(ended)), EOS)
        sums = np.zeros((total, len(ended)), np.float32)
        attention = [x.cpu().float() for x in self._attention]
        attn = torch.zeros(total, self.src_tokens.size(1), len(ended)) if attention else None
        owners: list[int] = []
        rows: np.ndarray = np.zeros(0, np.int64)
        # Backwards, hypotheses in the order in which they are met; a step's in reverse.
        for step in reversed(range(len(ended))):
            count = len(rows)
            if count:
                scores, words, before = (x.flatten().cpu().numpy() for x in self._went_on[step])
                tokens[:count, step], sums[:count, step] = words[rows], scores[rows]
                rows = before[rows]
            (sentences, _, scores, before), (i, j) = ended[step], places[step]
            i, j = i[::-1], j[::-1]
            owners += [sentences[k] for k in i]
            sums[count : len(owners), step] = scores[i, j]
            rows = np.concatenate([rows, before[i, j]])
            if attn is not None:
                attn[: len(rows), :, step] = attention[step][torch.from_numpy(rows)]
        results: list[list[Hypothesis]] = [[] for _ in range(self.src_tokens.size(0))]
        padding = self.src_tokens.eq(PAD).cpu()
        positional = torch.from_numpy(np.diff(sums, prepend=np.float32(0)) * np.float32(math.log(2)))
        for k in reversed(range(total)):
            length = int(lengths[k])
            score = float(sums[k, length - 1]) * math.log(2)
            if not self.cfg.unnormalized:
                score /= length**self.cfg.lenpen
            found = None if attn is None else attn[k, ~padding[owners[k]], :length]
            results[owners[k]].append(
                Hypothesis(torch.from_numpy(tokens[k, :length]), score, positional[k, :length], found)
            )
        return [sorted(hypotheses, key=lambda h: h.score, reverse=True) for hypotheses in results]
