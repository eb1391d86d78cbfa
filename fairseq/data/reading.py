"""Reading batches from a data-bin, ahead of their use in processes of their own where asked to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fairseq.data.batching import shown_ids
from fairseq.data.translation import Batch, BatchShape, LanguagePairDataset, map_batch
from fairseq.errors import FairseqError, out_of_memory_ends
from fairseq.utils.processes import JOB_SIGNALS, end_with_parent, worker_context


class _Arrays:
    """A batch on its way between processes, as numpy arrays, which travel several times faster than tensors do."""

    def __init__(self, batch: Batch) -> None:
        self._batch = map_batch(batch, Tensor, Tensor.numpy)

    def tensors(self) -> Batch:
        return map_batch(self._batch, np.ndarray, torch.from_numpy)

    def pin_memory(self) -> Batch:  # DataLoader calls it, where it is to pin what it has read
        return map_batch(self.tensors(), Tensor, Tensor.pin_memory)


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
    for signum in (signal.SIGINT, *JOB_SIGNALS):
        signal.signal(signum, signal.SIG_IGN)
    end_with_parent()
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
        multiprocessing_context=worker_context() if num_workers else None,
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
