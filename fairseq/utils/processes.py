"""Processes that read, count or clean for another one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from fairseq.errors import FairseqError

T = TypeVar("T")
R = TypeVar("R")

JOB_SIGNALS = (signal.SIGHUP, signal.SIGUSR1)  # that may come to all processes of a training, besides SIGINT

_function: Callable[[Any], Any]  # of a worker process


def worker_context() -> BaseContext:
    """Forked ones on Linux, elsewhere Python's choice.

    Python's choice on Linux is another from 3.14 on: each process imports everything again and is sent what to work on,
    and a process besides, whose end ends them all, starts them.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Send ``signum`` to this worker when the process that started it has gone: one that is killed cannot end it, and a
    worker that waits for work, or to be read, would do so for ever.
    """
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid

    def wait() -> None:
        while os.getppid() == pid:
            time.sleep(1)
        os.kill(os.getpid(), signum)

    threading.Thread(target=wait, daemon=True).start()


def ordered_map(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """``map(function, tasks)`` in up to ``workers`` processes, which run a bounded number of tasks ahead.

    ``function`` is sent to each process once. Raises FairseqError when a process dies.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, max(1, workers)))
    tasks = chain(first, tasks)
    if len(first) <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(len(first), worker_context(), initializer=_start_worker, initargs=(function,))
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_call, task))
            if len(pending) > 2 * len(first):
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
    end_with_parent()


def _call(task: Any) -> Any:
    return _function(task)
