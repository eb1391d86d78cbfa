"""Batched beam search and sampling with incremental decoding, by fairseq's rules.

A step scores every continuation of every hypothesis, takes a sentence's best 2 * beam, finishes those among the best
beam that end in ``</s>``, and goes on with the best beam of the rest. A sentence is done, and leaves the batch, with
beam finished hypotheses or at its longest output. Rows are sentences x beam, a sentence's hypotheses adjacent, and
sentences alone in the first step; a row that stands for nothing (samples that have ended) has the score -inf. The few
sentences of a batch that go on for long wait, and are then gone on with together.

What makes it fast: see docs/performance.md. Inside, scores are float32 logarithms to base 2, whatever the model
computes in: exp2 costs half of exp on a CPU. Hypotheses are not kept; each step's choices are, and at the end the
outputs are read from them backwards.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.generation.constraints import EOS, NEVER, PAD, check_generation_config, constrain, output_lengths
from fairseq.generation.history import History, Hypothesis, Past
from fairseq.generation.sampling import sample, sentence_noise
from fairseq.models.transformer import Transformer
from fairseq.modules.decoder_cache import DecoderCache
from fairseq.options import GenerationConfig

GROUP_SIZE = 16
CHUNK = 2**23  # logits at a time on a CPU: a wide beam takes no more memory
CHUNK_GPU = 2**28
CHECK_EVERY = 4  # steps, on a GPU: that often the host waits for it, to drop the sentences that are done
WAITING_SHARE = 4  # the last quarter of a batch's sentences wait
LOG2_E = math.log2(math.e)


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
            logits = model.decoder.output_projection(x * self.scale)
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
    largest = x.amax(1, keepdim=True)
    return (x - largest).exp2_().sum(1, keepdim=True).log2_() + largest


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
class Sources:
    """A batch to translate.

    src_tokens: (sentences, src_len), padded on either side. ids: with the seed they set the random numbers of
    ``--sampling`` (None: 0, 1, ...). prefix_tokens: (sentences, prefix_len), padded on the right, begins the outputs;
    an ``</s>`` in it ends them.
    """

    src_tokens: Tensor
    ids: Sequence[int] | None = None
    prefix_tokens: Tensor | None = None


class _Batch:
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

    @staticmethod
    def merge(batches: Sequence[_Batch]) -> _Batch:
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
        return merged

    def run(self, until: int, check: Callable[[], None]) -> list[tuple[int, Hypothesis]]:
        """Go on until at most so many sentences are left, where they ``can_wait``; returns what has ended."""
        every = check_interval(self.device)
        prefix_len = 0 if self.prefix_tokens is None else self.prefix_tokens.size(1)
        while self.sentences and self.step < self.steps:
            if self.can_wait and self.step >= max(prefix_len, 1) and len(self.sentences) <= until:
                break
            if self.step % every == 0:
                check()
            scores, tokens, rows, attn = self.candidates(self.step)
            choice = _choose(scores, tokens, rows, self.counts, self.cfg.beam)
            self.history.end(self.sentences, choice.ends, scores[:, : self.cfg.beam], rows[:, : self.cfg.beam], attn)
            keep = None
            if self.step % every == every - 1:
                # at its longest output a sentence has no live row: </s> was forced
                done = (self.counts >= self.cfg.beam) | ~choice.scores.isfinite().any(1)
                keep = _fill_holes(done.tolist())
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
        size = max(1, (CHUNK if self.device.type == "cpu" else CHUNK_GPU) // (beam * vocab))
        pieces = -(-len(self.sentences) // size)
        size = -(-len(self.sentences) // pieces)
        chunks = [self._candidates(step, i, i + size, features) for i in range(0, len(self.sentences), size)]
        scores, tokens, beams = (torch.cat(parts) if pieces > 1 else parts[0] for parts in zip(*chunks, strict=True))
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


def _fill_holes(done: list[bool]) -> list[int] | None:
    """The sentences to go on with where some are done: the last of them take the others' places, so that most stay
    where they are. None when all go on.
    """
    going_on = [i for i, is_done in enumerate(done) if not is_done]
    if len(going_on) == len(done):
        return None
    last = [i for i in going_on if i >= len(going_on)]
    return [last.pop() if done[i] else i for i in range(len(going_on))]


@dataclass
class _Choice:
    """What a step ends and what it goes on with, each (sentences, beam). ends: bool."""

    ends: Tensor
    scores: Tensor
    tokens: Tensor
    rows: Tensor


def _choose(scores: Tensor, tokens: Tensor, rows: Tensor, counts: Tensor, beam: int) -> _Choice:
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
    return _Choice(ends, other_scores, tokens.gather(1, others), rows.gather(1, others))


class _Search:
    """Batches one after the other. When few sentences of one are left, they wait for those of the next ones; together
    they take about the room of the largest batch so far at most.
    """

    def __init__(
        self,
        models: Sequence[Transformer],
        cfg: GenerationConfig,
        seed: int,
        need_attn: bool,
        check: Callable[[], None] | None,
    ) -> None:
        check_generation_config(cfg, models[0].decoder.output_projection.out_features)
        self.models, self.cfg, self.seed, self.need_attn = models, cfg, seed, need_attn
        self.check = check or (lambda: None)
        self.unfinished: deque[tuple[range, Sources]] = deque()
        self.results: dict[int, list[Hypothesis]] = {}  # of the unfinished batches' sentences
        self.waiting: list[_Batch] = []
        self.count = 0  # sentences so far
        self.most_sentences = self.most_tokens = 0  # in a batch

    @torch.inference_mode()
    def add(self, sources: Sources) -> None:
        """Translate another batch, except what waits."""
        size = sources.src_tokens.size(0)
        numbers = range(self.count, self.count + size)
        self.count += size
        self.results.update((i, []) for i in numbers)
        self.unfinished.append((numbers, sources))
        self.most_sentences = max(self.most_sentences, size)
        self.most_tokens = max(self.most_tokens, sources.src_tokens.numel())
        batch = _Batch(self.models, sources, self.cfg, list(numbers), self.seed, self.need_attn)
        self._run(batch, size // WAITING_SHARE)
        waiting = sum(len(batch.sentences) for batch in self.waiting)
        src_len = max((batch.src_len for batch in self.waiting), default=1)
        room = min(self.most_sentences, self.most_tokens // max(src_len, 1))
        if waiting > room - room // WAITING_SHARE:
            self.resume(waiting // WAITING_SHARE)

    @torch.inference_mode()
    def resume(self, until: int = 0) -> None:
        """Go on with those that wait, until at most so many are left."""
        if self.waiting:
            batch = _Batch.merge(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
            self.waiting = []
            self._run(batch, until)

    def _run(self, batch: _Batch, until: int) -> None:
        for sentence, hypothesis in batch.run(until, self.check):
            self.results[sentence].append(hypothesis)
        if batch.sentences:
            self.waiting.append(_Batch.merge([batch]))  # a copy of what is needed of it

    def finished(self) -> Iterator[list[list[Hypothesis]]]:
        """Of each batch that is finished after all before it, once."""
        going_on = [number for batch in self.waiting for number in batch.sentences]
        while self.unfinished and not any(number in self.unfinished[0][0] for number in going_on):
            numbers, sources = self.unfinished.popleft()
            found = [sorted(self.results.pop(i), key=lambda h: h.score, reverse=True) for i in numbers]
            if [] in found:
                number = found.index([])
                raise FairseqError(
                    f"sentence {number if sources.ids is None else sources.ids[number]} has no translation: the "
                    "model's output is not finite (in fp16, try bf16 or float32), or the constraints leave no token"
                )
            yield found


def search_batches(
    models: Sequence[Transformer],
    batches: Iterable[Sources],
    cfg: GenerationConfig,
    *,
    seed: int = 1,
    need_attn: bool = False,
    check: Callable[[], None] | None = None,
) -> Iterator[list[list[Hypothesis]]]:
    """What ``beam_search`` finds in each batch, in order, but faster: several are read before the first is yielded.

    check: called every few steps; what it raises ends the search.
    """
    search = _Search(models, cfg, seed, need_attn, check)
    for sources in batches:
        search.add(sources)
        yield from search.finished()
    search.resume()
    yield from search.finished()


def beam_search(
    models: Sequence[Transformer],
    src_tokens: Tensor,
    cfg: GenerationConfig,
    *,
    ids: Sequence[int] | None = None,
    prefix_tokens: Tensor | None = None,
    seed: int = 1,
    need_attn: bool = False,
) -> list[list[Hypothesis]]:
    """Translate a batch; of each sentence its finished hypotheses, best first, at most ``cfg.beam``.

    models: one, or an ensemble with the same dictionaries; in eval mode. src_tokens, ids, prefix_tokens: as
    ``Sources``'; seed: of ``--sampling``. Raises FairseqError for settings out of range, and when a sentence has no
    hypothesis since the models' output is not finite or the rules leave no token.
    """
    sources = Sources(src_tokens, ids, prefix_tokens)
    [found] = search_batches(models, [sources], cfg, seed=seed, need_attn=need_attn)
    return found
