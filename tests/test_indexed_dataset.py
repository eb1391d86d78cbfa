"""The mmap format: bytes on disk, round trips, damaged files."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data import indexed_dataset
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dtype_for
from fairseq.errors import FairseqError


def _write(prefix: Path, sentences: list[list[int]], dtype: object = np.uint16) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sentence in sentences:
            writer.add(sentence)


def test_bytes_on_disk(tmp_path: Path) -> None:
    _write(tmp_path / "x", [[4, 5, 2], [2], [65000, 2]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<6H", 4, 5, 2, 2, 65000, 2)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, 3) + struct.pack("<3i", 3, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == expected + struct.pack("<3q", 0, 6, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_large_dictionary_of_fairseq(tmp_path: Path) -> None:
    """Files of fairseq-preprocess 0.12.2 with a dictionary of 65,500 entries."""
    index = "4d4d494449445800000100000000000000090100000000000000040000000000000000000000"
    (tmp_path / "x.idx").write_bytes(bytes.fromhex(index))
    (tmp_path / "x.bin").write_bytes(bytes.fromhex("050000007cff00000300000002000000"))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset[0].tolist() == [5, 65404, 3, 2]
    taken = dataset.take(np.array([0]), dataset.sizes, 65_500)
    assert (taken.dtype, taken.tolist()) == (np.int64, [5, 65404, 3, 2])


def test_dtype_of_dictionary_size() -> None:
    assert dtype_for(65_499) is np.uint16
    assert dtype_for(65_500) is np.int32


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), max_size=9), st.sampled_from("HiQ"))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, sentences: list[list[int]], code: str) -> None:
    prefix = tmp_path_factory.mktemp("round") / "x"
    dtype = {"H": np.uint16, "i": np.int32, "Q": np.int64}[code]
    _write(prefix, sentences, dtype)
    dataset = IndexedDataset(prefix)
    assert [dataset[i].tolist() for i in range(len(dataset))] == sentences
    assert dataset.sizes.tolist() == [len(s) for s in sentences]
    assert all(dataset[i].dtype == dtype for i in range(len(dataset)))


def test_add_many_equals_add(tmp_path: Path) -> None:
    _write(tmp_path / "x", [[4, 5, 2], [2], [7, 2]])
    with IndexedDatasetWriter(tmp_path / "y", np.uint16) as writer:
        writer.add_many(np.array([4, 5, 2, 2]), np.array([3, 1]))
        writer.add_many(np.array([7, 2]), np.array([2]))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == (tmp_path / f"y.{suffix}").read_bytes()


def test_offsets_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [[4] * n + [2] for n in range(8)]
    _write(tmp_path / "x", sentences)
    for block in (1, 3, 8):
        monkeypatch.setattr(indexed_dataset, "OFFSETS_BLOCK", block)
        _write(tmp_path / "y", sentences)
        assert (tmp_path / "y.idx").read_bytes() == (tmp_path / "x.idx").read_bytes()


def test_reference_data(shared: Path, tmp_path: Path) -> None:
    prefix = shared / "reference" / "multi30k-databin" / "test.en-de.de"
    dataset = IndexedDataset(prefix)
    assert len(dataset) == 1000
    assert all(dataset[i][-1] == 2 for i in range(1000))
    _write(tmp_path / "x", [dataset[i].tolist() for i in range(1000)])
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == prefix.with_name(f"{prefix.name}.{suffix}").read_bytes()


def test_pickle_carries_the_path_alone(tmp_path: Path) -> None:
    _write(tmp_path / "x", [[4, 2]] * 10_000)
    data = pickle.dumps(IndexedDataset(tmp_path / "x"))
    assert len(data) < 1000
    assert pickle.loads(data)[9_999].tolist() == [4, 2]


def test_nothing_is_written_on_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add([4, 2])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(tmp_path: Path) -> None:
    _write(tmp_path / "x", [[4, 5, 2], [2]])
    index, data = tmp_path / "x.idx", tmp_path / "x.bin"
    good_index, good_data = index.read_bytes(), data.read_bytes()
    for bad in (b"", good_index[:20], good_index[:-1], b"TNTIDX\x00\x00" + good_index[8:], good_index[:17] + b"\x63"):
        index.write_bytes(bad)
        with pytest.raises(FairseqError, match=r"x\.idx: "):
            IndexedDataset(tmp_path / "x")
    index.write_bytes(good_index)
    data.write_bytes(good_data[:-1])
    with pytest.raises(FairseqError, match=r"x\.bin: cut short: 7 bytes, 8 expected"):
        IndexedDataset(tmp_path / "x")
    data.unlink()
    with pytest.raises(FairseqError, match=r"x\.bin: cannot read: No such file"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("sizes", [(2, -1), (0, 1), (2**31 - 1, 1)])
def test_sizes_that_contradict_offsets(tmp_path: Path, sizes: tuple[int, int]) -> None:
    _write(tmp_path / "x", [[4, 2], [2]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[26:34] = struct.pack("<2i", *sizes)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(FairseqError, match="contradict"):
        IndexedDataset(tmp_path / "x")


def test_more_sentences_than_bytes(tmp_path: Path) -> None:
    _write(tmp_path / "x", [[4, 2], [2]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[18:26] = struct.pack("<Q", 2**60)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(FairseqError, match="do not fit"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_an_open_index_is_not_in_memory(tmp_path: Path) -> None:
    count = 2_000_000
    sizes = np.full(count, 3, "<i4")
    with open(tmp_path / "a.idx", "wb") as handle:
        handle.write(indexed_dataset.HEADER.pack(indexed_dataset.MAGIC, indexed_dataset.VERSION, 8, count))
        handle.write(sizes.data)
        handle.write((6 * np.arange(count, dtype="<i8")).data)
    with open(tmp_path / "a.bin", "wb") as handle:
        handle.truncate(6 * count)
    dataset = IndexedDataset(tmp_path / "a")
    mapping = Path("/proc/self/smaps").read_text().split(f"{tmp_path}/a.idx\n")[1]
    resident = int(next(line for line in mapping.splitlines() if line.startswith("Rss:")).split()[1])
    assert resident < 12 * count / 1024 / 4
    assert dataset[count - 1].tolist() == [0, 0, 0]
