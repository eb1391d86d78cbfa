"""Log lines as fairseq prints them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import TextIO

from fairseq.errors import FairseqError

LINE_FORMAT, DATE_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class LineHandler(logging.StreamHandler):
    """Writes lines while it can. Where a disk is full or a reader has gone, that is said once, on standard error, and
    the work goes on: it is worth more than its log.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """name: of the stream, for the message."""
        super().__init__(stream)
        self.setFormatter(logging.Formatter(LINE_FORMAT, DATE_FORMAT))
        self._name = name
        self._said = False

    def handleError(self, record: logging.LogRecord) -> None:
        """As `logging.Handler.handleError`, which is called where an exception is at hand."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            warn_unwritable(self._name, error)


def warn_unwritable(name: str, error: OSError) -> None:
    """Say on standard error, if that can be written, that ``name`` cannot, and that this ends nothing."""
    with contextlib.suppress(OSError):
        print(
            f"warning: {name}: cannot write: {error.strerror or error}; going on without", file=sys.stderr, flush=True
        )


def log_to(stream: TextIO) -> None:
    """Write this process's log lines to ``stream``, from the level on that the environment's LOGLEVEL names.

    They, and all output, are UTF-8 as all text is, whatever the locale. Raises FairseqError for a level that is none.
    """
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(encoding="utf-8", errors="backslashreplace")
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    if level not in LEVELS:
        raise FairseqError(f"LOGLEVEL={level} in the environment: choose from {', '.join(LEVELS)}")
    name = "standard output" if stream is sys.stdout else "standard error"
    logging.basicConfig(level=level, handlers=[LineHandler(stream, name)])
