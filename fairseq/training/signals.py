"""Signals that ask a training to stop: the update is finished, a checkpoint saved, and all processes end alike."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from fairseq.training.distributed import World

LONGEST_WAIT = timedelta(hours=2)  # of processes for one, say while it writes; the heartbeat tells a lost one before
SAME_SIGINT = 0.3  # seconds: `timeout` and others send it to a process and to its group, which is one Ctrl-C
# Ctrl-C; a scheduler's; a terminal that has gone; as SLURM is told to send before its limit
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def exit_status(signum: int) -> int:
    """The exit status of a process that was stopped by a signal, as a shell reports it: 130, 143, 129 or 138."""
    return 128 + signum


STOP_STATUSES = tuple(exit_status(signum) for signum in STOP_SIGNALS)


class StopSignals:
    """Remembers a signal until training has come to a place where it can stop. A context manager; one a process.

    A signal that the process was told to ignore stays ignored. A second SIGINT ends the process at once.
    """

    def __init__(self, world: World) -> None:
        self.received = 0  # the first signal that came to this process
        self._settling = False  # a first SIGINT has come
        self._world = world
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._work: Any = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other can
            for signum in STOP_SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        if self._world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
            self._start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        if self._group is not None:
            if kind is None and self._work is not None:
                self._work.wait()
            with contextlib.suppress(RuntimeError):  # when another process has gone
                dist.destroy_process_group(self._group)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self._world.is_master and not self.received:  # not through logging, which this may have interrupted
            with contextlib.suppress(OSError):  # of a pipe whose reader the same Ctrl-C has ended
                os.write(2, b"interrupted: saving a checkpoint; Ctrl-C once more ends it at once\n")
        self.received = self.received or signum
        if signum == signal.SIGINT and not self._settling:
            self._settling = True
            time.sleep(SAME_SIGINT)  # another one comes here meanwhile
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _start(self) -> None:
        self._flag = torch.tensor(self.received)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)

    def agreed(self) -> int:
        """The signal that all processes stop for, or 0; the same in all of them, which must call it equally often.

        With several processes this is what they knew at the call before: the exchange goes on beside an update, on the
        CPU, so that nothing waits for it or for a GPU.
        """
        if self._world.size == 1:
            return self.received
        self._work.wait()
        signum = int(self._flag)
        self._work = None
        if not signum:
            self._start()
        return signum

    def agreed_now(self) -> int:
        """``agreed`` where all processes know that one of them has a signal."""
        while not (signum := self.agreed()):
            pass
        return signum
