"""torch's device ``cuda`` on a machine without a GPU, for tests: ``FAKE_CUDA=library pytest -p tests.fake_cuda ...``.

Tensors there are the host's memory and their kernels the CPU's (``fake_cuda.cpp``), but torch takes them for a GPU's:
autograd, autocast and every branch of ours and torch's own that asks for the device. Streams are all one, which does
everything at once; a CUDA graph is `tests.tape`'s. Seen are tensors on the wrong device, dtypes that do not fit under
CUDA's autocast, attributes that are not there, what waits and what a graph cannot record. Not seen: races between
streams, memory that runs out, and a GPU's own kernels.

The library has to be there before torch is, so this replaces torch's functions as soon as it is imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def build(directory: Path) -> Path:
    """Compile the library. Raises CalledProcessError or FileNotFoundError where that is not possible."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_directory, library = Path(spec.origin).parent, directory / "fake_cuda.so"
    libraries = torch_directory / "lib"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-w", f"-I{torch_directory / 'include'}"]
    command += [str(Path(__file__).with_name("fake_cuda.cpp")), "-o", str(library)]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def install(library: ctypes.CDLL) -> None:
    """Have ``torch.cuda`` be that of one GPU."""
    import contextlib

    import torch

    from tests.tape import Tape

    cuda: Any = torch.cuda
    nothing, waiting, capture = 0, 1, 2
    device = torch.device("cuda", 0)
    now = {"watch": nothing, "debug": nothing}

    def watch(what: int) -> None:
        now["watch"] = what
        library.fake_cuda_watch(what)

    def waits(what: str) -> None:
        if now["watch"]:
            raise RuntimeError(f"CUDA error: operation not permitted while this waits for nothing ({what})")

    class Stream:
        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.device = torch.device("cuda", 0)

        def wait_stream(self, stream: Stream) -> None:
            assert isinstance(stream, Stream)

        def synchronize(self) -> None:
            waits("Stream.synchronize")

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            self.recorded = False

        def record(self, stream: Stream | None = None) -> None:
            self.recorded = True

        def synchronize(self) -> None:
            assert self.recorded
            if now["watch"] == capture:
                waits("Event.synchronize")

        def query(self) -> bool:
            return True

    default = Stream()
    streams = [default]
    recording: list[Any] = []  # pools of graphs that failed, for which the allocator still records

    @contextlib.contextmanager
    def stream(one: Stream) -> Iterator[None]:
        streams.append(one)
        try:
            yield
        finally:
            streams.pop()

    class CUDAGraph:
        def __init__(self) -> None:
            self.repeat: Any = None

        def replay(self) -> None:
            assert self.repeat is not None, "replayed before it was captured"
            self.repeat()

    @contextlib.contextmanager
    def graph(
        cuda_graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        waits("beginning a capture")
        assert streams[-1] is not default or stream is not None
        with Tape.recording() as tape:
            watch(capture)
            try:
                yield
            except RuntimeError as error:
                if "not permitted" in str(error):  # the recording is invalid, and its end fails before ...
                    recording.append(pool)  # ... the allocator is told
                raise
            finally:
                watch(now["debug"])
        cuda_graph.repeat = tape.repeat

    def empty_cache() -> None:
        assert now["watch"] != capture
        if recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end_allocate(index: int, pool: Any) -> None:
        if pool not in recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        recording.remove(pool)

    def set_sync_debug_mode(mode: str | int) -> None:
        now["debug"] = waiting if mode == "error" else nothing
        watch(now["debug"])

    def synchronize(device: Any = None) -> None:
        waits("torch.cuda.synchronize")

    class Generator:
        """What `CudaRecorder.give_up` does with the default generator."""

        def clone_state(self) -> Generator:
            return Generator()

        def graphsafe_set_state(self, state: Generator) -> None:
            assert isinstance(state, Generator)

    @contextlib.contextmanager
    def on_device(_: Any) -> Iterator[None]:
        yield

    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda *args, **kwargs: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": on_device,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "empty_cache": empty_cache,
        "synchronize": synchronize,
        "max_memory_allocated": lambda device=None: 10**9,
        "memory_allocated": lambda device=None: 10**9,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: streams[-1],
        "default_stream": lambda device=None: default,
        "stream": stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: now["watch"] == capture,
        "default_generators": (Generator(),),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,  # torch.manual_seed has done it
        "manual_seed_all": lambda seed: waits("seeding") if now["watch"] == capture else None,
    }
    for name, value in replaced.items():
        assert hasattr(cuda, name), f"torch.cuda has no {name}"
        setattr(cuda, name, value)
    import torch.cuda.amp.common

    torch._C._cuda_endAllocateToPool = end_allocate  # type: ignore[attr-defined]
    torch.backends.cuda.is_built = lambda: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    assert torch.ones(2, device=device).is_cuda


if path := os.environ.get("FAKE_CUDA"):
    install(ctypes.CDLL(path))
