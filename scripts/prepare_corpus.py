"""Prepare parallel text for fairseq-preprocess: extract, tokenise, clean, split, BPE. No Perl.

    python scripts/prepare_corpus.py tokenize -l de --lowercase --workers 8 raw.de tok.de
    python scripts/prepare_corpus.py clean --max-words 175 --ratio 1.5 tok.de tok.en clean.de clean.en
    python scripts/prepare_corpus.py learn-bpe --merges 10000 --codes codes clean.de clean.en

The work is done by `fairseq.data.corpus_cleaning`; nmt-experiments/ has whole recipes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from fairseq.cli import command
from fairseq.data import corpus_cleaning as corpus


def _segments(args: argparse.Namespace) -> str:
    return f"{corpus.write_lines(args.output, corpus.extract_segments(args.input))} segments"


def _talks(args: argparse.Namespace) -> str:
    return f"{corpus.write_lines(args.output, corpus.extract_talks(args.input))} lines"


def _map(function: Callable[[str], str], args: argparse.Namespace) -> str:
    lines = corpus.map_lines(function, corpus.read_lines(args.input), args.workers)
    return f"{corpus.write_lines(args.output, lines)} lines"


def _tokenize(args: argparse.Namespace) -> str:
    function = partial(
        corpus.tokenize,
        language=args.language,
        normalize_punctuation=args.normalize_punctuation,
        remove_nonprinting=args.remove_nonprinting,
        aggressive_hyphens=args.aggressive_hyphens,
        escape=not args.no_escape,
        lowercase=args.lowercase,
    )
    return _map(function, args)


def _detokenize(args: argparse.Namespace) -> str:
    return _map(partial(corpus.detokenize, language=args.language), args)


def _clean(args: argparse.Namespace) -> str:
    limits = {"min_words": args.min_words, "max_words": args.max_words, "ratio": args.ratio}
    kept, total = corpus.clean_parallel(args.source, args.target, args.source_output, args.target_output, **limits)
    return f"kept {kept} of {total} pairs"


def _split(args: argparse.Namespace) -> str:
    train, valid = corpus.split_valid(args.input, args.train, args.valid, args.every)
    return f"{train} lines for training, {valid} for validation"


def _split_pairs(args: argparse.Namespace) -> str:
    outputs = [(f"{part}.{args.left}", f"{part}.{args.right}") for part in (args.train, args.valid, args.test)]
    train, valid, test = corpus.split_pairs(args.input, outputs, args.every)
    return f"{train} pairs for training, {valid} for validation, {test} for testing"


def _learn_bpe(args: argparse.Namespace) -> str:
    return f"{corpus.learn_bpe(args.input, args.merges, args.codes)} merges"


def _apply_bpe(args: argparse.Namespace) -> str:
    return _map(partial(corpus.apply_bpe, codes=args.codes), args)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _at_least_two(text: str) -> int:
    if (number := int(text)) < 2:
        raise ValueError
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Prepare parallel text for fairseq-preprocess.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, function: Callable[[argparse.Namespace], str], help: str, *files: str
    ) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=help, description=help)
        subparser.set_defaults(function=function, name=name)
        for file in files:
            subparser.add_argument(file)
        return subparser

    add("segments", _segments, "text of the <seg> elements of IWSLT XML or WMT SGML", "input", "output")
    add("talks", _talks, "text of an IWSLT train.tags file", "input", "output")
    tokenize = add("tokenize", _tokenize, "Moses tokenisation (sacremoses)", "input", "output")
    detokenize = add("detokenize", _detokenize, "undo Moses tokenisation", "input", "output")
    clean = add("clean", _clean, "drop empty, long and badly matched pairs", "source", "target")
    split = add("split", _split, "hold out every Nth line for validation", "input", "train", "valid")
    pairs = add(
        "split-pairs", _split_pairs, "hold out of a file of tab-separated pairs", "input", "train", "valid", "test"
    )
    learn = add("learn-bpe", _learn_bpe, "learn joint BPE merges (subword-nmt)")
    apply = add("apply-bpe", _apply_bpe, "split words into BPE subwords", "input", "output")

    for subparser in (tokenize, detokenize):
        subparser.add_argument("-l", "--language", required=True, help="two-letter code")
    for flag, help in (
        ("--normalize-punctuation", "first make quotation marks, dashes and spaces alike (normalize-punctuation)"),
        ("--remove-nonprinting", "then replace control characters by spaces (remove-non-printing-char)"),
        ("--aggressive-hyphens", "split hyphens, a @-@ b (tokenizer -a)"),
        ("--no-escape", "leave & | < > ' \" [ ] as they are (tokenizer -no-escape)"),
        ("--lowercase", "lower-case the tokens"),
    ):
        tokenize.add_argument(flag, action="store_true", help=help)
    for subparser in (tokenize, detokenize, apply):
        subparser.add_argument("--workers", type=_positive, default=1, help="processes (default: %(default)s)")
    clean.add_argument("source_output")
    clean.add_argument("target_output")
    clean.add_argument("--min-words", type=int, default=1, help="on either side (default: %(default)s)")
    clean.add_argument("--max-words", type=int, default=175, help="on either side (default: %(default)s)")
    clean.add_argument("--ratio", type=float, default=9.0, help="between the sides at most (default: %(default)s)")
    split.add_argument("--every", type=_positive, required=True, help="line numbers divisible by it go to validation")
    pairs.add_argument("--left", required=True, metavar="LANG", help="files are named TRAIN.LANG, VALID.LANG, ...")
    pairs.add_argument("--right", required=True, metavar="LANG", help="likewise, of the second text")
    pairs.add_argument("--every", type=_at_least_two, required=True, help="of N distinct left texts 1 each is held out")
    learn.add_argument("input", nargs="+")
    learn.add_argument("--merges", type=_positive, required=True)
    for subparser in (learn, apply):
        subparser.add_argument("--codes", required=True, help="file of the merges")
    return parser


def _main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    print(f"{args.name}: {args.function(args)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main)(argv)


if __name__ == "__main__":
    main()
