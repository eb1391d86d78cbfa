"""Who is noticed to be gone, and who is not: watchers in one process first, then real ones, on two hosts too."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from fairseq.training.heartbeat import LOST_STATUS, Heartbeat
from tests.training_runs import (
    ROOT,
    assert_same,
    assert_same_to_rounding,
    command_line,
    last,
    logged,
    start,
    train,
    updates,
    write_databin,
)

TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "--max-restarts=1", "-m")
TIMEOUT = 0.6


class Hanging:
    """A store that never answers."""

    def set(self, *_: object) -> None:
        threading.Event().wait()


class Watchers:
    """Heartbeats of several ranks in this process, and what they say; who should end this process beats no more."""

    def __init__(self, size: int, timeout: float = TIMEOUT, continues: str = "") -> None:
        store = dist.HashStore()
        self.lines: list[tuple[int, str]] = []
        self.said = threading.Event()
        self.beats = [
            Heartbeat(store, "here:1", rank, size, timeout, self._end(rank), continues) for rank in range(size)
        ]
        for beat in self.beats:
            beat.start()

    def _end(self, rank: int) -> Callable[[str], None]:
        def end(line: str) -> None:
            if line:
                self.lines.append((rank, line))
                self.said.set()
            self.beats[rank]._store = Hanging()
            threading.Event().wait()

        return end

    def stop(self) -> None:
        for beat in self.beats:
            beat.stop()


@pytest.fixture
def watchers() -> Iterator[Callable[..., Watchers]]:
    made: list[Watchers] = []

    def make(*arguments: Any) -> Watchers:
        made.append(Watchers(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_one_that_falls_silent_is_named_once_a_host(watchers):
    three = watchers(3, TIMEOUT, "the same command without --reset-meters continues")
    silent = three.beats[1]
    silent._updates = 7
    time.sleep(TIMEOUT / 3)
    silent._store = Hanging()
    silent._stuck = silent._silent = lambda *_: ""  # nor does it say anything
    assert three.said.wait(10 * TIMEOUT)
    time.sleep(TIMEOUT)
    host = socket.gethostname()
    ((rank, line),) = three.lines
    assert rank == 0
    assert line == (
        f"process 1 of 3 on {host} has given no sign of life for {TIMEOUT} s after update 7; the same command without "
        "--reset-meters continues from the last checkpoint (--heartbeat-timeout)"
    )


def test_who_is_busy_or_done_is_left_alone(watchers):
    three = watchers(3)
    three.beats[2].stop()
    time.sleep(2 * TIMEOUT)  # as a long validation would
    assert three.lines == []
    assert three.beats[0].who_is_gone() == ""


def test_waiting_for_a_batch(watchers):
    two = watchers(2)

    def batches() -> Iterator[int]:
        yield 1
        yield 2
        time.sleep(3 * TIMEOUT)

    numbers = []
    for number in two.beats[1].reading(batches(), lambda: len(numbers)):
        numbers.append(number)
        time.sleep(1.5 * TIMEOUT)  # what is done with a batch may take as long as it likes
    assert numbers == [1, 2]
    assert two.lines[0][0] == 1
    assert f"has waited {TIMEOUT} s for a batch after update 2" in two.lines[0][1]


def test_a_store_that_does_not_answer(watchers):
    two = watchers(2)
    time.sleep(TIMEOUT / 3)
    two.beats[1]._store = Hanging()
    assert two.said.wait(10 * TIMEOUT)
    time.sleep(TIMEOUT)
    told = dict(two.lines)
    assert told[1].startswith(f"no answer for {TIMEOUT} s from here:1, where the processes meet: process 0 on ")
    assert told[0].startswith("process 1 of 2 on ")  # it cannot know better


# -- real processes

USER_DIR = """
import os, signal, torch
import torch.distributed as dist
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.registry import CRITERIONS

@CRITERIONS.register("heartbeat_{name}")
def failing(config, padding_idx):
    calls = []
    def criterion(logits, target):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 6 and dist.get_rank() == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.{name})
        return smoothed_nll(logits, target, 0.1, padding_idx)
    return criterion
"""


def failing(directory: Path, name: str) -> tuple[object, ...]:
    """Flags of a training whose process 1 sends itself a signal in its 6th update, the second of an epoch."""
    user_dir = directory / f"user_heartbeat_{name}"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text(USER_DIR.format(name=name))
    return "--user-dir", user_dir, "--criterion", f"heartbeat_{name}", "--max-epoch", 2, "--heartbeat-timeout", 2


def ended(pid: int) -> bool:
    """Whether a process is no more, or all but buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_a_stopped_process(toy_databin, tmp_path):
    """Started by ourselves; all end, data workers too."""
    flags = failing(tmp_path, "SIGSTOP")
    process = start(toy_databin, tmp_path / "run", *flags, "--distributed-world-size", 2, "--num-workers", 1)
    seen: set[int] = set()
    while process.poll() is None:
        for pid in [process.pid, *seen]:
            tasks = Path(f"/proc/{pid}/task/{pid}/children")
            if tasks.exists():
                seen |= set(map(int, tasks.read_text().split()))
        time.sleep(0.05)
    _, errors = process.communicate()
    assert process.returncode == LOST_STATUS
    (line,) = errors.splitlines()
    name = f"process 1 of 2 on {socket.gethostname()}"
    assert line.startswith(f"error: {name} has given no sign of life for 2 s after update ")
    assert len(seen) >= 4
    deadline = time.monotonic() + 30
    while not all(ended(pid) for pid in seen):  # a data worker looks every 5 s whether its parent lives
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_reader_that_hangs(tmp_path):
    """As where the file system does not answer: a process that reads for one of the two is stopped."""
    databin = write_databin(tmp_path / "bin", 50_000, seed=0)  # an epoch of some minutes: each has readers of its own
    flags = ("--max-epoch", 1, "--no-save", "--disable-validation", "--heartbeat-timeout", 3)
    process = start(databin, tmp_path, *flags, "--distributed-world-size", 2, "--num-workers", 1)
    readers: list[psutil.Process] = []
    while process.poll() is None and not (readers and logged(tmp_path)):
        with contextlib.suppress(psutil.NoSuchProcess):
            readers = [r for p in psutil.Process(process.pid).children() for r in p.children()]
        time.sleep(0.05)
    readers[0].suspend()
    try:
        process.wait(timeout=120)
    finally:
        readers[0].resume()  # it holds the other end of our pipes
    _, errors = process.communicate(timeout=30)
    assert process.returncode == LOST_STATUS
    (line,) = errors.splitlines()
    name = f"process [01] of 2 on {re.escape(socket.gethostname())}"
    assert re.match(rf"error: {name} has waited 3 s for a batch after update \d+ \(--heartbeat-timeout\)$", line)


@pytest.fixture(scope="module")
def uninterrupted(toy_databin, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    train(toy_databin, directory, "--update-freq", 2, "--max-epoch", 2)
    return directory


@pytest.mark.slow
def test_torchrun_restarts(toy_databin, tmp_path, uninterrupted):
    process = start(toy_databin, tmp_path / "run", *failing(tmp_path, "SIGKILL"), launcher=TORCHRUN)
    _, lines = process.communicate()
    assert process.returncode == 0, lines
    assert_same_to_rounding(uninterrupted, tmp_path / "run")
    counts = [line["num_updates"] for line in logged(tmp_path / "run") if "loss" in line]
    assert counts in ([1, 2, 3, 4, 5, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8])


# -- two hosts


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.99.0.1 and 10.99.0.2, interface ``cable``."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command (iproute2) here")
    names = [f"fairseq-{os.getpid()}-{i}" for i in range(2)]

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0

    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("making network namespaces is not permitted here")
        peer = ["peer", "name", "cable", "netns", names[1]]
        if not ip("link", "add", "cable", "netns", names[0], "type", "veth", *peer):
            pytest.skip("making network interfaces is not permitted here")
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "cable")
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def on_host(host: str, command: list[str], **environment: object) -> subprocess.Popen[str]:
    given = {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "cable", **environment}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {key: str(value) for key, value in given.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


STATIC = ["--master-addr=10.99.0.1", "--master-port=29400"]
C10D = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.99.0.1:29400", "--rdzv-id=7"]


@pytest.mark.slow
@pytest.mark.parametrize("meeting", [STATIC, C10D], ids=["static", "c10d"])
def test_two_hosts_train_as_one(toy_databin, tmp_path, uninterrupted, hosts, meeting):
    """With c10d the hosts' names, which torchrun takes by default, lead nowhere: each says its address."""
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting]
    command = ["-m", "fairseq.cli.train", *command_line(toy_databin, tmp_path, "--max-epoch", 2)]
    own = [[f"--node-rank={rank}"] for rank in range(2)]
    if meeting is C10D:
        own = [[f"--rdzv-conf=is_host={1 - rank}", f"--local-addr=10.99.0.{rank + 1}"] for rank in range(2)]
    processes = [on_host(host, [*torchrun, *flags, *command]) for host, flags in zip(hosts, own, strict=True)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for key in ("model", "last_optimizer_state"):
        assert_same(last(uninterrupted)[key], last(tmp_path)[key], atol=1e-5)
    assert updates(logged(tmp_path)).keys() == updates(logged(uninterrupted)).keys()


@pytest.mark.slow
def test_a_cut_cable(toy_databin, tmp_path, hosts):
    """Each side ends and says whom it misses."""
    command = command_line(toy_databin, tmp_path, "--max-update", 100000, "--heartbeat-timeout", 3)
    meeting = {"WORLD_SIZE": 2, "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": 29500}
    processes = [
        on_host(host, ["fairseq.cli.train", *command], RANK=rank, **meeting) for rank, host in enumerate(hosts)
    ]
    while not (tmp_path / "checkpoint1.pt").exists() and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    subprocess.run(["ip", "-n", hosts[0], "link", "set", "cable", "down"], check=True)
    messages = []
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == LOST_STATUS, errors
        messages += [line for line in errors.splitlines() if line.startswith("error: ")]
    first, second = messages
    assert first.startswith("error: process 1 of 2 on ")
    assert "has given no sign of life for 3 s after update" in first
    assert second.startswith("error: no answer for 3 s from 10.99.0.1:29500, where the processes meet: process 0 on ")
    assert last(tmp_path)["optimizer_history"]  # whole
