"""``fairseq-average``: one checkpoint with the mean of several ones' parameters."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fairseq.checkpoint import save_checkpoint
from fairseq.cli import command
from fairseq.options import AverageConfig, make_parser
from fairseq.training.averaging import average_checkpoints, last_checkpoints

logger = logging.getLogger(__name__)


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, average, write."""
    description = "Average the parameters of several checkpoints of one model."
    parser = make_parser("fairseq-average", description, ((AverageConfig, "averaging"),))
    parser.add_argument("--inputs", nargs="+", required=True, metavar="PATH", help="checkpoints, or one directory")
    args = parser.parse_args(argv)
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
