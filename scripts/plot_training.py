#!/usr/bin/env python3
"""Loss curves of training logs (fairseq-train --log-file, any --log-interval) as one picture.

python scripts/plot_training.py --out curves.png NAME=train.log ...
python scripts/plot_training.py --out curves.png --mean 20 Admin=admin/train.log Post-LN=postln/train.log
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq.cli import command
from fairseq.clinic.figures import COLOURS
from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write

_UPDATE = re.compile(r'train_inner \|.*?\bloss(?:=|": )([\d.]+),.*\bnum_updates(?:=|": )(\d+)')


def read_losses(path: Path) -> list[tuple[int, float]]:
    """(update, loss in bits) of every progress line. Raises FairseqError for a file that has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FairseqError(f"{path}: cannot read: {error}") from error
    # a run that was resumed from before where it had come says some updates twice: the last time counts
    found = {int(m[2]): float(m[1]) for m in _UPDATE.finditer(text)}
    if not found:
        raise FairseqError(f"{path}: no progress lines of fairseq-train; write one with --log-file")
    return sorted(found.items())


def draw(curves: dict[str, list[tuple[int, float]]], mean: int, path: Path) -> None:
    """Each curve as a line of the means over ``mean`` lines of the log, above faint dots of what they average."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 11}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        updates, losses = zip(*points, strict=True)
        if mean > 1:
            axes.plot(updates, losses, ".", color=colour, markersize=3, alpha=0.3)
        windows = [losses[max(0, i - mean // 2) : i + mean // 2 + 1] for i in range(len(losses))]
        axes.plot(updates, [sum(w) / len(w) for w in windows], color=colour, label=name)
    axes.set_xlabel("updates")
    axes.set_ylabel("training loss, bits a token")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=150)


def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", metavar="NAME=LOG", help="what the legend says, and a log file")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, PNG")
    parser.add_argument("--mean", type=int, default=1, help="average over so many lines of the log (1)")
    args = parser.parse_args(argv)
    if args.mean < 1:
        parser.error(f"--mean {args.mean}: must be at least 1")
    if len(args.logs) > len(COLOURS):
        parser.error(f"{len(args.logs)} logs: at most {len(COLOURS)} have a colour")
    curves = {}
    for log in args.logs:
        name, separator, path = log.partition("=")
        if not separator:
            parser.error(f"'{log}': give NAME=LOG")
        curves[name] = read_losses(Path(path))
    draw(curves, args.mean, args.out)


if __name__ == "__main__":
    command(_main)(None)
