"""Log lines as fairseq prints them."""

from __future__ import annotations

import logging
import os
from typing import TextIO

LINE_FORMAT, DATE_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S"


def log_to(stream: TextIO) -> None:
    """Write this process's log lines to ``stream``, from the level on that the environment's LOGLEVEL names."""
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    logging.basicConfig(level=level, format=LINE_FORMAT, datefmt=DATE_FORMAT, stream=stream)
