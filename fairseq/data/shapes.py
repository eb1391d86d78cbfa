"""Batches of few shapes, chosen from the corpus: a CUDA graph replays one shape, and is recorded once for each.

A shape is so many rows by so many source and target tokens. Sentences stand in the order of `LengthBuckets`; that
list is divided into consecutive groups, one a shape, with the least padding (dynamic programming over some hundred
places to divide it at). A group is a number of full batches: what is left over begins the next group. In the last
group alone rows are fewer where that fills its batches better, and the last batch may have empty rows.

Where batches as small as can be have few enough shapes already, they are kept. Lengths alone decide, so that every
epoch has the same shapes, chosen once; within a group it is chance which sentences meet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fairseq.data.batching import BatchLimits, LengthBuckets, batch_ends
from fairseq.data.translation import BatchShape

BLOCKS, CUTS = 2048, 512  # equal parts of the list that are measured; ends of them where a group may end


class ShapeGroups(NamedTuple):
    """How a list of sentences in the order of `LengthBuckets.shuffled` is cut into batches of few shapes.

    ends: where each group ends. shapes: of the batches of each. mixed: its sentences are shuffled first.
    """

    ends: list[int]
    shapes: list[BatchShape]
    mixed: bool

    def cut(self, order: np.ndarray, rng: np.random.Generator) -> tuple[list[np.ndarray], list[BatchShape]]:
        """Batches and the shape of each; ``order`` is overwritten. rng: which sentences of a group meet."""
        batches, shapes, start = list[np.ndarray](), list[BatchShape](), 0
        for end, shape in zip(self.ends, self.shapes, strict=True):
            if self.mixed:
                rng.shuffle(order[start:end])
            firsts = range(start, end, shape.rows)
            batches += [order[first : min(first + shape.rows, end)] for first in firsts]
            shapes += [shape] * len(firsts)
            start = end
        return batches, shapes


def choose_shapes(buckets: LengthBuckets, count: int) -> ShapeGroups:
    """The groups of batches of at most ``count`` shapes with the least padding, within the limits of ``buckets``."""
    limits, bounds = buckets.limits, np.cumsum(buckets.counts)
    total = int(bounds[-1])
    about = max(
        int(buckets.costs @ buckets.counts) // (limits.max_tokens or 2**40), total // (limits.max_sentences or total)
    )
    if about < 2 * count:
        ends = batch_ends(buckets.costs, bounds, limits)
        starts = np.append(0, ends[:-1])
        sides = (limits.padded(sizes).tolist() for sizes in _longest(buckets, starts, ends))
        shapes = list(map(BatchShape, (ends - starts).tolist(), *sides))
        if len(set(shapes)) <= count:
            return ShapeGroups(ends.tolist(), shapes, False)
    groups = ShapeGroups([], [], True)
    start = 0
    for end in _group_ends(buckets, count):
        src_len, tgt_len = (int(limits.padded(n)[0]) for n in _longest(buckets, np.array([start]), np.array([end])))
        rows = int(_rows(np.array([src_len]), np.array([tgt_len]), limits, total)[0])
        sentences = end - start
        if end == total:
            share = -(-sentences // -(-sentences // rows))  # of each, if all had as many
            rows = min(rows, -(-share // limits.rows_multiple) * limits.rows_multiple)
        else:
            sentences -= sentences % rows
        start += sentences
        groups.ends.append(start)
        groups.shapes.append(BatchShape(rows, src_len, tgt_len))
    return groups


def _longest(buckets: LengthBuckets, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) each: the longest source and target among the sorted sentences from each of ``starts`` to before its end."""
    bounds = np.cumsum(buckets.counts)
    first, last = bounds.searchsorted(starts, side="right"), bounds.searchsorted(ends, side="left")
    ranges = np.column_stack([first, last + 1]).ravel()
    src_len, tgt_len = (np.append(sizes, 0) for sizes in (buckets.src_len, buckets.tgt_len))
    return np.maximum.reduceat(src_len, ranges)[::2], np.maximum.reduceat(tgt_len, ranges)[::2]


def _rows(src_len: np.ndarray, tgt_len: np.ndarray, limits: BatchLimits, total: int) -> np.ndarray:
    """(n,): rows of full batches of so many tokens, padding included."""
    rows = np.minimum(limits.rows(np.maximum(src_len, tgt_len)), total)
    return np.where(rows < limits.rows_multiple, rows, rows - rows % limits.rows_multiple)


def _group_ends(buckets: LengthBuckets, count: int) -> list[int]:
    """After how many sentences each of at most ``count`` groups should end."""
    total = int(buckets.counts.sum())
    starts = np.unique(np.linspace(0, total, BLOCKS, endpoint=False).astype(np.int64))
    ends = np.append(starts[1:], total)
    src_len, tgt_len = _longest(buckets, starts, ends)
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
        fills_one = (sentences >= _rows(src, tgt, buckets.limits, total)) | (ends[i:] == total)
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
