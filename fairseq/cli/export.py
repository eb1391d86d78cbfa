"""``fairseq-export``: a trained model as other programs read it."""

from __future__ import annotations

from argparse import Namespace

from fairseq.cli import command
from fairseq.errors import FairseqError
from fairseq.export import FORMATS
from fairseq.options import ExportConfig, parse_args, section


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, export, say what was done."""
    description = "Write a trained model without what only training needs, for other programs."
    args = parse_args("fairseq-export", description, ((ExportConfig, "export"),), argv, _check)
    print(*FORMATS[args.format](section(ExportConfig, args)), sep="\n")


def _check(args: Namespace) -> None:
    if not args.output:
        raise FairseqError("--output DIR is missing")


if __name__ == "__main__":
    main(None)
