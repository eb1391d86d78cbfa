"""Reading checkpoints of any origin without running what is pickled in them.

What ``torch.save`` writes is a pickle beside the bytes of the tensors: a zip archive, or up to torch 1.5 one after the
other. The pickle is read as data (``fairseq.utils.unpickler``); classes of other fairseqs, which pickled meters and
configuration objects into their checkpoints, become inert records. Nothing is allocated that the file is too small
for: its tensors together are at most `TENSOR_RATIO` times as large as the file.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.errors import MORE_MEMORY, FairseqError, OutOfMemory, out_of_memory_ends
from fairseq.utils.unpickler import MOST_OPCODES, Function, PickleError, Record, Unpickler

TENSOR_RATIO = 8  # tensors share storages: embeddings of both sides and of the output are one
MOST_DIMENSIONS = 16
DEEPEST = 50
_ZIP, _TAR = b"PK\x03\x04", b"ustar"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: the lengths of its name and extra field, which data follow
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MEMBERS_OF_PROGRAMS = ("constants.pkl",)

_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")


class _Tensors:
    """Makes the tensors of one file, and sees to it that they are not larger than it can hold."""

    def __init__(self, file_size: int) -> None:
        self.left = TENSOR_RATIO * file_size

    def rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        """A view of ``storage``, one-dimensional. Raises PickleError when that has no such elements."""
        if not isinstance(storage, Tensor) or storage.dim() != 1:
            raise PickleError("a tensor without a storage")
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
            raise PickleError(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
        if not all(isinstance(number, int) and 0 <= number < 2**62 for number in numbers):
            raise PickleError("a tensor whose size is no number")
        count = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if count and last >= len(storage):
            raise PickleError(f"a tensor of element {last:,} in a storage of {len(storage):,}")
        self.left -= count * storage.element_size()
        if self.left < 0:
            raise PickleError("its tensors are larger than the file")
        return torch.empty(0, dtype=storage.dtype).set_(storage.untyped_storage(), offset, tuple(size), tuple(stride))

    def rebuild_typed(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
        """The same where the type is stated besides: after requires_grad and hooks."""
        if not isinstance(storage, Tensor) or len(rest) < 3 or not isinstance(rest[2], torch.dtype):
            raise PickleError("a tensor without a type")
        return self.rebuild(storage.view(rest[2]), offset, size, stride)

    def names(self) -> dict[tuple[str, str], Any]:
        """(module, name) -> what the pickle of a checkpoint may name."""
        functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("collections", "defaultdict"): lambda *_: {},
            ("argparse", "Namespace"): Namespace,
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch._utils", "_rebuild_tensor"): self.rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild,
            ("torch._utils", "_rebuild_tensor_v3"): self.rebuild_typed,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        storages = {(module, name): dtype for module in _STORAGE_MODULES for name, dtype in _STORAGES.items()}
        dtypes = {("torch", name): dtype for name, dtype in _DTYPES.items()}
        return {key: Function(function) for key, function in functions.items()} | storages | dtypes


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if not all(isinstance(key, (str, int)) for key, _ in pairs):
        raise PickleError("a dict with keys that are no names")
    return dict(pairs)


def _storage_id(saved: Any) -> tuple[torch.dtype, str, int, Any]:
    """(type, key, elements, view) of a persistent id, which is a storage's."""
    if not isinstance(saved, tuple) or len(saved) not in (5, 6) or saved[0] != "storage":
        raise PickleError("an object outside the pickle that is no storage")
    _, dtype, key, _, count, *view = saved
    if not isinstance(dtype, torch.dtype) or not isinstance(key, (str, int)) or not isinstance(count, int) or count < 0:
        raise PickleError("a storage without type, name or size")
    return dtype, str(key), count, view[0] if view else None


def _read_zip(data: mmap.mmap, file: Any) -> Any:
    """A zip archive: ``NAME/data.pkl``, and a member ``NAME/data/KEY`` for each storage."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if not members.keys().isdisjoint(_MEMBERS_OF_PROGRAMS):
        raise PickleError("a TorchScript program")
    if "data.pkl" not in members:
        raise PickleError("a zip archive that torch.save did not write")

    checksums = any(info.CRC for info in members.values())  # torch writes zeros when told to compute none

    def content(name: str) -> memoryview:
        if name not in members:
            raise PickleError(f"no {name} in it")
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise PickleError(f"{name} is compressed, which torch.save never does")
        if info.header_offset + _LOCAL_HEADER.size > len(data):
            raise PickleError(f"{name} is cut short")
        start = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack_from(data, info.header_offset))
        if start + info.file_size > len(data):
            raise PickleError(f"{name} is cut short: {info.file_size:,} bytes in a file of {len(data):,}")
        stored = memoryview(data)[start : start + info.file_size]
        if checksums and zlib.crc32(stored) != info.CRC:
            raise PickleError(f"the checksum of record {info.filename} does not match")
        return stored

    storages: dict[str, Tensor] = {}

    def storage(saved: Any) -> Tensor:
        dtype, key, count, _ = _storage_id(saved)
        if key not in storages:
            name = f"data/{key}"
            stored = content(name)
            if len(stored) != count * dtype.itemsize:
                raise PickleError(f"{name} has {len(stored):,} bytes, {count * dtype.itemsize:,} expected")
            storages[key] = _copied(stored)
        return storages[key].view(dtype)

    if "byteorder" in members and bytes(content("byteorder")) != b"little":
        raise PickleError("written by a big-endian machine")
    return Unpickler(bytes(content("data.pkl")), 0, _Tensors(len(data)).names(), storage).load()


def _copied(stored: memoryview) -> Tensor:
    """The bytes, in memory of their own."""
    storage = torch.empty(len(stored), dtype=torch.uint8)
    storage.numpy()[:] = np.frombuffer(stored, np.uint8)
    return storage


def _read_legacy(data: mmap.mmap) -> Any:
    """A magic number, a version, the writer's properties, the object, the storages' keys (a pickle each); then their
    sizes and elements.
    """
    storages: dict[str, tuple[Tensor, torch.dtype]] = {}
    position, left = 0, len(data)

    def storage(saved: Any) -> Tensor:
        nonlocal left
        dtype, key, count, view = _storage_id(saved)
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise PickleError(f"storages of more bytes than the file has, which are {len(data):,}")
            storages[key] = torch.empty(count * dtype.itemsize, dtype=torch.uint8), dtype
        whole = storages[key][0].view(dtype)
        if view is None:
            return whole
        _, offset, size = view
        if not (0 <= offset <= offset + size <= len(whole)):
            raise PickleError(f"a view of a storage of {len(whole):,} elements that it does not have")
        return whole[offset : offset + size]

    names = _Tensors(len(data)).names()

    def next_pickle() -> Any:
        nonlocal position
        unpickler = Unpickler(data, position, names, storage)
        value = unpickler.load()
        position = unpickler.position
        return value

    if next_pickle() != _LEGACY_MAGIC or next_pickle() != _LEGACY_VERSION:
        raise PickleError("no file of torch.save")
    next_pickle()
    value = next_pickle()
    for key in next_pickle():
        content, dtype = storages.pop(str(key))
        count = int.from_bytes(data[position : position + 8], "little")
        position += 8
        if count * dtype.itemsize != len(content) or position + len(content) > len(data):
            raise PickleError(f"storage {key} is cut short")
        content.numpy()[:] = np.frombuffer(data, np.uint8, len(content), position)
        position += len(content)
    if storages:
        raise PickleError(f"no elements of storage {min(storages)}")
    return value


def plain(value: Any) -> Any:
    """``value`` with configuration records (OmegaConf's) unwrapped into dicts, lists and scalars."""
    if isinstance(value, Record):
        content = _content(value)
        return value if content is value else plain(content)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _content(record: Record) -> Any:
    """What a configuration record holds; another record itself."""
    return record.state.get("_content", record.state.get("_val", record))


def _check_nesting(value: Any) -> None:
    """Raise PickleError for what nests deeply, in itself, or unfolds into far more than was pickled, so that what
    walks through it afterwards ends.
    """
    seen, waiting = 0, [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, Record):
            content = _content(value)
            children = [] if content is value else [content]
        elif isinstance(value, dict):
            children = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            children = list(value)
        else:
            continue
        seen += len(children)
        if depth > DEEPEST or seen > MOST_OPCODES:
            raise PickleError("it contains itself, or nests too deeply")
        waiting.extend((child, depth + 1) for child in children)


def load(path: str | Path) -> Any:
    """What ``torch.save`` wrote to ``path``, tensors on the CPU, foreign classes as records; runs no code from it.

    Raises FairseqError when the file is missing, cut short or no such file.
    """
    try:
        with out_of_memory_ends(f"reading checkpoint {path}", MORE_MEMORY), open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise PickleError("empty")
            value = _read(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), file)
            _check_nesting(value)
        return value
    except OutOfMemory:
        raise
    except FileNotFoundError:
        raise FairseqError(f"checkpoint {path}: no such file") from None
    except IsADirectoryError:
        raise FairseqError(f"checkpoint {path}: is a directory; name a file in it") from None
    except PermissionError:
        raise FairseqError(f"checkpoint {path}: no permission to read it") from None
    except Exception as error:  # a malformed pickle can fail in any way that Python code can
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FairseqError(f"checkpoint {path}: damaged or not a checkpoint ({reason})") from error


def _read(data: mmap.mmap, file: Any) -> Any:
    if data[:4] == _ZIP:
        return _read_zip(data, file)
    if data[257:262] == _TAR:
        raise PickleError("a tar archive")
    return _read_legacy(data)
