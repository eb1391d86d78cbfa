"""Checkpoints made to do harm, and damaged ones: nothing in them runs, and no other error than FairseqError comes."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq.checkpoint import build_from_checkpoint, load_checkpoint, load_model
from fairseq.errors import FairseqError
from fairseq.utils import unpickler
from tests.toys import toy_model, write_toy_checkpoint

SLOTS = ("args", "cfg", "model", "optimizer_history", "last_optimizer_state", "extra_state")


class Reduced:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def text(value: str) -> bytes:
    """Opcodes that push a string."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """Opcodes that push a global."""
    return f"c{module}\n{attribute}\n".encode()


def dumped(value: Any, protocol: int) -> bytes:
    """Opcodes that push a pickled object."""
    return pickle.dumps(value, protocol)[2 if protocol > 1 else 0 : -1]


def attacks(marker: Path) -> dict[str, bytes]:
    """Opcodes that push an object and, believed, make the file ``marker`` on the way."""
    command, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    shell = text(command)
    found = {f"{f.__name__} {n}": dumped(Reduced(f, command), n) for f in (os.system, os.popen) for n in range(4)}
    found |= {f"{f.__name__} {n}": dumped(Reduced(f, python), n) for f in (eval, exec) for n in range(4)}
    found["Popen"] = dumped(Reduced(subprocess.Popen, ["touch", str(marker)]), 2)
    found["inst"] = b"(" + shell + b"ios\nsystem\n"
    found["obj"] = b"(" + name("posix", "system") + shell + b"o"
    found["stack_global"] = b"\x8c\x05posix\x8c\x06system\x93" + shell + b"\x85R"
    found["newobj"] = name("subprocess", "Popen") + b"(]" + text("touch") + b"a" + text(str(marker)) + b"at\x81"
    found["newobj_ex"] = name("subprocess", "Popen") + shell + b"\x85}" + text("shell") + b"\x88s\x92"
    module = name("builtins", "__import__") + text("os") + b"\x85R"
    found["getattr"] = name("builtins", "getattr") + module + text("system") + b"\x86R" + shell + b"\x85R"
    found["module"] = module + b"}" + text("sep") + shell + b"sb"
    found["dotted"] = b"\x8c\x05torch\x8c\x17serialization.os.system\x93" + shell + b"\x85R"
    nested = io.BytesIO()
    torch.save(Reduced(eval, python), nested)
    found["from bytes"] = name("torch.storage", "_load_from_bytes") + dumped(nested.getvalue(), 3) + b"\x85R"
    # classes and functions that are allowed, with attributes set
    change = b"(N}" + text("__init__") + name("os", "system") + b"stb"
    found["class"] = name("argparse", "Namespace") + change
    found["dict class"] = name("collections", "OrderedDict") + change
    found["function"] = name("torch._utils", "_rebuild_tensor_v2") + b"(N}" + text("__defaults__") + b")stb"
    found["size"] = name("torch", "Size") + change
    found["items"] = name("collections", "OrderedDict") + b")R}" + text("items") + name("os", "system") + b"sb"
    found["record"] = name("os", "system") + b"}" + text("dump_patches") + b"\x88sb"
    return found


def content(slot: str, opcodes: bytes) -> bytes:
    """The pickle of a checkpoint with an attack in one place."""
    harmless = {"args": name("argparse", "Namespace") + b")\x81}b", "model": b"}"}
    parts = harmless | {slot: opcodes}
    return b"\x80\x02}" + b"".join(text(key) + value + b"s" for key, value in parts.items()) + b"."


def write_zip(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def write_legacy(path: Path, pickled: bytes) -> None:
    serialization = torch.serialization
    head = [serialization.MAGIC_NUMBER, serialization.PROTOCOL_VERSION, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in head) + pickled + pickle.dumps([], 2))


def attempt(path: Path) -> str:
    """Load a file as far as it goes; the error's text, or nothing."""
    try:
        build_from_checkpoint(load_checkpoint(path), path)
    except FairseqError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


ATTACKS = sorted(attacks(Path("marker")))


@pytest.mark.parametrize("attack", ["system 0", "eval 3", "inst", "obj", "stack_global", "getattr", "from bytes"])
def test_the_attacks_work_on_plain_pickle(tmp_path, attack):
    marker = tmp_path / "marker"
    pickle.loads(content("extra_state", attacks(marker)[attack]))
    assert marker.exists()


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_runs(tmp_path, monkeypatch, write, attack):
    monkeypatch.chdir(tmp_path)
    marker, path = tmp_path / "marker", tmp_path / "model.pt"
    classes = (argparse.Namespace, unpickler.Record, unpickler.Class, unpickler.Function)
    before = [dict(vars(cls)) for cls in classes], torch._utils._rebuild_tensor_v2.__defaults__
    for slot in SLOTS:
        write(path, content(slot, attacks(marker)[attack]))
        attempt(path)
        assert not marker.exists()
        assert [dict(vars(cls)) for cls in classes] == before[0]
        assert torch._utils._rebuild_tensor_v2.__defaults__ == before[1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_the_writers_of_these_tests_write_checkpoints(tmp_path, write):
    write(tmp_path / "model.pt", content("extra_state", b"}"))
    assert load_checkpoint(tmp_path / "model.pt")["extra_state"] == {}
    assert "no parameter" in attempt(tmp_path / "model.pt")


def test_foreign_objects_load_as_records(tmp_path):
    class_ = type("AverageMeter", (), {"__module__": __name__})
    globals()["AverageMeter"] = class_
    meter = class_()
    meter.val = 3.5  # type: ignore[attr-defined]
    path = write_toy_checkpoint(toy_model(), tmp_path / "model.pt")
    torch.save(torch.load(path, weights_only=False) | {"extra_state": {"meter": meter}}, path)
    del globals()["AverageMeter"]
    record = load_checkpoint(path)["extra_state"]["meter"]
    assert isinstance(record, unpickler.Record)
    assert record.state == {"val": 3.5}
    load_model(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_and_archives_are_refused(tmp_path):
    scripted = tmp_path / "scripted.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(scripted))
    with pytest.raises(FairseqError, match="TorchScript"):
        load_checkpoint(scripted)
    archive = tmp_path / "old.pt"
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(FairseqError, match="tar"):
        load_checkpoint(archive)


@pytest.mark.parametrize("what", ["text", "empty", "zeros", "directory", "missing", "tensor", "zip", "loop"])
def test_what_is_no_checkpoint(tmp_path, what):
    path = tmp_path / "model.pt"
    if what == "directory":
        path.mkdir()
    elif what == "tensor":
        torch.save(torch.ones(3), path)
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b", "c")
    elif what == "loop":
        loop: list[Any] = []
        loop.append(loop)
        torch.save({"model": {}, "args": argparse.Namespace(x=loop)}, path)
    elif what != "missing":
        path.write_bytes({"text": b"hello\n" * 50, "empty": b"", "zeros": bytes(2048)}[what])
    assert str(path) in attempt(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_files(tmp_path, legacy):
    whole = write_toy_checkpoint(toy_model(), tmp_path / "whole.pt")
    if legacy:
        state = torch.load(whole, weights_only=False)
        torch.save(state, whole, _use_new_zipfile_serialization=False)
    data, path = whole.read_bytes(), tmp_path / "model.pt"
    assert attempt(whole) == ""
    for size in (*range(0, 200, 20), *range(200, len(data), len(data) // 20)):
        path.write_bytes(data[:size])
        assert attempt(path), size
    rng = np.random.default_rng(1)
    stated = data.index(b"encoder_layers")
    for position in (*rng.integers(0, len(data), 60), *range(stated - 50, stated + 50)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        attempt(path)


def op(code: bytes, *numbers: object) -> bytes:
    """An opcode with its operand. code: as for `struct`, after the opcode itself."""
    return code[:1] + struct.pack(code[1:].decode(), *numbers)


def tensor_op(count: int, size: int, stride: int, key: str = "0") -> bytes:
    """Opcodes that push a tensor of ``size`` elements of a storage that says it has ``count``."""
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu")
    storage += dumped(count, 2) + b"tQ"
    numbers = b"K\x00(" + dumped(size, 2) + b"t(" + dumped(stride, 2) + b"t"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + numbers + b"\x89}tR"


DOUBLED = b"](K\x01K\x01eq\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
BOMBS = {
    "doubled lists": DOUBLED,
    "deep lists": b"]" * 100_000 + b"a" * 99_999,
    "nested key": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s",
    "long int": op(b"\x8b<I", 2**31 - 1),
    "long text": op(b"\x8d<Q", 2**62),
    "long bytes": op(b"\x8e<Q", 2**40),
    "long bytearray": op(b"\x96<Q", 2**40),
    "far memo": b"]" + op(b"r<I", 2**32 - 1) + op(b"\x8d<Q", 2**62),
    "copied list": b"](" + b"K\x01" * 50_000 + b"eq\x00" + name("torch", "Size") + b"q\x01" + b"h\x01h\x00\x85R" * 200,
    "classes": b"".join(name("m", f"c{i}") + b"0" for i in range(2000)) + b"N",
    "huge storage": tensor_op(2**50, 1, 1),
    "huge tensor": tensor_op(1, 2**40, 1),
    "expanded tensor": tensor_op(1, 2**40, 0),
    "negative offset": tensor_op(1, -5, 1),
    "extension": op(b"\x82<B", 1),
}
RUN_BOMBS = """
import resource, sys
from fairseq.checkpoint import build_from_checkpoint, load_checkpoint
from fairseq.errors import FairseqError
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
for path in sys.argv[1:]:
    try:
        build_from_checkpoint(load_checkpoint(path), path)
        print("accepted", path)
    except FairseqError as error:
        print("refused", error)
"""


def test_sizes_that_no_file_holds(tmp_path):
    """Every bomb is refused by a process that may take no more than 256 MiB, and for another reason than that."""
    paths = []
    for number, (bomb, opcodes) in enumerate(BOMBS.items()):
        for write, slots in (
            (write_zip, SLOTS if bomb == "doubled lists" else ("args", "model")),
            (write_legacy, SLOTS[2:3]),
        ):
            for slot in slots:
                paths.append(tmp_path / f"{number}-{write.__name__}-{slot}-{bomb.replace(' ', '-')}.pt")
                write(paths[-1], content(slot, opcodes))
    compressed = tmp_path / "compressed.pt"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as member:
        for _ in range(300):
            member.write(bytes(2**20))
    claimed = write_toy_checkpoint(toy_model(), tmp_path / "claimed.pt")
    data = bytearray(claimed.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of data.pkl
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
    claimed.write_bytes(data)
    for setting in ("encoder_layers", "encoder_ffn_embed_dim", "max_source_positions", "encoder_embed_dim"):
        path = write_toy_checkpoint(toy_model(), tmp_path / f"{setting}.pt")
        state = torch.load(path, weights_only=False)
        setattr(state["args"], setting, 10**10)
        torch.save(state, path)
        paths.append(path)
    paths += [compressed, claimed]
    result = subprocess.run(
        [sys.executable, "-c", RUN_BOMBS, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths)
    for line in lines:
        assert line.startswith("refused"), line
        assert "MemoryError" not in line, line
        assert "allocate" not in line, line


def test_more_opcodes_than_any_checkpoint_has(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickler, "MOST_OPCODES", 1000)
    write_zip(tmp_path / "model.pt", content("extra_state", b"N0" * 1000 + b"}"))
    assert "more than 1,000 opcodes" in attempt(tmp_path / "model.pt")


def test_a_checkpoint_does_not_name_code_to_load(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    path = write_toy_checkpoint(toy_model(), tmp_path / "model.pt")
    state = torch.load(path, weights_only=False)
    state["args"].user_dir = str(package)
    torch.save(state, path)
    load_model(path)
    assert not (tmp_path / "marker").exists()
