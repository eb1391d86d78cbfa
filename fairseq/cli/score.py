"""``fairseq-score``: BLEU of a file of translations."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

from fairseq.cli import command
from fairseq.errors import FairseqError
from fairseq.generation.scoring import Scorer
from fairseq.options import ScoreConfig, make_parser, section
from fairseq.utils.io import refuse_bom


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, read both files, print."""
    parser = make_parser("fairseq-score", "BLEU of translations.", ((ScoreConfig, "scoring"),))
    config: ScoreConfig = section(ScoreConfig, parser.parse_args(argv))
    if not config.ref:
        parser.error("--ref FILE is missing: the references to compare with")
    if config.sacrebleu and (config.sentence_bleu or config.order != 4):
        parser.error("--sacrebleu goes neither with --sentence-bleu nor with another --order than 4")
    name = "sacrebleu" if config.sacrebleu else "bleu"

    def scorer() -> Scorer:
        return Scorer(name, order=config.order, lowercase=config.ignore_case, smooth=config.sentence_bleu)

    corpus = scorer()
    for number, (hypothesis, reference) in enumerate(_pairs(config.sys, config.ref)):
        if config.sentence_bleu:
            sentence = scorer()
            sentence.add(reference, hypothesis)
            print(number, sentence.result_string())
        else:
            corpus.add(reference, hypothesis)
    if not config.sentence_bleu:
        print(corpus.result_string())


def _pairs(sys_path: str, ref_path: str) -> Iterator[tuple[str, str]]:
    counts = [0, 0]
    for pair in itertools.zip_longest(_lines(sys_path), _lines(ref_path)):
        counts = [count + (line is not None) for count, line in zip(counts, pair, strict=True)]
        if counts[0] == counts[1]:
            yield pair
    if counts[0] != counts[1]:
        raise FairseqError(f"{sys_path} has {counts[0]} lines, {ref_path} has {counts[1]}; they must pair up")


def _lines(path: str) -> Iterator[str]:
    """Lines of a UTF-8 file, or of standard input, without their line ends."""
    number = 1
    try:
        with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as handle:
            for line in handle:
                if number == 1:
                    refuse_bom(line, f"{path}: line 1")
                yield line.decode("utf-8").rstrip("\r\n")
                number += 1
    except UnicodeDecodeError as error:
        raise FairseqError(f"{path}: line {number} is not UTF-8") from error
    except OSError as error:
        raise FairseqError(f"{path}: cannot read: {error.strerror}") from error


if __name__ == "__main__":
    main(None)
