"""Our commands beside fairseq's own, on the same machine and data: one table of preprocess, train and generate.

    python scripts/bench_fairseq.py DATA-BIN --fairseq OTHER-ENVIRONMENT/bin --path model.pt --threads 1 2

Both are run as a user runs them, in turn, --repeat times; the best of each counts. preprocess: lines of both sides a
second of the whole command, on the training set written back as text. train: target tokens a second as logged, the mean
of the updates after the first --warmup. generate: sentences a second as printed at the end; loading is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fairseq.data.translation import TranslationData
from fairseq.errors import FairseqError
from fairseq.options import DataConfig
from fairseq.utils.io import atomic_write

ROOT = Path(__file__).resolve().parents[1]
TRAINING = shlex.split(
    """
    --optimizer adam --adam-betas (0.9,0.98) --lr 1e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --share-all-embeddings
    --no-save --disable-validation --log-format json --log-interval 1 --num-workers 1 --cpu
    """
)
Row = dict[str, Any]
Run = Callable[..., str]
Measure = Callable[[Run], float]


def main() -> None:
    args = _parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench_fairseq-") as work:
        text, pairs = _write_text(args.data, Path(work) / "text")
        for threads in args.threads:
            for name, unit, measure in _tasks(args, text, pairs, Path(work)):
                best: dict[str, float] = {}
                for _ in range(args.repeat):
                    for who in ("fairseq", "ours"):
                        best[who] = max(best.get(who, 0.0), measure(_command(args, who, threads)))
                rows.append({"task": name, "unit": unit, "threads": threads, **best})
                print(
                    f"{name:48} {threads} thread{'s' if threads > 1 else ' '} fairseq {best['fairseq']:10,.1f}  "
                    f"ours {best['ours']:10,.1f} {unit}  {best['ours'] / best['fairseq']:.2f}x",
                    flush=True,
                )
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(rows, indent=2) + "\n")


def _parse_args() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data-bin with splits train and test")
    parser.add_argument("--fairseq", required=True, metavar="DIR", help="bin directory of an environment with fairseq")
    parser.add_argument("--tasks", nargs="+", choices=("preprocess", "train", "generate"), help="default: all")
    parser.add_argument("--arch", nargs="+", default=["transformer_tiny"], help="architectures to train")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens in a training batch")
    parser.add_argument("--path", help="checkpoint to translate with, one that both can read")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of the CPU")
    parser.add_argument("--updates", type=int, default=20, help="training updates to time")
    parser.add_argument("--warmup", type=int, default=3, help="training updates before those")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    args.tasks = args.tasks or ["preprocess", "train", *(["generate"] if args.path else [])]
    if "generate" in args.tasks and not args.path:
        parser.error("generate needs --path, a checkpoint")
    return args


def _tasks(args: Namespace, text: Path, pairs: int, work: Path) -> list[tuple[str, str, Measure]]:
    """Name, unit and what measures it, given what runs commands."""
    found: list[tuple[str, str, Measure]] = []
    if "preprocess" in args.tasks:
        found.append(("preprocess", "lines/s", partial(_preprocess, text, pairs, work)))
    if "train" in args.tasks:
        for arch in args.arch:
            name = f"train {arch}, {args.max_tokens} tokens"
            found.append((name, "target tokens/s", partial(_train, args, arch)))
    if "generate" in args.tasks:
        name = f"generate {Path(args.path).name}, beam 5, batch 128"
        found.append((name, "sentences/s", partial(_generate, args)))
    return found


def _command(args: Namespace, who: str, threads: int) -> Run:
    """What runs ``fairseq-NAME ARGUMENTS`` of either and returns all that it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    if who == "ours":
        environment["PYTHONPATH"] = str(ROOT)

    def run(name: str, *arguments: object) -> str:
        theirs = [f"{args.fairseq}/fairseq-{name}"]
        command = theirs if who == "fairseq" else [sys.executable, "-m", f"fairseq.cli.{name}"]
        with tempfile.TemporaryDirectory() as elsewhere:  # ./fairseq would be imported
            done = subprocess.run(
                [*command, *map(str, arguments)],
                cwd=elsewhere,
                env=environment,
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise FairseqError(f"fairseq-{name} of {who} failed:\n{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    return run


def _write_text(databin: str, directory: Path) -> tuple[Path, int]:
    """The training set as ``train.src`` and ``train.tgt``; returns their prefix and the number of pairs."""
    data = TranslationData.open(DataConfig(databin))
    dataset = data.load("train")
    assert dataset.tgt is not None
    directory.mkdir()
    for name, side, dictionary in (("src", dataset.src, data.src_dict), ("tgt", dataset.tgt, data.tgt_dict)):
        lines = (" ".join(map(dictionary.symbols.__getitem__, side[i][:-1])) for i in range(len(side)))
        (directory / f"train.{name}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return directory / "train", len(dataset)


def _preprocess(text: Path, pairs: int, work: Path, run: Run) -> float:
    with tempfile.TemporaryDirectory(dir=work) as destination:
        began = time.perf_counter()
        run("preprocess", "-s", "src", "-t", "tgt", "--trainpref", text, "--destdir", f"{destination}/bin")
        return 2 * pairs / (time.perf_counter() - began)


def _train(args: Namespace, arch: str, run: Run) -> float:
    with tempfile.TemporaryDirectory() as directory:
        last = args.warmup + args.updates
        flags = ["--arch", arch, "--max-tokens", args.max_tokens, "--max-update", last, "--save-dir", directory]
        printed = run("train", Path(args.data).resolve(), *flags, *TRAINING)
    updates = [json.loads(line[line.index("{") :]) for line in printed.splitlines() if '"ups"' in line]
    timed = [update for update in updates if args.warmup < int(update["num_updates"]) and "wpb" in update][
        : args.updates
    ]
    tokens = sum(float(update["wpb"]) for update in timed)
    return tokens / sum(float(update["wpb"]) / float(update["wps"]) for update in timed)


def _generate(args: Namespace, run: Run) -> float:
    flags = ["--path", Path(args.path).resolve(), "--beam", 5, "--batch-size", 128, "--remove-bpe", "--cpu"]
    printed = run("generate", Path(args.data).resolve(), *flags)
    [speed] = re.findall(r"([\d.]+) sentences/s", printed)
    return float(speed)


if __name__ == "__main__":
    main()
