"""Reading checkpoints of any origin without running what is pickled in them.

An unpickler calls whatever a file names. Ours resolves a short list of harmless constructors; every other class or
function becomes an inert ``Record`` that only remembers its state. Old fairseqs pickled meters and configuration
classes into their checkpoints; those load as records and are ignored.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from fairseq.errors import FairseqError

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: collections.OrderedDict(),
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
}
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class Record:
    """What stands in for an object of a class that is not loaded: its state, no behaviour."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.state: dict[str, Any] = {}
        self.items: dict[Any, Any] = {}

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name.endswith("Storage") and hasattr(torch, name):
            return getattr(torch, name)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
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
        return torch.load(path, map_location="cpu", pickle_module=_PICKLE_MODULE, weights_only=False)
    except FileNotFoundError:
        raise FairseqError(f"checkpoint {path}: no such file") from None
    except IsADirectoryError:
        raise FairseqError(f"checkpoint {path}: is a directory; name a file in it") from None
    except PermissionError:
        raise FairseqError(f"checkpoint {path}: no permission to read it") from None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairseqError(f"checkpoint {path}: damaged or not a checkpoint ({reason})") from error
    except Exception as error:  # a malformed pickle can fail in any way that Python code can
        raise FairseqError(f"checkpoint {path}: damaged or not a checkpoint ({type(error).__name__})") from error
