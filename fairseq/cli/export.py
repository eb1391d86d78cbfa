"""``fairseq-export``: a trained model as other programs read it."""

from __future__ import annotations

from fairseq.cli import command
from fairseq.export import FORMATS
from fairseq.options import ExportConfig, Sections, make_parser, parse_args, section

SECTIONS: Sections = ((ExportConfig, "export"),)


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, export, say what was done."""
    prog, description = "fairseq-export", "Write a trained model without what only training needs, for other programs."
    args = parse_args(prog, description, SECTIONS, argv)
    if not args.output:
        make_parser(prog, description, SECTIONS).error("--output DIR is missing")
    print(*FORMATS[args.format](section(ExportConfig, args)), sep="\n")


if __name__ == "__main__":
    main(None)
