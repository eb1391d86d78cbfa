"""Which sentences go together, in which order, and which process sees them.

Sentences are sorted by the longer of their two sides, then by the difference of the sides, ascending and descending in
turn, so that neighbours are alike on both sides across every boundary; equal ones are shuffled anew each epoch. On
Multi30k at 4096 tokens a batch this leaves 2.8% padding; by source, then target length it would be 6.2%.
Planning is vectorised: a few numpy calls a batch, none a sentence.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fairseq.data.translation import Batch, BatchShape, LanguagePairDataset
from fairseq.errors import FairseqError, out_of_memory_ends

logger = logging.getLogger(__name__)

IDS_SHOWN = 10  # sentence ids named in a message
LONGEST_SORTED = 2**12 - 1  # longer sentences are sorted as if they were this long
SORT_BLOCK = 2**16
DATA_STATS = ("data_wait", "tokens", "positions")  # see EpochBatchIterator.take_stats


def shown_ids(ids: Sequence[int] | np.ndarray) -> str:
    """Sentence ids for a message, the first few of many."""
    return ", ".join(map(str, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")


def describe_batch(batch: Batch) -> str:
    """Sentences, their lengths in tokens with padding, and their numbers in the dataset, from 0."""
    inputs, ids = batch["net_input"], batch["id"].tolist()
    lengths = f"{inputs['src_tokens'].size(1)} source"
    if batch["target"] is not None:
        lengths += f" and {inputs['prev_output_tokens'].size(1)} target"
    return f"a batch of {len(ids)} sentences of up to {lengths} tokens (sentences {shown_ids(ids)})"


@contextlib.contextmanager
def batches_fit(batches: Iterable[Batch], doing: str, advice: str) -> Iterator[Iterator[Batch]]:
    """``batches``, for use within: running out of memory there becomes an OutOfMemory that names the last one read."""
    last: list[Batch] = []

    def read() -> Iterator[Batch]:
        for batch in batches:
            last[:] = [batch]
            yield batch

    with out_of_memory_ends(lambda: ", on ".join([doing, *map(describe_batch, last)]), advice):
        yield read()


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


class _Arrays:
    """A batch on its way between processes, as numpy arrays, which travel several times faster than tensors do."""

    def __init__(self, batch: Batch) -> None:
        self._batch = _each(batch, Tensor, Tensor.numpy)

    def tensors(self) -> Batch:
        return _each(self._batch, np.ndarray, torch.from_numpy)

    def pin_memory(self) -> Batch:  # DataLoader calls it, where it is to pin what it has read
        return _each(self.tensors(), Tensor, Tensor.pin_memory)


def _each(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """``value``, a dict of dicts, with ``function`` applied to all in it that is of a ``kind``."""
    if isinstance(value, dict):
        return {key: _each(item, kind, function) for key, item in value.items()}
    return function(value) if isinstance(value, kind) else value


class _Collated(Dataset[Any]):
    """Batch number -> collated batch, or the error that collating raised: DataLoader would bury it in a traceback."""

    def __init__(
        self, dataset: LanguagePairDataset, batches: Sequence[np.ndarray], shapes: Sequence[BatchShape] | None
    ) -> None:
        self.dataset, self.batches, self.shapes = dataset, batches, shapes

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> _Arrays | FairseqError:
        try:
            shape = None if self.shapes is None else self.shapes[number]
            return _Arrays(self.dataset.collate(self.batches[number], shape))
        except FairseqError as error:
            return error


def _obey_parent(_: int) -> None:
    """Make a worker deaf to signals that go to all processes of a job, which its parent may still need it after.

    SIGTERM from the parent itself, which ends its workers so, ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()

    def wait() -> None:
        while parent is None or signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def iterate_batches(
    dataset: LanguagePairDataset,
    batches: Sequence[np.ndarray],
    num_workers: int = 0,
    pin_memory: bool = False,
    shapes: Sequence[BatchShape] | None = None,
) -> Generator[Batch, None, None]:
    """Collate ``batches``, in order, ahead of their use in ``num_workers`` processes.

    shapes: of each, if they are not to be as small as can be. Raises FairseqError when collating does, and when one of
    those processes dies.
    """
    loader = DataLoader(
        _Collated(dataset, batches, shapes),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_obey_parent,
        generator=torch.Generator(),  # DataLoader draws a seed; not from the generator that dropout uses
    )
    reader = _without_signal_handler(loader)
    while True:
        try:
            batch = next(reader, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise FairseqError("a reading process died, perhaps out of memory; try fewer --num-workers") from error
        if batch is None:
            return
        if isinstance(batch, FairseqError):
            raise batch
        yield batch.tensors() if isinstance(batch, _Arrays) else batch


def _without_signal_handler(loader: DataLoader) -> Iterator[Any]:
    """``iter(loader)``, but a dead process is told by ``next`` alone.

    torch's handler of SIGCHLD raises wherever the main thread is, in the middle of a log line or of saving.
    """
    before = signal.getsignal(signal.SIGCHLD)
    reader = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return reader


def _as_it_is(batch: Any) -> Any:
    return batch


Planner = Callable[..., list[tuple[np.ndarray, BatchShape]]]  # `fairseq.data.shapes.plan_shapes` without its count


class EpochBatchIterator:
    """The training batches, epoch by epoch, for one of ``world_size`` processes.

    An epoch is one list of global batches, which depends on the data, ``seed`` and the epoch's number alone. Update k
    consists of the next ``update_freq * world_size`` of them: its micro-batch u on rank r is number
    ``(k * update_freq + u) * world_size + r``. So the position in the list says all there is to say when training
    continues from a checkpoint, also with other values of the two.

    datasets: epoch -> the dataset of that epoch. max_positions: (source, target); longer sentences are left out with a
    warning. planner: cuts batches of given shapes; None: batches are as small as can be. Raises FairseqError as
    `select_by_size` and `plan_batches` do.
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
        planner: Planner | None = None,
    ) -> None:
        self.epoch = 1  # being trained, or about to be
        self.rank, self.world_size = rank, world_size
        self._datasets = datasets
        self._limits: dict[str, Any] = {
            "max_tokens": max_tokens,
            "max_sentences": max_sentences,
            "required_batch_size_multiple": required_batch_size_multiple,
        }
        self._max_positions, self._seed = max_positions, seed
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._planner = planner
        self._selected: tuple[str, np.ndarray] | None = None  # of the dataset planned last: it is often the same again
        # of this epoch, made when needed: batches and their shapes
        self._plan: tuple[LanguagePairDataset, list[np.ndarray], list[BatchShape] | None] | None = None
        self._offset = 0  # global batches of this epoch handed out, those read ahead not counted
        self._stats = dict.fromkeys(DATA_STATS, 0.0)

    def _planned(self) -> tuple[LanguagePairDataset, list[np.ndarray], list[BatchShape] | None]:
        if self._plan is None:
            dataset = self._datasets(self.epoch)
            sizes = dataset.src_sizes, dataset.tgt_sizes
            name = dataset.src.prefix
            if self._selected is None or self._selected[0] != name:
                self._selected = name, select_by_size(*sizes, self._max_positions, name=name, skip=True)
            rng = np.random.default_rng([self._seed % 2**64, self.epoch])
            ordered = sort_by_length(*sizes, self._selected[1], rng)
            limits = self._limits | {"required_seq_len_multiple": dataset.required_seq_len_multiple}
            if self._planner is None:
                batches, shapes = plan_batches(*sizes, ordered, **limits), None
            else:
                batches, shapes = map(list, zip(*self._planner(*sizes, ordered, rng=rng, **limits), strict=True))
            order = rng.permutation(len(batches))
            self._plan = dataset, [batches[i] for i in order], shapes and [shapes[i] for i in order]
        return self._plan

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
