"""A short run of ``scripts/fuzz.py``: what is damaged is refused by FairseqError, and memory stays bounded."""

from __future__ import annotations

import sys
import time
from types import ModuleType

import pytest

from fairseq.errors import FairseqError
from tests.training_runs import ROOT, load_script

for package in ("starlette", "ctranslate2"):
    pytest.importorskip(package, reason="the extras [serve] and [export] are not installed")

CASES = {"checkpoint": 200, "interactive": 100, "json-flags": 100, "options": 100, "sentencepiece": 300, "serve": 300}
TARGETS = [
    *("bpe", "checkpoint", "clinic", "ctranslate2", "ctranslate2-json", "dictionary", "idx", "interactive"),
    *("json-flags", "omega", "options", "sentencepiece", "serve"),
]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))  # for what it imports
    try:
        return load_script("fuzz")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_all_targets_are_here(fuzz):
    assert sorted(fuzz.TARGETS) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_fails(fuzz, tmp_path, target):
    assert fuzz.run(target, CASES.get(target, 500), seed=2, engine="hypothesis", keep=tmp_path) == 0
    assert not list(tmp_path.iterdir())


def add_target(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, check) -> None:
    target = fuzz.Target(lambda folder: [b"good"], lambda folder, data: data == b"good" or check(data))
    monkeypatch.setitem(fuzz.TARGETS, "broken", target)


def test_a_failure_is_found_and_kept(fuzz, tmp_path, monkeypatch, capsys):
    """The harness itself: a reader that lets another error out is reported, with its case."""

    def check(data: bytes) -> None:
        raise KeyError(data)

    add_target(fuzz, monkeypatch, check)
    assert fuzz.run("broken", 20, seed=1, engine="hypothesis", keep=tmp_path) > 0
    assert (tmp_path / "broken-0").read_bytes() != b"good"
    assert "KeyError" in capsys.readouterr().out


def test_too_much_memory_is_found(fuzz, tmp_path, monkeypatch, capsys):
    """Memory that is asked for and not given, even where the reader makes a FairseqError of it."""

    def check(data: bytes) -> None:
        try:
            bytearray(2 * fuzz.MEMORY)
        except MemoryError as error:
            raise FairseqError("damaged") from error

    add_target(fuzz, monkeypatch, check)
    assert fuzz.run("broken", 20, seed=1, engine="hypothesis", keep=tmp_path) > 0
    assert "refused only after it was given no memory" in capsys.readouterr().out


def test_a_hang_is_found(fuzz, tmp_path, monkeypatch, capsys):
    def check(data: bytes) -> None:
        end = time.process_time() + 5
        while time.process_time() < end:
            pass

    add_target(fuzz, monkeypatch, check)
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    assert fuzz.run("broken", 2, seed=1, engine="hypothesis", keep=tmp_path) > 0
    assert "TooSlow" in capsys.readouterr().out


def test_a_run_can_be_continued(fuzz, tmp_path, monkeypatch):
    """Slices run apart give the cases of one run."""
    seen: list[bytes] = []
    add_target(fuzz, monkeypatch, lambda data: seen.append(data) or True)
    monkeypatch.setattr(fuzz, "SLICE", 20)
    monkeypatch.setattr(fuzz, "DRAWN", 10)

    def cases(cases: int, first: int) -> list[bytes]:
        seen.clear()
        assert fuzz.run("broken", cases, seed=1, engine="hypothesis", keep=tmp_path, first=first) == 0
        return list(seen)

    one, two = cases(20, 0), cases(20, 20)
    assert one + two == cases(40, 0)
    assert len(set(two) - set(one)) > 5  # how many differ depends on Hypothesis's version
