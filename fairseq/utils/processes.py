"""How processes that read, count or clean for another one are started."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext


def worker_context() -> BaseContext:
    """Forked ones on Linux, elsewhere Python's choice.

    Python's choice on Linux is another from 3.14 on: each process imports everything again and is sent what to work on,
    and a process besides, whose end ends them all, starts them.
    """
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)
