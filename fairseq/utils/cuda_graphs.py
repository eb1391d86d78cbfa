"""What records CUDA graphs, for training and for generation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from fairseq.errors import first_line


class Recorder(Protocol):
    """What records device work and repeats it; in tests also something that does so on the CPU."""

    def on_stream(self) -> contextlib.AbstractContextManager[None]:
        """Where updates run, those that are not recorded included."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats ``work``, which is not executed. ``work`` reads nothing back from the device."""

    def give_up(self) -> None:
        """Call when `record` has failed and nothing that it has recorded is used again."""


class CudaRecorder:
    """`Recorder` of CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """A stream of our own: the default one cannot be recorded, nor can a backward pass that ran there before."""
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Raises what ``work`` does, and RuntimeError for what cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins batches may go on
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def give_up(self) -> None:
        """See `Recorder`."""
        # An invalid recording leaves allocator and generator as if it went on: the one would not empty its cache
        old = "_cuda_endAllocateCurrentStreamToPool"  # its name in torch 2.6
        end = getattr(torch._C, old if hasattr(torch._C, old) else "_cuda_endAllocateToPool")
        with contextlib.suppress(RuntimeError):  # where it has ended all the same
            end(self._device.index or 0, self._pool)
        generator = torch.cuda.default_generators[self._device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


class Graphs:
    """What has been recorded, and how to go on without it for good, which is said once."""

    def __init__(self, recorder: Recorder, logger: logging.Logger, kept: list[dict[Any, Any] | list[Any]]) -> None:
        """kept: all that holds memory; what is recorded, or what it works on, first."""
        self._recorder, self._logger, self._kept = recorder, logger, kept
        self._off = False

    def release(self) -> bool:
        """Go on without graphs, so that others have their memory; returns whether they had any."""
        if not self._kept[0]:
            return False
        self._logger.warning("--cuda-graphs: memory is short; going on without")
        self._turn_off()
        return True

    def _failed(self, error: Exception) -> None:
        """Go on without graphs after a recording that has failed."""
        self._logger.warning(f"--cuda-graphs failed, going on without: {type(error).__name__}: {first_line(error)}")
        self._turn_off(self._recorder.give_up)

    def _turn_off(self, clean_up: Callable[[], None] = lambda: None) -> None:
        self._off = True
        for kept in self._kept:
            kept.clear()
        clean_up()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
