"""fairseq's mmap format: a corpus of id sequences that is never loaded whole.

``PREFIX.bin`` has the ids of all sentences back to back. ``PREFIX.idx``, little endian: magic, version (u64) 1, dtype
code (u8), sentence count (u64), sizes in tokens (i32 each), offsets in bytes (i64 each).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQ")  # magic, version, dtype code, sentence count
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float32,
    7: np.float64,
    8: np.uint16,
    9: np.uint32,  # of fairseq 0.12 for large dictionaries, where others, and we, write int32
    10: np.uint64,
}
UNFINISHED = ".publishing"  # directory in a data-bin of the files that fairseq-preprocess is about to put in place
OFFSETS_BLOCK = 2**18  # sentences whose offsets are computed, or checked, at once
UINT16_ENTRIES = 65_500  # a dictionary of fewer entries is stored in two bytes an id


def dtype_for(entries: int) -> type[np.generic]:
    """The id type of a corpus whose dictionary has ``entries`` entries."""
    return np.uint16 if entries < UINT16_ENTRIES else np.int32


def exists(prefix: str | os.PathLike[str]) -> bool:
    """Whether there is a dataset at ``prefix``."""
    return os.path.isfile(f"{prefix}.idx") and os.path.isfile(f"{prefix}.bin")


def _map(path: str) -> memoryview:
    """The bytes of a file, mapped. The mapping lives as long as the view."""
    try:
        with open(path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise FairseqError(f"{path}: cannot read: {error.strerror or error}") from error


def _check_layout(index_path: str, sizes: np.ndarray, starts: np.ndarray, itemsize: int) -> int:
    """The size in bytes of sentences that stand back to back, as all writers put them.

    Raises FairseqError when the index says otherwise.
    """
    end = 0
    for first in range(0, len(sizes), OFFSETS_BLOCK):
        lengths = sizes[first : first + OFFSETS_BLOCK]
        ends = end + np.cumsum(lengths, dtype=np.int64) * itemsize
        if lengths.min() < 1 or starts[first] != end or (starts[first + 1 : first + len(ends)] != ends[:-1]).any():
            raise FairseqError(
                f"{index_path}: its sizes and offsets contradict each other between sentences {first} and "
                f"{first + len(ends) - 1}; make the data-bin again"
            )
        end = int(ends[-1])
    return end


class IndexedDataset:
    """A memory-mapped corpus.

    sizes: (sentences,) int32, tokens in each, ``</s>`` included. tokens: every id of the corpus, in the type it is
    stored in. Both are read-only views of the files.

    Raises FairseqError when a file is missing, cut short or not in this format.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        index_path, data_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        index = _map(index_path)
        if len(index) < HEADER.size:
            raise FairseqError(f"{index_path}: cut short; make the data-bin again with fairseq-preprocess")
        magic, version, code, count = HEADER.unpack(index[: HEADER.size])
        if magic != MAGIC:
            raise FairseqError(f"{index_path}: not fairseq's mmap format; make it with --dataset-impl mmap")
        if version != VERSION or code not in DTYPES:
            raise FairseqError(
                f"{index_path}: unknown format version {version} or dtype code {code}; make the data-bin again"
            )
        if len(index) != HEADER.size + 12 * count:
            raise FairseqError(
                f"{index_path}: {len(index)} bytes do not fit {count} sentences; make the data-bin again"
            )
        dtype = np.dtype(DTYPES[code])
        data = _map(data_path)
        self.sizes = np.frombuffer(index, "<i4", count, HEADER.size)
        starts = np.frombuffer(index, "<i8", count, HEADER.size + 4 * count)
        end = _check_layout(index_path, self.sizes, starts, dtype.itemsize)
        if end > len(data):
            raise FairseqError(f"{data_path}: cut short: {len(data)} bytes, {end} expected; make the data-bin again")
        if isinstance(index.obj, mmap.mmap):
            index.obj.madvise(mmap.MADV_DONTNEED)  # the check has read all of it; few offsets are needed soon
        self.tokens = np.frombuffer(data, dtype.newbyteorder("<"), len(data) // dtype.itemsize)
        self._starts, self._itemsize = starts, dtype.itemsize

    @property
    def parts(self) -> list[IndexedDataset]:
        """The corpora that this one consists of: itself."""
        return [self]

    def take(self, indices: np.ndarray, sizes: np.ndarray, entries: int) -> np.ndarray:
        """The first ``sizes`` ids of sentences ``indices``, back to back, int64.

        entries: of the dictionary. Raises FairseqError for an id that is not in it.
        """
        starts = self._starts[indices] // self._itemsize
        tokens = self.tokens[np.repeat(starts, sizes) + positions_in_row(sizes)].astype(np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < entries:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise FairseqError(
                f"{self.prefix}.bin: token id {wrong} is not in the dictionary ({entries} entries); "
                "use the dictionaries that this data-bin was made with"
            )
        return tokens

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of one sentence, in the type they are stored in."""
        start = int(self._starts[index]) // self._itemsize
        return self.tokens[start : start + int(self.sizes[index])]

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}  # a worker process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


class JoinedDataset:
    """Several corpora, one behind the other, as one; one that is there twice counts twice.

    sizes: (sentences,) int32, tokens in each, in memory. prefix: names the parts, for messages.
    """

    def __init__(self, parts: Sequence[IndexedDataset]) -> None:
        self.parts = list(parts)
        counts = {part.prefix: self.parts.count(part) for part in self.parts}
        self.prefix = " + ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
        self.sizes = np.concatenate([part.sizes for part in self.parts])
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def take(self, indices: np.ndarray, sizes: np.ndarray, entries: int) -> np.ndarray:
        """As ``IndexedDataset.take``."""
        tokens = np.empty(sizes.sum(), np.int64)
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(part_of):
            rows = part_of == number
            part, own = self.parts[number], indices[rows] - self._starts[number]
            tokens[np.repeat(rows, sizes)] = part.take(own, sizes[rows], entries)
        return tokens

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """As ``IndexedDataset``'s."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part][index - int(self._starts[part])]

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedDataset, (self.parts,)  # a worker process maps the files itself


def positions_in_row(sizes: np.ndarray) -> np.ndarray:
    """0 .. size-1 of every row, back to back."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


class IndexedDatasetWriter:
    """Write a dataset sentence by sentence or in runs of sentences.

    A context manager: both files appear when the block ends without an exception, neither when it fails.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: Any) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, known in DTYPES.items() if np.dtype(known) == self.dtype)
        self._count = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> IndexedDatasetWriter:
        with self._stack as stack:  # closes what is open when opening the other fails
            self._index = stack.enter_context(atomic_write(f"{self.prefix}.idx", "w+b"))
            self._data = stack.enter_context(atomic_write(f"{self.prefix}.bin", "wb"))
            self._index.write(bytes(HEADER.size))
            self._stack = stack.pop_all()
        return self

    def add(self, ids: Any) -> None:
        """Append one sentence."""
        values = np.asarray(ids)
        self.add_many(values, np.array([len(values)]))

    def add_many(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Append sentences of ``sizes`` tokens whose ids stand back to back in ``ids``."""
        self._data.write(np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).data)
        self._index.write(np.ascontiguousarray(sizes, dtype="<i4").data)
        self._count += len(sizes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._stack.push(self._finish_index)  # runs first, and its failure keeps the ids from appearing too
        self._stack.__exit__(kind, error, trace)

    def _finish_index(self, *exception: object) -> None:
        """Write the header, and behind the sizes the offsets, block by block: memory does not grow with the corpus."""
        index, end = self._index, 0
        index.seek(0)
        index.write(HEADER.pack(MAGIC, VERSION, self._code, self._count))
        for first in range(0, self._count, OFFSETS_BLOCK):
            block = min(OFFSETS_BLOCK, self._count - first)
            index.seek(HEADER.size + 4 * first)
            ends = end + np.cumsum(np.frombuffer(index.read(4 * block), "<i4"), dtype=np.int64) * self.dtype.itemsize
            index.seek(HEADER.size + 4 * self._count + 8 * first)
            index.write(np.concatenate([[end], ends[:-1]]).astype("<i8").data)
            end = int(ends[-1])
