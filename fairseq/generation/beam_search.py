"""Batched beam search and sampling with incremental decoding, by fairseq's rules.

A step scores every continuation of every hypothesis, takes a sentence's best 2 * beam, finishes those among the best
beam that end in ``</s>``, and goes on with the best beam of the rest. A sentence is done, and leaves the batch, with
beam finished hypotheses or at its longest output. Rows are sentences x beam, a sentence's hypotheses adjacent, and
sentences alone in the first step; a row that stands for nothing (samples that have ended) has the score -inf.

What makes it fast: see docs/performance.md. Hypotheses are not kept; each step's choices are, and at the end the
outputs are read from them backwards. ``search`` goes through batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fairseq.generation.candidates import (
    LOG2_E,
    average_probabilities,
    best_candidates,
    choose,
    log2_sum_exp2,
    sampled_candidates,
)
from fairseq.generation.constraints import constrain, output_lengths
from fairseq.generation.history import History, Hypothesis, Past
from fairseq.generation.sampling import sentence_noise
from fairseq.models.transformer import Transformer
from fairseq.modules.decoder_cache import DecoderCache
from fairseq.options import GenerationConfig
from fairseq.utils.parts import part_size
from fairseq.utils.symbols import EOS, PAD

if TYPE_CHECKING:
    from fairseq.generation.capture import SearchGraphs

CHUNK = 2**23  # logits at a time on a CPU: a wide beam takes no more memory
CHUNK_GPU = 2**28
CHECK_EVERY = 4  # steps, on a GPU: that often the host waits for it, to drop the sentences that are done


class _Ensemble:
    """The decoding state of one or more models, stepped together; their probabilities are averaged."""

    def __init__(self, models: Sequence[Transformer], src_tokens: Tensor, cfg: GenerationConfig, attn: bool) -> None:
        self.models = models
        self.need_attn = attn
        self.scale = LOG2_E / cfg.temperature
        self.caches = [model.decoder.new_cache(model.encoder(src_tokens)) for model in models]

    def step(self, tokens: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """tokens: (rows,), the last ones -> features (rows, dim) of each model, attention (rows, src_len) if needed."""
        steps = [m.decoder.step(tokens, c, self.need_attn) for m, c in zip(self.models, self.caches, strict=True)]
        attention = [attn for _, attn in steps if attn is not None]
        return [x for x, _ in steps], torch.stack(attention).mean(0) if attention else None

    def lprobs(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities to base 2 are the sum of both: (rows, vocab) and (rows, 1)."""
        found = [self._lprobs(model, x) for model, x in zip(self.models, features, strict=True)]
        if len(found) == 1:
            return found[0]
        natural = average_probabilities([(logits + offset) / LOG2_E for logits, offset in found])
        return natural * LOG2_E, natural.new_zeros(natural.size(0), 1)

    def _lprobs(self, model: Transformer, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float32:
            logits = model.decoder.output_projection(x * self.scale).float()  # of 16 bits under autocast
        else:
            logits = model.decoder.output_projection(x).float().mul_(self.scale)
        return logits, -log2_sum_exp2(logits)

    @staticmethod
    def merge(ensembles: Sequence[_Ensemble]) -> _Ensemble:
        merged = copy.copy(ensembles[0])
        caches = zip(*(ensemble.caches for ensemble in ensembles), strict=True)
        merged.caches = [DecoderCache.merge(of_model) for of_model in caches]
        return merged

    def select(self, rows: Tensor | None, sentences: list[int] | None) -> None:
        for cache in self.caches:
            cache.select(rows, sentences)


def check_interval(device: torch.device) -> int:
    """Steps from one look at which sentences are done, for which the host waits, to the next."""
    return 1 if device.type == "cpu" else CHECK_EVERY


@dataclass
class Sources:
    """A batch to translate.

    src_tokens: (sentences, src_len), padded on either side. ids: with the seed they set the random numbers of
    ``--sampling`` (None: 0, 1, ...). prefix_tokens: (sentences, prefix_len), padded on the right, begins the outputs;
    an ``</s>`` in it ends them.
    """

    src_tokens: Tensor
    ids: Sequence[int] | None = None
    prefix_tokens: Tensor | None = None


class SearchBatch:
    """The sentences still being translated. ``sentences``: their numbers. ``step``: of the sentence that has most."""

    def __init__(
        self,
        models: Sequence[Transformer],
        sources: Sources,
        cfg: GenerationConfig,
        sentences: list[int],
        seed: int,
        need_attn: bool,
    ) -> None:
        src_tokens = sources.src_tokens
        self.cfg = cfg
        self.device = src_tokens.device
        self.prefix_tokens = sources.prefix_tokens
        src_lengths = src_tokens.ne(PAD).sum(1).tolist()
        limit = min(model.cfg.max_target_positions for model in models) - 1
        shortest, longest = output_lengths(cfg, src_lengths, limit)
        self.sentences = sentences
        self.step, self.steps = 0, max(longest, default=-1) + 1
        self.no_end_before, self.no_limit_before = max(shortest, default=0), min(longest, default=0)
        self.shortest, self.longest = self.index(shortest), self.index(longest)
        self.counts = torch.zeros_like(self.longest)  # finished hypotheses
        self.ensemble = _Ensemble(models, src_tokens, cfg, need_attn)
        self.tokens = torch.full((len(sentences), 1), EOS, device=self.device)  # the last, or with n-grams all
        self.scores = torch.zeros(len(sentences), 1, device=self.device)
        self.noise: Tensor | None = None
        if cfg.sampling:
            ids = range(len(sentences)) if sources.ids is None else sources.ids
            self.noise = sentence_noise(seed, ids, self.steps, cfg.beam).to(self.device)
        self.past: Past | None = None  # after ``run``, where sentences are left
        padding = dict(zip(sentences, src_tokens.eq(PAD).cpu(), strict=True)) if need_attn else None
        self.history = History(cfg, padding)
        self.can_wait = not (cfg.sampling or cfg.no_repeat_ngram_size or need_attn)  # what has more state does not
        self.src_len = src_tokens.size(1)
        self.places = 0  # of sentences, in the buffers of ``SearchGraphs`` that it was in; 0: in none yet

    @staticmethod
    def merge(batches: Sequence[SearchBatch]) -> SearchBatch:
        """Of all their sentences, which go on where they were; steps are counted as by the one that has most."""
        merged = copy.copy(batches[0])
        merged.step = max(batch.step for batch in batches)
        behind = [merged.step - batch.step for batch in batches]
        pairs = list(zip(batches, behind, strict=True))
        merged.steps = max(batch.steps + b for batch, b in pairs)
        merged.no_end_before = max(batch.no_end_before + b for batch, b in pairs)
        merged.no_limit_before = min(batch.no_limit_before + b for batch, b in pairs)
        merged.shortest = torch.cat([batch.shortest + b for batch, b in pairs])
        merged.longest = torch.cat([batch.longest + b for batch, b in pairs])
        merged.counts, merged.tokens, merged.scores = (
            torch.cat([getattr(batch, name) for batch in batches]) for name in ("counts", "tokens", "scores")
        )
        merged.sentences = [sentence for batch in batches for sentence in batch.sentences]
        merged.ensemble = _Ensemble.merge([batch.ensemble for batch in batches])
        merged.history = History(
            merged.cfg, past=Past.merge([batch.past for batch in batches if batch.past is not None])
        )
        merged.prefix_tokens = None
        merged.src_len = max(batch.src_len for batch in batches)
        merged.places = 0
        return merged

    def run(
        self, until: int, check: Callable[[], None], graphs: SearchGraphs | None = None
    ) -> list[tuple[int, Hypothesis]]:
        """Go on until at most so many sentences are left, where they ``can_wait``; returns what has ended.

        graphs: do the steps that they can.
        """
        every = check_interval(self.device)
        prefix_len = 0 if self.prefix_tokens is None else self.prefix_tokens.size(1)
        while self.sentences and self.step < self.steps:
            if self.can_wait and self.step >= max(prefix_len, 1) and len(self.sentences) <= until:
                break
            if graphs is not None and graphs.run(self, until, check):
                continue
            if self.step % every == 0:
                check()
            scores, tokens, rows, attn = self.candidates(self.step)
            choice = choose(scores, tokens, rows, self.counts, self.cfg.beam)
            self.history.end(self.sentences, choice.ends, scores[:, : self.cfg.beam], rows[:, : self.cfg.beam], attn)
            keep = None
            if self.step % every == every - 1:
                # at its longest output a sentence has no live row: </s> was forced
                keep = still_going(self.counts, choice.scores)
            self.step += 1
            if keep == []:
                self.sentences = []
                break
            self.history.go_on(*self.go_on(keep, choice.scores, choice.tokens, choice.rows))
        if self.step >= self.steps:
            self.sentences = []
        ended, self.past = self.history.hypotheses(len(self.sentences) * self.cfg.beam)
        return ended

    def index(self, values: list[int]) -> Tensor:
        """One-dimensional, on the device, which the host does not wait for."""
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    def candidates(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scores, tokens and rows of the continuations to choose from, best first: (sentences, at least beam); and the
        attention that led to them, (rows, src_len) or None.
        """
        features, attn = self.ensemble.step(self.tokens[:, -1])
        vocab = self.ensemble.models[0].decoder.output_projection.out_features
        beam = self.scores.size(1)
        size = part_size(len(self.sentences), (CHUNK if self.device.type == "cpu" else CHUNK_GPU) // (beam * vocab))
        chunks = [self._candidates(step, i, i + size, features) for i in range(0, len(self.sentences), size)]
        several = len(chunks) > 1
        scores, tokens, beams = (torch.cat(parts) if several else parts[0] for parts in zip(*chunks, strict=True))
        first_rows = torch.arange(0, self.scores.numel(), beam, device=self.device)
        return scores, tokens, beams + first_rows[:, None], attn

    def _candidates(self, step: int, start: int, end: int, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, tokens and beams for sentences ``start`` to ``end``."""
        beam = self.scores.size(1)
        rows = slice(start * beam, end * beam)
        lprobs, offsets = self.ensemble.lprobs([x[rows] for x in features])
        lprobs, offsets = lprobs.unflatten(0, (-1, beam)), offsets.view(-1, beam)
        too_short = self.shortest[start:end] > step if step < self.no_end_before else None
        constrain(lprobs, self.tokens[rows], self.cfg, too_short, self._forced(step, start, end), LOG2_E)
        so_far = self.scores[start:end]
        if self.noise is None:
            return best_candidates(lprobs, offsets, so_far, 2 * self.cfg.beam)
        return sampled_candidates(lprobs, offsets, so_far, self.noise[start:end, step], self.cfg)

    def _forced(self, step: int, start: int, end: int) -> Tensor | None:
        """The token each sentence must have next, PAD for any: ``</s>`` at its longest output, else its prefix's."""
        prefix = self.prefix_tokens
        if prefix is not None and step < prefix.size(1):
            forced = prefix[start:end, step]
        elif step < self.no_limit_before:
            return None
        else:
            forced = self.longest.new_full((min(end, len(self.sentences)) - start,), PAD)
        return torch.where(self.longest[start:end] <= step, EOS, forced)

    def go_on(self, keep: list[int] | None, scores: Tensor, tokens: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Each row becomes ``rows`` with one more of ``tokens``; with ``keep``, of these sentences alone.

        scores, tokens, rows: (sentences, beam). Returns those that are kept.
        """
        if keep is not None:
            kept = self.index(keep)
            self.sentences = [self.sentences[i] for i in keep]
            scores, tokens, rows = scores[kept], tokens[kept], rows[kept]
            self.shortest, self.longest, self.counts = self.shortest[kept], self.longest[kept], self.counts[kept]
            self.prefix_tokens = None if self.prefix_tokens is None else self.prefix_tokens[kept]
            self.noise = None if self.noise is None else self.noise[kept]
        if self.cfg.no_repeat_ngram_size > 0:
            self.tokens = torch.cat([self.tokens[rows.flatten()], tokens.view(-1, 1)], dim=1)
        else:
            self.tokens = tokens.view(-1, 1)
        self.scores = scores
        stay = self.cfg.beam == 1 and keep is None
        self.ensemble.select(None if stay else rows.flatten(), keep)
        return scores, tokens, rows


def still_going(counts: Tensor, scores: Tensor) -> list[int] | None:
    """The sentences to go on with where some are done: the last of them take the others' places, so that most stay
    where they are. None when all go on.

    counts: (sentences,), hypotheses that have ended. scores: (sentences, beam), of those to go on with.
    """
    beam = scores.size(1)
    done = ((counts >= beam) | ~scores.isfinite().any(1)).tolist()
    going_on = [i for i, is_done in enumerate(done) if not is_done]
    if len(going_on) == len(done):
        return None
    last = [i for i in going_on if i >= len(going_on)]
    return [last.pop() if done[i] else i for i in range(len(going_on))]
