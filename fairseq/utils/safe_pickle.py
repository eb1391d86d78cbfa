"""Reading checkpoints of any origin without running what is pickled in them.

An unpickler calls whatever a file names, and sets attributes of what the calls return. Ours resolves a short list of
harmless constructors, none of which a file can alter; every other class or function becomes an inert ``Record`` that
only remembers its state. Old fairseqs pickled meters and configuration classes into their checkpoints; those load as
records and are ignored.
"""

from __future__ import annotations

import argparse
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from fairseq.errors import FairseqError


class _Function:
    """A function that a pickle may call and cannot alter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("attributes for a function")


class _Dict(dict[Any, Any]):
    """In place of an OrderedDict: a dict without the attributes that a state_dict comes with."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Settings(argparse.Namespace):
    """In place of a Namespace. Having ``__setstate__``, the class itself takes no attributes from a pickle."""

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)


class Record:
    """What stands in for an object of a class that is not loaded: its state, no behaviour."""

    args: tuple[Any, ...]
    state: dict[str, Any]
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        record = super().__new__(cls)
        record.args, record.state, record.items = args, {}, {}  # here, since pickles may go without __init__
        return record

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def add(self, value: Any) -> None:
        self.append(value)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _Function(lambda *_: _Dict()),
    ("argparse", "Namespace"): _Settings,
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
} | {("torch", str(d).removeprefix("torch.")): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        return type(name.rpartition(".")[2], (Record,), {"__module__": module})


def _load(file: BinaryIO, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


# The interface torch.load wants of a pickle module.
_PICKLE_MODULE = SimpleNamespace(
    Unpickler=_Unpickler,
    load=_load,
    UnpicklingError=pickle.UnpicklingError,
    __name__="fairseq.utils.safe_pickle",
)


def plain(value: Any) -> Any:
    """``value`` with configuration records (OmegaConf's) unwrapped into dicts, lists and scalars."""
    if isinstance(value, Record):
        if "_content" in value.state:
            return plain(value.state["_content"])
        if "_val" in value.state:
            return plain(value.state["_val"])
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def load(path: str | Path) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors on the CPU, foreign classes as records; runs no code from it.

    Raises FairseqError when the file is missing, cut short or no such file.
    """
    try:
        with open(path, "rb") as file:
            _refuse_archives(file)
            return torch.load(file, map_location="cpu", pickle_module=_PICKLE_MODULE, weights_only=False)
    except FileNotFoundError:
        raise FairseqError(f"checkpoint {path}: no such file") from None
    except IsADirectoryError:
        raise FairseqError(f"checkpoint {path}: is a directory; name a file in it") from None
    except PermissionError:
        raise FairseqError(f"checkpoint {path}: no permission to read it") from None
    except Exception as error:  # a malformed pickle can fail in any way that Python code can
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairseqError(f"checkpoint {path}: damaged or not a checkpoint ({reason})") from error


def _refuse_archives(file: BinaryIO) -> None:
    """Raise UnpicklingError for what torch.load would not unpickle but extract or, as TorchScript, run."""
    if file.read(4) == b"PK\x03\x04":  # torch.load's own test for a zip file
        file.seek(0)
        if "constants.pkl" in torch._C.PyTorchFileReader(file).get_all_records():
            raise pickle.UnpicklingError("a TorchScript program")
    else:
        file.seek(0)
        try:
            tarfile.open(fileobj=file, mode="r:").close()
        except tarfile.TarError:
            pass
        else:
            raise pickle.UnpicklingError("a tar archive")
    file.seek(0)
