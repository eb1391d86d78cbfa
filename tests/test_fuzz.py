"""A short run of ``scripts/fuzz.py``: what is damaged is refused by FairseqError, and memory stays bounded."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.training_runs import load_script


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return load_script("fuzz")


@pytest.mark.parametrize(
    ("target", "cases"),
    [("dictionary", 500), ("idx", 500), ("checkpoint", 300), ("omega", 500), ("options", 100), ("bpe", 300),
     ("interactive", 50)],
)  # fmt: skip
def test_nothing_fails(fuzz, tmp_path, target, cases):
    assert fuzz.run(target, cases, seed=2, engine="hypothesis", keep=tmp_path) == 0


def test_a_failure_is_found_and_kept(fuzz, tmp_path, monkeypatch, capsys):
    """The harness itself: a reader that lets another error out is reported, with its case."""

    def check(data: bytes) -> None:
        if data != b"good":
            raise KeyError(data)

    monkeypatch.setitem(fuzz.TARGETS, "broken", (lambda: [b"good"], check))
    assert fuzz.run("broken", 20, seed=1, engine="hypothesis", keep=tmp_path) > 0
    assert (tmp_path / "broken-0").read_bytes() != b"good"
    assert "KeyError" in capsys.readouterr().out
