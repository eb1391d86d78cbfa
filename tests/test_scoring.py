"""BLEU against hand-computed values and against the scores that the originals printed."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path

import pytest

from fairseq.cli import score
from fairseq.errors import FairseqError
from fairseq.generation.scoring import Scorer


def _generated(path: Path, hypothesis: str) -> tuple[list[str], list[str], str]:
    """References, hypotheses and the score line of a saved output of fairseq-generate."""
    references, hypotheses, result = {}, {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"T-(\d+)\t(.*)", line):
            references[match[1]] = match[2]
        elif match := re.match(rf"{hypothesis}-(\d+)\t\S+\t(.*)", line):
            hypotheses[match[1]] = match[2]
        elif "BLEU4" in line:
            result = line[line.index("BLEU4") :]
    assert references.keys() == hypotheses.keys()
    return list(references.values()), [hypotheses[key] for key in references], result


@pytest.mark.parametrize(
    ("file", "hypothesis", "score"),
    [("fairseq012_tiny.generate.txt", "D", "33.07"), ("fairseq08_postln_3x3.generate200.txt", "H", "27.36")],
)
def test_same_line_as_the_originals(shared: Path, file: str, hypothesis: str, score: str) -> None:
    references, hypotheses, expected = _generated(shared / "reference" / file, hypothesis)
    scorer = Scorer("bleu")
    for pair in zip(references, hypotheses, strict=True):
        scorer.add(*pair)
    assert score in expected and scorer.result_string() == expected


def test_bleu_by_hand() -> None:
    scorer = Scorer("bleu", order=2)
    scorer.add("the cat sat on the mat", "the cat on the mat")
    # 5 of 5 words, 3 of 4 bigrams, brevity exp(1 - 6/5)
    assert scorer.score() == pytest.approx(100 * math.exp(-0.2) * math.sqrt(0.75))
    assert scorer.result_string() == "BLEU2 = 70.90, 100.0/75.0 (BP=0.819, ratio=0.833, syslen=5, reflen=6)"


def test_unknown_word_never_matches() -> None:
    scorer = Scorer("bleu", order=1)
    scorer.add("a <unk> b", "a <unk> b")
    assert scorer.score() == pytest.approx(100 * 2 / 3)


def test_no_match_and_empty_hypotheses_score_zero() -> None:
    scorer = Scorer("bleu")
    scorer.add("a b c d e", "")
    assert scorer.result_string() == "BLEU4 = 0.00, 0.0/0.0/0.0/0.0 (BP=0.000, ratio=0.000, syslen=0, reflen=5)"
    scorer.add("a b c d e", "a b x y z")
    assert scorer.score() == 0  # no trigram matches, and nothing is smoothed


def test_smoothing_counts_one_match_more() -> None:
    scorer = Scorer("bleu", order=2, smooth=True)
    scorer.add("a b c", "a x c")
    assert scorer.score() == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 3))


def test_tokens_as_they_are_with_sacrebleus_smoothing() -> None:
    """fairseq's --eval-tokenized-bleu: orders without a match count as 1/2, 1/4, ... of one."""
    scorer = Scorer("sacrebleu", tokenized=True)
    scorer.add("a b. c d e", "a b. x d e")
    assert scorer.score() == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** 0.25)


def test_ignore_case() -> None:
    for lowercase, expected in ((True, 100), (False, 0)):
        scorer = Scorer("bleu", lowercase=lowercase)
        scorer.add("A B C D", "a b c d")
        assert scorer.score() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sacrebleu", "chrf"])
def test_detokenised_scores_print_a_signature(name: str) -> None:
    scorer = Scorer(name)
    scorer.add("It's fine, isn't it?", "It's fine, isn't it?")
    assert scorer.score() == pytest.approx(100)
    assert re.search(r"nrefs:1\|case:mixed\|.*version:\S+ = 100\.0", scorer.result_string())
    assert ("tok:13a" in scorer.result_string()) == (name == "sacrebleu")


def test_nothing_to_score() -> None:
    with pytest.raises(FairseqError, match="nothing to score"):
        Scorer("bleu").score()
    with pytest.raises(FairseqError, match="--scoring meteor"):
        Scorer("meteor")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "sys").write_text("the cat on the mat\na dog barks loudly now\n")
    (tmp_path / "ref").write_text("the cat sat on the mat\na Dog barks loudly now\n")
    return str(tmp_path / "sys"), str(tmp_path / "ref")


def test_command(files: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    translations, references = files
    score.main(["--sys", translations, "--ref", references, "--ignore-case"])
    assert re.fullmatch(r"BLEU4 = \d+\.\d\d, 100\.0/.* reflen=11\)\n", capsys.readouterr().out)
    score.main(["-s", translations, "-r", references, "-o", "2", "--sentence-bleu"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("0 BLEU2 = ") and second.startswith("1 BLEU2 = ")
    score.main(["--sys", translations, "--ref", references, "--sacrebleu"])
    assert capsys.readouterr().out.startswith("BLEU|nrefs:1|")

    with open(translations, "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
        score.main(["--ref", references, "--order", "1"])
    assert capsys.readouterr().out.startswith("BLEU1 = ")


def test_command_errors(files: tuple[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    translations, references = files
    (tmp_path / "long").write_text("a\nb\nc\nd\n")
    (tmp_path / "latin1").write_bytes(b"fine\nH\xf6he\n")
    (tmp_path / "empty").write_text("")
    for arguments, message in [
        (["--sys", str(tmp_path / "long"), "--ref", references], "long has 4 lines, .*ref has 2"),
        (["--sys", str(tmp_path / "latin1"), "--ref", references], "latin1: line 2 is not UTF-8"),
        (["--sys", str(tmp_path / "none"), "--ref", references], "none: cannot read"),
        (["--sys", str(tmp_path / "empty"), "--ref", str(tmp_path / "empty")], "nothing to score"),
    ]:
        with pytest.raises(SystemExit) as stop:
            score.main(arguments)
        assert stop.value.code == 1
        assert re.search(message, capsys.readouterr().err)
    for arguments, message in [
        (["--sys", translations], "--ref FILE is missing"),
        (["--sys", translations, "--ref", references, "--sacrebleu", "--order", "2"], "--sacrebleu goes neither"),
        (["--sys", translations, "--ref", references, "--order", "0"], "--order.*: 0: must be at least 1"),
    ]:
        with pytest.raises(SystemExit) as stop:
            score.main(arguments)
        assert stop.value.code == 2
        assert re.search(message, capsys.readouterr().err)
