"""Saving beside training: the state is copied to host memory, and a thread writes the copy."""

from __future__ import annotations

import logging
import threading
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fairseq.errors import FairseqError

logger = logging.getLogger("fairseq.checkpoint")


def to_host(state: Any, _copies: dict[Any, Tensor] | None = None) -> Any:
    """Nested dicts, lists and Namespaces with every tensor copied to the CPU; one that occurs twice is copied once."""
    copies: dict[Any, Tensor] = {} if _copies is None else _copies
    if isinstance(state, Tensor):
        key = state.data_ptr(), state.dtype, state.device, state.shape, state.stride()
        if key not in copies:
            copies[key] = state.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(state, dict):
        return {key: to_host(value, copies) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_host(value, copies) for value in state)
    if isinstance(state, Namespace):
        return Namespace(**to_host(vars(state), copies))
    return state


class BackgroundWriter:
    """Runs one job at a time in a thread; an error in it is raised at the next call of any method."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Wait for the job before, then start this one. Raises what the one before has raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the last job has raised, if it has ended; waits for nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when no job is running. Raises what the last has raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except FairseqError as error:
            if kind is None:
                raise
            logger.error(str(error))  # what ends training already is the error to raise
