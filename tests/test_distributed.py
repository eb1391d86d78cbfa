"""Several processes on the CPU: the same training as one process, and one error when one of them fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fairseq.training import distributed
from fairseq.training.heartbeat import LOST_STATUS
from tests.training_runs import (
    EPOCH,
    assert_fails,
    assert_same,
    assert_same_to_rounding,
    command_line,
    files,
    last,
    load,
    logged,
    start,
    train,
    updates,
)

TWO = ("--distributed-world-size", "2")
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")


def assert_near(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    a, b = updates(one), updates(other)
    assert a.keys() == b.keys()
    for number, line in a.items():
        for key, value in line.items():
            # what is logged has three digits, the gradient norm of the mean too
            assert b[number][key] == pytest.approx(value, abs=1.1e-3, rel=1e-5), (number, key)


@pytest.fixture(scope="module")
def one_process(toy_databin, tmp_path_factory) -> tuple[Path, list[dict[str, float]]]:
    """One process with --update-freq 2: 4 updates an epoch, the last of a single batch."""
    directory = tmp_path_factory.mktemp("one")
    lines = train(toy_databin, directory, "--update-freq", 2, "--max-epoch", 2)
    assert EPOCH % 2 == 1
    assert max(updates(lines)) == 8
    return directory, lines


@pytest.mark.slow
def test_several_processes_are_one_with_a_larger_update_freq(toy_databin, tmp_path, one_process):
    """The first epoch in two processes of our own, the second, resumed, under torchrun."""
    directory, expected = one_process
    lines = train(toy_databin, tmp_path, *TWO, "--max-epoch", 1)
    assert_same(load(directory / "checkpoint1.pt")["model"], last(tmp_path)["model"], atol=1e-5)
    process = start(toy_databin, tmp_path, "--max-epoch", 2, launcher=TORCHRUN)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = logged(tmp_path)
    assert_near(expected, lines)
    for key in ("model", "last_optimizer_state"):
        assert_same(last(directory)[key], last(tmp_path)[key], atol=1e-5)
    whole = [line for line in lines if "train_loss" in line]
    assert [line["train_bsz"] * 4 for line in whole] == [300, 300]  # every sentence once
    for key in ("train_loss", "valid_loss", "valid_ppl"):
        values = [[line[key] for line in part if key in line] for part in (lines, expected)]
        assert values[0] == pytest.approx(values[1], abs=2e-2 if key == "valid_ppl" else 1.1e-3)
    assert last(tmp_path)["extra_state"]["best"] == pytest.approx(last(directory)["extra_state"]["best"], abs=1e-5)
    assert files(tmp_path) == files(directory)


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_with_it(toy_databin, tmp_path, one_process):
    """Two, one, two: from the middle of an epoch each, the same batches in the same updates."""
    directory, expected = one_process
    for flags in ((*TWO, "--max-update", 3), ("--update-freq", 2, "--max-update", 6), (*TWO, "--max-epoch", 2)):
        lines = train(toy_databin, tmp_path, *flags)
    assert_near(expected, logged(tmp_path))
    assert max(updates(lines)) == 8
    assert_same_to_rounding(directory, tmp_path)


@pytest.mark.slow
def test_one_process_of_several_profiles(toy_databin, tmp_path):
    paths = tmp_path / "one", tmp_path / "two"
    flags = ("--init-type", "adaptive-profiling", "--omega-file")
    train(toy_databin, tmp_path / "run", *flags, paths[0])
    process = start(toy_databin, tmp_path / "run", *flags, paths[1], launcher=TORCHRUN)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.fixture
def failure(capfd) -> Callable[..., list[str]]:
    """Run a command that fails with status 1; returns the lines of its standard error that are not torch's warnings."""

    def run(*arguments: object) -> list[str]:
        with pytest.raises(SystemExit) as exit_info:
            train(*arguments)  # type: ignore[arg-type]
        assert exit_info.value.code == 1
        lines = capfd.readouterr().err.splitlines()
        return [line for line in lines if not line.startswith("[") and "Warning" not in line and line[:2] != "  "]

    return run


USER_DIR = """
import os, signal, torch
import torch.distributed as dist
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.errors import FairseqError
from fairseq.registry import CRITERIONS

@CRITERIONS.register("{name}")
def failing(config, padding_idx):
    calls = []
    def criterion(logits, target):
        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == 1:
            {action}
        return smoothed_nll(logits, target, 0.1, padding_idx)
    return criterion
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("raise FairseqError('the third batch is bad')", "error: the third batch is bad"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: process 1 of 2 was ended by signal SIGKILL"),
        ("[].pop()", "error: process 1 of 2 failed: IndexError: pop from empty list"),
        ("os._exit(3)", "error: process 1 of 2 ended with status 3"),
    ],
    ids=["error", "killed", "bug", "crash"],
)
def test_one_failing_process_ends_all_with_one_line(toy_databin, tmp_path, failure, action, message):
    name = "failing_" + re.sub(r"\W", "", action)
    user_dir = tmp_path / f"user_{name}"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text(USER_DIR.format(action=action, name=name))
    flags = (*TWO, "--max-epoch", 2, "--user-dir", user_dir, "--criterion", name)
    lines = failure(toy_databin, tmp_path / "run", *flags)
    assert lines[-1] == message
    assert len(lines) == 1 or lines[0].startswith("Traceback")  # of what is a bug


@pytest.mark.slow
def test_a_process_that_loses_the_others(toy_databin, tmp_path):
    """Started one by one, as SLURM does, without heartbeats: the one that is left sees broken connections."""
    user_dir = tmp_path / "user_lost"
    user_dir.mkdir()
    action = "os.kill(os.getpid(), signal.SIGKILL)"
    (user_dir / "__init__.py").write_text(USER_DIR.format(action=action, name="failing_lost"))
    flags = ("--user-dir", user_dir, "--criterion", "failing_lost", "--max-epoch", 2, "--heartbeat-timeout", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [start(toy_databin, tmp_path / "run", *flags, RANK=str(rank), **environment) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode == LOST_STATUS
    assert errors[0].splitlines()[-1] == "error: process 0 of 2 has lost the others, one of which failed"
    assert "Traceback" not in errors[0]


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(toy_databin, tmp_path, failure):
    flags = (*TWO, "--max-epoch", 1, "--optimizer", "sgd", "--lr", "1e30", "--lr-scheduler", "fixed")
    flags += ("--max-nonfinite-updates", 2)
    (line,) = failure(toy_databin, tmp_path, *flags)
    assert re.match("error: training diverges", line)


@pytest.mark.slow
def test_port_in_use(toy_databin, tmp_path, failure):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (line,) = failure(toy_databin, tmp_path, *TWO, "--distributed-port", port, "--max-epoch", 1)
    assert re.match(rf"error: --distributed-port {port}: Address already in use; take another", line)


def listening(pid: int | str) -> list[str]:
    """The addresses, as the kernel writes them, at which a process listens."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    entries = [line.split() for table in tables for line in table.splitlines()]
    listen = "0A"
    return [entry[1].split(":")[0] for entry in entries if entry[3] == listen and f"socket:[{entry[9]}]" in links]


@pytest.mark.slow
def test_nothing_listens_beyond_this_machine_and_an_interrupt_ends_all(toy_databin, tmp_path):
    process = start(toy_databin, tmp_path, *TWO, "--max-update", 100000)
    found: set[tuple[str, int]] = set()  # from the start on
    while process.poll() is None and not (tmp_path / "checkpoint1.pt").exists():
        time.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                listens = [c for c in child.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                found |= {tuple(connection.laddr) for connection in listens}
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    addresses = {address for pid in (process.pid, *children) for address in listening(pid)}
    assert addresses == {"0100007F"}  # 127.0.0.1: nobody else can talk to them
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines() == ["interrupted: saving a checkpoint; Ctrl-C once more ends it at once"]
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(found) >= 2  # the rendezvous, and the processes' own
    assert {address for address, _ in found} == {"127.0.0.1"}


@pytest.mark.parametrize("size", ["0", "-2", "two"])
def test_world_size(toy_databin, tmp_path, capsys, size):
    argv = command_line(toy_databin, tmp_path, "--distributed-world-size", size, "--max-update", 1)
    assert_fails(capsys, 2, "--distributed-world-size", *argv)


@pytest.mark.parametrize("known_after", [0, 2, 99])
def test_a_meeting_place_whose_name_is_not_known(monkeypatch, caplog, known_after):
    """It may become known while machines come up; one line says at once what is waited for."""
    asked: list[str] = []

    def look_up(host: str, port: None) -> list[object]:
        asked.append(host)
        if len(asked) <= known_after:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return []

    clock = iter(range(1000))
    monkeypatch.setattr(distributed.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(distributed.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(distributed, "NAME_SECONDS", 5)
    with contextlib.nullcontext() if known_after < 99 else pytest.raises(OSError, match=r"^Name or service not known$"):
        distributed._wait_for_name("head")
    assert len(asked) == min(known_after + 1, 5)
    warnings = ["MASTER_ADDR head: Name or service not known; asking again for 5 seconds"]
    assert caplog.messages == warnings * (known_after > 0)


def test_barrier_names_the_gpu(monkeypatch):
    """NCCL would guess it, and say so in every process."""
    import torch

    from fairseq.training.distributed import World

    calls = []
    monkeypatch.setattr("torch.distributed.barrier", lambda device_ids=None: calls.append(device_ids))
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        World(0, 2, device).barrier()
    assert calls == [[1], None]
