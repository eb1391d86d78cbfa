"""Are the other processes still there? One that is stopped or cut off leaves the rest waiting for ever in a collective.

Each process publishes a beat, a number that grows, in the store where all have met, and watches the others'. Only how
long ago a beat was last seen to change counts, on the clock of the process that watches. One thread talks to the store,
which may never answer when its machine has gone; another one judges.

What a process does between two beats is its own affair: a long validation, compilation or checkpoint ends nothing. Only
for a batch its main thread must not wait longer than that: the file system has gone, or a data worker hangs.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.distributed import Store

from fairseq.errors import FairseqError

LOST_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command, given again, goes on
_MOST_SECONDS = 5.0  # between two beats
_GONE = 2.5  # beats missed by a process whose connections are broken too
T = TypeVar("T")


class LostProcess(FairseqError):
    """Another process is gone or hangs; this one has done nothing wrong."""

    exit_status = LOST_STATUS


class Heartbeat:
    """Beats of this process, and a watch over all of them, from creation to ``stop``.

    store: a connection that nothing else uses. where: its address, for messages. timeout: seconds. end: called in a
    thread with one line that says who is lost, an empty one if a process beside this says it; it must end this process,
    whose main thread may hang. continues: what continues from the last checkpoint, in words, if there is to be one.
    """

    def __init__(
        self,
        store: Store,
        where: str,
        rank: int,
        size: int,
        timeout: float,
        end: Callable[[str], None],
        continues: str = "",
    ) -> None:
        self._store, self._where = store, where
        self._rank, self._size = rank, size
        self._timeout, self._end = timeout, end
        self._continues = f"; {continues} from the last checkpoint" if continues else ""
        self._interval = min(timeout / 30, _MOST_SECONDS)
        self._host = socket.gethostname()
        self._updates = 0
        self._count = 0
        self._reading_since: float | None = None
        self._beats: list[list] = []  # of all processes, as `_beat` makes them
        self._moved: list[float] = []  # when each was last seen to change
        self._stopped = threading.Event()
        store.set(self._key(rank), self._beat())
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]

    def start(self) -> None:
        """Begin, when all processes have created theirs."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Tell the others that this process has come to its end, and stop watching them."""
        self._stopped.set()
        self._threads[0].join(2 * self._interval)

    def reading(self, batches: Iterable[T], updates: Callable[[], int] | None = None) -> Iterator[T]:
        """``batches``, each of which has to come within the timeout. updates: the number of updates so far."""
        iterator = iter(batches)
        while True:
            if updates is not None:
                self._updates = updates()
            self._reading_since = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._reading_since = None
            yield batch

    def who_is_gone(self) -> str:
        """Who has stopped beating, in a line, or an empty one; for when connections break. Takes a few beats' time."""
        time.sleep((_GONE + 1) * self._interval)
        return self._silent(_GONE * self._interval)

    @staticmethod
    def _key(rank: int) -> str:
        return f"heartbeat/{rank}"

    def _beat(self, done: bool = False) -> str:
        self._count += 1
        return json.dumps([self._count, done, self._updates, self._host])

    def _exchange(self) -> None:
        keys = [self._key(rank) for rank in range(self._size)]
        try:
            while not self._stopped.is_set():
                self._store.set(keys[self._rank], self._beat())
                beats = [json.loads(value) for value in self._store.multi_get(keys)]
                now = time.monotonic()
                if not self._beats:
                    self._moved = [now] * self._size
                else:
                    pairs = zip(self._moved, self._beats, beats, strict=True)
                    self._moved = [now if new != old else moved for moved, old, new in pairs]
                self._beats = beats
                self._stopped.wait(self._interval)
            self._store.set(keys[self._rank], self._beat(done=True))
        except RuntimeError:
            return  # no beat moves from now on, and that is noticed

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if now - looked > self._timeout / 3:  # this process was stopped itself, and knows nothing of the others
                self._moved = [now] * len(self._moved)
                if self._reading_since is not None:
                    self._reading_since = now
            looked = now
            if line := self._stuck():
                self._end(line)
            elif line := self._silent(self._timeout):
                self._end(line if self._speaks() else "")

    def _speaks(self) -> bool:
        """Whether it is for this process to speak, as the first on its host; if not, the one that does gets time to."""
        now = time.monotonic()
        for rank in range(min(self._rank, len(self._beats))):
            _, done, _, host = self._beats[rank]
            if host == self._host and not done and now - self._moved[rank] <= self._timeout / 2:
                time.sleep(4 * self._interval)
                return False
        return True

    def _stuck(self) -> str:
        """A line if this process has waited too long for a batch."""
        since = self._reading_since
        if since is None or time.monotonic() - since <= self._timeout:
            return ""
        return self._line(self._rank, f"has waited {self._timeout:g} s for a batch", self._host, self._updates)

    def _silent(self, seconds: float) -> str:
        """A line if a process, or the store, has not been heard of for so long."""
        if not self._beats:
            return ""
        beats, moved = self._beats, self._moved
        heard = moved[self._rank]  # its own beat comes back whenever the store answers
        if time.monotonic() - heard > seconds:
            what = f"process 0 on {beats[0][3]}, its machine or the network to it is gone"
            where = f"no answer for {seconds:g} s from {self._where}, where the processes meet"
            return f"{where}: {what}{self._advice(self._updates)}"
        silent = [rank for rank in range(self._size) if heard - moved[rank] > seconds and not beats[rank][1]]
        if not silent:
            return ""
        _, _, updates, host = beats[silent[0]]
        return self._line(silent[0], f"has given no sign of life for {seconds:g} s", host, updates)

    def _line(self, rank: int, what: str, host: str, updates: int) -> str:
        return f"process {rank} of {self._size} on {host} {what}{self._advice(updates)}"

    def _advice(self, updates: int) -> str:
        return f" after update {updates}{self._continues} (--heartbeat-timeout)"


def end_process(line: str) -> None:
    """Say what is lost and end this process at once: its main thread may wait for ever, and so would any clean-up."""
    if line:
        os.write(2, f"error: {line}\n".encode())
    os._exit(LOST_STATUS)
