"""Batches: budgets, order, epochs, ranks, continuing."""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.batching import BatchLimits, LengthBuckets, make_batches, plan_batches, select_by_size
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.reading import iterate_batches
from fairseq.data.translation import Batch, BatchShape, LanguagePairDataset
from fairseq.errors import FairseqError

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=80)
POSITIONS = (1024, 1024)


def _sizes(lengths: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    src, tgt = np.array(lengths, dtype=np.int32).T
    return src, tgt


def _make_dataset(path: Path, count: int, seed: int = 0, longest: int = 20) -> LanguagePairDataset:
    rng = np.random.default_rng(seed)
    for language in ("en", "de"):
        with IndexedDatasetWriter(path / f"train.en-de.{language}", np.uint16) as writer:
            for size in rng.integers(0, longest, count):
                writer.add([*rng.integers(4, 12, size), 2])
    dictionary = Dictionary.build({f"{n}": 1 for n in range(8)})
    sides = [IndexedDataset(path / f"train.en-de.{language}") for language in ("en", "de")]
    return LanguagePairDataset(sides[0], sides[1], dictionary, dictionary)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LanguagePairDataset:
    """300 pairs of 1 to 20 tokens."""
    return _make_dataset(tmp_path_factory.mktemp("data"), 300)


def _iterator(dataset: LanguagePairDataset, **settings_: Any) -> EpochBatchIterator:
    defaults = {"max_tokens": 100, "max_sentences": None, "max_positions": POSITIONS, "seed": 1}
    return EpochBatchIterator(lambda epoch: dataset, **(defaults | settings_))


def _ids(batch: Batch | None) -> tuple[int, ...] | None:
    return None if batch is None else tuple(batch["id"].tolist())


def _epoch(iterator: EpochBatchIterator, update_freq: int = 1) -> list[list[tuple[int, ...] | None]]:
    return [[_ids(batch) for batch in group] for group in iterator.updates(update_freq)]


def _plan_one_by_one(
    lengths: list[tuple[int, int]], order: list[int], max_tokens: int, max_sentences: int, multiple: int
) -> list[list[int]]:
    """The batching rule, sentence by sentence: a sentence that does not fit closes the batch before it."""

    def fits(batch: list[int]) -> bool:
        return len(batch) <= max_sentences and len(batch) * max(max(lengths[i]) for i in batch) <= max_tokens

    batches, batch = [], list[int]()
    for index in order:
        while batch and not fits([*batch, index]):
            keep = len(batch) // multiple * multiple or len(batch)
            batches.append(batch[:keep])
            batch = batch[keep:]
        batch.append(index)
    return [*batches, batch]


@settings(max_examples=100, deadline=None)
@given(
    LENGTHS,
    st.integers(32, 200),
    st.integers(1, 20),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_plan_equals_the_rule_applied_one_by_one(
    lengths: list[tuple[int, int]],
    max_tokens: int,
    max_sentences: int,
    multiple: int,
    seq_multiple: int,
    is_sorted: bool,
) -> None:
    src, tgt = _sizes(lengths)
    order, limits = np.arange(len(src)), BatchLimits(max_tokens, max_sentences, multiple, seq_multiple)
    if is_sorted:
        buckets = LengthBuckets(src, tgt, order, limits)
        order = buckets.shuffled(np.random.default_rng(max_tokens))
        batches = buckets.cut(order)
    else:
        batches = plan_batches(src, tgt, order, limits)
    assert np.concatenate(batches).tolist() == order.tolist()
    for batch in batches:
        assert (
            len(batch) * math.ceil(max(src[batch].max(), tgt[batch].max()) / seq_multiple) * seq_multiple <= max_tokens
        )
        assert len(batch) <= max_sentences
    padded = [
        (math.ceil(s / seq_multiple) * seq_multiple, math.ceil(t / seq_multiple) * seq_multiple) for s, t in lengths
    ]
    expected = _plan_one_by_one(padded, order.tolist(), max_tokens, max_sentences, multiple)
    assert [b.tolist() for b in batches] == expected


def _sorted(src: np.ndarray, tgt: np.ndarray | None, indices: np.ndarray, seed: int | None = None) -> np.ndarray:
    buckets = LengthBuckets(src, tgt, indices, BatchLimits(max_sentences=1))
    return buckets.shuffled(None if seed is None else np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 2**31), st.sampled_from([slice(None), slice(-1), slice(2, None), slice(None, None, 3)]))
def test_sort_order(lengths: list[tuple[int, int]], seed: int, part: slice) -> None:
    src, tgt = _sizes(lengths)
    indices = np.arange(len(src), dtype=np.int32)[part]

    def key(index: int) -> tuple[int, int]:
        longer, difference = max(lengths[index]), lengths[index][0] - lengths[index][1]
        return longer, -difference if longer % 2 else difference

    assert _sorted(src, tgt, indices).tolist() == sorted(indices.tolist(), key=key)
    shuffled = _sorted(src, tgt, indices, seed).tolist()
    assert sorted(shuffled) == indices.tolist()
    assert [key(i) for i in shuffled] == sorted(key(i) for i in indices)
    if len(indices):  # chance is a number of each, as when checkpoints were saved that may be in the midst of an epoch
        bits = 63 - (2 * max(map(max, lengths)).bit_length() + 1) - max(1, len(indices) - 1).bit_length()
        draws = np.random.default_rng(seed).integers(0, 2 ** min(32, bits), len(indices), np.uint32).tolist()
        by_chance = sorted((*key(i), draw, i) for i, draw in zip(indices.tolist(), draws, strict=True))
        assert shuffled == [i for *_, i in by_chance]
    one_sided = _sorted(src, None, indices).tolist()
    assert one_sided == sorted(indices.tolist(), key=lambda i: lengths[i][0])


def test_equal_lengths_are_shuffled() -> None:
    sizes = np.full(1000, 7, dtype=np.int32)
    orders = [_sorted(sizes, sizes, np.arange(1000), seed) for seed in (1, 1, 2)]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).mean() > 0.9
    assert abs(np.corrcoef(orders[0], np.arange(1000))[0, 1]) < 0.2


def test_very_long_sentences_keep_to_the_budget() -> None:
    src = np.random.default_rng(0).integers(1, 9000, 500).astype(np.int32)
    limits = BatchLimits(20_000, rows_multiple=8)
    buckets = LengthBuckets(src, src, np.arange(500), limits)
    order = buckets.shuffled(np.random.default_rng(1))
    batches = buckets.cut(order)
    assert [b.tolist() for b in batches] == [b.tolist() for b in plan_batches(src, src, order, limits)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(batch) * src[batch].max() <= 20_000 for batch in batches)


def test_padding_on_real_data(shared: Path) -> None:
    sides = [IndexedDataset(shared / "reference" / "multi30k-databin" / f"train.en-de.{lang}") for lang in ("en", "de")]
    src, tgt = sides[0].sizes, sides[1].sizes
    buckets = LengthBuckets(src, tgt, np.arange(len(src)), BatchLimits(4096, rows_multiple=8))
    batches = buckets.cut(buckets.shuffled(np.random.default_rng(1)))
    cells = sum(len(b) * (int(src[b].max()) + int(tgt[b].max())) for b in batches)
    assert 1 - (int(src.sum()) + int(tgt.sum())) / cells < 0.035


def test_limits() -> None:
    sizes = np.array([3, 9, 4], dtype=np.int32)
    with pytest.raises(FairseqError, match=r"sentence 1 has 9 tokens, more than --max-tokens 8"):
        plan_batches(sizes, None, np.arange(3), BatchLimits(8))
    with pytest.raises(FairseqError, match=r"--max-tokens or --batch-size"):
        plan_batches(sizes, None, np.arange(3), BatchLimits())
    assert [b.tolist() for b in plan_batches(sizes, None, np.arange(3), BatchLimits(None, 2))] == [[0, 1], [2]]
    assert plan_batches(sizes, None, np.arange(0), BatchLimits(8)) == []


def test_select_by_size(caplog: pytest.LogCaptureFixture) -> None:
    src, tgt = np.array([5, 11, 3, 2]), np.array([5, 2, 21, 2])
    with pytest.raises(
        FairseqError, match=r"^valid: sentence 1 has 11 source and 2 target .*--skip-invalid-size-inputs-valid-test"
    ):
        select_by_size(src, tgt, (10, 20), name="valid", skip=False)
    with caplog.at_level(logging.WARNING):
        assert select_by_size(src, tgt, (10, 20), name="valid", skip=True).tolist() == [0, 3]
    assert "valid: 2 sentences longer than" in caplog.text
    assert caplog.text.rstrip().endswith("are left out: 1, 2")
    with caplog.at_level(logging.WARNING):
        assert select_by_size(src, tgt, (9, 20), name="train", skip=True, max_tokens=4).tolist() == [3]
    assert "or --max-target-positions 20, or --max-tokens 4 are left out: 0, 1, 2" in caplog.text
    assert select_by_size(src, None, (11, 1), name="valid", skip=False).tolist() == [0, 1, 2, 3]
    with pytest.raises(FairseqError, match="every sentence is longer"):
        select_by_size(src, tgt, (1, 1), name="valid", skip=True)
    with pytest.raises(FairseqError, match="no sentence"):
        select_by_size(src[:0], None, (1, 1), name="valid", skip=True)


def test_make_batches_and_shards(dataset: LanguagePairDataset) -> None:
    common: dict[str, Any] = {"name": "test", "max_tokens": 60, "max_sentences": 8, "max_positions": POSITIONS}
    whole = make_batches(dataset, **common)
    shards = [make_batches(dataset, **common, num_shards=3, shard_id=i) for i in range(3)]
    assert sorted(i for shard in shards for b in shard for i in b.tolist()) == list(range(300))
    assert [b.tolist() for b in shards[1]] == [b.tolist() for b in whole[1::3]]
    with pytest.raises(FairseqError, match=r"--shard-id 3 is not one of 0 to 2"):
        make_batches(dataset, **common, num_shards=3, shard_id=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterate_batches(dataset: LanguagePairDataset, num_workers: int) -> None:
    batches = [np.array([3, 1]), np.array([200]), np.array([5, 6, 7])]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    read = list(iterate_batches(dataset, batches, num_workers))
    assert torch.rand(1) == expected  # reading draws no random numbers that training uses
    assert [_ids(batch) for batch in read] == [(3, 1), (200,), (5, 6, 7)]
    for batch, indices in zip(read, batches, strict=True):
        assert torch.equal(batch["net_input"]["src_tokens"], dataset.collate(indices)["net_input"]["src_tokens"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_reading_processes_are_one_line(dataset: LanguagePairDataset, num_workers: int) -> None:
    small = Dictionary.build({}, padding_factor=1)
    broken = LanguagePairDataset(dataset.src, dataset.tgt, small, small)
    with pytest.raises(FairseqError) as error:
        list(iterate_batches(broken, [np.arange(9)], num_workers))
    assert "\n" not in str(error.value)


class _Deadly(LanguagePairDataset):
    def collate(self, indices: np.ndarray, shape: BatchShape | None = None) -> Batch:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_reading_process_that_dies_is_one_line(dataset: LanguagePairDataset) -> None:
    deadly = _Deadly(dataset.src, dataset.tgt, dataset.src_dict, dataset.tgt_dict)
    with pytest.raises(FairseqError, match=r"a reading process died.*--num-workers"):
        list(iterate_batches(deadly, [np.arange(9)], 1))


class _NotSent(LanguagePairDataset):
    def __reduce__(self) -> Any:
        raise AssertionError


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what is read is sent to the processes")
def test_reading_processes_are_forked_whatever_pythons_choice(dataset: LanguagePairDataset) -> None:
    unsendable = _NotSent(dataset.src, dataset.tgt, dataset.src_dict, dataset.tgt_dict)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        read = list(iterate_batches(unsendable, [np.array([3, 1])], 1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert [_ids(batch) for batch in read] == [(3, 1)]


@pytest.mark.parametrize(("multiple", "num_workers"), [(1, 0), (8, 2)])
def test_stats_of_what_is_handed_out(dataset: LanguagePairDataset, multiple: int, num_workers: int) -> None:
    dataset = dataclasses.replace(dataset, required_seq_len_multiple=multiple)
    iterator = _iterator(dataset, world_size=2, rank=1, num_workers=num_workers)
    tokens = positions = 0
    for group in iterator.updates(2):
        for batch in group:
            if batch is not None:
                assert batch["target"] is not None
                for side in (batch["net_input"]["src_tokens"], batch["target"]):
                    assert side.shape[1] % multiple == 0
                    tokens, positions = tokens + int(side.ne(1).sum()), positions + side.numel()
    stats = iterator.take_stats()
    assert 0 < stats.pop("data_wait") < 60
    assert stats == {"tokens": tokens, "positions": positions}
    assert iterator.take_stats() == {"data_wait": 0, "tokens": 0, "positions": 0}


def test_too_long_with_its_padding() -> None:
    sizes = np.array([5, 9], np.int32)
    with pytest.raises(FairseqError, match=r"sentence 1 has 16 tokens with its padding .*--max-tokens 10"):
        plan_batches(sizes, None, np.arange(2), BatchLimits(10, length_multiple=8))


def test_epochs(dataset: LanguagePairDataset) -> None:
    iterator = _iterator(dataset, required_batch_size_multiple=4)
    epochs = []
    for number in (1, 2, 3):
        assert (iterator.epoch, iterator.updates_done(2)) == (number, 0)
        first = iterator.first_batch()
        epochs.append([batch for group in _epoch(iterator, 2) for batch in group])
        assert epochs[-1][0] == _ids(first)
        assert iterator.end_of_epoch()
        assert iterator.updates_done(2) == iterator.updates_in_epoch(2) == -(-iterator.n_batches // 2)
        assert _epoch(iterator, 2) == []
        iterator.next_epoch()
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch or ()) == list(range(300))
    assert epochs[0] != epochs[1] != epochs[2]
    assert set(epochs[0]) != set(epochs[1])  # other batches, not just another order
    longest = [max(dataset.src_sizes[list(batch or ())]) for batch in epochs[0]]
    assert longest != sorted(longest)


def test_deterministic_from_seed_and_epoch(dataset: LanguagePairDataset) -> None:
    first = _epoch(_iterator(dataset))
    assert _epoch(_iterator(dataset)) == first
    assert _epoch(_iterator(dataset, num_workers=1)) == first
    assert _epoch(_iterator(dataset, seed=2)) != first
    assert len(_epoch(_iterator(dataset, seed=-1))) > 0
    later = _iterator(dataset)
    later.load_state_dict({"epoch": 3, "iterations_in_epoch": 0})
    walked = _iterator(dataset)
    walked.next_epoch()
    walked.next_epoch()
    assert _epoch(later) == _epoch(walked)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(20, 400))
def test_ranks_share_the_global_list(
    dataset: LanguagePairDataset, world_size: int, update_freq: int, max_tokens: int
) -> None:
    whole = [batch for [batch] in _epoch(_iterator(dataset, max_tokens=max_tokens))]
    ranks = [
        _epoch(_iterator(dataset, max_tokens=max_tokens, rank=rank, world_size=world_size), update_freq)
        for rank in range(world_size)
    ]
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1  # the same updates and micro-batches on all
    for rank, updates in enumerate(ranks):
        for k, update in enumerate(updates):
            for u, batch in enumerate(update):
                number = (k * update_freq + u) * world_size + rank
                assert batch == (whole[number] if number < len(whole) else None)
    assert sum(batch is not None for rank in ranks for update in rank for batch in update) == len(whole)


def test_two_ranks_do_what_one_does_with_update_freq_two(dataset: LanguagePairDataset) -> None:
    one = _epoch(_iterator(dataset), 2)
    two = [_epoch(_iterator(dataset, rank=rank, world_size=2), 1) for rank in (0, 1)]
    merged = [[*left, *right] for left, right in zip(*two, strict=True)]
    assert [[batch for batch in group if batch] for group in merged] == one


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_continuing_gives_exactly_the_rest(dataset: LanguagePairDataset, data: st.DataObject) -> None:
    whole = [batch for [batch] in _epoch(_iterator(dataset))]
    position, state = 0, _iterator(dataset).state_dict()
    while position < len(whole):  # each stretch with other processes and another update frequency
        world_size, update_freq = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        stretch = data.draw(st.integers(1, 8))
        readers: list[Iterator[list[Batch | None]]] = []
        iterators = [_iterator(dataset, rank=rank, world_size=world_size) for rank in range(world_size)]
        for iterator in iterators:
            iterator.load_state_dict(state)
            readers.append(iterator.updates(update_freq))
        for _ in range(stretch):
            groups = [next(reader, []) for reader in readers]
            for micro_batches in zip(*groups, strict=True):
                for batch in micro_batches:
                    if batch is not None:
                        assert _ids(batch) == whole[position]
                        position += 1
        states = [iterator.state_dict() for iterator in iterators]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert (state["epoch"], state["offset_batches"], state["iterations_in_epoch"]) == (2, 0, 0)


def test_read_ahead_does_not_count(dataset: LanguagePairDataset) -> None:
    iterator = _iterator(dataset, num_workers=1)
    updates = iterator.updates(2)
    next(updates)
    next(updates)
    assert iterator.state_dict()["offset_batches"] == 4
    assert (iterator.updates_done(2), iterator.end_of_epoch()) == (2, False)


def test_state_of_fairseq_and_of_other_batch_sizes(
    dataset: LanguagePairDataset, caplog: pytest.LogCaptureFixture
) -> None:
    iterator = _iterator(dataset, world_size=2)
    iterator.load_state_dict({"epoch": 2, "iterations_in_epoch": 3, "shuffle": True, "version": 2})
    assert (iterator.epoch, iterator.state_dict()["offset_batches"]) == (2, 6)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    iterator.load_state_dict({"epoch": 2, "offset_batches": 1000, "n_batches": 2000})
    assert iterator.state_dict()["offset_batches"] == iterator.n_batches // 2
    assert "data or batch size differ" in caplog.text


def test_data_bins_rotate(tmp_path: Path) -> None:
    datasets = [_make_dataset(tmp_path / f"{n}", 20 + n, seed=n) for n in range(2)]
    iterator = EpochBatchIterator(
        lambda epoch: datasets[(epoch - 1) % 2], max_tokens=100, max_sentences=None, max_positions=POSITIONS, seed=1
    )
    for epoch in range(1, 5):
        seen = [i for group in _epoch(iterator) for batch in group for i in batch or ()]
        assert sorted(seen) == list(range(len(datasets[(epoch - 1) % 2])))
        iterator.next_epoch()


def test_long_training_sentences_are_left_out_once_with_a_warning(
    dataset: LanguagePairDataset, caplog: pytest.LogCaptureFixture
) -> None:
    iterator = _iterator(dataset, max_positions=(15, 15))
    for _ in range(2):
        seen = {i for group in _epoch(iterator) for batch in group for i in batch or ()}
        assert seen == set(np.flatnonzero((dataset.src.sizes <= 15) & (dataset.tgt_sizes <= 15)).tolist())  # type: ignore[operator]
        iterator.next_epoch()
    assert caplog.text.count("are left out") == 1
