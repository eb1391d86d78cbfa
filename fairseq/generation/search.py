"""The search over batches: one after the other, or on a CPU several at a time.

The few sentences of a batch that go on for long wait, and are then gone on with together. On a CPU, threads that each
search with one core do more than one search that divides every operation among the cores: see docs/performance.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import chain, islice

import torch
from torch import Tensor

from fairseq.errors import FairseqError, is_out_of_memory
from fairseq.generation.beam_search import SearchBatch, Sources
from fairseq.generation.capture import SearchGraphs, search_graphs
from fairseq.generation.constraints import check_generation_config
from fairseq.generation.history import Hypothesis
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig
from fairseq.utils.parts import part_size

WAITING_SHARE = 4  # the last quarter of a batch's sentences wait
MOST_THREADS = 8  # Python itself runs in one of them at a time
MOST_ROWS, MOST_TOKENS = 12000, 12000  # hypotheses and source tokens in all threads
ALL = 2**62
ROWS = 640  # hypotheses in each of several threads: with more, fewer have work, and none is faster

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
        graphs: SearchGraphs | None,
    ) -> None:
        self.models, self.cfg, self.seed, self.need_attn, self.check = models, cfg, seed, need_attn, check
        self.graphs = graphs
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
        if not self._start(sources, sentences):
            self._start(sources, sentences)
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

    def _start(self, sources: Sources, sentences: range) -> bool:
        """Translate a batch, except what waits. False where memory did not suffice, and there is more of it now."""
        try:
            batch = SearchBatch(self.models, sources, self.cfg, list(sentences), self.seed, self.need_attn)
            self._run(batch, len(sentences) // WAITING_SHARE)
            return True
        except (RuntimeError, MemoryError) as error:
            if self.graphs is None or not is_out_of_memory(error) or not self.graphs.release():
                raise
        return False

    def _run(self, batch: SearchBatch, until: int) -> None:
        ended = batch.run(until, self.check, self.graphs)
        if batch.sentences:
            self.waiting.append(SearchBatch.merge([batch]))  # a copy of what is needed of it
        for sentence, hypothesis in ended:
            self.results[sentence].append(hypothesis)

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
    threads: int | None = None,
) -> Iterator[Found]:
    """What ``beam_search`` finds in each batch, in order, but faster: several are read before the first is yielded.

    check: called every few steps, in any of the threads; what it raises ends the search. threads: on a CPU, at most so
    many search at a time (None: as many as torch has), each a part of a batch; with 1, batches stay whole and every
    operation has all of torch's threads.
    """
    check_generation_config(cfg, models[0].decoder.output_projection.out_features)
    on_cpu = next(models[0].parameters()).device.type == "cpu"
    threads = torch.get_num_threads() if threads is None else threads
    threads = max(1, min(threads, MOST_THREADS, MOST_ROWS // cfg.beam)) if on_cpu else 1
    stop = threading.Event()

    def stop_or_check() -> None:
        if stop.is_set():
            raise CancelledError
        if check is not None:
            check()

    counts: deque[int] = deque()  # of each batch's parts
    most = ALL, ALL  # a GPU's memory says itself when it is full; the host's ends the process
    if on_cpu:
        most = (ROWS, MOST_TOKENS // threads) if threads > 1 else (MOST_ROWS, ALL)
    parts = chain.from_iterable(_parts(sources, most[0] // cfg.beam, most[1], counts) for sources in batches)
    first = list(islice(parts, threads))  # what there is to do decides how many threads do it
    numbered = enumerate(chain(first, parts))
    done: dict[int, Found] = {}
    start = 0
    with search_graphs(models, cfg, need_attn) as graphs:
        searches = [_Search(models, cfg, seed, need_attn, stop_or_check, graphs) for _ in range(max(1, len(first)))]
        for number, found in (
            _in_turn(searches[0], numbered) if len(searches) == 1 else _in_threads(searches, numbered, stop)
        ):
            done[number] = found
            while counts and all(i in done for i in range(start, start + counts[0])):
                end = start + counts.popleft()
                yield [hypotheses for i in range(start, end) for hypotheses in done.pop(i)]
                start = end


def _parts(sources: Sources, most_sentences: int, most_tokens: int, counts: deque[int]) -> list[Sources]:
    """A batch in parts of like size, none larger than that unless of one sentence. counts: their number is added."""
    sentences, src_len = sources.src_tokens.shape
    size = part_size(sentences, min(most_sentences, most_tokens // max(src_len, 1)))
    src_tokens = sources.src_tokens.split(size)
    counts.append(len(src_tokens))
    ids = range(sentences) if sources.ids is None else sources.ids
    prefixes = [None] * len(src_tokens) if sources.prefix_tokens is None else sources.prefix_tokens.split(size)
    return [
        Sources(x, ids[i * size : (i + 1) * size], p) for i, (x, p) in enumerate(zip(src_tokens, prefixes, strict=True))
    ]


def _in_turn(search: _Search, batches: Iterable[tuple[int, Sources]]) -> Iterator[tuple[int, Found]]:
    for number, sources in batches:
        yield from search.add(number, sources)
    yield from search.finish()


def _in_threads(
    searches: Sequence[_Search], batches: Iterable[tuple[int, Sources]], stop: threading.Event
) -> Iterator[tuple[int, Found]]:
    """A thread a search, which share the batches and torch's threads. stop: set in the end, it ends what still runs."""
    threads = torch.get_num_threads()
    autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")  # a thread has its own
    free = deque(searches)

    def run(number: int, sources: Sources) -> list[tuple[int, Found]]:
        search = free.popleft()
        try:
            with torch.autocast("cpu", *autocast):
                return search.add(number, sources)
        finally:
            free.append(search)

    def finish(search: _Search) -> list[tuple[int, Found]]:
        with torch.autocast("cpu", *autocast):
            return search.finish()

    count = len(searches)
    pool = ThreadPoolExecutor(count, "search", torch.set_num_threads, (max(1, threads // count),))
    running: deque[Future[list[tuple[int, Found]]]] = deque()
    try:
        for number, sources in batches:
            running.append(pool.submit(run, number, sources))
            if len(running) == 2 * count:  # so that none waits for the oldest
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
        for found in pool.map(finish, searches):
            yield from found
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # for threads to come; this one's was never another


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
