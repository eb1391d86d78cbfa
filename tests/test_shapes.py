"""Batches of few shapes: every sentence once, within the limits, little padding, empty rows that count nowhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.batching import BatchLimits, LengthBuckets
from fairseq.data.indexed_dataset import IndexedDataset
from fairseq.data.shapes import _cheapest_path, choose_shapes
from fairseq.data.translation import BatchShape, TranslationData
from fairseq.errors import FairseqError
from fairseq.options import DataConfig
from fairseq.training.losses import batch_losses
from tests.training_runs import batches_of_shapes, last, train, trainer_and_batches, updates


def _plan(src, tgt, count, seed=1, **limits):
    buckets = LengthBuckets(src, tgt, np.arange(len(src)), BatchLimits(**limits))
    order = buckets.shuffled(np.random.default_rng(seed))
    batches, shapes = choose_shapes(buckets, count).cut(order, np.random.default_rng(seed))
    return list(zip(batches, shapes, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 12),
    st.integers(32, 300),
    st.sampled_from([None, 3, 20]),
    st.sampled_from([1, 8]),
    st.sampled_from([1, 4]),
    st.integers(0, 2**31),
)
def test_every_sentence_once_within_the_limits(n, count, max_tokens, max_sentences, rows_multiple, multiple, seed):
    rng = np.random.default_rng(seed)
    src = rng.geometric(0.15, n).clip(1, 30).astype(np.int32)
    tgt = (src + rng.integers(-3, 4, n)).clip(1, 32).astype(np.int32)
    limits = {"max_tokens": max_tokens, "max_sentences": max_sentences, "length_multiple": multiple}
    batches = _plan(src, tgt, count, rows_multiple=rows_multiple, **limits)
    assert sorted(np.concatenate([batch for batch, _ in batches]).tolist()) == list(range(n))
    assert len({shape for _, shape in batches}) <= count
    for batch, (rows, src_len, tgt_len) in batches:
        assert 0 < len(batch) <= rows <= (max_sentences or rows)
        assert src[batch].max() <= src_len
        assert tgt[batch].max() <= tgt_len
        assert src_len % multiple == tgt_len % multiple == 0
        assert rows * max(src_len, tgt_len) <= max_tokens
    assert sum(len(batch) < shape.rows for batch, shape in batches) <= 1


def _corpus(shared: Path, databin: str) -> tuple[np.ndarray, np.ndarray]:
    src, tgt = (IndexedDataset(shared / "reference" / databin / f"train.en-de.{side}").sizes for side in ("en", "de"))
    return src, tgt


@pytest.mark.parametrize(("max_tokens", "most"), [(4096, 0.06), (16384, 0.08)])
def test_padding_and_shapes_on_real_data(shared, max_tokens, most):
    src, tgt = _corpus(shared, "multi30k-databin")
    plans = [_plan(src, tgt, 48, seed, max_tokens=max_tokens, rows_multiple=8) for seed in (1, 2)]
    shapes = [[shape for _, shape in plan] for plan in plans]
    assert sorted(shapes[0]) == sorted(shapes[1])  # the same every epoch
    assert {tuple(batch) for batch, _ in plans[0]} != {tuple(batch) for batch, _ in plans[1]}
    assert len(set(shapes[0])) <= 48
    positions = sum(rows * (src_len + tgt_len) for rows, src_len, tgt_len in shapes[0])
    assert 1 - (src.sum() + tgt.sum()) / positions < most


def test_batches_that_have_few_shapes_already_are_kept():
    src = np.repeat([3, 5, 9], 40).astype(np.int32)
    buckets = LengthBuckets(src, src, np.arange(120), BatchLimits(60))
    expected = buckets.cut(buckets.shuffled())
    kept, _ = choose_shapes(buckets, 20).cut(buckets.shuffled(), np.random.default_rng(1))
    assert [batch.tolist() for batch in kept] == [batch.tolist() for batch in expected]


def test_very_long_sentences_have_the_same_shapes_every_epoch():
    src, tgt = np.random.default_rng(0).integers(1, 9000, (2, 500)).astype(np.int32)
    plans = [_plan(src, tgt, 12, seed, max_tokens=20_000) for seed in (1, 2)]
    shapes = [[shape for _, shape in plan] for plan in plans]
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) <= 12
    for batch, (rows, src_len, tgt_len) in plans[0] + plans[1]:
        assert src[batch].max() <= src_len
        assert tgt[batch].max() <= tgt_len
        assert rows * max(src_len, tgt_len) <= 20_000


def test_the_last_batch_has_empty_rows_rather_than_a_shape_of_its_own():
    src = np.full(21, 5, np.int32)
    [(first, shape), (second, same), *rest] = _plan(src, src, 1, max_tokens=100, rows_multiple=8)
    assert not rest
    assert shape == same == (16, 5, 5)
    assert (len(first), len(second)) == (16, 5)


def test_too_long_a_sentence():
    src = np.array([3, 9], np.int32)
    with pytest.raises(FairseqError, match="sentence 1 has 9 tokens, more than --max-tokens 8"):
        _plan(src, src, 4, max_tokens=8)


def test_cheapest_path_against_all_paths():
    rng = np.random.default_rng(0)
    cost = np.triu(rng.integers(1, 50, (7, 7)).astype(float), 1)
    cost[cost == 0] = np.inf
    cost[0, 6] = np.inf

    def all_paths(at: int) -> list[list[int]]:
        return [[]] if at == 6 else [[to, *rest] for to in range(at + 1, 7) for rest in all_paths(to)]

    def price(path: list[int]) -> float:
        return sum(cost[a, b] for a, b in zip([0, *path], path, strict=False))

    for most in (1, 2, 3, 6):
        best = min(price(path) for path in all_paths(0) if len(path) <= most)
        path = _cheapest_path(cost, most)
        assert len(path) <= most
        assert price(path) == best


@pytest.mark.parametrize("left", [True, False])
def test_collate_to_a_shape(toy_databin, left):
    dataset = TranslationData.open(DataConfig(str(toy_databin))).load("train")
    dataset = dataclasses.replace(dataset, left_pad_source=left)
    indices = np.arange(3)
    plain, shaped = dataset.collate(indices), dataset.collate(indices, BatchShape(5, 20, 17))
    inputs, wider = plain["net_input"], shaped["net_input"]
    assert wider["src_tokens"].shape == (5, 20)
    assert wider["prev_output_tokens"].shape == shaped["target"].shape == (5, 17)
    assert [shaped[key] for key in ("nsentences", "ntokens")] == [plain[key] for key in ("nsentences", "ntokens")]
    assert shaped["id"].tolist() == [0, 1, 2]
    assert wider["src_lengths"].tolist() == [*inputs["src_lengths"].tolist(), 0, 0]
    for narrow, wide in (
        (inputs["src_tokens"], wider["src_tokens"]),
        (inputs["prev_output_tokens"], wider["prev_output_tokens"]),
        (plain["target"], shaped["target"]),
    ):
        assert [row[row != 1].tolist() for row in narrow] == [row[row != 1].tolist() for row in wide[:3]]
    assert (wider["src_tokens"][3:] != 1).sum(1).tolist() == [1, 1]
    assert (wider["src_tokens"][3:, -1 if left else 0] == 2).all()
    assert wider["prev_output_tokens"][3:].tolist() == [[2] + [1] * 16] * 2
    assert (shaped["target"][3:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("init_type", ["default", "adaptive", "subln", "rezero", "b2t"])
def test_padding_and_empty_rows_change_neither_loss_nor_gradients(toy_databin, dtype, init_type):
    trainer, _ = trainer_and_batches(
        toy_databin, "--dropout", 0, "--attention-dropout", 0, "--init-type", init_type, "--encoder-layers", 2
    )
    model = trainer.model.to(dtype)
    dataset = TranslationData.open(DataConfig(str(toy_databin))).load("train")
    results = []
    for shape in (None, BatchShape(16, 20, 17)):
        batch = dataset.collate(np.arange(9), shape)
        model.zero_grad()
        loss, nll = batch_losses(model, trainer.criterion, batch, trainer.args, torch.device("cpu"))
        loss.backward()
        results.append([loss, nll, *(parameter.grad for parameter in model.parameters())])
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5)


def test_processes_have_the_same_number_of_batches_and_count_real_tokens_alone(toy_databin):
    ranks = [batches_of_shapes(toy_databin, 5, 120, rank=rank, world_size=2, num_workers=rank) for rank in (0, 1)]
    steps = [list(itr.updates(2)) for itr in ranks]
    assert [len(update) for update in steps[0]] == [len(update) for update in steps[1]]
    batches = [batch for rank in steps for update in rank for batch in update if batch is not None]
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(300))
    shapes = {(*batch["net_input"]["src_tokens"].shape, batch["target"].shape[1]) for batch in batches}
    assert len(shapes) <= 5
    stats = [itr.take_stats() for itr in ranks]
    whole = batches_of_shapes(toy_databin, 5, 120)._datasets(1)
    assert sum(s["tokens"] for s in stats) == whole.src_sizes.sum() + whole.tgt_sizes.sum()
    cells = sum(batch["net_input"]["src_tokens"].numel() + batch["target"].numel() for batch in batches)
    assert sum(s["positions"] for s in stats) == cells


def test_training_stops_and_goes_on_exactly(toy_databin, tmp_path):
    flags = ("--batch-shapes", 4, "--max-tokens", 120, "--no-epoch-checkpoints")
    whole = updates(train(toy_databin, tmp_path / "whole", *flags, "--max-update", 12))
    train(toy_databin, tmp_path / "parts", *flags, "--max-update", 5)
    rest = updates(train(toy_databin, tmp_path / "parts", *flags, "--max-update", 12))
    assert {n: line["loss"] for n, line in rest.items()} == {n: whole[n]["loss"] for n in rest}
    for name, tensor in last(tmp_path / "whole")["model"].items():
        assert torch.equal(tensor, last(tmp_path / "parts")["model"][name])
