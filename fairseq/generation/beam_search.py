"""Batched beam search and sampling with incremental decoding, by fairseq's rules.

A step scores every continuation of every hypothesis, takes a sentence's best 2 * beam, finishes those among the best
beam that end in ``</s>``, and goes on with the best beam of the rest. A sentence is done, and leaves the batch, with
beam finished hypotheses or at its longest output. Rows are sentences x beam, a sentence's hypotheses adjacent; a row
that stands for nothing (all but one at the start, samples that have ended) has the score -inf.

Scores are float32 natural logarithms whatever the model computes in. The host looks at the device once a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.generation.constraints import EOS, NEVER, PAD, check_generation_config, constrain, output_lengths
from fairseq.generation.sampling import sample, sentence_noise
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig

GROUP_SIZE = 8  # divides the size of most dictionaries: they are padded to a multiple of it


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


class _Ensemble:
    """The decoding state of one or more models, stepped together; their probabilities are averaged."""

    def __init__(self, models: Sequence[Transformer], src_tokens: Tensor, beam: int, need_attn: bool) -> None:
        self.models = models
        self.need_attn = need_attn
        self.caches = [model.decoder.new_cache(model.encoder(src_tokens), beam) for model in models]

    def step(self, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """tokens: (rows,), the last ones -> log-probabilities (rows, vocab), attention (rows, src_len) if needed."""
        lprobs, attention = [], []
        for model, cache in zip(self.models, self.caches, strict=True):
            logits, attn = model.decoder.step(tokens, cache, self.need_attn)
            if temperature != 1:
                logits = logits.float() / temperature
            lprobs.append(torch.log_softmax(logits, dim=-1, dtype=torch.float32))
            if attn is not None:
                attention.append(attn)
        mean_attn = torch.stack(attention).mean(0) if attention else None
        return average_probabilities(lprobs), mean_attn

    def select(self, rows: Tensor, sentences: Tensor | None) -> None:
        for cache in self.caches:
            cache.select(rows, sentences)


@dataclass
class _Rows:
    """The unfinished hypotheses. tokens, scores: (rows, 1 + step), from the initial ``</s>`` on, scores summed up to
    each token; attention: (rows, src_len, step) or None.
    """

    tokens: Tensor
    scores: Tensor
    attention: Tensor | None

    def select(self, rows: Tensor) -> _Rows:
        """Those at indices ``rows``."""
        attention = None if self.attention is None else self.attention.index_select(0, rows)
        return _Rows(self.tokens.index_select(0, rows), self.scores.index_select(0, rows), attention)

    def append(self, tokens: Tensor, scores: Tensor) -> _Rows:
        """Each with one more token and its new summed score, both (rows,)."""
        return _Rows(
            torch.cat([self.tokens, tokens[:, None]], dim=1),
            torch.cat([self.scores, scores[:, None]], dim=1),
            self.attention,
        )


def average_probabilities(lprobs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the models' mean probability, from their log-probabilities, all of one shape."""
    if len(lprobs) == 1:
        return lprobs[0]
    return torch.logsumexp(torch.stack(list(lprobs)), dim=0) - math.log(len(lprobs))


def best_candidates(lprobs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best 2 * beam continuations of each sentence, best first.

    lprobs: (sentences, beam, vocab); scores: (sentences, beam), summed so far. Returns scores, tokens and the beams
    they continue, each (sentences, 2 * beam).
    """
    _, beam, vocab = lprobs.shape
    # The best k are in the k groups with the largest maxima, and maxima are found much faster than the best k.
    size = math.gcd(vocab, GROUP_SIZE) if vocab > GROUP_SIZE else 1
    groups = vocab // size  # token t is in group t % groups
    maxima = lprobs.unflatten(2, (size, groups)).amax(2) + scores[:, :, None]
    best = maxima.flatten(1).topk(2 * beam, dim=1).indices
    first = best // groups * vocab + best % groups
    index = (first[:, :, None] + torch.arange(0, vocab, groups, device=first.device)).flatten(1)
    totals, chosen = (lprobs.flatten(1).gather(1, index) + scores.gather(1, index // vocab)).topk(2 * beam, dim=1)
    index = index.gather(1, chosen)
    return totals, index % vocab, index // vocab


def sampled_candidates(
    lprobs: Tensor, scores: Tensor, noise: Tensor, cfg: GenerationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``best_candidates``, but one random continuation of each beam: (sentences, beam). noise: same shape."""
    tokens = sample(lprobs, noise, cfg.sampling_topk, cfg.sampling_topp)
    totals = scores + lprobs.gather(2, tokens[:, :, None]).squeeze(2)
    beams = torch.arange(lprobs.size(1), device=lprobs.device).expand_as(tokens)
    return totals, tokens, beams


class _Results:
    """Finished hypotheses, a chunk a step, on the device until all are there."""

    def __init__(self, sentences: int, cfg: GenerationConfig) -> None:
        self.cfg = cfg
        self.counts = [0] * sentences
        self._chunks: list[tuple[list[int], _Rows]] = []

    def admit(self, sentence: int) -> bool:
        """Whether to keep one more hypothesis of a sentence, which then counts: at most ``beam`` are."""
        self.counts[sentence] += 1
        return self.counts[sentence] <= self.cfg.beam

    def add(self, sentences: list[int], finished: _Rows) -> None:
        """finished: its rows' sentences, by number in the first batch."""
        self._chunks.append((sentences, finished))

    def hypotheses(self, padding: Sequence[Tensor]) -> list[list[Hypothesis]]:
        """Of each sentence, best first. padding: bool (src_len,) each, True on the source's padding."""
        results: list[list[Hypothesis]] = [[] for _ in self.counts]
        for sentences, chunk in self._chunks:
            length = chunk.tokens.size(1) - 1
            total = chunk.scores[:, -1]
            final = total if self.cfg.unnormalized else total / length**self.cfg.lenpen
            tokens, scores = chunk.tokens[:, 1:].cpu(), final.tolist()
            positional = chunk.scores.diff(dim=1).cpu()
            attention = None if chunk.attention is None else chunk.attention.cpu()
            for row, sentence in enumerate(sentences):
                attn = None if attention is None else attention[row][~padding[sentence]]
                results[sentence].append(Hypothesis(tokens[row], scores[row], positional[row], attn))
        return [sorted(hypotheses, key=lambda h: h.score, reverse=True) for hypotheses in results]


class _Batch:
    """The sentences still being translated. ``sentences``: their numbers in the batch as it was at first."""

    def __init__(
        self,
        models: Sequence[Transformer],
        src_tokens: Tensor,
        cfg: GenerationConfig,
        prefix_tokens: Tensor | None,
        need_attn: bool,
    ) -> None:
        self.cfg = cfg
        self.device = src_tokens.device
        self.prefix_tokens = prefix_tokens
        self.noise: Tensor | None = None
        src_lengths = src_tokens.ne(PAD).sum(1).tolist()
        limit = min(model.cfg.max_target_positions for model in models) - 1
        self.shortest, self.longest = output_lengths(cfg, src_lengths, limit)
        self.sentences = list(range(len(src_lengths)))
        self.steps = max(self.longest, default=-1) + 1
        self.ensemble = _Ensemble(models, src_tokens, cfg.beam, need_attn)
        rows = len(self.sentences) * cfg.beam
        scores = torch.zeros(len(self.sentences), cfg.beam, device=self.device)
        if not cfg.sampling:
            scores[:, 1:] = NEVER  # all beams are the same at first: only one counts
        attention = torch.empty(rows, src_tokens.size(1), 0, device=self.device) if need_attn else None
        self.rows = _Rows(torch.full((rows, 1), EOS, device=self.device), scores.view(rows, 1), attention)

    def index(self, values: list[int] | list[bool]) -> Tensor:
        """One-dimensional, on the device, which the host does not wait for."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    def candidates(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, tokens and rows of the continuations to choose from, best first: (sentences, at least beam)."""
        lprobs, attn = self.ensemble.step(self.rows.tokens[:, -1], self.cfg.temperature)
        lprobs = lprobs.unflatten(0, (-1, self.cfg.beam))
        if self.rows.attention is not None and attn is not None:
            self.rows.attention = torch.cat([self.rows.attention, attn[:, :, None]], dim=2)
        short = [step < self.shortest[sentence] for sentence in self.sentences]
        too_short = self.index(short) if any(short) else None
        constrain(lprobs, self.rows.tokens, self.cfg, too_short, self._forced(step))
        so_far = self.rows.scores[:, -1].view(-1, self.cfg.beam)
        if self.noise is None:
            scores, tokens, beams = best_candidates(lprobs, so_far)
        else:
            scores, tokens, beams = sampled_candidates(lprobs, so_far, self.noise[:, step], self.cfg)
        first_rows = torch.arange(0, self.rows.tokens.size(0), self.cfg.beam, device=self.device)
        return scores, tokens, beams + first_rows[:, None]

    def _forced(self, step: int) -> Tensor | None:
        """The token each sentence must have next, PAD for any: ``</s>`` at its longest output, else its prefix's."""
        at_limit = [step >= self.longest[sentence] for sentence in self.sentences]
        prefix = self.prefix_tokens
        if prefix is not None and step < prefix.size(1):
            forced = prefix[:, step]
        elif any(at_limit):
            forced = torch.full((len(at_limit),), PAD, device=self.device)
        else:
            return None
        return torch.where(self.index(at_limit), EOS, forced)

    def go_on(self, keep: list[int], scores: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Keep the sentences at indices ``keep``; each of their rows becomes ``rows`` with one more of ``tokens``.

        scores, tokens, rows: (sentences, beam).
        """
        kept = self.index(keep) if len(keep) < len(self.sentences) else None
        if kept is not None:
            self.sentences = [self.sentences[i] for i in keep]
            scores, tokens, rows = scores[kept], tokens[kept], rows[kept]
            self.prefix_tokens = None if self.prefix_tokens is None else self.prefix_tokens[kept]
            self.noise = None if self.noise is None else self.noise[kept]
        self.rows = self.rows.select(rows.flatten()).append(tokens.flatten(), scores.flatten())
        self.ensemble.select(rows.flatten(), kept)


@torch.inference_mode()
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

    models: one, or an ensemble with the same dictionaries; in eval mode. src_tokens: (sentences, src_len), padded on
    either side. ids: with ``seed`` they set the random numbers of ``--sampling`` (default: 0, 1, ...).
    prefix_tokens: (sentences, prefix_len), padded on the right, begins the outputs; an ``</s>`` in it ends them.
    Raises FairseqError for settings out of range, and when a sentence has no hypothesis since the models' output is not
    finite or the rules leave no token.
    """
    check_generation_config(cfg)
    beam = cfg.beam
    batch = _Batch(models, src_tokens, cfg, prefix_tokens, need_attn)
    if cfg.sampling:
        noise = sentence_noise(seed, batch.sentences if ids is None else ids, batch.steps, beam)
        batch.noise = noise.to(src_tokens.device)
    results = _Results(len(batch.sentences), cfg)
    for step in range(batch.steps):
        scores, tokens, rows = batch.candidates(step)
        ends = tokens.eq(EOS) & scores.isfinite()
        # the best beam that do not end, in order; where there are fewer, others fill up as rows that stand for nothing
        others = ends.byte().argsort(dim=1, stable=True)[:, :beam]
        other_scores = scores.masked_fill(ends | ~scores.isfinite(), NEVER).gather(1, others)
        seen = torch.cat([ends[:, :beam], other_scores.isfinite().any(1, keepdim=True)], dim=1).cpu()
        ended = [at for at in seen[:, :-1].nonzero().tolist() if results.admit(batch.sentences[at[0]])]
        if ended:
            index = batch.index([sentence * tokens.size(1) + column for sentence, column in ended])
            finished = batch.rows.select(rows.take(index)).append(tokens.take(index), scores.take(index))
            results.add([batch.sentences[i] for i, _ in ended], finished)
        # at its longest output a sentence has no live row: </s> was forced
        is_live = seen[:, -1].tolist()
        keep = [i for i, sentence in enumerate(batch.sentences) if is_live[i] and results.counts[sentence] < beam]
        if not keep:
            break
        batch.go_on(keep, other_scores, tokens.gather(1, others), rows.gather(1, others))
    if 0 in results.counts:
        raise FairseqError(
            f"sentence {(ids or range(len(results.counts)))[results.counts.index(0)]} has no translation: the model's "
            "output is not finite (in fp16, try bf16 or float32), or the constraints leave no token"
        )
    return results.hypotheses(list(src_tokens.eq(PAD).cpu()))
