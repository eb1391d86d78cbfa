"""Batches of few shapes, chosen from the corpus: a CUDA graph replays one shape, and is recorded once for each.

A shape is so many rows by so many source and target tokens. Sentences stand in the order of `sort_by_length`; that
list is divided into consecutive groups, one a shape, with the least padding (dynamic programming over some hundred
places to divide it at). A group is a number of full batches: what is left over begins the next group. In the last
group alone rows are fewer where that fills its batches better, and the last batch may have empty rows.

Where batches as small as can be have few enough shapes already, they are kept. Lengths alone decide, so that every
epoch has the same shapes; within a group it is chance which sentences meet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fairseq.data.batching import plan_batches, sentence_costs
from fairseq.data.translation import BatchShape

BLOCKS, CUTS = 2048, 512  # equal parts of the list that are measured; ends of them where a group may end


class _Limits(NamedTuple):
    max_tokens: int
    max_sentences: int
    rows_multiple: int
    length_multiple: int

    def padded(self, src_sizes: np.ndarray, tgt_sizes: np.ndarray) -> tuple[int, int]:
        """Tokens of both sides of a batch of such sentences; sizes: (sentences,)."""
        src_len, tgt_len = (-(-int(sizes.max()) // self.length_multiple) for sizes in (src_sizes, tgt_sizes))
        return src_len * self.length_multiple, tgt_len * self.length_multiple

    def rows(self, src_len: np.ndarray | int, tgt_len: np.ndarray | int) -> np.ndarray:
        """Rows of full batches of so many tokens; numbers or (n,)."""
        rows = np.clip(self.max_tokens // np.maximum(src_len, tgt_len), 1, self.max_sentences)
        return np.where(rows < self.rows_multiple, rows, rows - rows % self.rows_multiple)


def plan_shapes(
    src_sizes: np.ndarray,
    tgt_sizes: np.ndarray,
    order: np.ndarray,
    count: int,
    rng: np.random.Generator,
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    required_seq_len_multiple: int = 1,
) -> list[tuple[np.ndarray, BatchShape]]:
    """Batches of at most ``count`` shapes with the sentences of each; every sentence of ``order`` is in exactly one.

    order: of `sort_by_length`; overwritten. rng: which sentences of a group meet. Limits and errors are those of
    `plan_batches`.
    """
    limits = _Limits(
        max_tokens or 2**40, max_sentences or len(order), required_batch_size_multiple, required_seq_len_multiple
    )
    costs = sentence_costs(src_sizes, tgt_sizes, order, max_tokens, max_sentences, required_seq_len_multiple)
    batches_about = max(costs.sum(dtype=np.int64) // limits.max_tokens, len(order) // limits.max_sentences)
    del costs
    if batches_about < 2 * count:
        smallest = plan_batches(
            src_sizes,
            tgt_sizes,
            order,
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_batch_size_multiple=required_batch_size_multiple,
            required_seq_len_multiple=required_seq_len_multiple,
        )
        shapes = [BatchShape(len(batch), *limits.padded(src_sizes[batch], tgt_sizes[batch])) for batch in smallest]
        if len(set(shapes)) <= count:
            return list(zip(smallest, shapes, strict=True))
    batches: list[tuple[np.ndarray, BatchShape]] = []
    start, src, tgt = 0, src_sizes[order], tgt_sizes[order]
    for end in _group_ends(src, tgt, count, limits):
        group = order[start:end]
        src_len, tgt_len = limits.padded(src[start:end], tgt[start:end])
        rows = int(limits.rows(src_len, tgt_len))
        if end == len(order):
            share = -(-len(group) // -(-len(group) // rows))  # of each, if all had as many
            rows = min(rows, -(-share // limits.rows_multiple) * limits.rows_multiple)
        else:
            group = group[: len(group) // rows * rows]
        rng.shuffle(group)
        shape = BatchShape(rows, src_len, tgt_len)
        batches += [(group[first : first + rows], shape) for first in range(0, len(group), rows)]
        start += len(group)
    return batches


def _group_ends(src_sizes: np.ndarray, tgt_sizes: np.ndarray, count: int, limits: _Limits) -> list[int]:
    """After how many sentences each of at most ``count`` groups ends; sizes: in order."""
    starts = np.unique(np.linspace(0, len(src_sizes), BLOCKS, endpoint=False).astype(np.int64))
    ends = np.append(starts[1:], len(src_sizes))
    src_len, tgt_len = (np.maximum.reduceat(sizes, starts).astype(np.int64) for sizes in (src_sizes, tgt_sizes))
    positions = np.cumsum((ends - starts) * np.maximum(src_len, tgt_len))
    last = np.searchsorted(positions, positions[-1] * np.arange(1, CUTS + 1) // CUTS)  # blocks of parts of equal size
    last = np.unique(np.append(last, len(ends) - 1)[: CUTS + 1])
    first = np.append(0, last[:-1] + 1)
    src_len, tgt_len = np.maximum.reduceat(src_len, first), np.maximum.reduceat(tgt_len, first)
    ends = ends[last]

    n = len(ends)  # cost[i, j]: source and target positions of a group of the parts from i to before j
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        sentences = ends[i:] - (ends[i - 1] if i else 0)
        src, tgt = np.maximum.accumulate(src_len[i:]), np.maximum.accumulate(tgt_len[i:])
        fills_one = (sentences >= limits.rows(src, tgt)) | (ends[i:] == len(src_sizes))
        cost[i, i + 1 :] = np.where(fills_one, sentences * (src + tgt), np.inf)
    return [int(ends[j - 1]) for j in _cheapest_path(cost, count)]


def _cheapest_path(cost: np.ndarray, most: int) -> list[int]:
    """Stations after 0, at most ``most``, on the cheapest way to the last; cost: (n, n), of a step from i to j > i."""
    reached, came_from = cost[0], []
    best, steps = reached[-1], 1
    for step in range(2, most + 1):
        by_way_of = reached[:, None] + cost
        came_from.append(by_way_of.argmin(axis=0))
        reached = np.minimum.reduce(by_way_of, axis=0)
        if reached[-1] < best:
            best, steps = reached[-1], step
    path = [len(cost) - 1]
    for choice in came_from[: steps - 1][::-1]:
        path.append(int(choice[path[-1]]))
    return path[::-1]
