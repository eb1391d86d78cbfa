"""A CUDA graph's stand-in on the CPU: the operations of some work with their very tensors and numbers, and again.

As with a graph, recording changes nothing that was there before, repeating runs no Python of the work's, and a number
that came from the host stays what it was. Work that reads a tensor back fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What gives a number or a shape that depends on numbers; on a GPU these wait
READS_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")


def _tensors(value: Any) -> list[Tensor]:
    """Those in nested lists, tuples and dicts. (torch's own tree_flatten takes most of a test's time.)"""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _storages(value: Any) -> dict[int, Tensor]:
    return {t.untyped_storage().data_ptr(): t for t in _tensors(value) if t.numel()}


class Tape(TorchDispatchMode):
    """The operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        # function, arguments, and the results that are no view of an argument: their place among all, and they
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> what was there before, and a copy of it
        self.own: set[int] = set()  # storages made on the way

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.partition(".")[0] in READS_BACK:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        inputs = _storages((args, kwargs))
        for pointer, tensor in inputs.items():
            if pointer not in self.own and pointer not in self.before:
                storage = tensor.untyped_storage()
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
                self.before[pointer] = whole, whole.clone()
        out = func(*args, **kwargs)
        new = _storages(out).keys() - inputs.keys()
        self.own.update(new - self.before.keys())
        made = [(i, t) for i, t in enumerate(_tensors(out)) if t.untyped_storage().data_ptr() in new]
        self.operations.append((func, args, kwargs, made))
        return out

    @classmethod
    @contextlib.contextmanager
    def recording(cls) -> Iterator[Tape]:
        """What runs within is on the tape and, afterwards, has not happened."""
        tape, state = cls(), torch.get_rng_state()
        try:
            with tape:
                yield tape
        finally:
            torch.set_rng_state(state)
            with torch.no_grad():
                for whole, copy in tape.before.values():
                    whole.copy_(copy)

    @torch.no_grad()
    def repeat(self) -> None:
        """All of it again, with the same tensors and numbers."""
        for func, args, kwargs, made in self.operations:
            again = _tensors(func(*args, **kwargs))
            for i, old in made:
                old.copy_(again[i])


class TapeRecorder:
    """`fairseq.utils.cuda_graphs.Recorder`. failures: raised by the next recordings, one each."""

    def __init__(self) -> None:
        self.recorded = self.repeated = self.given_up = 0
        self.failures: list[Exception] = []

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.failures:
            raise self.failures.pop()
        with Tape.recording() as tape:
            work()
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            tape.repeat()

        return repeat

    def give_up(self) -> None:
        self.given_up += 1
