"""Rows of ``docs/errors.md`` that take more than a command line: a process killed, a permission less, a stand-in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from fairseq.cli.train import main as train_main
from tests.error_cases import RUN
from tests.test_errors import DOCUMENTED, check_error
from tests.toys import toy_model, write_toy_checkpoint
from tests.training_runs import ROOT, command_line, files, logged


def begin(
    line: str, directory: Path, prepare: Callable[[], object] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start a command in ``directory``. prepare: what the new process does first."""
    command, *argv = shlex.split(line)
    return subprocess.Popen(
        [sys.executable, "-m", f"fairseq.cli.{command}", *argv],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def says(process: subprocess.Popen[str], start: str) -> None:
    """It ends with the documented message that begins so."""
    _, errors = process.communicate(timeout=120)
    [message] = [message for message in DOCUMENTED if message.startswith(start)]
    check_error(DOCUMENTED[message], message, process.returncode, errors)


def kill_a_child(process: subprocess.Popen[str], ready: Callable[[], bool] = lambda: True) -> None:
    """Kill one that works for ``process``, as the system does when memory runs out."""
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                if ready() and "tracker" not in "".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return
        time.sleep(0.01)


@pytest.mark.slow
def test_a_worker_that_is_killed(tmp_path):
    for side in ("xx", "yy"):
        (tmp_path / f"text.{side}").write_text("a b c d e f g h\n" * 1_000_000)
    process = begin("preprocess -s xx -t yy --trainpref text --destdir out --workers 2", tmp_path)
    kill_a_child(process)
    says(process, "a worker process died")
    assert files(tmp_path) - {"out"} == {"text.xx", "text.yy"}
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_reading_process_that_is_killed(toy_databin, tmp_path):
    line = shlex.join(["train", *command_line(toy_databin, tmp_path, "--max-epoch", 1000, "--num-workers", 1)])
    process = begin(line, tmp_path)
    kill_a_child(process, lambda: bool(logged(tmp_path)))
    says(process, "a reading process died")


def give_up_reading_everything() -> None:
    """What root may by its capabilities alone, from the next program on."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_checkpoint_that_may_not_be_read(toy_databin, tmp_path):
    path = write_toy_checkpoint(toy_model(), tmp_path / "toy.pt")
    path.chmod(0)
    says(
        begin(f"generate {toy_databin} --path toy.pt --cpu", tmp_path, give_up_reading_everything),
        "checkpoint *: no perm",
    )


def test_weights_and_biases_refuses(toy_databin, tmp_path):
    """Its Python package has a stand-in here, which has no key either."""
    code = "class Error(Exception): pass\ndef init(**_): raise Error('api_key not configured (no-tty)')\n"
    (tmp_path / "wandb.py").write_text(code)
    line = shlex.join(["train", *command_line(toy_databin, tmp_path, "--max-epoch", 1, "--wandb-project", "nmt")])
    says(begin(line, tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}"), "--wandb-project *: *")


@pytest.mark.slow
def test_the_port_of_the_meeting_is_taken(toy_databin, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        line = shlex.join(["train", *command_line(toy_databin, tmp_path, "--max-epoch", 1)])
        says(begin(line, tmp_path, RANK="0", WORLD_SIZE="2", **meeting), "process * cannot meet")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_processes_with_different_models(toy_databin, tmp_path, backend):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = ("--max-epoch", 1, "--ddp-backend", backend, "--encoder-layers")
    lines = [shlex.join(["train", *command_line(toy_databin, tmp_path, *flags, layers)]) for layers in (1, 2)]
    processes = [begin(line, tmp_path, RANK=str(rank), **meeting) for rank, line in enumerate(lines)]
    says(processes[0], "process * of * has a model")
    assert processes[1].wait(120) != 0


@pytest.mark.parametrize(
    ("start", "flags", "environment"),
    [
        ("--distributed-world-size", "--distributed-world-size 3", {}),
        ("process * has no GPU", "", {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3"}),
    ],
)
def test_more_processes_than_gpus(monkeypatch, capsys, tmp_path, start, flags, environment):
    """torch is made to say that it sees two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_info:
        train_main(shlex.split(f"{RUN} {flags}".replace("--cpu", ""))[1:])
    [message] = [message for message in DOCUMENTED if message.startswith(start)]
    check_error(DOCUMENTED[message], message, exit_info.value.code, capsys.readouterr().err)
    assert files(tmp_path) == set()


def test_output_for_which_there_is_no_room(tmp_path):
    (tmp_path / "text").write_text("a b c d e f g h\n")
    with open("/dev/full", "w") as full:
        process = begin("score --ref text --sys text", tmp_path, lambda: os.dup2(full.fileno(), 1))
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "error: standard output: cannot write: No space left on device\n")


RULE = """
import torch
from fairseq.registry import RESIDUAL_RULES

@RESIDUAL_RULES.register("squashed")
class Squashed(torch.nn.Module):
    needs_final_norm = False

    def __init__(self, site):
        super().__init__()
    def forward(self, x, sublayer):
        return torch.tanh(x + sublayer(x))
"""


def test_a_rule_of_the_user_that_has_no_dependency(toy_databin, tmp_path):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules/__init__.py").write_text(RULE)
    flags = "--models squashed --user-dir rules --max-tokens 100 --cpu --out-dir out --encoder-embed-dim 16"
    process = begin(f"clinic dependency {toy_databin} {flags} --encoder-attention-heads 2", tmp_path)
    says(process, "*: the stream")
    assert files(tmp_path) - {"out"} == {"rules"}
