"""``fairseq-train``: train a model, or measure its omega with ``--init-type adaptive-profiling``."""

from __future__ import annotations

import sys

from fairseq.admin.residual import PROFILING
from fairseq.cli import command
from fairseq.options import parse_train_args
from fairseq.training.distributed import launch
from fairseq.training.train import train


def _main(argv: list[str] | None = None) -> None:
    args = parse_train_args(argv)
    if args.init_type == PROFILING:
        args.distributed_world_size = 1  # one pass, one file
    launch(train, args)


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main, logs=sys.stdout)(argv)


if __name__ == "__main__":
    main()
