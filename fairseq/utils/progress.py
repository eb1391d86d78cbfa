"""How far a command is through the batches of a subset, as ``--log-format`` and ``--log-interval`` say."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def batch_progress(
    batches: Iterable[T],
    total: int,
    subset: str,
    *,
    verb: str,
    log_format: str,
    log_interval: int,
    log: logging.Logger,
) -> Iterator[T]:
    """Yield ``batches``, with a bar (log_format tqdm) or a line every ``log_interval`` of them (simple, json)."""
    with tqdm(total=total, desc=f"{verb} {subset}", leave=False, disable=log_format != "tqdm") as bar:
        for number, batch in enumerate(batches, start=1):
            yield batch
            bar.update()
            if number % log_interval == 0 and log_format == "simple":
                log.info(f"{subset}: {number} of {total} batches")
            elif number % log_interval == 0 and log_format == "json":
                log.info(f'{{"subset": "{subset}", "batch": {number}, "batches": {total}}}')
