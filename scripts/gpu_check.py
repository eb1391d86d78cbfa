"""Ten minutes with a GPU: python scripts/gpu_check.py --out DIR [--data DATA-BIN] [--minutes 9] [--stages NAME ...]

Runs tests/test_cuda.py, the real commands on the GPU, then the table of bench_train.py row by row, the most telling
rows first, until the time is over. Each stage is a process of its own with a time limit of its own: what fails, hangs
or crashes takes no other with it. DIR gets log.txt (all output), rows.jsonl (the table, and one line a stage) and
summary.txt, all up to date after every stage. Needs the repository and a Python with torch, numpy and pytest; nothing
has to be installed. Without --data, a corpus of random sentences is made.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fairseq.data.dictionary import Dictionary  # noqa: E402
from fairseq.data.indexed_dataset import IndexedDatasetWriter  # noqa: E402

WORDS, PAIRS, MEAN_LENGTH = 10_000, 40_000, 25
SHOWN = (  # of a row, in the summary
    *("wps", "ms_per_step", "memory_gb", "mfu", "startup_seconds", "steady_seconds"),
    *("search", "precision", "beam", "sentences/s", "tokens/s", "peak MiB"),
)
SMALL = 500, 300  # words and pairs, with --cpu
CRITERION = "--criterion label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam --lr 5e-4"


@dataclass
class Stage:
    """One process. seconds: its limit. rows: the file where it writes rows of the table."""

    name: str
    command: list[str]
    seconds: float
    rows: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    args = _parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:  # anew: trainings do not go on from those of before
        _check(args, Path(work))


def _check(args: argparse.Namespace, work: Path) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    args.work = work
    end = time.monotonic() + 60 * args.minutes
    data = args.data or _make_corpus(args.work / "data-bin", *(SMALL if args.cpu else (WORDS, PAIRS)))
    stages = [stage for stage in _stages(args, data) if not args.stages or stage.name.split()[0] in args.stages]
    with (args.out / "log.txt").open("w", encoding="utf-8") as log:
        for stage in stages:
            left = end - time.monotonic()
            if left < 15:
                stage.found = {"result": "not started: the time is over"}
            else:
                _run(stage, min(stage.seconds, left), log)
            _write(args.out, stages)
    print((args.out / "summary.txt").read_text(encoding="utf-8"))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--data", type=Path, help="data-bin with splits train, valid and test")
    parser.add_argument("--arch", default="transformer_iwslt_de_en")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only stages whose first word is one of these")
    parser.add_argument("--cpu", action="store_true", help="try this script itself: no tests, all on the CPU")
    args = parser.parse_args()
    args.out, args.data = args.out.resolve(), args.data and args.data.resolve()
    return args


def _make_corpus(directory: Path, vocabulary: int, pairs: int) -> Path:
    """Sentences of words by Zipf's law and of lengths as corpora have them."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    dictionary = Dictionary.build({f"w{i:05d}": vocabulary - i for i in range(vocabulary)})
    for language in ("de", "en"):
        dictionary.save(directory / f"dict.{language}.txt")
    for split, count in (("train", pairs), ("valid", pairs // 80), ("test", pairs // 40)):
        lengths = np.clip(rng.lognormal(np.log(MEAN_LENGTH) - 0.25, 0.7, count), 1, 150).astype(int)
        for language in ("de", "en"):
            with IndexedDatasetWriter(directory / f"{split}.de-en.{language}", np.uint16) as writer:
                for length in lengths:
                    words = 3 + np.minimum(rng.zipf(1.2, length), vocabulary)
                    writer.add(np.append(words, dictionary.eos()))
    return directory


def _stages(args: argparse.Namespace, data: Path) -> list[Stage]:
    python, cpu = [sys.executable], ["--cpu"] * args.cpu
    train = [*python, "-m", "fairseq.cli.train", str(data), "--arch", args.arch, *CRITERION.split(), *cpu]
    train += ["--max-tokens", "256" if args.cpu else "4096", "--share-all-embeddings"]
    train += ["--log-format", "simple", "--log-interval", "20"]

    def training(name: str, flags: str, updates: int = 60) -> Stage:
        save = ["--save-dir", str(args.work / name.replace(" ", "-")), "--no-epoch-checkpoints"]
        return Stage(name, [*train, *save, "--max-update", str(2 if args.cpu else updates), *flags.split()], 75)

    about = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available() and "
    about += "(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory))"
    tests = [*python, "-m", "pytest", "-q", "-rfE", "--tb=short", "--durations=8", "-p", "no:cacheprovider"]
    stages = [Stage("about", [*python, "-c", about], 60)]
    if not args.cpu:
        stages.append(Stage("tests", [*tests, *_in_parallel(), "tests/test_cuda.py"], 200))
    admin = f"--init-type adaptive --omega-file {args.work}/omega"
    bleu = '--eval-bleu --eval-bleu-args {"beam":4,"max_len_b":60}'
    stages += [
        training("train bf16", "--bf16"),
        training("train eager fp16 BLEU", f"--no-cuda-graphs --fp16 {bleu}" if not args.cpu else bleu),
        training("train Admin 18 layers", f"{admin} --bf16 --encoder-layers 18 --checkpoint-activations"),
        training("train compiled", "--bf16 --compile"),
        training("train offloaded", "--offload-activations" if not args.cpu else "", 20),
    ]
    model = str(args.work / "train-bf16" / "checkpoint_last.pt")
    generate = [*python, "scripts/bench_generate.py", str(data), "--path", model, *cpu, "--limit", "500"]
    stages += [_bench(args, data, tokens, precision, variant) for tokens, precision, variant in _rows(args.cpu)]
    found = args.work / "generate.json"
    flags = ["--precision", "bf16", "float32", *["--cuda-graphs"] * (not args.cpu), "--json", str(found)]
    stages.insert(len(stages) - len(_rows(args.cpu)) + 5, Stage("generate", [*generate, *flags], 120, found))
    return stages


def _in_parallel() -> list[str]:
    """A test that takes its process with it should not take the others."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    return ["-n", "4"]


def _rows(cpu: bool) -> list[tuple[int, str, str]]:
    if cpu:
        return [(512, "float32", "eager")]
    variants = ("eager", "graphs", "compile+graphs", "baseline", "compile", "shapes")
    rows = [(tokens, "bf16", variant) for tokens in (4096, 16384) for variant in variants]
    return rows + [(4096, "fp16", variant) for variant in ("eager", "graphs", "baseline")]


def _bench(args: argparse.Namespace, data: Path, tokens: int, precision: str, variant: str) -> Stage:
    found = args.work / f"bench-{tokens}-{precision}-{variant}.json"
    command = [sys.executable, "scripts/bench_train.py", str(data), "--arch", args.arch, "--max-tokens", str(tokens)]
    command += ["--precision", precision, "--updates", "2" if args.cpu else "100", "--json", str(found)]
    command += ["--baseline", "--variants"] if variant == "baseline" else ["--variants", variant]
    return Stage(f"bench {tokens} {precision} {variant}", [*command, *["--cpu"] * args.cpu], 90, found)


def _run(stage: Stage, seconds: float, log: Any) -> None:
    """Fill ``stage.found``."""
    log.write(f"\n==== {stage.name}: {' '.join(stage.command)}\n")
    log.flush()
    if stage.rows is not None:
        stage.rows.parent.mkdir(parents=True, exist_ok=True)
        stage.rows.unlink(missing_ok=True)
    began, position = time.monotonic(), log.tell()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        result = "ok" if process.wait(seconds) == 0 else f"FAILED with status {process.returncode}"
    except subprocess.TimeoutExpired:
        result = f"STOPPED after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    log.seek(0, os.SEEK_END)
    with Path(log.name).open(encoding="utf-8", errors="replace") as file:
        file.seek(position)
        lines = [line.rstrip() for line in file if line.strip()]
    rows = []
    if stage.rows is not None and stage.rows.exists():
        rows = json.loads(stage.rows.read_text(encoding="utf-8"))
    stage.found = {"result": result, "seconds": round(time.monotonic() - began, 1), "rows": rows, "lines": lines[-3:]}


def _write(directory: Path, stages: list[Stage]) -> None:
    """The results so far."""
    ran = [stage for stage in stages if stage.found]
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as file:
        for stage in ran:
            file.write(json.dumps({"stage": stage.name} | stage.found) + "\n")
    lines = []
    for stage in ran:
        lines.append(f"{stage.name:32} {stage.found.get('seconds', 0):6.1f} s  {stage.found['result']}")
        if not stage.found.get("rows") or stage.found["result"] != "ok":
            lines += [f"    {line[:200]}" for line in stage.found.get("lines", [])]
        for row in stage.found.get("rows", []):
            lines.append("    " + ", ".join(f"{key} {_short(row[key])}" for key in SHOWN if row.get(key) is not None))
    (directory / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
