"""Signals, full disks, damaged checkpoints: nothing is lost, and a resumed training is the uninterrupted one."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fairseq.checkpoint import load_checkpoint
from fairseq.cli.preprocess import main as preprocess
from fairseq.cli.train import main
from fairseq.data import preprocess as preprocess_module
from fairseq.data.indexed_dataset import UNFINISHED
from fairseq.data.translation import load_dictionaries
from fairseq.errors import FairseqError
from fairseq.training.async_save import BackgroundWriter, to_host
from fairseq.training.heartbeat import LOST_STATUS
from fairseq.training.trainer import Trainer
from fairseq.training.validation import Validator
from fairseq.utils.io import atomic_write, locked_directory
from tests.training_runs import (
    EPOCH,
    ROOT,
    assert_fails,
    assert_same,
    command_line,
    files,
    last,
    load,
    logged,
    start,
    train,
    updates,
    write_databin,
)

LAST = "checkpoint_last.pt"
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
LONG = ("--max-update", 60, "--save-interval", 100, "--validate-interval", 2)

# -- damaged checkpoints


def test_damage_is_found_or_harmless(toy_databin, tmp_path):
    train(toy_databin, tmp_path, "--max-update", 1)
    good, expected = (tmp_path / LAST).read_bytes(), load_checkpoint(tmp_path / LAST)
    directory = good.rfind(b"PK\x01\x02", 0, good.find(b"PK\x01\x02") + 1)  # where the index of the zip file starts
    rng, found, path = random.Random(1), 0, tmp_path / "damaged.pt"
    for number in range(400):
        data = bytearray(good)
        if number % 4 == 0:
            del data[rng.randrange(len(data)) :]
        elif number % 4 == 1:
            at = rng.randrange(len(data))
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        else:
            data[rng.randrange(0 if number % 4 == 2 else directory, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            state = load_checkpoint(path)
        except FairseqError as error:
            found += 1
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
        else:
            for key in ("model", "last_optimizer_state", "optimizer_history", "args"):
                assert_same(state[key], expected[key])
    assert found > 200


def test_torch_alone_would_not_notice(tmp_path):
    path, value = tmp_path / "x.pt", torch.arange(100.0)
    torch.save({"model": {"w": value}, "args": None}, path)
    data = bytearray(path.read_bytes())
    data[data.find(value.numpy().tobytes()) + 41] ^= 4
    path.write_bytes(data)
    assert not torch.equal(torch.load(path)["model"]["w"], value)
    with pytest.raises(FairseqError, match="checksum of record x/data/0 does not match"):
        load_checkpoint(path)


def test_fallback(toy_databin, tmp_path, capsys, caplog):
    flags = ("--max-epoch", 3, "--save-interval-updates", 5)
    train(toy_databin, tmp_path / "whole", *flags)
    train(toy_databin, tmp_path / "run", *flags, "--max-update", 10)
    path = tmp_path / "run" / LAST
    data = bytearray(path.read_bytes())
    path.unlink()  # the other names of the file stay good
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    for age, name in enumerate(("checkpoint1.pt", "checkpoint_1_5.pt", "checkpoint_2_10.pt")):
        os.utime(tmp_path / "run" / name, (2e9 - age, 2e9 - age))  # in a copied directory ages say nothing
    argv = command_line(toy_databin, tmp_path / "run", *flags)
    assert_fails(capsys, 1, "the newest good one, with --restore-fallback", *argv)
    assert path.read_bytes() == data
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / LAST).write_bytes(data)
    for more in ((), ("--restore-fallback",), ("--restore-fallback", "--restore-file", path)):
        # there is no other, or none that was named
        with pytest.raises(SystemExit):
            main(command_line(toy_databin, tmp_path / "alone", *flags, *more))
        error = capsys.readouterr().err
        assert "damaged" in error and "newest good" not in error
    train(toy_databin, tmp_path / "run", *flags, "--restore-fallback")
    [resumed] = [record.message for record in caplog.records if record.message.startswith("resumed from")]
    assert resumed.endswith("(epoch 2 @ 10 updates)")
    for key in ("model", "last_optimizer_state"):
        assert_same(last(tmp_path / "whole")[key], last(tmp_path / "run")[key])


# -- writing


def test_leftovers_go_unless_someone_is_writing(tmp_path):
    (tmp_path / ".a.txt.dead.tmp").write_text("half")
    with atomic_write(tmp_path / "a.txt") as one:
        assert not (tmp_path / ".a.txt.dead.tmp").exists()
        with atomic_write(tmp_path / "a.txt") as two:
            two.write("two")
        one.write("one")
    assert (tmp_path / "a.txt").read_text() == "one"
    assert files(tmp_path) == {"a.txt"}


def test_a_copy_of_the_state_shares_nothing_but_what_was_shared():
    w, step = torch.ones(3), torch.tensor(1.0)
    copy = to_host({"a": w, "b": w, "state": {0: {"step": step}}, "list": [w, 1], "text": "x"})
    w.add_(1)
    step.add_(1)
    assert_same(copy, {"a": torch.ones(3), "b": torch.ones(3), "state": {0: {"step": torch.tensor(1.0)}}}
                | {"list": [torch.ones(3), 1], "text": "x"})  # fmt: skip
    assert copy["a"] is copy["b"]


def test_one_job_at_a_time_and_its_error_comes_out():
    order: list[int] = []

    def job(number: int) -> None:
        time.sleep(0.05)
        order.append(number)
        if number == 2:
            raise FairseqError("disk full")

    writer = BackgroundWriter()
    writer.start(lambda: job(1))
    assert order == []
    writer.start(lambda: job(2))
    assert order == [1]
    with pytest.raises(FairseqError, match="disk full"):
        writer.start(lambda: job(3))
    assert order == [1, 2]
    writer.wait()


@pytest.mark.parametrize("asynchronously", ["True", "False"])
def test_both_ways_of_saving_write_the_same(toy_databin, tmp_path, asynchronously):
    flags = ("--max-epoch", 2, "--write-checkpoints-asynchronously", asynchronously, "--keep-last-epochs", 1)
    train(toy_databin, tmp_path / "run", *flags)
    train(toy_databin, tmp_path / "other", "--max-epoch", 2)
    assert files(tmp_path / "run") == {"checkpoint2.pt", LAST, "checkpoint_best.pt"}
    for key in ("model", "last_optimizer_state"):
        assert_same(last(tmp_path / "run")[key], last(tmp_path / "other")[key])


MOUNT = {"full": "size=330k", "read-only": "size=10m"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOUNT)
def test_disk_full_or_read_only(toy_databin, tmp_path, kind):
    """On a small file system of its own: training stops, the checkpoint before stays."""
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    place, copy = tmp_path / "disk", tmp_path / "copy"
    place.mkdir()
    flags = ("--log-file", tmp_path / "log", "--no-epoch-checkpoints", "--disable-validation", "--max-epoch")
    python = shlex.quote(sys.executable)
    first, second = (
        f"{python} -m fairseq.cli.train {shlex.join(command_line(toy_databin, place, *flags, epochs))}"
        for epochs in (1, 100)
    )
    between = f"mount -o remount,ro {place}" if kind == "read-only" else f"head -c 150000 /dev/zero > {place}/other"
    script = f"mount -t tmpfs -o {MOUNT[kind]} none {place} && {first} && {between}; {second}; status=$?; "
    script += f"cp -r {place} {copy}; exit $status"
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    reason = "Read-only file system" if kind == "read-only" else "No space left on device"
    assert line.startswith("error: ")
    assert reason in line
    assert files(copy) - {"other"} == {LAST}
    assert load(copy / LAST)["optimizer_history"][-1]["num_updates"] == 7


# -- data-bins


def test_a_data_bin_grows_to_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for language in ("en", "de"):
            Path(f"{split}.{language}").write_text("a b\nb a\n")
    common = ["-s", "en", "-t", "de", "--destdir", "bin"]
    preprocess([*common, "--trainpref", "train"])
    moved = []

    def replace(source: Path, target: Path) -> None:
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(os.rename(source, target))

    monkeypatch.setattr(preprocess_module.os, "replace", replace)
    given = ["--srcdict", "bin/dict.en.txt", "--tgtdict", "bin/dict.de.txt", "--testpref", "test"]
    destdir = Path("bin")
    with pytest.raises(SystemExit):
        preprocess([*common, *given])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    if (destdir / UNFINISHED).exists():
        with pytest.raises(FairseqError, match="give its command again"):
            load_dictionaries(destdir, "en", "de")
    preprocess([*common, *given])
    load_dictionaries(destdir, "en", "de")
    expected = {f"{s}.en-de.{x}.{end}" for s in ("train", "test") for x in ("en", "de") for end in ("bin", "idx")}
    assert files(destdir) == expected | {"dict.en.txt", "dict.de.txt"}


@pytest.mark.slow
def test_two_trainings_in_one_directory(toy_databin, tmp_path, capsys):
    """The second, of two processes, is refused before it changes anything."""
    argv = command_line(toy_databin, tmp_path, *LONG, "--distributed-world-size", 2)
    with locked_directory(tmp_path):
        assert_fails(capsys, LOST_STATUS, "another training is running there", *argv)
    assert files(tmp_path) == set()


# -- signals


def wait_for_update(process: subprocess.Popen[str], directory: Path, number: int) -> None:
    while process.poll() is None and not any(n >= number for n in updates(logged(directory))):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "size"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2), (signal.SIGINT, 1)], ids=["TERM", "USR1", "INT"]
)
def test_signal_saves_and_the_rest_is_exact(toy_databin, tmp_path, signum, size):
    """To the first process and to all of the job, those that read data too, as `timeout` sends it."""
    flags = (*LONG, "--distributed-world-size", size)
    argv = [*command_line(toy_databin, tmp_path / "run", *flags), "--num-workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fairseq.cli.train", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_update(process, tmp_path / "run", 3)
    process.send_signal(signum)
    if signum == signal.SIGINT:
        time.sleep(0.1)  # else the two may be one, and a second one ended it
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, errors
    assert errors == "interrupted: saving a checkpoint; Ctrl-C once more ends it at once\n"
    assert 3 <= last(tmp_path / "run")["optimizer_history"][-1]["num_updates"] < 60
    assert files(tmp_path / "run") == {LAST} | ({"checkpoint_best.pt"} & files(tmp_path / "run"))
    if size > 1:  # how several go on: test_heartbeat.py
        return
    train(toy_databin, tmp_path / "whole", *flags)
    train(toy_databin, tmp_path / "run", *flags)
    for key in ("model", "last_optimizer_state"):
        assert_same(last(tmp_path / "whole")[key], last(tmp_path / "run")[key])
    whole, run = logged(tmp_path / "whole"), logged(tmp_path / "run")
    assert updates(whole) == updates(run)
    assert [x["valid_loss"] for x in whole if "valid_loss" in x] == [x["valid_loss"] for x in run if "valid_loss" in x]


def test_what_is_due_when_a_signal_comes_is_done_by_the_run_that_continues(toy_databin, tmp_path, monkeypatch):
    """Signals with nothing due, with a save due, at the ends of the epochs and of the training, and in validations."""
    flags = ("--max-epoch", 2, "--save-interval-updates", 5, "--keep-best-checkpoints", 2, "--patience", 50)
    whole = train(toy_databin, tmp_path / "whole", *flags)
    after_update, in_validation = [3, 5, EPOCH, 2 * EPOCH], [EPOCH, 10, 2 * EPOCH]
    step, validate = Trainer.train_step, Validator.validate

    def stop_if_in(places: list[int], updates: int) -> None:
        if updates in places:
            places.remove(updates)
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped_step(trainer: Trainer, *rest: Any) -> bool:
        updated = step(trainer, *rest)
        stop_if_in(after_update, trainer.num_updates)
        return updated

    def stopped_validation(validator: Validator, epoch: int, updates: int, *rest: Any) -> float:
        stop_if_in(in_validation, updates)
        return validate(validator, epoch, updates, *rest)

    monkeypatch.setattr(Trainer, "train_step", stopped_step)
    monkeypatch.setattr(Validator, "validate", stopped_validation)
    while after_update or in_validation:
        left = len(after_update + in_validation)
        with pytest.raises(SystemExit) as exit_info:
            train(toy_databin, tmp_path / "run", *flags)
        assert exit_info.value.code == 128 + signal.SIGTERM
        assert len(after_update + in_validation) == left - 1
    train(toy_databin, tmp_path / "run", *flags)
    run = logged(tmp_path / "run")
    assert updates(run) == updates(whole)
    for name in ("train_num_updates", "train_loss", "valid_num_updates", "valid_loss", "valid_best_loss"):
        assert [line[name] for line in run if name in line] == [line[name] for line in whole if name in line], name
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    for name in files(tmp_path / "whole"):
        one, other = load(tmp_path / "whole" / name), load(tmp_path / "run" / name)
        for key in ("model", "optimizer_history"):
            assert_same(one[key], other[key])
        assert_same(one["last_optimizer_state"]["state"], other["last_optimizer_state"]["state"])
        for key in ("train_iterator", "val_loss", "best", "bad_validations", "unfinished"):
            assert one["extra_state"][key] == other["extra_state"][key], (name, key)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "the same command continues"),
        (("--no-save-optimizer-state",), "the same command with --reset-optimizer continues"),
        (
            ("--restore-file", "first.pt", "--reset-optimizer", "--reset-meters"),
            "the same command without --reset-meters, --reset-optimizer, --restore-file continues",
        ),
        (
            ("--no-save-optimizer-state", "--reset-optimizer", "--reset-dataloader"),
            "the same command without --reset-dataloader continues",
        ),
        (("--no-save",), "nothing was saved, as the flags say"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_command_that_continues_is_told(toy_databin, tmp_path, monkeypatch, caplog, flags, said):
    monkeypatch.setattr(Validator, "validate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 1.0)
    with pytest.raises(SystemExit):
        train(toy_databin, tmp_path, "--max-update", 2, "--validate-interval-updates", 1, *flags)
    assert caplog.messages[-1] == f"stopped after 2 updates: SIGTERM; {said}"


@pytest.mark.slow
def test_a_reader_or_a_terminal_that_has_gone(toy_databin, tmp_path):
    """As where Ctrl-C ends `tee`, too: training goes on without its log, and what ends it then saves as ever."""
    flags = ("--max-epoch", 1000, "--no-epoch-checkpoints", "--distributed-world-size", 2)
    process = start(toy_databin, tmp_path, *flags)
    wait_for_update(process, tmp_path, 2)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    wait_for_update(process, tmp_path, max(updates(logged(tmp_path))) + 20)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert last(tmp_path)["optimizer_history"][-1]["num_updates"] >= 20


def end_first(process: subprocess.Popen[str]) -> None:
    """Kill a job's first process alone, as the system does when memory runs out; the others must end by themselves."""
    others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1)  # those that it reads from now wait for it
    process.kill()
    _, alive = psutil.wait_procs(others, timeout=60)
    for other in alive:
        other.kill()
    process.communicate()
    assert others
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize(("size", "launcher"), [(1, ()), (2, ()), (2, TORCHRUN)], ids=["one", "two", "torchrun"])
def test_no_process_of_a_killed_training_is_left(tmp_path, size, launcher):
    """Nor those that read, with a batch in hand that is larger than what a pipe takes."""
    databin = write_databin(tmp_path / "bin", 50_000, seed=0)
    flags = ("--max-tokens", 20000, "--max-epoch", 1000, "--save-interval", 1000, "--disable-validation")
    flags += () if launcher else ("--distributed-world-size", size)
    process = start(databin, tmp_path, *flags, "--num-workers", 1, launcher=launcher)
    wait_for_update(process, tmp_path, 1)
    end_first(process)
    assert files(tmp_path) - {"bin", "log"} == ({LAST} if size > 1 else set())  # several have saved where they were


@pytest.mark.slow
def test_no_process_of_a_killed_preprocessing_is_left(tmp_path):
    for side in ("xx", "yy"):
        (tmp_path / f"text.{side}").write_text("a b c d e f g h\n" * 1_000_000)
    argv = ["-s", "xx", "-t", "yy", "--trainpref", f"{tmp_path}/text", "--destdir", f"{tmp_path}/out", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "fairseq.cli.preprocess", *argv], cwd=ROOT, text=True)
    while len(psutil.Process(process.pid).children()) < 2:
        time.sleep(0.02)
    end_first(process)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one rank"])
def test_signal_under_torchrun(toy_databin, tmp_path, to):
    process = start(toy_databin, tmp_path, *LONG, launcher=TORCHRUN)
    wait_for_update(process, tmp_path, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if to == "torchrun" else int(children[-1]), signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert 3 <= last(tmp_path)["optimizer_history"][-1]["num_updates"] < 60, errors
    assert "SIGTERM; the same command continues" in (tmp_path / "log").read_text()
    process = start(toy_databin, tmp_path, *LONG, launcher=TORCHRUN)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    numbers = [line["num_updates"] for line in logged(tmp_path) if "update" in line]
    assert numbers == list(range(1, 61))  # none lost, none twice


@pytest.mark.slow
def test_chaos(tmp_path):
    argv = [sys.executable, ROOT / "scripts" / "chaos_train.py", "--kills", "3", "--seed", "2"]
    done = subprocess.run(
        argv, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills, 0 violations" in done.stdout
