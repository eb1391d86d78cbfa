"""``--cuda-graphs`` of generation: steps of the beam search that the GPU repeats by itself, recorded once a shape.

A step is some 240 small kernels, and launching them takes the host milliseconds, however few rows there are. A CUDA
graph is such a sequence with every address and number in it, and one launch repeats it. So a batch is copied into
buffers of its shape, which has room for some more sentences, source tokens and tokens; what a step needs to know, such
as how many tokens there are, is on the device; and the batch leaves the buffers when it outgrows them or half of its
sentences are done. A graph is two steps: one moves the keys and values of each hypothesis to spare buffers, the other
back.

Only steps without rules of their own (a length's, a prefix's) are recorded. The others, and a shape's first one, are
as without graphs; so is what comes of all of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq.generation.beam_search import CHECK_EVERY, SearchBatch, still_going
from fairseq.generation.candidates import NEVER, choose
from fairseq.models.transformer import Transformer
from fairseq.modules.buffered_cache import Allocate, BufferedCache
from fairseq.options import GenerationConfig
from fairseq.utils.cuda_graphs import CudaRecorder, Graphs, Recorder
from fairseq.utils.symbols import EOS

logger = logging.getLogger(__name__)

MOST_GRAPHS = 128  # further shapes go on without
STEPS = 2  # in a graph
BLOCK, SOURCE_BLOCK = 16, 8  # tokens


class Shape(NamedTuple):
    """What there is room for: sentences, source tokens, tokens."""

    places: int
    src_len: int
    room: int


class SearchGraphs(Graphs):
    """The recorded steps of one ensemble and one `GenerationConfig`, for one search at a time."""

    def __init__(self, recorder: Recorder) -> None:
        self._seen: set[Shape] = set()
        self._steps: dict[Shape, _Steps] = {}
        self._memory: dict[str, Tensor] = {}  # the largest that was needed; graphs keep what they were recorded with
        super().__init__(recorder, logger, [self._memory, self._steps])

    def run(self, batch: SearchBatch, until: int, check: Callable[[], None]) -> bool:
        """Go on with ``batch`` as long as its shape suits it; False where its next step has to be an ordinary one.

        until, check: as `SearchBatch.run`'s.
        """
        prefix_len = 0 if batch.prefix_tokens is None else batch.prefix_tokens.size(1)
        first = max(1, batch.no_end_before, prefix_len)
        if self._off or batch.step < first or batch.step + STEPS > batch.no_limit_before:
            return False
        with self._recorder.on_stream():
            shape = _shape(batch)
            try:
                steps = self._ready(shape, batch)
                if steps is not None:
                    steps.load(batch)
            except Exception as error:  # one that is not the recording's comes again without it
                self._failed(error)
                return False
            if steps is None:
                return False
            batch.places = shape.places
            _go_on(batch, steps, min(shape.room, batch.no_limit_before), max(until, shape.places // 2), check)
        return True

    def _ready(self, shape: Shape, batch: SearchBatch) -> _Steps | None:
        if shape in self._seen and shape not in self._steps and len(self._steps) < MOST_GRAPHS:
            self._steps[shape] = _Steps(batch, shape, self._allocate, self._recorder)
        self._seen.add(shape)
        return self._steps.get(shape)

    def _allocate(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Zeros, or what is there: no two shapes are in use at once."""
        count = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < count:
            self._memory[name] = like.new_zeros(count)
        return self._memory[name][:count].view(shape)


def _go_on(batch: SearchBatch, steps: _Steps, end: int, few: int, check: Callable[[], None]) -> None:
    """Repeat ``steps``, in which ``batch`` is, until step ``end`` or until at most ``few`` sentences go on."""
    size, since = len(batch.sentences), 0
    while True:
        outcomes = steps.repeat(size)
        batch.step += STEPS
        since += STEPS
        over = batch.step + STEPS > end
        keep = None
        if over or since >= CHECK_EVERY:
            since = 0
            check()
            keep = still_going(steps.counts[:size], steps.scores[:size])
            over = over or (keep is not None and len(keep) <= few)
        for i, ((ends, scores, rows), went_on) in enumerate(outcomes):
            batch.history.end(batch.sentences, ends, scores, rows, None)
            if over and i == STEPS - 1:
                went_on = steps.unload(batch, keep, went_on)
            if went_on:
                scores, tokens, rows = went_on
                batch.history.go_on(scores, tokens, rows)
        if over:
            return


class _Steps:
    """Steps of searches of one shape, and the buffers that they work on."""

    def __init__(self, batch: SearchBatch, shape: Shape, allocate: Allocate, recorder: Recorder) -> None:
        """batch: any such, left as it is."""
        self.beam = batch.cfg.beam
        of_sentence, of_row = (shape.places, self.beam), shape.places * self.beam
        self.step = batch.counts.new_zeros(1)  # tokens so far
        self.rows = torch.arange(of_row, device=batch.device)  # what each was in the step before
        self.tokens = self.rows.new_full((of_row, 1), EOS)
        self.scores, self.counts = batch.scores.new_zeros(of_sentence), batch.counts.new_zeros(shape.places)
        ids = self.rows.new_zeros(3 * STEPS, *of_sentence)
        self._outcomes = ids.bool()[:STEPS], self.scores.new_zeros(2 * STEPS, *of_sentence), ids
        self.caches = [
            BufferedCache(cache, shape, self.beam, self.step, lambda name, *rest, i=i: allocate(f"{name} {i}", *rest))
            for i, cache in enumerate(batch.ensemble.caches)
        ]
        work = partial(self._work, self._as_batch(batch, shape.places))
        work(1)  # what it needs is loaded and tuned before it is recorded
        self._repeat = recorder.record(partial(work, STEPS))

    def _as_batch(self, like: SearchBatch, places: int) -> SearchBatch:
        """These buffers, as ``candidates`` reads them."""
        batch, batch.ensemble = copy.copy(like), copy.copy(like.ensemble)
        batch.sentences, batch.prefix_tokens = list(range(places)), None
        batch.no_end_before, batch.no_limit_before = 0, 1
        batch.tokens, batch.scores, batch.ensemble.caches = self.tokens, self.scores, list(self.caches)
        return batch

    def _work(self, batch: SearchBatch, count: int) -> None:
        """``count`` steps of what ``_as_batch`` returns; an even number ends in the buffers in which it began."""
        ends, sums, ids = [], [], []
        for _ in range(count):
            for cache in self.caches:
                cache.move(self.rows)
            scores, tokens, rows, _ = batch.candidates(0)
            choice = choose(scores, tokens, rows, self.counts, self.beam)
            ends.append(choice.ends)
            sums += [scores[:, : self.beam], choice.scores]
            ids += [rows[:, : self.beam], choice.tokens, choice.rows]
            self.scores.copy_(choice.scores)
            self.tokens.copy_(choice.tokens.view(-1, 1))
            self.rows.copy_(choice.rows.flatten())
            self.step.add_(1)
        for parts, out in zip((ends, sums, ids), self._outcomes, strict=True):
            torch.stack(parts, out=out[: len(parts)])

    def repeat(self, size: int) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Do the steps; returns of each, for the first ``size`` sentences, what `History.end` and `History.go_on` are
        called with.
        """
        self._repeat()
        ends, sums, ids = (outcome[:, :size].clone() for outcome in self._outcomes)
        return [
            ((ends[i], sums[2 * i], ids[3 * i]), (sums[2 * i + 1], ids[3 * i + 1], ids[3 * i + 2]))
            for i in range(STEPS)
        ]

    def load(self, batch: SearchBatch) -> None:
        """Put ``batch`` into the buffers; its caches are emptied."""
        size = len(batch.sentences)
        self.step.fill_(batch.step)
        torch.arange(len(self.rows), out=self.rows)
        self.scores.fill_(NEVER)  # where there is no sentence nothing ends
        self.scores[:size] = batch.scores
        self.counts[:size] = batch.counts
        self.tokens[: size * self.beam] = batch.tokens[:, -1:]
        for cache, other in zip(self.caches, batch.ensemble.caches, strict=True):
            cache.load(other)
        for other in batch.ensemble.caches:  # now that nothing can fail
            other.clear()

    def unload(self, batch: SearchBatch, keep: list[int] | None, choice: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give ``batch`` back what it has become; of its sentences ``keep``, None: all.

        choice: what it goes on with, (sentences, beam) each. Returns that of the sentences that are kept.
        """
        if keep == []:
            batch.sentences = []
            return ()
        batch.counts = self.counts[: len(batch.sentences)].clone()
        for buffers, cache in zip(self.caches, batch.ensemble.caches, strict=True):
            buffers.unload(cache, choice[0].numel(), batch.step)
        scores, tokens, rows = choice
        went_on = batch.go_on(keep, scores, tokens, rows)
        for cache in batch.ensemble.caches:
            cache.settle()
        return went_on


def _shape(batch: SearchBatch) -> Shape:
    """What ``batch`` needs for two more steps, in few sizes; places for sentences stay while half of them are taken."""
    size = len(batch.sentences)
    places = batch.places if size <= batch.places < 2 * size else _round_up(size)
    blocks, source_blocks = -(-(batch.step + STEPS) // BLOCK), -(-batch.src_len // SOURCE_BLOCK)
    return Shape(places, SOURCE_BLOCK * _round_up(source_blocks), BLOCK * _round_up(blocks))


def _round_up(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


_KEPT: weakref.WeakKeyDictionary[Transformer, tuple[Any, SearchGraphs]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def search_graphs(models: Sequence[Transformer], cfg: GenerationConfig, attn: bool) -> Iterator[SearchGraphs | None]:
    """The graphs of a search, None without ``--cuda-graphs`` and, which is said once, where that does nothing.

    They are kept for the models' next search, as long as the first model is there.
    """
    reason = _obstacle(models, cfg, attn) if cfg.cuda_graphs else ""
    if reason or not cfg.cuda_graphs:
        if reason:
            _say(f"--cuda-graphs does nothing here: {reason}")
        yield None
        return
    # a graph has the parameters' addresses and the settings' numbers in it
    addresses = [tensor.data_ptr() for model in models for tensor in (*model.parameters(), *model.buffers())]
    what = [*map(weakref.ref, models)], addresses, cfg.beam, cfg.temperature, cfg.unkpen
    kept, graphs = _KEPT.pop(models[0], (None, None))  # another search, in another thread, makes its own
    if graphs is None or kept != what:
        graphs = SearchGraphs(CudaRecorder(next(models[0].parameters()).device))
    try:
        yield graphs
    finally:
        _KEPT[models[0]] = what, graphs


def _obstacle(models: Sequence[Transformer], cfg: GenerationConfig, attn: bool) -> str:
    for is_there, reason in (
        (not _on_gpu(models[0]), "generation is not on a GPU"),
        (cfg.sampling, "--sampling is given"),
        (cfg.no_repeat_ngram_size > 0, "--no-repeat-ngram-size is given"),
        (attn, "attention is wanted"),
        (torch.is_autocast_enabled("cuda"), "the model is in training, in 16 bits"),
        (dist.is_available() and dist.is_initialized(), "there are several processes"),
    ):
        if is_there:
            return reason
    return ""


def _on_gpu(model: Transformer) -> bool:
    return next(model.parameters()).device.type == "cuda"


@functools.cache
def _say(message: str) -> None:
    logger.warning(message)
