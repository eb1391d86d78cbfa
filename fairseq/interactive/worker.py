"""One thread that computes, so that the event loop never waits for a model, and a short line in front of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Busy(Exception):
    """As many jobs are waiting as may."""


class Abandoned(Exception):
    """Nobody waits for the job's result any more."""


class Worker:
    """Runs one job at a time, in the order they came. most_waiting: jobs in line, besides the one that runs."""

    def __init__(self, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self._waiting = 0
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="translate")

    async def run(self, job: Callable[[threading.Event], T]) -> T:
        """The result of ``job(abandoned)``. Raises Busy at once when the line is full.

        Cancelled while it waits, a job leaves the line. One that runs has ``abandoned`` set, which it should look at
        from time to time, and end by raising Abandoned; only then does the next begin.
        """
        if self._waiting >= self.most_waiting:
            raise Busy
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        abandoned = threading.Event()
        running = asyncio.get_running_loop().run_in_executor(self._thread, job, abandoned)
        running.add_done_callback(self._finished)
        try:
            return await asyncio.shield(running)
        finally:
            abandoned.set()

    def _finished(self, running: asyncio.Future[T]) -> None:
        self._turn.release()
        if not running.cancelled():
            running.exception()  # or asyncio complains that nobody asked for an abandoned job's
