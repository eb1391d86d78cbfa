"""Log lines as fairseq prints them."""

from __future__ import annotations

import logging
import os
from typing import TextIO

from fairseq.errors import FairseqError

LINE_FORMAT, DATE_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def log_to(stream: TextIO) -> None:
    """Write this process's log lines to ``stream``, from the level on that the environment's LOGLEVEL names.

    Raises FairseqError for a level that is none.
    """
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    if level not in LEVELS:
        raise FairseqError(f"LOGLEVEL={level} in the environment: choose from {', '.join(LEVELS)}")
    logging.basicConfig(level=level, format=LINE_FORMAT, datefmt=DATE_FORMAT, stream=stream)
