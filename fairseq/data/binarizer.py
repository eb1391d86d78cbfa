"""Text files to token counts and to ``.bin``/``.idx``, in chunks that end on line ends, by one process or several.

A chunk is the unit of work, of decoding and of memory; results come back in the order of the file, so the output does
not depend on the number of processes. Lines end in ``\\n`` and nothing else, tokens are what ``str.split()`` gives.
A chunk is split once, its line ends standing among its tokens, and every token numbered by one look-up in C; what
follows is array arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDatasetWriter, dtype_for
from fairseq.errors import FairseqError
from fairseq.utils.processes import ordered_map

R = TypeVar("R")

CHUNK_BYTES = 2**21
READ_BYTES = 2**20
UNKNOWN = -1  # stands for a token that the dictionary lacks until it is counted
LINE_END = "\udc0a"  # stands for a line end among tokens; a surrogate, which no decoded text contains


class _Bar(tqdm):
    monitor_interval = 0  # no monitor thread: threads and forked processes do not mix


@dataclass
class BinarizeSummary:
    """What became of a text file. tokens includes one ``</s>`` a sentence; replaced counts those that became <unk>."""

    sentences: int = 0
    tokens: int = 0
    replaced: int = 0


def count_lines(path: str | os.PathLike[str]) -> int:
    """Lines of a text file; a last one without a line end counts too. Raises FairseqError when it cannot be read."""
    lines, last = 0, b"\n"
    try:
        with open(path, "rb") as handle:
            while block := handle.read(READ_BYTES):
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise FairseqError(f"{path}: cannot read: {error.strerror or error}") from error
    return lines + (last != b"\n")


class NumberedText:
    """A text file as numbers of tokens in order of first appearance, for when its dictionary is yet to be built.

    Numbers lie in a file without a name, four bytes a token, so that `binarize` need not read the text again. A context
    manager, which deletes that file.
    """

    def __init__(self, path: str | os.PathLike[str], directory: str | os.PathLike[str], workers: int = 1) -> None:
        """Read ``path``. directory: where the file of numbers goes, for as long as it is needed.

        Raises FairseqError, naming the line, where the text is not UTF-8; OSError when numbers cannot be written.
        """
        self._tokens = _Numbering()
        self._counts = np.zeros(1, np.int64)  # by number; longer than needed
        self._lengths: list[int] = []  # of the chunks, in numbers
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(tempfile.TemporaryFile(dir=directory))
            for chunk in _map_chunks(functools.partial(_number_chunk, path), path, workers, "counting"):
                table = np.fromiter(map(self._tokens.__getitem__, chunk.tokens), np.int32, len(chunk.tokens))
                if len(self._tokens) > len(self._counts):
                    self._counts.resize(2 * len(self._tokens), refcheck=False)
                self._counts[table] += chunk.counts
                self._file.write(table[chunk.numbers].data)
                self._lengths.append(len(chunk.numbers))
            self._stack = stack.pop_all()

    def counts(self) -> dict[str, int]:
        """How often each token is in the text."""
        counts = dict(zip(self._tokens, self._counts.tolist(), strict=False))
        del counts[LINE_END]
        return counts

    def binarize(self, dictionary: Dictionary, prefix: str | os.PathLike[str]) -> BinarizeSummary:
        """As the function `binarize`."""
        ids, is_unknown = _ids_of(list(self._tokens), dictionary)
        summary = BinarizeSummary(replaced=int(self._counts[: len(ids)][is_unknown].sum()))
        self._file.seek(0)
        with IndexedDatasetWriter(prefix, dtype_for(len(dictionary))) as writer:
            for length in self._lengths:
                _add_lines(writer, summary, np.fromfile(self._file, np.int32, length), ids)
        return summary

    def __enter__(self) -> NumberedText:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def binarize(
    path: str | os.PathLike[str], dictionary: Dictionary, prefix: str | os.PathLike[str], workers: int = 1
) -> BinarizeSummary:
    """Write text file ``path`` as dataset ``prefix``, each line ending in ``</s>``.

    Raises FairseqError, naming the line, where the text is not UTF-8; there is then no dataset.
    """
    summary = BinarizeSummary()
    with IndexedDatasetWriter(prefix, dtype_for(len(dictionary))) as writer:
        for chunk in _map_chunks(functools.partial(_number_chunk, path), path, workers, "writing"):
            ids, is_unknown = _ids_of(chunk.tokens, dictionary)
            summary.replaced += int(chunk.counts[is_unknown].sum())
            _add_lines(writer, summary, chunk.numbers, ids)
    return summary


class _Numbering(dict[str, int]):
    """Token -> number in order of first appearance; the end of a line is 0."""

    def __init__(self) -> None:
        super().__init__({LINE_END: 0})

    def __missing__(self, token: str) -> int:
        number = self[token] = len(self)
        return number


class _Chunk(NamedTuple):
    """Text whose tokens and line ends are numbered in order of first appearance in it."""

    numbers: np.ndarray  # (tokens and line ends,) int32
    tokens: list[str]  # by number
    counts: np.ndarray  # by number, int64


def _number_chunk(path: str | os.PathLike[str], span: tuple[int, int]) -> _Chunk:
    text = _read_text(path, span).removesuffix("\n")
    tokens = f"{text}\n".replace("\n", f" {LINE_END} ").split()
    numbering = _Numbering()
    numbers = np.fromiter(map(numbering.__getitem__, tokens), np.int32, len(tokens))  # no Python code a token
    return _Chunk(numbers, list(numbering), np.bincount(numbers, minlength=len(numbering)))


def _ids_of(tokens: list[str], dictionary: Dictionary) -> tuple[np.ndarray, np.ndarray]:
    """The dictionary's ids of numbered tokens, int32, the end of a line being ``</s>``; and which it does not have."""
    ids = np.fromiter(map(dictionary.lookup(), tokens, repeat(UNKNOWN)), np.int32, len(tokens))
    ids[0] = dictionary.eos()
    is_unknown = ids == UNKNOWN
    ids[is_unknown] = dictionary.unk()
    return ids, is_unknown


def _add_lines(writer: IndexedDatasetWriter, summary: BinarizeSummary, numbers: np.ndarray, ids: np.ndarray) -> None:
    """Write whole lines of numbered tokens. ids: by number."""
    sizes = np.diff(np.flatnonzero(numbers == 0), prepend=-1)
    writer.add_many(ids.astype(writer.dtype)[numbers], sizes)
    summary.sentences += len(sizes)
    summary.tokens += len(numbers)


def _read_text(path: str | os.PathLike[str], span: tuple[int, int]) -> str:
    start, end = span
    with open(path, "rb") as handle:
        handle.seek(start)
        data = handle.read(end - start)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            handle.seek(0)
            before, line = start, 1 + data.count(b"\n", 0, error.start)
            while before > 0:
                block = handle.read(min(before, READ_BYTES))
                line, before = line + block.count(b"\n"), before - len(block)
            raise FairseqError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert or repair the file") from None


def _chunk_spans(path: str | os.PathLike[str]) -> Iterator[tuple[int, int]]:
    """Byte ranges of whole lines, about CHUNK_BYTES each."""
    with open(path, "rb") as handle:
        size, start = os.fstat(handle.fileno()).st_size, 0
        while start < size:
            handle.seek(min(start + CHUNK_BYTES, size) - 1)
            handle.readline()
            yield start, handle.tell()
            start = handle.tell()


def _map_chunks(
    function: Callable[[tuple[int, int]], R], path: str | os.PathLike[str], workers: int, verb: str
) -> Iterator[R]:
    """``function`` of each chunk of a file, in order, with a progress bar on a terminal."""
    spans = list(_chunk_spans(path))
    description = f"{verb} {os.path.basename(path)}"
    with _Bar(
        total=sum(e - s for s, e in spans), desc=description, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        for (start, end), result in zip(spans, ordered_map(function, spans, workers), strict=True):
            yield result
            bar.update(end - start)
