"""The training batches of one process, epoch by epoch, from wherever a checkpoint was saved."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fairseq.data.batching import BatchLimits, LengthBuckets, select_by_size
from fairseq.data.reading import iterate_batches
from fairseq.data.shapes import ShapeGroups, choose_shapes
from fairseq.data.translation import Batch, BatchShape, LanguagePairDataset
from fairseq.errors import FairseqError

logger = logging.getLogger(__name__)

DATA_STATS = ("data_wait", "tokens", "positions")  # see EpochBatchIterator.take_stats


class _Corpus(NamedTuple):
    """What is the same in every epoch of a dataset: of the one planned last, as the next is often the same again."""

    name: str
    buckets: LengthBuckets
    groups: ShapeGroups | None


class EpochBatchIterator:
    """The training batches, epoch by epoch, for one of ``world_size`` processes.

    An epoch is one list of global batches, which depends on the data, ``seed`` and the epoch's number alone. Update k
    consists of the next ``update_freq * world_size`` of them: its micro-batch u on rank r is number
    ``(k * update_freq + u) * world_size + r``. So the position in the list says all there is to say when training
    continues from a checkpoint, also with other values of the two.

    datasets: epoch -> the dataset of that epoch. max_positions: (source, target); longer sentences are left out with a
    warning, and so are those of more than ``max_tokens``. batch_shapes: most shapes that batches may have
    (`fairseq.data.shapes`); 0: any, as small as can be. Raises FairseqError as `select_by_size` and `plan_batches` do.
    """

    def __init__(
        self,
        datasets: Callable[[int], LanguagePairDataset],
        *,
        max_tokens: int | None,
        max_sentences: int | None,
        required_batch_size_multiple: int = 1,
        max_positions: tuple[int, int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        batch_shapes: int = 0,
    ) -> None:
        self.epoch = 1  # being trained, or about to be
        self.rank, self.world_size = rank, world_size
        self._datasets = datasets
        self._limits = BatchLimits(max_tokens, max_sentences, required_batch_size_multiple)
        self._max_positions, self._seed = max_positions, seed
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._batch_shapes = batch_shapes
        self._corpus: _Corpus | None = None
        # of this epoch, made when needed: batches and their shapes
        self._plan: tuple[LanguagePairDataset, list[np.ndarray], list[BatchShape] | None] | None = None
        self._offset = 0  # global batches of this epoch handed out, those read ahead not counted
        self._stats = dict.fromkeys(DATA_STATS, 0.0)

    def _planned(self) -> tuple[LanguagePairDataset, list[np.ndarray], list[BatchShape] | None]:
        if self._plan is None:
            dataset = self._datasets(self.epoch)
            corpus = self._known(dataset)
            rng = np.random.default_rng([self._seed % 2**64, self.epoch])
            ordered = corpus.buckets.shuffled(rng)
            if corpus.groups is None:
                batches, shapes = corpus.buckets.cut(ordered), None
            else:
                batches, shapes = corpus.groups.cut(ordered, rng)
            order = rng.permutation(len(batches))
            self._plan = dataset, [batches[i] for i in order], shapes and [shapes[i] for i in order]
        return self._plan

    def _known(self, dataset: LanguagePairDataset) -> _Corpus:
        name = dataset.src.prefix
        if self._corpus is None or self._corpus.name != name:
            logger.info(f"{name}: {len(dataset):,} sentence pairs")
            self._corpus, sizes = None, (dataset.src_sizes, dataset.tgt_sizes)
            max_tokens = self._limits.max_tokens  # as in fairseq, a longer sentence does not stop training
            selected = select_by_size(*sizes, self._max_positions, name=name, skip=True, max_tokens=max_tokens)
            limits = self._limits._replace(length_multiple=dataset.required_seq_len_multiple)
            buckets = LengthBuckets(*sizes, selected, limits)
            groups = choose_shapes(buckets, self._batch_shapes) if self._batch_shapes else None
            self._corpus = _Corpus(name, buckets, groups)
        return self._corpus

    @property
    def n_batches(self) -> int:
        """Global batches in this epoch."""
        return len(self._planned()[1])

    def updates_in_epoch(self, update_freq: int) -> int:
        """Updates in the whole of this epoch, what is done included."""
        return -(-self.n_batches // (update_freq * self.world_size))

    def updates_done(self, update_freq: int) -> int:
        """Updates of this epoch that are handed out."""
        return -(-self._offset // (update_freq * self.world_size))

    def end_of_epoch(self) -> bool:
        """Whether all batches of this epoch are handed out."""
        return self._offset >= self.n_batches

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self._offset, self._plan = self.epoch + 1, 0, None

    def first_batch(self) -> Batch:
        """The first global batch of this epoch, on every rank: for one that has none itself."""
        return self.first_batches(1)[0]

    def first_batches(self, count: int) -> list[Batch]:
        """The first ``count`` global batches of this epoch, in training order, without empty rows or needless padding.

        Raises FairseqError if it has fewer.
        """
        dataset, batches, _ = self._planned()
        if count > len(batches):
            raise FairseqError(f"--profile-batches {count}: {dataset.src.prefix} has {len(batches)} batches an epoch")
        return [dataset.collate(batch) for batch in batches[:count]]

    def updates(self, update_freq: int) -> Iterator[list[Batch | None]]:
        """The rest of this epoch: for each update, this rank's micro-batches, at most ``update_freq``.

        All ranks get the same number of updates and micro-batches; one that runs out at the end gets None for a batch.
        """
        dataset, batches, shapes = self._planned()
        step = update_freq * self.world_size
        own = slice(self._offset + self.rank, None, self.world_size)
        own_shapes = None if shapes is None else shapes[own]
        reading = iterate_batches(dataset, batches[own], self._num_workers, self._pin_memory, own_shapes)
        with contextlib.closing(reading) as reader:
            for first in range(self._offset, len(batches), step):
                end = min(first + step, len(batches))
                starts = range(first, end, self.world_size)
                began = time.perf_counter()
                group = [next(reader) if start + self.rank < end else None for start in starts]
                self._stats["data_wait"] += time.perf_counter() - began
                for batch in group:
                    self._count_padding(batch)
                self._offset = end
                yield group

    def _count_padding(self, batch: Batch | None) -> None:
        if batch is not None:
            net_input, target = batch["net_input"], batch["target"]
            assert target is not None
            self._stats["tokens"] += int(net_input["src_lengths"].sum()) + batch["ntokens"]
            self._stats["positions"] += net_input["src_tokens"].numel() + target.numel()

    def take_stats(self) -> dict[str, float]:
        """What this process has handed out since the last call.

        data_wait: seconds that it waited for batches; positions: of source and target, padding included, and tokens:
        those without padding.
        """
        stats, self._stats = self._stats, dict.fromkeys(DATA_STATS, 0.0)
        return stats

    def state_dict(self) -> dict[str, Any]:
        """Where training stands; at the end of an epoch, the start of the next.

        ``offset_batches`` counts global batches; ``iterations_in_epoch``, as in fairseq, those of one rank.
        """
        started = self._offset > 0  # if not, there is no need to plan
        done = started and self.end_of_epoch()
        offset = 0 if done else self._offset
        return {
            "version": 2,
            "epoch": self.epoch + done,
            "iterations_in_epoch": -(-offset // self.world_size),
            "offset_batches": offset,
            "n_batches": self.n_batches if offset else 0,
            "shuffle": True,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict`, ours or fairseq's, was taken.

        Where the epoch now has another number of batches, the same share of it counts as done, with a warning.
        """
        self.epoch, self._plan = int(state["epoch"]), None
        iterations = int(state.get("iterations_in_epoch", 0))
        self._offset = int(state.get("offset_batches", iterations * self.world_size))
        before = int(state.get("n_batches", 0))
        if self._offset and before not in (0, self.n_batches):
            logger.warning(
                f"epoch {self.epoch} had {before} batches when the checkpoint was saved and has {self.n_batches} now: "
                "data or batch size differ, and training continues at about the same place"
            )
            self._offset = self._offset * self.n_batches // before
