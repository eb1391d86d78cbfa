"""The search over batches, one after the other.

The few sentences of a batch that go on for long wait, and are then gone on with together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.generation.beam_search import SearchBatch, Sources
from fairseq.generation.constraints import check_generation_config
from fairseq.generation.history import Hypothesis
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig

WAITING_SHARE = 4  # the last quarter of a batch's sentences wait

Found = list[list[Hypothesis]]  # of each sentence, best first


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
        check: Callable[[], None],
    ) -> None:
        self.models, self.cfg, self.seed, self.need_attn, self.check = models, cfg, seed, need_attn, check
        self.unfinished: deque[tuple[int, range, Sources]] = deque()
        self.results: dict[int, list[Hypothesis]] = {}  # of the unfinished batches' sentences
        self.waiting: list[SearchBatch] = []
        self.count = 0  # sentences so far
        self.most_sentences = self.most_tokens = 0  # in a batch

    @torch.inference_mode()
    def add(self, number: int, sources: Sources) -> list[tuple[int, Found]]:
        """Translate another batch, except what waits; returns the numbers of batches that are finished and what was
        found in them. A batch comes after all that were added before.
        """
        size = sources.src_tokens.size(0)
        sentences = range(self.count, self.count + size)
        self.count += size
        self.results.update((i, []) for i in sentences)
        self.unfinished.append((number, sentences, sources))
        self.most_sentences = max(self.most_sentences, size)
        self.most_tokens = max(self.most_tokens, sources.src_tokens.numel())
        batch = SearchBatch(self.models, sources, self.cfg, list(sentences), self.seed, self.need_attn)
        self._run(batch, size // WAITING_SHARE)
        waiting = sum(len(batch.sentences) for batch in self.waiting)
        src_len = max((batch.src_len for batch in self.waiting), default=1)
        room = min(self.most_sentences, self.most_tokens // max(src_len, 1))
        if waiting > room - room // WAITING_SHARE:
            self._resume(waiting // WAITING_SHARE)
        return list(self._finished())

    @torch.inference_mode()
    def finish(self) -> list[tuple[int, Found]]:
        """Go on with those that wait; returns the rest of the batches, as ``add``."""
        self._resume(0)
        return list(self._finished())

    def _resume(self, until: int) -> None:
        """Go on with those that wait, until at most so many are left."""
        if self.waiting:
            batch = SearchBatch.merge(self.waiting) if len(self.waiting) > 1 else self.waiting[0]
            self.waiting = []
            self._run(batch, until)

    def _run(self, batch: SearchBatch, until: int) -> None:
        for sentence, hypothesis in batch.run(until, self.check):
            self.results[sentence].append(hypothesis)
        if batch.sentences:
            self.waiting.append(SearchBatch.merge([batch]))  # a copy of what is needed of it

    def _finished(self) -> Iterator[tuple[int, Found]]:
        """Each batch that is finished after all before it, once."""
        going_on = [sentence for batch in self.waiting for sentence in batch.sentences]
        while self.unfinished and not any(sentence in self.unfinished[0][1] for sentence in going_on):
            number, sentences, sources = self.unfinished.popleft()
            found = [sorted(self.results.pop(i), key=lambda h: h.score, reverse=True) for i in sentences]
            if [] in found:
                empty = found.index([])
                raise FairseqError(
                    f"sentence {empty if sources.ids is None else sources.ids[empty]} has no translation: the "
                    "model's output is not finite (in fp16, try bf16 or float32), or the constraints leave no token"
                )
            yield number, found


def search_batches(
    models: Sequence[Transformer],
    batches: Iterable[Sources],
    cfg: GenerationConfig,
    *,
    seed: int = 1,
    need_attn: bool = False,
    check: Callable[[], None] | None = None,
) -> Iterator[Found]:
    """What ``beam_search`` finds in each batch, in order, but faster: several are read before the first is yielded.

    check: called every few steps; what it raises ends the search.
    """
    check_generation_config(cfg, models[0].decoder.output_projection.out_features)
    search = _Search(models, cfg, seed, need_attn, check or (lambda: None))
    for number, sources in enumerate(batches):
        yield from (found for _, found in search.add(number, sources))
    yield from (found for _, found in search.finish())


def beam_search(
    models: Sequence[Transformer],
    src_tokens: Tensor,
    cfg: GenerationConfig,
    *,
    ids: Sequence[int] | None = None,
    prefix_tokens: Tensor | None = None,
    seed: int = 1,
    need_attn: bool = False,
) -> Found:
    """Translate a batch; of each sentence its finished hypotheses, best first, at most ``cfg.beam``.

    models: one, or an ensemble with the same dictionaries; in eval mode. src_tokens, ids, prefix_tokens: as
    ``Sources``'; seed: of ``--sampling``. Raises FairseqError for settings out of range, and when a sentence has no
    hypothesis since the models' output is not finite or the rules leave no token.
    """
    sources = Sources(src_tokens, ids, prefix_tokens)
    [found] = search_batches(models, [sources], cfg, seed=seed, need_attn=need_attn)
    return found
