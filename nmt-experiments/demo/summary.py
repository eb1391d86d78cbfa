"""Training runs side by side: their loss curves as a picture, and a line each with perplexity and BLEU.

    python nmt-experiments/demo/summary.py --out curves.png NAME=DIR ...

DIR holds ``train.log`` (from ``fairseq-train --log-file``) and ``generate.txt`` (what ``fairseq-generate`` printed).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from fairseq.cli import command
from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # distinct to colour-blind eyes (Okabe and Ito)
_TRAIN = re.compile(r"train_inner \|.* nll_loss=([\d.einf-]+),.* num_updates=(\d+)")
_VALID = re.compile(r"valid \|.* nll_loss ([\d.einf-]+) \| ppl ([\d.einf-]+) \|.* num_updates (\d+)")
_BLEU = re.compile(r"(BLEU\S* = |BLEU[^=]*= ?)([\d.]+)")


class Run(NamedTuple):
    """Points are (updates, loss in bits a token)."""

    name: str
    train: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    valid_ppl: float  # of the last validation
    bleu: float


def read_run(name: str, directory: Path) -> Run:
    """Read a run's two files. Raises FairseqError when one is missing or has no result in it."""
    log, output = directory / "train.log", directory / "generate.txt"
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
        last = output.read_text(encoding="utf-8").splitlines()[-1:]
    except OSError as error:
        raise FairseqError(f"{error.filename}: {error.strerror}") from error
    train = [(int(m[2]), float(m[1])) for line in lines if (m := _TRAIN.search(line))]
    valid = [(int(m[3]), float(m[1]), float(m[2])) for line in lines if (m := _VALID.search(line))]
    if not train or not valid:
        raise FairseqError(f"{log}: no training or validation lines; run fairseq-train with --log-file")
    bleu = _BLEU.search(last[0]) if last else None
    if bleu is None:
        raise FairseqError(f"{output}: its last line has no BLEU")
    return Run(name, train, [point[:2] for point in valid], valid[-1][2], float(bleu[2]))


def draw(runs: list[Run], path: Path) -> None:
    """Training loss as lines, validation loss as dots, one colour a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        axes.plot(*zip(*run.train, strict=True), color=colour, linewidth=2, label=f"{run.name}, training")
        axes.plot(*zip(*run.valid, strict=True), "o", color=colour, markersize=5, label=f"{run.name}, validation")
    axes.set(xlabel="updates", ylabel="loss (bits a token)", title="18-layer encoder, 18-layer decoder")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=150)
    plt.close(figure)


def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the picture, a PNG")
    args = parser.parse_args(argv)
    pairs = [text.partition("=") for text in args.runs]
    if not all(directory for _, _, directory in pairs):
        parser.error("runs are given as NAME=DIR")
    runs = [read_run(name, Path(directory)) for name, _, directory in pairs]
    draw(runs, args.out)
    width = max(len(run.name) for run in runs)
    for run in runs:
        print(f"{run.name:<{width}}  valid perplexity {run.valid_ppl:10.2f}  BLEU {run.bleu:6.2f}")
    print(f"loss curves: {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main)(argv)


if __name__ == "__main__":
    main()
