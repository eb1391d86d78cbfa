"""The choices of a search, step by step, and the outputs that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq.options import GenerationConfig
from fairseq.utils.symbols import EOS


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


@dataclass
class Past:
    """What rows have behind them: tokens and sums of scores, each (rows, steps), ending in the last step.

    first: of each row, the step of its first token.
    """

    tokens: np.ndarray
    sums: np.ndarray
    first: np.ndarray

    @staticmethod
    def merge(pasts: Sequence[Past]) -> Past:
        """Of all their rows, with their last steps aligned."""
        steps = max(past.tokens.shape[1] for past in pasts)

        def align(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, 0), (steps - x.shape[1], 0)))

        return Past(
            np.concatenate([align(past.tokens) for past in pasts]),
            np.concatenate([align(past.sums) for past in pasts]),
            np.concatenate([past.first + steps - past.tokens.shape[1] for past in pasts]),
        )


class History:
    """Of a batch. Tensors stay on their device until the outputs are wanted. Scores are logarithms to base 2."""

    def __init__(
        self, cfg: GenerationConfig, padding: Mapping[int, Tensor] | None = None, past: Past | None = None
    ) -> None:
        """padding: bool (src_len,) by the sentences' numbers, for attention alone. past: what the first step's rows go
        on from.
        """
        self.cfg = cfg
        self.padding = padding
        self.past = past
        self._ended: list[tuple[list[int], Tensor, Tensor, Tensor]] = []
        self._went_on: list[tuple[Tensor, Tensor, Tensor]] = []
        self._attention: list[Tensor] = []

    def end(self, sentences: list[int], ends: Tensor, scores: Tensor, rows: Tensor, attn: Tensor | None) -> None:
        """First of each step: hypotheses that end, where ``ends`` is True.

        sentences: their numbers; ends, scores, rows: (sentences, beam), rows being those of the model's batch that they
        end. attn: (rows, src_len), the step's attention, or None.
        """
        self._ended.append((sentences, ends, scores, rows))
        if attn is not None:
            self._attention.append(attn)

    def go_on(self, scores: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Then: with what the next step's rows go on, each (sentences, beam); rows as in ``end``."""
        self._went_on.append((scores, tokens, rows))

    def hypotheses(self, live: int = 0) -> tuple[list[tuple[int, Hypothesis]], Past]:
        """All that ended, in their order, each with its sentence's number; and what lies behind ``live`` rows, which
        are those of the step to come.
        """
        steps, more = len(self._ended), len(self._went_on)
        places = [ends.nonzero() for ends in _on_cpu([ends for _, ends, _, _ in self._ended])]
        scores = _on_cpu([scores for _, _, scores, _ in self._ended] + [scores for scores, _, _ in self._went_on])
        ids = [rows for _, _, _, rows in self._ended] + [tokens for _, tokens, _ in self._went_on]
        numbers = _on_cpu(ids + [rows for _, _, rows in self._went_on])
        ends_at = np.repeat(np.arange(1, steps + 1), [len(columns) for _, columns in places])[::-1]
        total = live + len(ends_at)
        tokens = np.full((total, steps), EOS)
        sums = np.zeros((total, steps), np.float32)
        attention = [torch.from_numpy(x) for x in _on_cpu([x.float() for x in self._attention])]
        attn = torch.zeros(total, attention[0].size(1), steps) if attention else None
        owners: list[int] = []
        rows: np.ndarray = np.arange(live)
        # Backwards, hypotheses in the order in which they are met; a step's in reverse.
        for step in reversed(range(steps)):
            count = len(rows)
            if count:
                tokens[:count, step] = numbers[steps + step].ravel()[rows]
                sums[:count, step] = scores[steps + step].ravel()[rows]
                rows = numbers[steps + more + step].ravel()[rows]
            sentences, (i, j) = self._ended[step][0], places[step]
            i, j = i[::-1], j[::-1]
            owners += [sentences[k] for k in i]
            sums[count : live + len(owners), step] = scores[step][i, j]
            rows = np.concatenate([rows, numbers[step][i, j]])
            if attn is not None:
                attn[: len(rows), :, step] = attention[step][torch.from_numpy(rows)]
        first = np.zeros(total, np.int64)
        if self.past is not None:
            tokens = np.concatenate([self.past.tokens[rows], tokens], axis=1)
            sums = np.concatenate([self.past.sums[rows], sums], axis=1)
            first = self.past.first[rows]
            ends_at = ends_at + self.past.tokens.shape[1]
        past = Past(tokens[:live], sums[:live], first[:live])
        positional = torch.from_numpy(np.diff(sums[live:], prepend=np.float32(0)) * np.float32(math.log(2)))
        results = []
        for k in reversed(range(len(owners))):
            start, end = int(first[live + k]), int(ends_at[k])
            score = float(sums[live + k, end - 1]) * math.log(2)
            if not self.cfg.unnormalized:
                score /= (end - start) ** self.cfg.lenpen
            found = None
            if attn is not None and self.padding is not None:
                found = attn[live + k, ~self.padding[owners[k]], :end]
            words = torch.from_numpy(tokens[live + k, start:end])
            results.append((owners[k], Hypothesis(words, score, positional[k, start:end], found)))
        return results, past


def _on_cpu(parts: Sequence[Tensor]) -> list[np.ndarray]:
    """Each of these, of one dtype and alike but in their first dimension; by one copy, for which the host waits."""
    ends = np.cumsum([len(part) for part in parts])
    return np.split(torch.cat(list(parts)).cpu().numpy(), ends[:-1]) if parts else []
