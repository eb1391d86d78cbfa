"""``fairseq-average``: one checkpoint with the mean of several ones' parameters."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from fairseq.cli import command
from fairseq.options import make_parser
from fairseq.training.averaging import average_checkpoints, last_checkpoints, save_checkpoint
from fairseq.utils.flags import flag

logger = logging.getLogger(__name__)


@dataclass
class AverageConfig:
    """What to average; ``--inputs``, which takes several values, is added to the parser by hand."""

    output: str = flag("", "checkpoint to write", metavar="FILE")
    num_epoch_checkpoints: int | None = flag(None, "average the last N checkpointEPOCH.pt in the directory --inputs")
    num_update_checkpoints: int | None = flag(
        None, "average the last N checkpoint_EPOCH_UPDATES.pt in the directory --inputs"
    )
    checkpoint_upper_bound: int | None = flag(None, "with --num-*-checkpoints: none after this epoch or update")


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, average, write."""
    description = "Average the parameters of several checkpoints of one model."
    parser = make_parser("fairseq-average", description, ((AverageConfig, "averaging"),))
    parser.add_argument("--inputs", nargs="+", required=True, metavar="PATH", help="checkpoints, or one directory")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    _check(parser, args)
    paths = _chosen(args)
    logger.info(f"averaging {', '.join(map(str, paths))}")
    save_checkpoint(average_checkpoints(paths), args.output)
    print(f"wrote {args.output}: the mean of {len(paths)} checkpoints")


def _check(parser: ArgumentParser, args: Namespace) -> None:
    counts = [args.num_epoch_checkpoints, args.num_update_checkpoints]
    if not args.output:
        parser.error("--output FILE is missing")
    if None not in counts:
        parser.error("--num-epoch-checkpoints and --num-update-checkpoints contradict each other; give one")
    if any(count is not None and count < 1 for count in counts):
        parser.error("--num-epoch-checkpoints and --num-update-checkpoints must be at least 1")
    if counts == [None, None]:
        if args.checkpoint_upper_bound is not None:
            parser.error("--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints")
        if any(Path(path).is_dir() for path in args.inputs):
            parser.error("--inputs is a directory: say which with --num-epoch-checkpoints or --num-update-checkpoints")
    elif len(args.inputs) != 1 or Path(args.inputs[0]).is_file():
        parser.error("--num-epoch-checkpoints and --num-update-checkpoints take one directory as --inputs")


def _chosen(args: Namespace) -> list[Path]:
    count = args.num_update_checkpoints or args.num_epoch_checkpoints
    if count is None:
        return [Path(path) for path in args.inputs]
    return last_checkpoints(
        args.inputs[0],
        count,
        by_updates=args.num_update_checkpoints is not None,
        upper_bound=args.checkpoint_upper_bound,
    )


if __name__ == "__main__":
    main(None)
