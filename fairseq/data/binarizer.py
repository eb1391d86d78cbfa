"""Text files to token counts and to ``.bin``/``.idx``, in chunks that end on line ends, by one process or several.

A chunk is the unit of work, of decoding and of memory; results come back in the order of the file, so the output does
not depend on the number of processes. Lines end in ``\\n`` and nothing else, tokens are what ``str.split()`` gives.
"""

from __future__ import annotations

import functools
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDatasetWriter, dtype_for
from fairseq.errors import FairseqError

T = TypeVar("T")
R = TypeVar("R")

CHUNK_BYTES = 2**21
READ_BYTES = 2**20
UNKNOWN = -1  # stands for a token that the dictionary lacks until it is counted

_function: Callable[[Any], Any]  # of a worker process


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


def count_tokens(path: str | os.PathLike[str], workers: int = 1) -> Counter[str]:
    """How often each token is in a text file. Raises FairseqError, naming the line, where it is not UTF-8."""
    total: Counter[str] = Counter()
    for part in _map_chunks(functools.partial(_count_chunk, path), path, workers, "counting"):
        total.update(part)
    return total


def binarize(
    path: str | os.PathLike[str], dictionary: Dictionary, prefix: str | os.PathLike[str], workers: int = 1
) -> BinarizeSummary:
    """Write text file ``path`` as dataset ``prefix``, each line ending in ``</s>``.

    Raises FairseqError, naming the line, where the text is not UTF-8; there is then no dataset.
    """
    dtype = dtype_for(len(dictionary))
    summary = BinarizeSummary()
    encode = functools.partial(_encode_chunk, path, dictionary, dtype)
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for ids, sizes, replaced in _map_chunks(encode, path, workers, "writing"):
            writer.add_many(ids, sizes)
            summary.sentences += len(sizes)
            summary.tokens += len(ids)
            summary.replaced += replaced
    return summary


def _count_chunk(path: str | os.PathLike[str], span: tuple[int, int]) -> Counter[str]:
    return Counter(_read_text(path, span).split())


def _encode_chunk(
    path: str | os.PathLike[str], dictionary: Dictionary, dtype: type[np.generic], span: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids back to back, sizes of the lines, and how many tokens are not in the dictionary."""
    text = _read_text(path, span)
    lookup, eos = dictionary.lookup(), dictionary.eos()
    ids: list[int] = []
    sizes: list[int] = []
    for line in text.removesuffix("\n").split("\n"):
        tokens = line.split()
        ids.extend(map(lookup, tokens, repeat(UNKNOWN)))
        ids.append(eos)
        sizes.append(len(tokens) + 1)
    values = np.array(ids, np.int32)
    unknown = values == UNKNOWN
    values[unknown] = dictionary.unk()
    return values.astype(dtype), np.array(sizes, np.int32), int(unknown.sum())


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


def ordered_map(function: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[R]:
    """``map(function, tasks)`` in up to ``workers`` processes, which run a bounded number of tasks ahead.

    ``function`` is sent to each process once. Raises FairseqError when a process dies.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(function,))
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_call, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise FairseqError("a worker process died, perhaps out of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _call(task: Any) -> Any:
    return _function(task)
