"""Which sentences go together, and in which order.

Sentences are sorted by the longer of their two sides, then by the difference of the sides, ascending and descending in
turn, so that neighbours are alike on both sides across every boundary; equal ones are shuffled anew each epoch. On
Multi30k at 4096 tokens a batch this leaves 2.8% padding; by source, then target length it would be 6.2%.
Planning is vectorised: a few numpy calls a batch, none a sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from fairseq.data.translation import LanguagePairDataset
from fairseq.errors import FairseqError

logger = logging.getLogger(__name__)

IDS_SHOWN = 10  # sentence ids named in a message
LONGEST_SORTED = 2**12 - 1  # longer sentences are sorted as if they were this long
SORT_BLOCK = 2**16


def shown_ids(ids: Sequence[int] | np.ndarray) -> str:
    """Sentence ids for a message, the first few of many."""
    return ", ".join(map(str, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")


def select_by_size(
    src_sizes: np.ndarray,
    tgt_sizes: np.ndarray | None,
    max_positions: tuple[int, int],
    *,
    name: str,
    skip: bool,
) -> np.ndarray:
    """Indices of the sentences no longer than ``max_positions`` (source, target), ascending.

    name: what the dataset is called in messages. skip: leave longer ones out, with a warning.
    Raises FairseqError when there are longer ones and ``skip`` is false, and when no sentence is left.
    """
    index_type = np.int32 if len(src_sizes) < 2**31 else np.int64  # 36 million pairs: every byte an index counts
    fits = src_sizes <= max_positions[0]
    if tgt_sizes is not None:
        fits &= tgt_sizes <= max_positions[1]
    if not len(fits):
        raise FairseqError(f"{name}: there is no sentence in it")
    if fits.all():
        return np.arange(len(fits), dtype=index_type)
    dropped = np.flatnonzero(~fits)
    limits = f"--max-source-positions {max_positions[0]} or --max-target-positions {max_positions[1]}"
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


def sort_by_length(
    src_sizes: np.ndarray, tgt_sizes: np.ndarray | None, indices: np.ndarray, rng: np.random.Generator | None = None
) -> np.ndarray:
    """``indices`` in the order described above; equal sentences in random order, or as they stand without ``rng``."""
    # One integer a sentence, all sorted in place: longer side | difference | random bits | position in indices.
    both = [sizes for sizes in (src_sizes, tgt_sizes) if sizes is not None]
    length_bits = min(max(int(sizes.max(initial=1)) for sizes in both), LONGEST_SORTED).bit_length()
    position_bits = max(1, len(indices) - 1).bit_length()
    random_bits = min(32, 63 - (2 * length_bits + 1) - position_bits)
    keys = np.empty(len(indices), np.int64)
    for first in range(0, len(keys), SORT_BLOCK):  # in blocks that stay in the cache
        key, block = keys[first : first + SORT_BLOCK], indices[first : first + SORT_BLOCK]
        source, target = (np.minimum(sizes[block], LONGEST_SORTED) for sizes in (both[0], both[-1]))
        longer, difference = np.maximum(source, target), source - target
        np.negative(difference, out=difference, where=longer % 2 == 1)
        key[:] = longer
        key <<= length_bits + 1
        key += difference + 2**length_bits  # the difference has a sign
        key <<= random_bits
        if rng is not None:
            key += rng.integers(0, 2**random_bits, len(key), dtype=np.uint32)
        key <<= position_bits
        key += np.arange(first, first + len(key))
    keys.sort()
    keys &= 2**position_bits - 1
    return indices[keys]


def sentence_costs(
    src_sizes: np.ndarray,
    tgt_sizes: np.ndarray | None,
    indices: np.ndarray,
    max_tokens: int | None,
    max_sentences: int | None,
    required_seq_len_multiple: int = 1,
) -> np.ndarray:
    """(len(indices),): the longer side of each sentence, as it is padded alone. Raises as `plan_batches` does."""
    if max_tokens is None and max_sentences is None:
        raise FairseqError("no limit on the batch size: give --max-tokens or --batch-size")
    cost = src_sizes[indices]
    if tgt_sizes is not None:
        np.maximum(cost, tgt_sizes[indices], out=cost)
    if required_seq_len_multiple > 1:
        cost = -(-cost // required_seq_len_multiple) * required_seq_len_multiple
    longest = int(cost.argmax()) if len(cost) else 0
    if max_tokens is not None and len(cost) and cost[longest] > max_tokens:
        padded = " with its padding (--required-seq-len-multiple)" if required_seq_len_multiple > 1 else ""
        raise FairseqError(
            f"sentence {indices[longest]} has {cost[longest]} tokens{padded}, more than --max-tokens {max_tokens}; "
            "raise that, or leave such sentences out by smaller --max-source-positions and --max-target-positions"
        )
    return cost


def plan_batches(
    src_sizes: np.ndarray,
    tgt_sizes: np.ndarray | None,
    indices: np.ndarray,
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    required_seq_len_multiple: int = 1,
) -> list[np.ndarray]:
    """Cut ``indices`` into batches, in order, each index in exactly one.

    A batch costs its sentence count times its longest side, source or target, rounded up to a multiple of
    ``required_seq_len_multiple``, and at most ``max_tokens``. A full batch
    is cut back to a multiple of ``required_batch_size_multiple`` where it has that many sentences; the rest begins the
    next one. Raises FairseqError when a sentence alone costs more, or neither limit is given.
    """
    cost = sentence_costs(src_sizes, tgt_sizes, indices, max_tokens, max_sentences, required_seq_len_multiple)
    budget = 2**62 if max_tokens is None else max_tokens
    batches, start, multiple = [], 0, required_batch_size_multiple
    limit = min(len(cost), budget, max_sentences or len(cost))
    counts = np.arange(1, limit + 1, dtype=np.int64)
    is_sorted = bool((cost[1:] >= cost[:-1]).all())
    while start < len(cost):
        most = min(budget // max(1, int(cost[start])), limit)  # if all the others were no longer than the first
        window = cost[start : start + most]
        if is_sorted and window[0] == window[-1]:  # nearly always so: all of it fits
            size = len(window)
        else:
            filled = np.maximum.accumulate(window) * counts[: len(window)]
            size = int(filled.searchsorted(budget, side="right"))
        if start + size < len(cost):
            size = size // multiple * multiple or size
        batches.append(indices[start : start + size])
        start += size
    return batches


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
    src_sizes, tgt_sizes = dataset.src_sizes, dataset.tgt_sizes
    indices = select_by_size(src_sizes, tgt_sizes, max_positions, name=name, skip=skip_invalid)
    batches = plan_batches(
        src_sizes,
        tgt_sizes,
        sort_by_length(src_sizes, tgt_sizes, indices),
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=required_batch_size_multiple,
        required_seq_len_multiple=dataset.required_seq_len_multiple,
    )
    return batches[shard_id::num_shards]
