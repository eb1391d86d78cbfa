"""Kill preprocessing, training and averaging with SIGKILL at random moments, start them again, and compare.

A tiny model is trained twice: once undisturbed, once killed ``--kills`` times in all. After every kill each checkpoint
in the directory must be readable and the data-bin whole, absent, or refused by its reader; in the end, losses and
gradient norms of every update, the last checkpoint's tensors, the averaged model, the data-bin and the names of all
files must be the same, bit for bit. Exit status 1 and a line for each violation otherwise.

A child process writes which phase it is in to a byte of shared memory, which outlives it: so the moment of each kill
can be aimed, and where it struck is known, not guessed.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq.checkpoint import load_checkpoint
from fairseq.data.translation import load_dictionaries
from fairseq.errors import FairseqError

PHASES = ("start", "step", "validate", "save", "average", "write text", "publish")
OF_STAGE = {
    "preprocess": ("write text", "publish"),
    "train": ("start", "step", "validate", "save"),
    "average": ("average",),
}
LENGTH_S = {"save": 0.003, "publish": 0.0005, "step": 0.01, "validate": 0.01}  # about; of the others 0.02
LIMIT_S = 120  # of one process
TRAIN = """--encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2
    --decoder-layers 1 --decoder-attention-heads 2 --dropout 0.2 --optimizer adam --lr 0.01 --max-tokens 120 --cpu
    --num-workers 0 --log-format none --log-interval 1 --max-epoch 4 --save-interval-updates 3
    --keep-interval-updates 3 --keep-best-checkpoints 2"""


# -- in the child


def child(argv: list[str]) -> None:
    """Run one command. argv: file of phases, file of losses, stage, the command's arguments."""
    phases, losses, stage, *arguments = argv
    with open(phases, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 2)  # what the main thread does, what the thread that saves does

    def during(name: str, function: Callable[..., Any], slot: int = 0) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, shared[slot] = shared[slot], PHASES.index(name) + 1
            try:
                return function(*args, **kwargs)
            finally:
                shared[slot] = before

        return wrapped

    if stage == "preprocess":
        from fairseq.cli.preprocess import main
        from fairseq.data import preprocess

        preprocess._write = during("write text", preprocess._write)
        preprocess._publish = during("publish", preprocess._publish)
    elif stage == "average":
        from fairseq.cli import average

        main = during("average", average.main)
    else:
        from fairseq.cli.train import main
        from fairseq.training import checkpoint_manager
        from fairseq.training.trainer import Trainer
        from fairseq.training.validation import Validator

        for name in ("save_checkpoint", "atomic_copy"):
            setattr(checkpoint_manager, name, during("save", getattr(checkpoint_manager, name), slot=1))
        Trainer.train_step = during("step", Trainer.train_step)  # type: ignore[method-assign]
        Validator.validate = during("validate", Validator.validate)  # type: ignore[method-assign]
        take_stats = Trainer.take_stats

        def recorded(trainer: Trainer) -> dict[str, float]:
            stats = take_stats(trainer)
            if stats["updates"]:
                line = f"{trainer.num_updates} {stats['loss'].hex()} {stats['gnorm'].hex()}\n"
                fd = os.open(losses, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                os.write(fd, line.encode())
                os.close(fd)
            return stats

        Trainer.take_stats = recorded  # type: ignore[method-assign, assignment]
        main = during("start", main)
    main(arguments)


# -- in the parent


class Place:
    """One directory with all that the commands read and write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.databin, self.run, self.averaged = root / "data-bin", root / "run", root / "averaged.pt"
        self.phases, self.losses = root / "phases", root / "losses"

    def commands(self, text: Path) -> list[tuple[str, list[str]]]:
        """(stage, arguments) of each command, in order; the second preprocessing adds to the data-bin of the first."""
        sides = ["-s", "xx", "-t", "yy", "--destdir", str(self.databin)]
        dicts = ["--srcdict", str(self.databin / "dict.xx.txt"), "--tgtdict", str(self.databin / "dict.yy.txt")]
        inputs = ["--inputs", str(self.run), "--num-update-checkpoints", "3", "--output", str(self.averaged)]
        return [
            ("preprocess", [*sides, "--trainpref", str(text / "train"), "--validpref", str(text / "valid")]),
            ("preprocess", [*sides, *dicts, "--testpref", str(text / "test")]),
            ("train", [str(self.databin), *TRAIN.split(), "--save-dir", str(self.run)]),
            ("average", inputs),
        ]

    def start(self, stage: str, arguments: list[str]) -> subprocess.Popen[str]:
        """The command as a child process, which tells its phase."""
        self.phases.write_bytes(bytes(2))
        argv = [sys.executable, __file__, "--child", str(self.phases), str(self.losses), stage, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def write_text(directory: Path, seed: int) -> None:
    """A parallel text whose targets are their sources in reverse."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 160), ("valid", 60), ("test", 60)):
        lines = [[f"w{i}" for i in rng.integers(0, 20, rng.integers(3, 10))] for _ in range(count)]
        for language, step in (("xx", 1), ("yy", -1)):
            text = "".join(" ".join(line[::step]) + "\n" for line in lines)
            (directory / f"{split}.{language}").write_text(text, encoding="utf-8")


def run(place: Place, stage: str, arguments: list[str], aim: str | None, rng: random.Random) -> str | None:
    """Run a command; kill it somewhere in phase ``aim``. Returns the phase it was killed in; None if it ended."""
    process = place.start(stage, arguments)
    wait_for_visits = rng.randrange(12) if aim in ("step", "save") else rng.randrange(3) if aim == "validate" else 0
    with open(place.phases, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 2)
    inside, deadline = False, time.monotonic() + LIMIT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"violation: {stage} hangs")
        now = aim is not None and PHASES.index(aim) + 1 in shared[:2]
        if now and not inside:
            wait_for_visits -= 1
        inside = now
        if now and wait_for_visits < 0:
            time.sleep(rng.random() * LENGTH_S.get(str(aim), 0.02))
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0001)
    _, errors = process.communicate()
    if process.returncode == -signal.SIGKILL:
        return PHASES[(shared[1] or shared[0] or 1) - 1]
    if process.returncode != 0:
        raise SystemExit(f"violation: {stage} ended with status {process.returncode}: {errors.strip()[-500:]}")
    return None


def content(directory: Path) -> dict[str, bytes]:
    """Name -> bytes of every file; nothing where there is no directory."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()} if directory.is_dir() else {}


def same(a: Any, b: Any) -> bool:
    """Nested dicts and lists of tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def check_after_kill(place: Place, stages: list[dict[str, bytes]]) -> list[str]:
    """What is broken. stages: what the data-bin may hold, as undisturbed commands leave it, an empty one included."""
    found = []
    for path in [*place.run.glob("*.pt"), *place.root.glob("*.pt")]:
        try:
            load_checkpoint(path)
        except FairseqError as error:
            found.append(f"unreadable: {error}")
    visible = {n: b for n, b in content(place.databin).items() if not n.startswith(".")}
    if visible not in stages:
        try:
            load_dictionaries(place.databin, "xx", "yy")
            found.append(f"{place.databin} is half there and nobody says so: {sorted(visible)}")
        except FairseqError as error:
            if "give its command again" not in str(error):
                found.append(f"{place.databin}: {error}")
    return found


def compare(expected: Place, place: Place) -> list[str]:
    """Where the results of the killed commands differ from the undisturbed ones'."""
    found = []
    truth = dict(line.split(" ", 1) for line in expected.losses.read_text().splitlines())
    lines = [line.split(" ", 1) for line in place.losses.read_text().splitlines()]
    found += [f"update {n}: loss and norm {value}, not {truth.get(n)}" for n, value in lines if truth.get(n) != value]
    if {n for n, _ in lines} != truth.keys():
        found.append("not every update was done")
    for name in ("run/checkpoint_last.pt", "run/checkpoint_best.pt", "averaged.pt"):
        a, b = (load_checkpoint(p.root / name) for p in (expected, place))
        found += [f"{name}: {k} differs" for k in ("model", "last_optimizer_state") if not same(a[k], b[k])]
    for name in ("data-bin", "run"):
        names, others = ({p.name for p in (q.root / name).iterdir()} for q in (expected, place))
        if names != others:
            found.append(f"{name}: {sorted(names ^ others)} on one side only")
    if content(expected.databin) != content(place.databin):
        found.append("the data-bins differ")
    if left := [path.name for path in place.root.iterdir() if path.name.startswith(".")]:
        found.append(f"left behind: {left}")
    return found


def chaos(root: Path, kills: int, rng: random.Random) -> list[str]:
    """Do everything twice; returns the violations."""
    text, expected, place = root / "text", Place(root / "undisturbed"), Place(root / "killed")
    for directory in (text, expected.root, place.root):
        directory.mkdir(parents=True)
    write_text(text, rng.randrange(2**32))
    stages: list[dict[str, bytes]] = [{}]
    for stage, arguments in expected.commands(text):
        run(expected, stage, arguments, None, rng)
        stages.append(content(expected.databin))
    updates = len(expected.losses.read_text().splitlines())
    print(f"undisturbed: {updates} updates, {len(list(expected.run.glob('*.pt')))} checkpoints")
    aims = [PHASES[i % len(PHASES)] if i < len(PHASES) else rng.choice(PHASES) for i in range(kills)]
    killed: collections.Counter[str] = collections.Counter()
    violations: list[str] = []
    done = 0
    for stage, arguments in place.commands(text):
        mine = [aim for aim in aims if aim in OF_STAGE[stage]]
        if stage == "preprocess":  # half of them for each of the two commands
            mine = mine[::2] if not place.databin.exists() else mine[1::2]
        rng.shuffle(mine)
        started = 0
        while True:
            aim = mine[0] if mine else None
            struck = run(place, stage, arguments, aim, rng)
            started += 1
            if struck is None:
                if not mine or started > 8 * kills:
                    break
                undo(place, stage)  # finished before all kills were done: once more
                continue
            done += 1
            mine.pop(0)
            killed[struck] += 1
            problems = check_after_kill(place, stages)
            violations += problems
            print(f"kill {done}: {stage}, aimed at '{aim}', struck in '{struck}'", *problems, sep="; ", flush=True)
    print("killed in: " + ", ".join(f"{name} {killed[name]}" for name in PHASES))
    if done < kills:
        violations.append(f"{done} kills of {kills}: the processes were too fast")
    return violations + compare(expected, place)


def undo(place: Place, stage: str) -> None:
    """Remove what a finished command has made, so that it can be killed again."""
    if stage == "train":
        shutil.rmtree(place.run)
    elif stage == "average":
        place.averaged.unlink()
    elif any(place.databin.glob("test.*")):
        for path in place.databin.glob("test.*"):
            path.unlink()
    else:
        shutil.rmtree(place.databin)


def main() -> None:
    """Parse the flags, run, report."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="how often to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of texts and moments (default: 1)")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-train-") as root:
        violations = chaos(Path(root), args.kills, random.Random(args.seed))
    for violation in violations:
        print(f"violation: {violation}")
    print(f"{args.kills} kills, {len(violations)} violations, {time.monotonic() - started:.0f} seconds")
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
