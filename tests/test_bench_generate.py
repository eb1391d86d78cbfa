"""scripts/bench_generate.py, run as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_generate.py"


@pytest.mark.slow
def test_table_of_a_real_model(shared, tmp_path):
    model, data = shared / "reference" / "fairseq012_tiny.pt", shared / "reference" / "multi30k-databin"
    command = [sys.executable, SCRIPT, data, "--path", model, "-s", "en", "--limit", "6", "--repeat", "1", "--cpu"]
    options = ["--beam", "1", "3", "--batch-size", "4", "--reference", "--json", tmp_path / "table.json"]
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    header, rule, *lines = done.stdout.splitlines()
    assert header.startswith("| device | model | search |") and set(rule) <= set("| -")
    rows = json.loads((tmp_path / "table.json").read_text())
    assert len(lines) == len(rows) == 4
    assert [(row["search"], row["beam"]) for row in rows] == [
        ("fairseq", 1), ("reference", 1), ("fairseq", 3), ("reference", 3),
    ]  # fmt: skip
    assert all(row["sentences/s"] > 0 and row["peak MiB"] > 50 and row["model"] == model.stem for row in rows)
