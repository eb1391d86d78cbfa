"""``--cuda-graphs`` of generation without a GPU: a tape in a graph's place repeats the steps on the CPU."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from fairseq.generation import beam_search, capture
from fairseq.generation.candidates import LOG2_E
from fairseq.generation.search import search_batches
from fairseq.modules.buffered_cache import BufferedCache
from fairseq.options import GenerationConfig
from tests.tape import TapeRecorder
from tests.test_beam_search import batch_of, sources
from tests.toys import toy_model

CFG = GenerationConfig(max_len_b=45)
LENGTHS = [(5, 3, 7, 1, 4, 2, 6), (2,), (6, 6, 5, 9, 2, 4, 3, 8), (5, 3, 7, 1, 4, 2), (9, 7, 3, 3, 5, 2, 6, 8, 8, 9)]


@pytest.fixture
def recorder(monkeypatch):
    """In the place of CUDA's, with steps as on a GPU, which look at nothing."""
    recorder = TapeRecorder()
    monkeypatch.setattr(capture, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr(capture, "_on_gpu", lambda model: True)
    monkeypatch.setattr(beam_search, "log2_sum_exp2", lambda x: torch.logsumexp(x / LOG2_E, 1, True) * LOG2_E)
    monkeypatch.setattr(beam_search, "check_interval", lambda device: beam_search.CHECK_EVERY)
    capture._say.cache_clear()
    return recorder


def toy_batches():
    return [beam_search.Sources(batch_of(sources(i, lengths))) for i, lengths in enumerate(LENGTHS)]


def search(models, cfg, batches=None):
    return list(search_batches(models, batches or toy_batches(), cfg, threads=1))


def agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        for hypotheses, others in zip(one, other, strict=True):
            assert [h.tokens.tolist() for h in hypotheses] == [h.tokens.tolist() for h in others]
            for a, b in zip(hypotheses, others, strict=True):
                assert a.score == pytest.approx(b.score, abs=1e-5)
                torch.testing.assert_close(a.positional_scores, b.positional_scores, rtol=0, atol=1e-5)


def long_model(seed, end=0.7, **settings):
    """A model whose outputs have from few to 45 tokens: </s> is seldom."""
    model = toy_model(seed, **settings)
    with torch.no_grad():
        model.decoder.output_projection.weight[2].mul_(end)
    return model


@pytest.mark.parametrize("count", [1, 2], ids=["one model", "ensemble"])
@pytest.mark.parametrize("beam", [1, 4, 5])
def test_repeated_steps_are_the_ordinary_ones(recorder, beam, count):
    models = [long_model(seed, 0.7 if count == 1 else 1.2, decoder_layers=seed) for seed in range(1, count + 1)]
    cfg = replace(CFG, beam=beam, unkpen=0.5)
    expected = search(models, cfg)
    lengths = [len(h.tokens) for found in expected for hypotheses in found for h in hypotheses]
    assert min(lengths) < 16 < 24 < max(lengths)
    assert recorder.repeated == 0
    found = search(models, replace(cfg, cuda_graphs=True))
    agree(found, expected)
    assert recorder.repeated > 40
    capture._KEPT.clear()  # anew from the largest batch on, so that the buffers of all shapes overlap
    agree(search(models, replace(cfg, cuda_graphs=True), toy_batches()[::-1]), expected[::-1])
    assert recorder.recorded < 40


@pytest.mark.parametrize(
    "settings",
    [{"min_len": 7}, {"max_len_a": 1.5, "max_len_b": 12}, {"lenpen": 2.0, "unnormalized": True, "temperature": 1.3}],
    ids=str,
)
def test_rules_and_prefixes(recorder, settings):
    models, cfg = [long_model(1)], replace(CFG, **settings)
    batches = [
        replace(
            batch, prefix_tokens=torch.tensor([[4 + i % 3, 5, 1 if i % 2 else 6] for i in range(len(batch.src_tokens))])
        )
        for batch in toy_batches()
    ]
    expected = search(models, cfg, batches)
    agree(search(models, replace(cfg, cuda_graphs=True), batches), expected)
    assert recorder.repeated > 20


def test_graphs_are_kept_for_the_next_search(recorder):
    """And nothing of the search before is in it. Of another model's parameters, they are not kept."""
    model, cfg = long_model(1), replace(CFG, cuda_graphs=True)
    expected = search([model], CFG)
    search([model], cfg)
    recorded, (_, graphs) = recorder.recorded, capture._KEPT[model]
    with torch.inference_mode():
        for memory in graphs._memory.values():
            memory.fill_(torch.nan)
    agree(search([model], cfg), expected)
    assert recorder.recorded == recorded
    agree(search([model], replace(cfg, beam=2)), search([model], replace(CFG, beam=2)))
    other = long_model(2)
    expected = search([other], CFG)
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = value.data.clone()
    agree(search([model], cfg), expected)
    kept = len(capture._KEPT)
    del model, parameter
    gc.collect()
    assert len(capture._KEPT) == kept - 1


def _warnings(caplog):
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("error", [RuntimeError("not permitted\nmore"), torch.OutOfMemoryError("CUDA out of memory")])
def test_failing_recording_is_said_once_and_changes_nothing(recorder, caplog, error):
    models = [long_model(1)]
    expected = search(models, CFG)
    recorder.failures = [error]
    for _ in range(2):
        agree(search(models, replace(CFG, cuda_graphs=True)), expected)
    reason = str(error).partition("\n")[0]
    assert _warnings(caplog) == [f"--cuda-graphs failed, going on without: {type(error).__name__}: {reason}"]
    assert (recorder.given_up, recorder.repeated) == (1, 0)


def test_failing_to_load_changes_nothing(recorder, caplog, monkeypatch):
    """As where memory is short for a moment: the batch's own caches are whole."""
    models, load = [long_model(1), long_model(2)], BufferedCache.load
    expected = search(models, CFG)
    calls = []

    def fails(self, other):
        calls.append(load(self, other))
        if len(calls) == 8:  # of the second model
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BufferedCache, "load", fails)
    agree(search(models, replace(CFG, cuda_graphs=True)), expected)
    assert _warnings(caplog) == ["--cuda-graphs failed, going on without: OutOfMemoryError: CUDA out of memory"]
    assert recorder.repeated > 0


def test_memory_that_others_need_is_given_back(recorder, caplog, monkeypatch):
    models, candidates = [long_model(1)], beam_search.SearchBatch.candidates
    expected = search(models, CFG)

    def fails(self, step):
        if recorder.repeated > 9:  # as long as there are graphs
            recorder.repeated = 0
            raise torch.OutOfMemoryError("CUDA out of memory")
        return candidates(self, step)

    monkeypatch.setattr(beam_search.SearchBatch, "candidates", fails)
    agree(search(models, replace(CFG, cuda_graphs=True)), expected)
    assert _warnings(caplog) == ["--cuda-graphs: memory is short; going on without"]
    assert recorder.repeated == recorder.given_up == 0 and not capture._KEPT[models[0]][1]._steps


def test_more_shapes_than_graphs(recorder, monkeypatch):
    monkeypatch.setattr(capture, "MOST_GRAPHS", 2)
    models = [long_model(1)]
    agree(search(models, replace(CFG, cuda_graphs=True)), search(models, CFG))
    assert recorder.recorded == 2


def test_says_once_that_it_does_nothing(caplog):
    capture._say.cache_clear()
    for _ in range(2):
        search([toy_model()], GenerationConfig(max_len_b=5, cuda_graphs=True))
    assert _warnings(caplog) == ["--cuda-graphs does nothing here: generation is not on a GPU"]


@pytest.mark.parametrize(
    ("settings", "attn", "reason"),
    [
        ({"sampling": True}, False, "--sampling is given"),
        ({"no_repeat_ngram_size": 2}, False, "--no-repeat-ngram-size is given"),
        ({}, True, "attention is wanted"),
    ],
)
def test_obstacles(recorder, caplog, settings, attn, reason):
    cfg = GenerationConfig(max_len_b=20, cuda_graphs=True, **settings)
    list(search_batches([toy_model()], toy_batches(), cfg, need_attn=attn, threads=1))
    assert _warnings(caplog) == [f"--cuda-graphs does nothing here: {reason}"]
    assert recorder.repeated == 0
