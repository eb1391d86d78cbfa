"""Which sentences go together, and in which order.

Sentences are sorted by the longer of their two sides, then by the difference of the sides, ascending and descending in
turn, so that neighbours are alike on both sides across every boundary; equal ones are shuffled anew each epoch. On
Multi30k at 4096 tokens a batch this leaves 2.8% padding; by source, then target length it would be 6.2%.
Lengths alone decide where one batch ends and the next begins, so that is reckoned from how many sentences have them;
nothing here looks lengths up in sorted order, which for a large corpus takes longer than sorting it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fairseq.data.translation import LanguagePairDataset
from fairseq.errors import FairseqError

logger = logging.getLogger(__name__)

IDS_SHOWN = 10  # sentence ids named in a message
LONGEST_SORTED = 2**12 - 1  # longer sentences are sorted as if they were this long
BLOCK, COUNTED = 2**14, 2**20  # sentences at a time: so that what is made of them stays in the cache, or memory small


def shown_ids(ids: Sequence[int] | np.ndarray) -> str:
    """Sentence ids for a message, the first few of many."""
    return ", ".join(map(str, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")


class BatchLimits(NamedTuple):
    """How large a batch may be.

    max_tokens: its rows times its longest side, source or target, padding included. max_sentences: its rows. A full
    batch has a multiple of ``rows_multiple`` rows where it has that many; its sides are padded to multiples of
    ``length_multiple``.
    """

    max_tokens: int | None = None
    max_sentences: int | None = None
    rows_multiple: int = 1
    length_multiple: int = 1

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """``lengths`` rounded up to multiples of ``length_multiple``."""
        return lengths if self.length_multiple == 1 else -(-lengths // self.length_multiple) * self.length_multiple

    def rows(self, longest: np.ndarray) -> np.ndarray:
        """How many fit, at least 1, where the longer side, padded, has ``longest`` tokens; both (n,)."""
        most = np.int64(2**62)
        return np.clip((self.max_tokens or most) // longest.astype(np.int64), 1, self.max_sentences or most)

    def rounded(self, rows: int) -> int:
        """``rows`` of a full batch, of which the rest goes into the next one."""
        return rows - rows % self.rows_multiple or rows

    def check(self, longest: int, find: Callable[[], int]) -> None:
        """Raise FairseqError when there is no limit, or the longest sentence, which ``find`` finds, exceeds it."""
        if self.max_tokens is None and self.max_sentences is None:
            raise FairseqError("no limit on the batch size: give --max-tokens or --batch-size")
        if self.max_tokens is not None and longest > self.max_tokens:
            padded = " with its padding (--required-seq-len-multiple)" if self.length_multiple > 1 else ""
            raise FairseqError(
                f"sentence {find()} has {longest} tokens{padded}, more than --max-tokens {self.max_tokens}; "
                "raise that, or leave such sentences out by smaller --max-source-positions and --max-target-positions"
            )


def select_by_size(
    src_sizes: np.ndarray,
    tgt_sizes: np.ndarray | None,
    max_positions: tuple[int, int],
    *,
    name: str,
    skip: bool,
    max_tokens: int | None = None,
) -> np.ndarray:
    """Indices of the sentences no longer than ``max_positions`` (source, target), ascending.

    name: what the dataset is called in messages. skip: leave longer ones out, with a warning. max_tokens: a batch's,
    to leave out what alone has more.
    Raises FairseqError when there are longer ones and ``skip`` is false, and when no sentence is left.
    """
    limits = f"--max-source-positions {max_positions[0]} or --max-target-positions {max_positions[1]}"
    if max_tokens is not None and max_tokens < max(max_positions):
        limits = f"{limits}, or --max-tokens {max_tokens}"
        max_positions = min(max_positions[0], max_tokens), min(max_positions[1], max_tokens)
    index_type = np.int32 if len(src_sizes) < 2**31 else np.int64  # 36 million pairs: every byte an index counts
    fits = src_sizes <= max_positions[0]
    if tgt_sizes is not None:
        fits &= tgt_sizes <= max_positions[1]
    if not len(fits):
        raise FairseqError(f"{name}: there is no sentence in it")
    if fits.all():
        return np.arange(len(fits), dtype=index_type)
    dropped = np.flatnonzero(~fits)
    if not skip:
        first = int(dropped[0])
        lengths = f"{src_sizes[first]} source" + (f" and {tgt_sizes[first]} target" if tgt_sizes is not None else "")
        raise FairseqError(
            f"{name}: sentence {first} has {lengths} tokens, more than {limits} ({len(dropped):,} such sentences); "
            "leave them out with --skip-invalid-size-inputs-valid-test"
        )
    if len(dropped) == len(fits):
        raise FairseqError(f"{name}: every sentence is longer than {limits}")
    logger.warning(f"{name}: {len(dropped):,} sentences longer than {limits} are left out: {shown_ids(dropped)}")
    return np.flatnonzero(fits).astype(index_type)


class LengthBuckets:
    """Sentences by their two lengths: all that sorting them anew each epoch needs to know, two bytes of each or four.

    counts: (buckets,) how many have the same two lengths; the buckets are in the order described above. src_len,
    tgt_len: (buckets,) these lengths; for a side beyond LONGEST_SORTED, the longest that there is. costs: (buckets,)
    the longer of the two, padded.

    indices: of the sentences, ascending. tgt_sizes: None if there is one side alone. Raises FairseqError as
    `plan_batches` does.
    """

    def __init__(
        self, src_sizes: np.ndarray, tgt_sizes: np.ndarray | None, indices: np.ndarray, limits: BatchLimits
    ) -> None:
        self.limits, self._count, self._index_type = limits, len(indices), indices.dtype
        self._indices = None if len(indices) == len(src_sizes) else indices  # None: all
        both = [src_sizes, src_sizes if tgt_sizes is None else tgt_sizes]
        self._length_bits = min(max(int(sizes.max(initial=1)) for sizes in both), LONGEST_SORTED).bit_length()
        longest = [int((sizes if self._indices is None else sizes[indices]).max(initial=1)) for sizes in both]
        cap = min(max(longest), LONGEST_SORTED)
        self._beyond = (src_sizes, tgt_sizes) if max(longest) > LONGEST_SORTED else None
        # longer**2 + difference: in the order of (longer, difference), and no number is left out for nothing
        self._codes = np.empty(self._count, np.min_scalar_type(cap**2 + cap))
        for first in range(0, self._count, BLOCK):
            block = slice(first, first + BLOCK) if self._indices is None else indices[first : first + BLOCK]
            source, target = (np.minimum(sizes[block], cap) for sizes in both)
            longer, difference = np.maximum(source, target), source - target
            np.negative(difference, out=difference, where=longer % 2 == 1)
            longer *= longer
            longer += difference
            self._codes[first : first + BLOCK] = longer
        counts = np.zeros(cap**2 + cap, np.int64)
        for first in range(0, self._count, COUNTED):
            found = np.bincount(self._codes[first : first + COUNTED])
            counts[: len(found)] += found
        codes = np.flatnonzero(counts)
        self.counts, longer = counts[codes], np.rint(np.sqrt(codes)).astype(np.int64)
        difference = (codes - longer**2) * np.where(longer % 2 == 1, -1, 1)
        self.src_len, self.tgt_len = longer + np.minimum(difference, 0), longer - np.maximum(difference, 0)
        for lengths, most in zip((self.src_len, self.tgt_len), longest, strict=True):
            lengths[lengths == LONGEST_SORTED] = most
        self.costs = limits.padded(np.maximum(self.src_len, self.tgt_len))
        if len(self.costs):
            limits.check(self.costs.max(), lambda: int(indices[np.maximum(*(n[indices] for n in both)).argmax()]))

    def shuffled(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """The sentences in order; equal ones in random order, or ascending without ``rng``."""
        # One integer a sentence, all sorted in place: lengths | random bits | the sentence, or its place in indices.
        place_bits = max(1, self._count - 1).bit_length()
        random_bits = min(32, 63 - (2 * self._length_bits + 1) - place_bits)
        names = None if self._indices is None or self._indices.max(initial=0) >> place_bits else self._indices
        keys = np.empty(self._count, np.int64)
        for first in range(0, self._count, BLOCK):
            key = keys[first : first + BLOCK]
            key[:] = self._codes[first : first + BLOCK]
            key <<= random_bits
            if rng is not None:
                key += rng.integers(0, 2**random_bits, len(key), dtype=np.uint32)
            key <<= place_bits
            key += np.arange(first, first + len(key)) if names is None else names[first : first + BLOCK]
        keys.sort()
        order = np.empty(self._count, self._index_type)
        np.bitwise_and(keys, 2**place_bits - 1, out=order, casting="unsafe")
        return order if names is not None or self._indices is None else self._indices[order]

    def cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Batches, as of `plan_batches`; order: of `shuffled`."""
        if self._beyond is not None:
            return plan_batches(*self._beyond, order, self.limits)
        return split(order, batch_ends(self.costs, np.cumsum(self.counts), self.limits))


def split(order: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Views of ``order``, one up to each of ``ends``."""
    return [order[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]


def batch_ends(costs: np.ndarray, ends: np.ndarray, limits: BatchLimits) -> np.ndarray:
    """How many sentences the first batch has, the first two, and so on, (batches,); the rule is `plan_batches`'.

    costs: (runs,) tokens of the longer side of each of a run of sentences, padded alone. ends: (runs,) how many
    sentences the runs up to it have.
    """
    last = np.append(costs[1:] != costs[:-1], True)[: len(costs)]  # of equal runs side by side
    bounds, found = ends[last].tolist(), list[np.ndarray]()
    fits = limits.rows(costs[last]).tolist()  # in a batch whose longest sentence is of this run
    start, run, total = 0, 0, bounds[-1] if bounds else 0
    while start < total:
        rows = fits[run]
        whole = (min(bounds[run], total - 1) - start - rows) // limits.rounded(rows) + 1  # batches within the run
        if whole > 0:
            found.append(start + limits.rounded(rows) * np.arange(1, whole + 1))
            start = int(found[-1][-1])
        else:
            end, most, at = start, rows, run
            while at < len(bounds):
                most = min(most, fits[at])
                if start + most <= end:
                    break
                end = min(bounds[at], start + most)
                if end < bounds[at]:
                    break
                at += 1
            start = end if end == total else start + limits.rounded(end - start)
            found.append(np.array([start]))
        while start < total and bounds[run] <= start:
            run += 1
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def plan_batches(
    src_sizes: np.ndarray, tgt_sizes: np.ndarray | None, order: np.ndarray, limits: BatchLimits
) -> list[np.ndarray]:
    """Cut ``order``, which may be any, into batches, each of its sentences in exactly one.

    A batch costs its sentence count times its longest side, source or target, padded, and at most
    ``limits.max_tokens``. A full batch is cut back to a multiple of ``limits.rows_multiple`` where it has that many
    sentences; the rest begins the next one. Raises FairseqError when a sentence alone costs more, or there is no limit.
    """
    costs = src_sizes[order]
    if tgt_sizes is not None:
        np.maximum(costs, tgt_sizes[order], out=costs)
    costs = limits.padded(costs)
    if len(costs):
        limits.check(costs.max(), lambda: int(order[costs.argmax()]))
    return split(order, batch_ends(costs, np.arange(1, len(costs) + 1), limits))


def make_batches(
    dataset: LanguagePairDataset,
    *,
    name: str,
    max_tokens: int | None,
    max_sentences: int | None,
    required_batch_size_multiple: int = 1,
    max_positions: tuple[int, int],
    skip_invalid: bool = False,
    num_shards: int = 1,
    shard_id: int = 0,
) -> list[np.ndarray]:
    """Batches of a whole dataset for validation or generation, always the same; of them, the part ``shard_id``.

    name, max_positions, skip_invalid: as in `select_by_size`. Raises FairseqError as that and `plan_batches` do.
    """
    if not 0 <= shard_id < num_shards:
        raise FairseqError(f"--shard-id {shard_id} is not one of 0 to {num_shards - 1} (--num-shards {num_shards})")
    sizes = dataset.src_sizes, dataset.tgt_sizes
    indices = select_by_size(*sizes, max_positions, name=name, skip=skip_invalid)
    limits = BatchLimits(max_tokens, max_sentences, required_batch_size_multiple, dataset.required_seq_len_multiple)
    buckets = LengthBuckets(*sizes, indices, limits)
    return buckets.cut(buckets.shuffled())[shard_id::num_shards]
