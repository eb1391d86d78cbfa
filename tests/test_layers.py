"""Dependencies point inwards, as CONTRIBUTING.md says: what each part of the package may import of the others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training_runs import ROOT

BASE = {"errors", "utils"}
MAY_IMPORT = {
    "utils": {"errors"},
    "registry": {"errors"},
    "modules": set(),
    "data": BASE,
    "admin": {*BASE, "registry", "modules"},
    "models": {*BASE, "registry", "modules", "admin", "hub"},  # hub: TransformerModel by its name in fairseq
    "criterions": {*BASE, "registry"},
    "optim": {*BASE, "registry"},
    "checkpoint": {*BASE, "data", "models", "admin"},
    "generation": {*BASE, "options", "data", "modules", "models", "checkpoint"},
}


def _imported(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(node) for check in checks for node in ast.walk(check)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            names = [f"fairseq.{name.name}" for name in node.names] if node.module == "fairseq" else [node.module or ""]
            yield from (name for name in names if name.startswith("fairseq."))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_dependencies_point_inwards(part):
    place = ROOT / "fairseq" / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    found = {(path.name, name) for path in files for name in _imported(path)}
    allowed = {part, *MAY_IMPORT[part]}
    assert not [pair for pair in sorted(found) if pair[1].split(".")[1] not in allowed]


def test_the_trainer_does_not_know_admin():
    assert not [name for name in _imported(ROOT / "fairseq/training/trainer.py") if "admin" in name]
