"""``fairseq-preprocess``: parallel text to a data-bin."""

from __future__ import annotations

from fairseq import options
from fairseq.cli import command
from fairseq.data.preprocess import preprocess
from fairseq.options import PreprocessConfig


def _main(argv: list[str] | None = None) -> None:
    sections = ((PreprocessConfig, "preprocessing"),)
    args = options.parse_args("fairseq-preprocess", "Build dictionaries and binarise parallel text.", sections, argv)
    preprocess(options.section(PreprocessConfig, args))


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main)(argv)


if __name__ == "__main__":
    main()
