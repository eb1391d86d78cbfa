"""Beam search against an independent slow one, and what must hold of any output."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fairseq import admin
from fairseq.checkpoint import load_model
from fairseq.data.indexed_dataset import IndexedDataset
from fairseq.errors import FairseqError
from fairseq.generation import beam_search as one_batch
from fairseq.generation import search
from fairseq.generation.beam_search import SearchBatch, Sources
from fairseq.generation.candidates import best_candidates, log2_sum_exp2
from fairseq.generation.history import Hypothesis
from fairseq.generation.sampling import sample, sentence_noise, truncate
from fairseq.generation.score_reference import score_reference
from fairseq.generation.search import beam_search, search_batches
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig
from tests.reference_search import reference_search
from tests.toys import VOCAB, toy_model

PAD, EOS, UNK = 1, 2, 3
BASE = GenerationConfig(max_len_b=8)


def sources(seed: int = 0, lengths: tuple[int, ...] = (5, 3, 7, 1, 4)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.cat([torch.randint(4, VOCAB, (n,), generator=generator), torch.tensor([EOS])]) for n in lengths]


def batch_of(rows: list[Tensor]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])


def next_lprobs(
    models: list[Transformer], source: Tensor, prefixes: list[list[int]], temperature: float = 1.0
) -> list[list[float]]:
    """A whole forward pass over outputs of one length, without cache or padding."""
    prev = torch.tensor([[EOS, *tokens] for tokens in prefixes])
    with torch.no_grad():
        logits = [m(source.expand(len(prev), -1), None, prev)[0][:, -1] for m in models]
    return torch.stack([(x / temperature).softmax(-1) for x in logits]).mean(0).log().tolist()


def allowed_tokens(tokens: list[int], step: int, cfg: GenerationConfig, max_len: int, prefix: list[int]) -> set[int]:
    if step == max_len:
        return {EOS}
    if step < len(prefix):
        return {prefix[step]}
    allowed = set(range(VOCAB)) - {PAD}
    if step < cfg.min_len:
        allowed.discard(EOS)
    n = cfg.no_repeat_ngram_size
    if n:
        seen = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
        allowed -= {v for v in allowed if (*tokens[len(tokens) - n + 1 :], v) in seen}
    return allowed


def slow_search(
    models: list[Transformer], source: Tensor, cfg: GenerationConfig, prefix: list[int] | None = None
) -> list[tuple[list[int], float, list[float]]]:
    """fairseq's rules in plain Python for one sentence: (tokens, score, positional scores), best first."""
    max_len = int(cfg.max_len_a * len(source) + cfg.max_len_b)
    active: list[tuple[list[int], list[float]]] = [([], [])]
    finished: list[tuple[list[int], float, list[float]]] = []
    for step in range(max_len + 1):
        candidates = []
        all_lprobs = next_lprobs(models, source, [tokens for tokens, _ in active], cfg.temperature)
        for (tokens, scores), lprobs in zip(active, all_lprobs, strict=True):
            lprobs[UNK] -= cfg.unkpen
            for token in allowed_tokens(tokens, step, cfg, max_len, prefix or []):
                candidates.append(([*tokens, token], [*scores, lprobs[token]]))
        candidates.sort(key=lambda c: -sum(c[1]))
        candidates = candidates[: 2 * cfg.beam]
        active = []
        for rank, (tokens, scores) in enumerate(candidates):
            if tokens[-1] != EOS:
                active.append((tokens, scores))
            elif rank < cfg.beam and len(finished) < cfg.beam:
                norm = 1.0 if cfg.unnormalized else len(tokens) ** cfg.lenpen
                finished.append((tokens, sum(scores) / norm, scores))
        active = active[: cfg.beam]
        if len(finished) == cfg.beam or not active:
            break
    return sorted(finished, key=lambda f: -f[1])


def assert_same(found: list[Hypothesis], expected: list[tuple[list[int], float, list[float]]]) -> None:
    assert [h.tokens.tolist() for h in found] == [tokens for tokens, _, _ in expected]
    for hypothesis, (_, score, positional) in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, abs=1e-5)
        assert hypothesis.positional_scores.tolist() == pytest.approx(positional, abs=1e-5)


VARIANTS = {
    "plain": BASE,
    "beam 1": replace(BASE, beam=1),
    "beam 4": replace(BASE, beam=4),
    "as wide as the vocabulary": replace(BASE, beam=VOCAB, max_len_b=3),
    "short": replace(BASE, lenpen=0.2),
    "long": replace(BASE, lenpen=2.0),
    "unnormalized": replace(BASE, unnormalized=True),
    "min_len": replace(BASE, min_len=5),
    "min_len 0": replace(BASE, min_len=0),
    "unkpen": replace(BASE, unkpen=3.0),
    "unkpen below 0": replace(BASE, unkpen=-3.0),
    "no 1-gram twice": replace(BASE, no_repeat_ngram_size=1),
    "no 2-gram twice": replace(BASE, no_repeat_ngram_size=2),
    "no 3-gram twice": replace(BASE, no_repeat_ngram_size=3, max_len_b=12),
    "temperature": replace(BASE, temperature=2.5),
    "max_len by source": replace(BASE, max_len_a=1.4, max_len_b=1),
}


@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS.keys())
def test_agrees_with_slow_search(cfg):
    for seed in (1, 2, 3):
        models = [toy_model(seed)]
        rows = sources(seed)
        for source, found in zip(rows, beam_search(models, batch_of(rows), cfg), strict=True):
            assert_same(found, slow_search(models, source, cfg))


def test_ensemble_averages_probabilities():
    models = [toy_model(1), toy_model(2), toy_model(3, decoder_layers=1)]
    rows = sources()
    for source, found in zip(rows, beam_search(models, batch_of(rows), BASE), strict=True):
        assert_same(found, slow_search(models, source, BASE))


def test_prefix_begins_the_output_and_its_end_ends_it():
    models = [toy_model()]
    rows = sources()
    prefixes = [[4, EOS, PAD], [5, 6, 4], [7, 7, 9], [UNK, 9, 5], [8, 8, EOS]]
    cfg = replace(BASE, no_repeat_ngram_size=1)  # a forced token may repeat
    found = beam_search(models, batch_of(rows), cfg, prefix_tokens=torch.tensor(prefixes))
    for source, prefix, hypotheses in zip(rows, prefixes, found, strict=True):
        prefix = [token for token in prefix if token != PAD]
        assert_same(hypotheses, slow_search(models, source, cfg, prefix))
        assert hypotheses[0].tokens.tolist()[: len(prefix)] == prefix
    assert [len(hypotheses) for hypotheses in found] == [1, 5, 5, 5, 1]
    short = beam_search(models, batch_of(rows[:2]), BASE, prefix_tokens=torch.tensor([[5, 6], [4, PAD]]))
    assert_same(short[1], slow_search(models, rows[1], BASE, [4]))


def test_beam_1_is_greedy():
    model, source = toy_model(), sources()[0]
    tokens: list[int] = []
    while EOS not in tokens and len(tokens) < 8:
        [lprobs] = next_lprobs([model], source, [tokens])
        lprobs[PAD] = -math.inf
        if not tokens:
            lprobs[EOS] = -math.inf
        tokens.append(max(range(VOCAB), key=lambda v: lprobs[v]))
    [[found]] = beam_search([model], source[None], replace(BASE, beam=1))
    assert found.tokens.tolist() == ([*tokens, EOS] if EOS not in tokens else tokens)


@pytest.mark.parametrize(
    "cfg",
    [BASE, replace(BASE, max_len_a=1.5, max_len_b=2), replace(BASE, sampling=True, beam=3)],
    ids=["beam", "max_len_a", "sampling"],
)
def test_results_do_not_depend_on_the_batch(cfg):
    models = [toy_model()]
    rows = sources(lengths=(5, 3, 7, 1, 4, 2, 2, 6))
    together = beam_search(models, batch_of(rows), cfg, need_attn=True)
    for i, source in enumerate(rows):
        [alone] = beam_search(models, source[None], cfg, ids=[i], need_attn=True)
        for a, b in zip(together[i], alone, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.score == pytest.approx(b.score, abs=1e-5)
            assert a.attention is not None and b.attention is not None
            assert torch.allclose(a.attention, b.attention, atol=1e-5)  # padding is not part of it


def test_match_source_len():
    rows = sources()
    cfg = replace(BASE, match_source_len=True)
    for source, found in zip(rows, beam_search([toy_model()], batch_of(rows), cfg), strict=True):
        assert {len(h.tokens) for h in found} == {len(source)}


def test_max_len_is_bounded_by_the_model():
    model = toy_model(max_target_positions=6)
    cfg = replace(BASE, max_len_b=200, min_len=100)
    [found] = beam_search([model], sources()[:1][0][None], cfg)
    assert {len(h.tokens) for h in found} == {6}


@pytest.mark.parametrize("vocab", [4, 8, 9, 16, 44, 61])
def test_best_candidates_are_those_of_a_whole_sort(vocab):
    generator = torch.Generator().manual_seed(vocab)
    for beam in (1, 2, 5):
        lprobs = torch.randn(7, beam, vocab, generator=generator)
        lprobs[:, :, 1] = -math.inf
        scores = torch.randn(7, beam, generator=generator)
        scores[0, 1:] = -math.inf
        totals, order = (lprobs + scores[:, :, None]).flatten(1).sort(dim=1, descending=True)
        offsets = torch.randn(7, beam, generator=generator)
        found, tokens, beams = best_candidates(lprobs - offsets[:, :, None], offsets, scores, 2 * beam)
        torch.testing.assert_close(found, totals[:, : 2 * beam])
        real = found.isfinite()
        assert torch.equal((beams * vocab + tokens)[real], order[:, : 2 * beam][real])
        assert tokens.max() < vocab and beams.max() < beam


def test_attention_is_that_of_a_plain_forward_pass():
    models, rows = [toy_model(1), toy_model(2)], sources()
    for need_attn in (False, True):
        found = beam_search(models, batch_of(rows), BASE, need_attn=need_attn)
    scored = score_reference(models, batch_of(rows), [h[0].tokens for h in found], need_attn=True)
    for source, best, [reference] in zip(rows, (h[0] for h in found), scored, strict=True):
        assert best.attention is not None and reference.attention is not None
        assert best.attention.shape == (len(source), len(best.tokens))
        assert torch.allclose(best.attention.sum(0), torch.ones(len(best.tokens)), atol=1e-5)
        assert torch.allclose(best.attention, reference.attention.float(), atol=1e-5)


def test_score_reference_is_the_models_log_probability():
    models, rows = [toy_model(1), toy_model(2)], sources()
    targets = sources(9, lengths=(2, 6, 1, 3, 4))
    found = score_reference(models, batch_of(rows), targets)
    for source, target, [hypothesis] in zip(rows, targets, found, strict=True):
        prev = torch.cat([torch.tensor([EOS]), target[:-1]])
        probs = torch.stack([m(source[None], None, prev[None])[0][0].softmax(-1) for m in models]).mean(0)
        expected = probs[torch.arange(len(target)), target].log()
        assert hypothesis.tokens.tolist() == target.tolist()
        assert torch.allclose(hypothesis.positional_scores.double(), expected, atol=1e-6)
        assert hypothesis.score == pytest.approx(expected.mean().item(), abs=1e-6)


def test_scores_of_a_search_are_those_of_score_reference():
    models, rows = [toy_model()], sources()
    found = beam_search(models, batch_of(rows), BASE)
    scored = score_reference(models, batch_of(rows), [h[0].tokens for h in found])
    for best, [reference] in zip((h[0] for h in found), scored, strict=True):
        assert best.score == pytest.approx(reference.score, abs=1e-5)


def test_low_precision_models_are_searched_in_float32():
    model = toy_model().bfloat16()
    [found] = beam_search([model], sources()[0][None], BASE)
    assert found[0].positional_scores.dtype == torch.float32
    assert found[0].score == pytest.approx(found[0].positional_scores.double().mean().item(), abs=1e-6)


# -- sampling


def first_tokens(cfg: GenerationConfig, model: Transformer, seed: int = 1) -> Tensor:
    [found] = beam_search([model], sources()[0][None], replace(cfg, sampling=True, max_len_b=1), seed=seed)
    assert len(found) == cfg.beam
    return torch.stack([h.tokens[0] for h in found])


def first_probs(model: Transformer) -> Tensor:
    probs = torch.tensor(next_lprobs([model], sources()[0], [[]])[0], dtype=torch.float64).exp()
    probs[[PAD, EOS]] = 0  # min_len is 1
    return probs / probs.sum()


def test_samples_have_the_models_distribution():
    model, n = toy_model(sharpness=2), 4000
    tokens = first_tokens(GenerationConfig(beam=n), model)
    expected = first_probs(model)
    share = tokens.bincount(minlength=VOCAB) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 4.5 * error + 1e-12).all()


def test_topk_and_topp_restrict_the_support():
    model = toy_model(sharpness=2)
    order = first_probs(model).argsort(descending=True)
    tokens = first_tokens(GenerationConfig(beam=2000, sampling_topk=3), model)
    assert set(tokens.tolist()) == set(order[:3].tolist())
    probs = torch.tensor(next_lprobs([model], sources()[0], [[]])[0]).exp()[order]  # </s> is out, its mass remains
    nucleus = int((probs.cumsum(0) < 0.6).sum()) + 1
    assert 1 < nucleus < VOCAB - 2
    tokens = first_tokens(GenerationConfig(beam=2000, sampling_topp=0.6), model)
    assert set(tokens.tolist()) == set(order[:nucleus].tolist())


def test_truncate_by_hand():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert truncate(probs, -1, 0.75).tolist() == [0.5, 0.25, 0, 0]
    assert truncate(probs, -1, 0.76).tolist() == [0.5, 0.25, 0.125, 0]
    assert truncate(probs, -1, 1e-9).tolist() == [0.5, 0, 0, 0]
    assert truncate(probs, 3, 0.9).tolist() == [0.5, 0.25, 0.125]


def test_sample_inverts_the_distribution():
    lprobs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).log().expand(5, -1)
    noise = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 1 - 1e-12], dtype=torch.float64)
    assert sample(lprobs, noise, -1, -1).tolist() == [1, 1, 3, 3, 4]


def test_sampling_depends_on_seed_and_sentence_alone():
    cfg, model = GenerationConfig(beam=50), toy_model(sharpness=2)
    assert torch.equal(first_tokens(cfg, model, 1), first_tokens(cfg, model, 1))
    assert not torch.equal(first_tokens(cfg, model, 1), first_tokens(cfg, model, 2))
    noise = sentence_noise(1, [3, 4], 6, 2)
    assert torch.equal(noise[1, :4], sentence_noise(1, [4], 4, 2)[0])
    assert not torch.equal(noise[0], noise[1])


def test_sampled_scores_are_the_models_log_probabilities():
    models, source = [toy_model()], sources()[0]
    [found] = beam_search(models, source[None], replace(BASE, sampling=True, beam=6))
    assert len(found) == 6
    for hypothesis in found:
        [[reference]] = score_reference(models, source[None], [hypothesis.tokens])
        assert torch.allclose(hypothesis.positional_scores, reference.positional_scores, atol=1e-5)


# -- errors


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"beam": 0}, "--beam 0"),
        ({"beam": VOCAB + 1}, f"--beam {VOCAB + 1}: the target dictionary has {VOCAB} entries"),
        ({"nbest": 6}, "--nbest 6"),
        ({"min_len": -1}, "--min-len"),
        ({"max_len_b": 0}, "--max-len-b"),
        ({"min_len": 9}, "--max-len-b 8"),
        ({"max_len_a": -1.0}, "--max-len-a"),
        ({"temperature": 0.0}, "--temperature"),
        ({"sampling_topk": 3}, "--sampling-topk needs --sampling"),
        ({"sampling_topp": 0.3}, "--sampling-topp needs --sampling"),
        ({"sampling": True, "sampling_topp": 1.3}, "--sampling-topp 1.3"),
        ({"no_repeat_ngram_size": -1}, "--no-repeat-ngram-size"),
    ],
)
def test_settings_out_of_range(settings, flag):
    with pytest.raises(FairseqError, match=flag.replace("-", r"\-")):
        beam_search([toy_model()], sources()[0][None], replace(BASE, **settings))


def test_model_that_gives_nan():
    model = toy_model()
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    with pytest.raises(FairseqError, match=r"sentence 7 .* not finite"):
        beam_search([model], sources()[0][None], BASE, ids=[7])


# -- the straightforward search


def deep_model(layers: int, init_type: str = "default") -> Transformer:
    """Random; with Admin, profiled."""
    model = toy_model(encoder_layers=layers, decoder_layers=layers, init_type=init_type)
    if init_type != "default":
        src = batch_of(sources(1))
        batch = {"src_tokens": src, "src_lengths": src.ne(PAD).sum(1), "prev_output_tokens": src.flip(1)}
        admin.apply_profile(model, admin.profile(model, batch))
    return model


def compare(models: list[Transformer], rows: list[Tensor], cfg: GenerationConfig, size: int = 128, **options) -> None:
    """The package's search finds what the reference finds, in every batch of ``size`` sentences."""
    prefixes = options.pop("prefixes", None)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        given = dict(options, ids=list(range(len(rows)))[part])
        if prefixes is not None:
            given["prefix_tokens"] = prefixes[part]
        expected = reference_search(models, batch_of(rows[part]), cfg, **given)
        for a, b in zip(beam_search(models, batch_of(rows[part]), cfg, **given), expected, strict=True):
            assert_same(a, [(h.tokens.tolist(), h.score, h.positional_scores.tolist()) for h in b])
            for x, y in zip(a, b, strict=True):
                assert (x.attention is None) == (y.attention is None)
                if x.attention is not None and y.attention is not None:
                    torch.testing.assert_close(x.attention, y.attention.float(), atol=1e-5, rtol=1e-5)


LENGTHS = (2, 6, 3, 5, 4, 6, 2, 1, 3, 5, 9, 4, 6)
DEPTHS = pytest.mark.parametrize(("layers", "init_type"), [(6, "default"), (18, "adaptive-profiling")])
SEARCHES = {
    "beam 1": {"beam": 1},
    "beam 4": {"beam": 4},
    "beam 5": {"beam": 5},
    "beam 10": {"beam": 10},
    "n-grams": {"no_repeat_ngram_size": 2},
    "long": {"min_len": 20, "max_len_b": 30, "lenpen": 1.5},
    "sampling": {"sampling": True, "beam": 4},
    "top 3": {"sampling": True, "sampling_topk": 3},
    "nucleus": {"sampling": True, "sampling_topp": 0.7, "temperature": 1.3},
}


@pytest.mark.parametrize("settings", SEARCHES.values(), ids=SEARCHES.keys())
@DEPTHS
def test_agrees_with_the_straightforward_search(layers, init_type, settings):
    cfg = GenerationConfig(**({"max_len_b": 12} | settings))
    compare([deep_model(layers, init_type)], sources(3, LENGTHS), cfg, need_attn=True, seed=5)


@pytest.mark.parametrize("size", [1, 5, 128])
@DEPTHS
def test_agrees_in_every_batch(layers, init_type, size):
    rows = sources(4, LENGTHS)
    compare([deep_model(layers, init_type)], rows, GenerationConfig(max_len_b=12), size=size)


@DEPTHS
def test_agrees_with_prefixes_and_ensembles(layers, init_type):
    models = [deep_model(layers, init_type), deep_model(2)]
    rows = sources(5, LENGTHS)
    prefixes = torch.tensor([[4 + i % 9, 5, PAD if i % 2 else 6] for i in range(len(rows))])
    cfg = GenerationConfig(max_len_b=12)
    compare(models, rows, cfg)
    compare(models[:1], rows, cfg, prefixes=prefixes)
    compare(models, rows, replace(cfg, beam=3, sampling=True), prefixes=prefixes)


@pytest.mark.parametrize("check_every", [1, 3, 4])
@pytest.mark.parametrize("chunk", [1, 200, 2**23])
def test_neither_pieces_nor_rare_checks_change_the_result(monkeypatch, check_every, chunk):
    """A GPU looks for finished sentences every few steps only; logits are computed for some sentences at a time."""
    monkeypatch.setattr(one_batch, "CHUNK", chunk)
    monkeypatch.setattr(one_batch, "check_interval", lambda device: check_every)
    rows = sources(6, lengths=(5, 3, 7, 1, 4, 2, 2, 6))
    for cfg in (BASE, replace(BASE, max_len_a=1.5, max_len_b=2), replace(BASE, sampling=True, beam=3)):
        compare([toy_model()], rows, cfg, need_attn=True)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(5, 4, 4), (1, 8, 3, 1), (13,)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"beam": 1}, {"max_len_a": 2.0, "max_len_b": 3, "min_len": 5}], ids=str)
def test_sentences_that_wait_for_those_of_other_batches(monkeypatch, share, sizes, settings):
    """Of batches of unlike length and ensembles; with a share of 1 all wait after the first step, or the prefix."""
    monkeypatch.setattr(search, "WAITING_SHARE", share)
    models, rows = [toy_model(1), toy_model(2)], sources(8, LENGTHS)
    cfg = GenerationConfig(**({"max_len_b": 12} | settings))
    batches, start = [], 0
    for size in sizes:
        prefixes = torch.tensor([[4, 5 + i] for i in range(size)]) if start == sizes[0] else None
        batches.append(Sources(batch_of(rows[start : start + size]), None, prefixes))
        start += size
    found = list(search_batches(models, iter(batches), cfg))
    assert [len(hypotheses) for hypotheses in found] == list(sizes)
    for batch, hypotheses in zip(batches, found, strict=True):
        expected = reference_search(models, batch.src_tokens, cfg, prefix_tokens=batch.prefix_tokens)
        for a, b in zip(hypotheses, expected, strict=True):
            assert_same(a, [(h.tokens.tolist(), h.score, h.positional_scores.tolist()) for h in b])


def test_attention_in_several_batches():
    """Each sentence's over its own source, whichever batch it is in."""
    model, rows, cfg = toy_model(), sources(8, LENGTHS), GenerationConfig(max_len_b=12)
    batches = [Sources(batch_of(rows[start : start + 5])) for start in range(0, len(rows), 5)]
    found = search_batches([model], batches, cfg, need_attn=True)
    for row, hypotheses in zip(rows, (sentence for batch in found for sentence in batch), strict=True):
        [alone] = beam_search([model], row[None], cfg, need_attn=True)
        for a, b in zip(hypotheses, alone, strict=True):
            assert a.attention is not None and a.attention.size(0) == len(row)
            torch.testing.assert_close(a.attention, b.attention, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("share", "together"), [(4, 8), (2, 4)])
def test_waiting_sentences_take_no_more_room_than_a_batch(monkeypatch, share, together):
    monkeypatch.setattr(search, "WAITING_SHARE", share)
    counts: list[int] = []
    candidates = SearchBatch.candidates

    def count(self: SearchBatch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        counts.append(len(self.sentences))
        return candidates(self, step)

    monkeypatch.setattr(SearchBatch, "candidates", count)
    rows = sources(9, lengths=(4,) * 24)
    batches = [Sources(batch_of(rows[i : i + together])) for i in range(0, len(rows), together)]
    assert sum(map(len, search_batches([toy_model()], batches, BASE))) == len(rows)
    assert max(counts) == together


@pytest.mark.slow
@pytest.mark.parametrize("beam", [1, 4, 5, 10])
@pytest.mark.parametrize("size", [1, 32, 128])
def test_agrees_on_a_real_model(shared, beam, size):
    """In float32: of sentences with ties the order may differ, of which there is none among these."""
    model = load_model(shared / "reference" / "fairseq012_tiny.pt")
    dataset = IndexedDataset(shared / "reference" / "multi30k-databin" / "test.en-de.en")
    numbers = range(0, len(dataset), 200 if size == 1 else 25)
    rows = sorted((torch.tensor(dataset[i].tolist()) for i in numbers), key=len)
    for start in range(0, len(rows), size):
        batch, cfg = batch_of(rows[start : start + size]), GenerationConfig(beam=beam)
        for a, b in zip(beam_search([model], batch, cfg), reference_search([model], batch, cfg), strict=True):
            assert [h.tokens.tolist() for h in a] == [h.tokens.tolist() for h in b]
            for x, y in zip(a, b, strict=True):
                assert x.score == pytest.approx(y.score, abs=1e-5)
                torch.testing.assert_close(x.positional_scores, y.positional_scores, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_log2_sum_exp2_does_not_overflow(shift):
    x = torch.randn(70, 50, generator=torch.Generator().manual_seed(0)) * 5 + shift
    expected = torch.logsumexp(x.double() * math.log(2), dim=1, keepdim=True) / math.log(2)
    torch.testing.assert_close(log2_sum_exp2(x).double(), expected, atol=1e-4, rtol=1e-6)
