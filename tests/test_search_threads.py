"""Several threads that search at a time find what one finds, in the same order, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fairseq.errors import FairseqError
from fairseq.generation import search
from fairseq.generation.beam_search import SearchBatch, Sources
from fairseq.generation.search import search_batches
from fairseq.options import GenerationConfig
from tests.test_beam_search import batch_of, sources
from tests.toys import toy_model

CFG = GenerationConfig(max_len_b=12)
LENGTHS = [(5, 3, 7, 1, 4), (2,), (6, 6, 5, 9, 2, 4, 3, 8), (3, 4), (7, 1, 1, 5, 2, 2)]


def batches(prefixed: bool = False) -> list[Sources]:
    """Of unlike sizes; the second, the third and the last have ids of their own."""
    prefix = [torch.tensor([[4 + i % 3, 5] for i in range(len(lengths))]) if prefixed else None for lengths in LENGTHS]
    ids = [None, [40], range(50, 58), None, [7, 3, 9, 1, 5, 8]]
    rows = [batch_of(sources(i, lengths)) for i, lengths in enumerate(LENGTHS)]
    return [Sources(*arguments) for arguments in zip(rows, ids, prefix, strict=True)]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [before]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("search")]


@pytest.mark.parametrize(
    "settings",
    [{}, {"beam": 1}, {"sampling": True, "beam": 3}, {"no_repeat_ngram_size": 2}, {"max_len_a": 2.0, "min_len": 5}],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 20, 640])
def test_the_same_is_found(monkeypatch, rows, settings):
    monkeypatch.setattr(search, "ROWS", rows)
    models = [toy_model(1), toy_model(2)]
    cfg = replace(CFG, **settings)
    for prefixed, need_attn in ((False, False), (True, True)):
        expected = list(search_batches(models, batches(prefixed), cfg, need_attn=need_attn, threads=1))
        found = list(search_batches(models, batches(prefixed), cfg, need_attn=need_attn, threads=3))
        assert [len(batch) for batch in found] == [len(lengths) for lengths in LENGTHS]
        pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
        for left, right in pairs:
            assert [h.tokens.tolist() for h in left] == [h.tokens.tolist() for h in right]
            for a, b in zip(left, right, strict=True):
                assert a.score == pytest.approx(b.score, abs=1e-5)
                torch.testing.assert_close(a.positional_scores, b.positional_scores, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(a.attention, b.attention, atol=1e-5, rtol=1e-5)


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, torch.dtype]]:
    """Of each batch that a thread starts with: the thread, sentences, torch's threads, and what it computes in."""
    seen: list[tuple[str, int, int, torch.dtype]] = []
    run = SearchBatch.run

    def watched(self: SearchBatch, *arguments: object) -> object:
        weight = torch.zeros(1, 1)
        dtype = torch.nn.functional.linear(weight, weight).dtype
        seen.append((threading.current_thread().name, len(self.sentences), torch.get_num_threads(), dtype))
        return run(self, *arguments)

    monkeypatch.setattr(SearchBatch, "run", watched)
    return seen


def test_parts_and_threads(monkeypatch):
    seen = _watch(monkeypatch)
    model, whole = toy_model(), sorted(len(lengths) for lengths in LENGTHS)
    monkeypatch.setattr(search, "WAITING_SHARE", 100)  # none: each start is a part
    list(search_batches([model], batches(), CFG, threads=1))
    assert sorted(n for _, n, *_ in seen) == whole
    assert {name for name, *_ in seen} == {threading.current_thread().name}
    del seen[:]
    monkeypatch.setattr(search, "ROWS", 3 * CFG.beam)
    list(search_batches([model], batches(), CFG, threads=2))
    assert sorted(n for _, n, *_ in seen) == [1, 2, 2, 2, 3, 3, 3, 3, 3]
    assert all(name.startswith("search") for name, *_ in seen)
    del seen[:]
    list(search_batches([model], [batches()[1]], CFG, threads=8))  # one sentence: nothing to share
    assert [name for name, *_ in seen] == [threading.current_thread().name]
    del seen[:]
    monkeypatch.setattr(search, "MOST_ROWS", 2 * CFG.beam - 1)  # a beam of which there is room for one
    list(search_batches([model], batches(), CFG, threads=8))
    assert [n for _, n, *_ in seen] == [1] * sum(whole)
    assert {name for name, *_ in seen} == {threading.current_thread().name}


def test_batches_too_large_for_the_memory(monkeypatch):
    """An explicit --batch-size and a wide beam: in parts, in one thread as well."""
    seen = _watch(monkeypatch)
    monkeypatch.setattr(search, "WAITING_SHARE", 100)
    monkeypatch.setattr(search, "MOST_ROWS", 4 * CFG.beam)
    found = list(search_batches([toy_model()], batches(), CFG, threads=1))
    assert [len(batch) for batch in found] == [len(lengths) for lengths in LENGTHS]
    assert [n for _, n, *_ in seen] == [3, 2, 1, 4, 4, 2, 3, 3]


def test_threads_share_torchs_and_autocast(monkeypatch):
    seen = _watch(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            list(search_batches([toy_model()], batches(), CFG, threads=2))
        assert {threads for _, _, threads, _ in seen} == {2}
        assert {dtype for *_, dtype in seen} == {torch.bfloat16}
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_comes_out():
    models = [toy_model()]
    with torch.no_grad():
        models[0].decoder.output_projection.weight.fill_(float("nan"))
    found = search_batches(models, batches(), CFG, threads=3)
    with pytest.raises(FairseqError, match="sentence 0 has no translation"):
        list(found)


def test_batches_that_cannot_be_read():
    def read() -> Iterator[Sources]:
        yield from batches()[:4]
        raise FairseqError("no more")

    with pytest.raises(FairseqError, match="no more"):
        list(search_batches([toy_model()], read(), CFG, threads=2))


def test_check_ends_the_search():
    class Enough(Exception):
        pass

    calls: list[str] = []

    def check() -> None:
        calls.append(threading.current_thread().name)
        if len(calls) > 9:
            raise Enough

    with pytest.raises(Enough):
        list(search_batches([toy_model()], batches(), CFG, check=check, threads=2))
    assert all(name.startswith("search") for name in calls)


def test_closed_early_it_stops_at_the_next_step():
    steps: list[int] = []
    many = [Sources(batch_of(sources(i, (4, 4)))) for i in range(200)]
    found = search_batches([toy_model()], many, replace(CFG, min_len=12), check=lambda: steps.append(1), threads=2)
    next(found)
    found.close()
    assert len(steps) < 100 * 12


def test_ctrl_c_ends_it():
    """It comes to the main thread, which waits for the others."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 50:  # all threads have started
            os.kill(os.getpid(), signal.SIGINT)

    def endless() -> Iterator[Sources]:
        while True:
            yield batches()[0]

    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in search_batches([toy_model()], endless(), CFG, check=check, threads=2):
                pass
    finally:
        signal.signal(signal.SIGINT, before)
