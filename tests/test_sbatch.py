"""The SLURM script, with programs in place of SLURM's that start two tasks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import ROOT, command_line, last, logged, updates

# Starts the tasks; the first time, tells them as SLURM does that time is running out. Ends with the largest status.
SRUN = """#!/usr/bin/env bash
shift
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
  tasks[i]=$!
done
if [ ! -e "$DIRECTORY/warned" ]; then
  until [ -e "$DIRECTORY/run/checkpoint_1_2.pt" ]; do sleep 0.05; done
  touch "$DIRECTORY/warned"
  kill -USR1 "${tasks[@]}"
fi
most=0
for task in "${tasks[@]}"; do
  wait "$task"; status=$?
  [ "$status" -gt "$most" ] && most=$status
done
exit "$most"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$DIRECTORY/scontrol"; fi
"""


@pytest.mark.slow
def test_it_requeues_a_job_until_it_is_done(toy_databin, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    train = f'#!/bin/sh\nexec {sys.executable} -m fairseq.cli.train "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("fairseq-train", train)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid()), "DIRECTORY": str(tmp_path)}
    environment = os.environ | job | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    arguments = command_line(toy_databin, tmp_path / "run", "--max-epoch", 16, "--save-interval-updates", 2)
    command = ["bash", str(Path(ROOT) / "scripts" / "train.sbatch"), *map(str, arguments)]

    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert first.returncode == 138, first.stderr
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    stopped_at = last(tmp_path / "run")["optimizer_history"][-1]["num_updates"]
    assert 2 <= stopped_at < 64

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "scontrol").read_text().count("requeue") == 1
    assert last(tmp_path / "run")["optimizer_history"][-1]["num_updates"] == 64
    assert sorted(updates(logged(tmp_path / "run"))) == list(range(1, 65))
