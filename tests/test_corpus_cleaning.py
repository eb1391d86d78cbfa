"""Corpus preparation: extraction, tokenisation, cleaning, splitting and BPE, against hand-worked cases."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq.data import corpus_cleaning as corpus
from fairseq.errors import FairseqError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_corpus.py"
lines_of_text = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=30))
few_files = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def prepare(*args: object) -> str:
    """Standard output of scripts/prepare_corpus.py."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# --- reading and writing ---


@few_files
@given(lines=lines_of_text)
def test_lines_come_back_as_written(tmp_path: Path, lines: list[str]) -> None:
    assert corpus.write_lines(tmp_path / "text", lines) == len(lines)
    assert list(corpus.read_lines(tmp_path / "text")) == lines


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "text", "a\u2028b\x0bc\x85d\r\ne\n\nf")
    assert list(corpus.read_lines(path)) == ["a\u2028b\x0bc\x85d", "e", "", "f"]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "text.gz").write_bytes(gzip.compress("ä\nb\n".encode()))
    assert list(corpus.read_lines(tmp_path / "text.gz")) == ["ä", "b"]
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a\nb\n" * 1000)[:-12])
    with pytest.raises(FairseqError, match=r"cut\.gz: cannot read"):
        list(corpus.read_lines(tmp_path / "cut.gz"))


def test_unreadable_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FairseqError, match=r"missing: cannot read: No such file"):
        list(corpus.read_lines(tmp_path / "missing"))
    (tmp_path / "latin1").write_bytes("gut\nsch\xf6n\n".encode("latin-1"))
    with pytest.raises(FairseqError, match=r"latin1, line 2: not valid UTF-8"):
        list(corpus.read_lines(tmp_path / "latin1"))


def test_failure_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"a\nb\n\xff\n")
    good = write(tmp_path / "good", "a\nb\nc\n")
    out = tmp_path / "out.a", tmp_path / "out.b"
    with pytest.raises(FairseqError):
        corpus.write_lines(out[0], corpus.read_lines(tmp_path / "bad"))
    with pytest.raises(FairseqError):
        corpus.clean_parallel(good, tmp_path / "bad", *out, min_words=1, max_words=9, ratio=9)
    with pytest.raises(FairseqError):
        corpus.split_valid(tmp_path / "bad", *out, every=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


@pytest.mark.parametrize(("left", "right"), [("a\nb\n", "x\n"), ("a\n", "x\ny\nz\n"), ("", "x\n")])
def test_files_of_different_length_are_refused(tmp_path: Path, left: str, right: str) -> None:
    source, target = write(tmp_path / "s", left), write(tmp_path / "t", right)
    short = min(source, target, key=lambda path: path.stat().st_size)
    with pytest.raises(FairseqError, match=rf"{short} has {short.read_text().count(chr(10))} lines, .* has more"):
        list(corpus.read_parallel(source, target))


# --- extraction ---


def test_segments_of_xml(tmp_path: Path) -> None:
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<refset>\n<title>A title</title>\n'
        '<seg id="1"> It\u2019s R&amp;D &lt;now&gt;. </seg>\n<seg id="2"></seg>\n'
        '<hl><SEG ID="3">x</SEG></hl>\n</refset>\n'
    )
    path = write(tmp_path / "set.xml", text)
    assert list(corpus.extract_segments(path)) == ["It's R&D <now>.", "", "x"]


def test_segment_over_two_lines_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "set.xml", '<seg id="1">one</seg>\n<seg id="2">two\n</seg>\n')
    with pytest.raises(FairseqError, match=r"set\.xml, line 2: a <seg> element must begin and end on one line"):
        list(corpus.extract_segments(path))


def test_talks_of_train_tags(tmp_path: Path) -> None:
    text = """<doc docid="1">
<url>http://example.org/talk</url>
<keywords>talks, science</keywords>
<speaker>Ann Other</speaker>
<talkid>343</talkid>
<title>Ann Other: A talk</title>
<description>About  things.</description>
 This is the first line.
I like <3 and a < b.
<i>So</i> it goes.

<reviewer href="x">B</reviewer>
<translator>C</translator>
</doc>
"""
    expected = [
        "Ann Other: A talk",
        "About  things.",
        "This is the first line.",
        "I like <3 and a < b.",
        "<i>So</i> it goes.",
        "",
    ]
    assert list(corpus.extract_talks(write(tmp_path / "train.tags.xx", text))) == expected


def test_real_iwslt_xml_is_parallel(shared: Path) -> None:
    folder = shared / "data" / "iwslt-ted-xml"
    for name, count in (("IWSLT16.TED.dev2010", 887), ("IWSLT16.TED.tst2012", 1700)):
        de, en = (list(corpus.extract_segments(folder / f"{name}.de-en.{lang}.xml")) for lang in ("de", "en"))
        assert len(de) == len(en) == count
        assert all(line == line.strip() and "<seg" not in line and "&amp;" not in line for line in chain(de, en))
    de, en = (list(corpus.extract_segments(folder / f"IWSLT16.TED.dev2010.de-en.{lang}.xml")) for lang in ("de", "en"))
    assert en[3] == "We're all born. We all bring our children into the world."
    assert de[4] == "Wir durchlaufen Initiationsrituale."


# --- tokenisation ---


@pytest.mark.parametrize(
    ("language", "text", "options", "expected"),
    [
        ("en", "Hello, world!", {}, "Hello , world !"),
        ("en", "It's Mr. Smith's dog.", {}, "It &apos;s Mr. Smith &apos;s dog ."),
        ("fr", "L'homme qu'il a vu.", {}, "L&apos; homme qu&apos; il a vu ."),
        ("en", 'a < b & [c|d] "e"', {}, "a &lt; b &amp; &#91; c &#124; d &#93; &quot; e &quot;"),
        ("en", "a < b", {"escape": False}, "a < b"),
        ("en", "1,000.50 dollars... really?", {}, "1,000.50 dollars ... really ?"),
        ("en", "a well-known fact", {}, "a well-known fact"),
        ("en", "a well-known fact", {"aggressive_hyphens": True}, "a well @-@ known fact"),
        ("de", "„Ja“ \u2013 5 %", {"normalize_punctuation": True}, "&quot; Ja &quot; - 5 %"),
        ("en", "a\u200bb\x1fc", {"remove_nonprinting": True}, "a b c"),
        ("de", "GROẞE Äpfel", {"lowercase": True}, "große äpfel"),
        ("en", " \u2028\u00a0 ", {}, ""),
        ("en", "a\u00a0b\u2003c\u2028d", {}, "a b c d"),
    ],
)
def test_tokenize(language: str, text: str, options: dict[str, bool], expected: str) -> None:
    assert corpus.tokenize(text, language, **options) == expected


@pytest.mark.parametrize("text", ["Hello, world!", "It's Mr. Smith's dog.", "Is 5 < 6 & 7?", 'He said: "No."'])
def test_detokenize_undoes_tokenize(text: str) -> None:
    assert corpus.detokenize(corpus.tokenize(text, "en"), "en") == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokens_are_separated_by_single_spaces(text: str) -> None:
    result = corpus.tokenize(text, "de", normalize_punctuation=True, remove_nonprinting=True, lowercase=True)
    assert result == " ".join(result.split())
    assert result.isprintable()


@given(text=st.text())
def test_replace_nonprinting_keeps_the_length(text: str) -> None:
    result = corpus.replace_nonprinting(text)
    assert len(result) == len(text)
    assert all(new in (old, " ") for new, old in zip(result, text, strict=True))


# --- cleaning and splitting ---


@pytest.mark.parametrize(
    ("words", "limits", "kept"),
    [
        ((1, 1), {}, True),
        ((0, 1), {}, False),
        ((0, 0), {"min_words": 0}, False),
        ((175, 175), {}, True),
        ((176, 175), {}, False),
        ((3, 2), {"ratio": 1.5}, True),
        ((2, 3), {"ratio": 1.5}, True),
        ((4, 2), {"ratio": 1.5}, False),
        ((2, 4), {"ratio": 1.5}, False),
        ((9, 1), {}, True),
        ((10, 1), {}, False),
        ((2, 2), {"min_words": 3}, False),
        ((250, 200), {"max_words": 250, "ratio": 1.5}, True),
    ],
)
def test_keep_pair(words: tuple[int, int], limits: dict[str, Any], kept: bool) -> None:
    source, target = (" ".join(["w"] * count) for count in words)
    assert corpus.keep_pair(source, target, **limits) is kept
    assert corpus.keep_pair(f" {target}  ", source, **limits) is kept


def test_clean_parallel_drops_pairs_together(tmp_path: Path) -> None:
    source = write(tmp_path / "s", "a  b\n\nc d e f\ng\nh\n")
    target = write(tmp_path / "t", "A B\nX\nC\nG\nH\u00a0 I\n")
    out = tmp_path / "os", tmp_path / "ot"
    assert corpus.clean_parallel(source, target, *out, min_words=1, max_words=10, ratio=2) == (3, 5)
    assert [path.read_text(encoding="utf-8") for path in out] == ["a b\ng\nh\n", "A B\nG\nH I\n"]


@few_files
@given(lines=lines_of_text, every=st.integers(1, 9))
def test_split_valid_holds_out_every_nth(tmp_path: Path, lines: list[str], every: int) -> None:
    corpus.write_lines(tmp_path / "all", lines)
    corpus.split_valid(tmp_path / "all", tmp_path / "train", tmp_path / "valid", every)
    valid = [line for number, line in enumerate(lines, start=1) if number % every == 0]
    train = [line for number, line in enumerate(lines, start=1) if number % every]
    assert list(corpus.read_lines(tmp_path / "valid")) == valid
    assert list(corpus.read_lines(tmp_path / "train")) == train


# --- BPE ---


def test_bpe_by_hand(tmp_path: Path) -> None:
    # "lo w</w>" x3 and "lo w e r</w>" x2: (l, o) 5 times, then (lo, w</w>) 3, and (lo, w) or (w, e) or (e, r</w>) 2
    text = write(tmp_path / "text", "low low low\nlower lower\n")
    assert corpus.learn_bpe([text], 2, tmp_path / "codes") == 2
    assert (tmp_path / "codes").read_text() == "#version: 0.2\nl o\nlo w</w>\n"
    codes = str(tmp_path / "codes")
    assert corpus.apply_bpe("low lower slow", codes) == "low lo@@ w@@ e@@ r s@@ low"
    assert corpus.apply_bpe("", codes) == ""


def test_bpe_is_joint_and_independent_of_file_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", "abab cab\nüber\n"), write(tmp_path / "two", "ab ab\nüb üb cab\n")
    whole = write(tmp_path / "whole", one.read_text("utf-8") + two.read_text("utf-8"))
    codes = []
    for files in ([one, two], [two, one], [whole]):
        corpus.learn_bpe(files, 50, tmp_path / "codes")
        codes.append((tmp_path / "codes").read_bytes())
    assert codes[0] == codes[1] == codes[2] and codes[0].count(b"\n") > 3


@given(words=st.lists(st.text("abcdü", min_size=1, max_size=8), min_size=1, max_size=8))
@few_files
def test_bpe_pieces_join_to_the_words(tmp_path: Path, words: list[str]) -> None:
    text = write(tmp_path / "text", "abcd abc dcba üab übcd abab cdcd\n" * 3)
    corpus.learn_bpe([text], 15, tmp_path / "codes")
    pieces = corpus.apply_bpe(" ".join(words), str(tmp_path / "codes"))
    assert pieces.replace("@@ ", "") == " ".join(words)


def test_bpe_needs_text_and_valid_codes(tmp_path: Path) -> None:
    with pytest.raises(FairseqError, match="no text to learn BPE from"):
        corpus.learn_bpe([write(tmp_path / "empty", "\n\n")], 10, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    broken = write(tmp_path / "broken", "#version: 0.2\na b\na b c\n")
    with pytest.raises(FairseqError, match=r"broken, line 3: not a BPE merge"):
        corpus.apply_bpe("abc", str(broken))


@pytest.mark.slow
def test_multi30k_codes_are_the_reference(shared: Path, tmp_path: Path) -> None:
    files = [shared / "data" / "multi30k" / f"train.lc.norm.tok.{lang}" for lang in ("en", "de")]
    assert corpus.learn_bpe(files, 10000, tmp_path / "codes") == 10000
    reference = shared / "reference" / "multi30k-databin"
    assert (tmp_path / "codes").read_bytes() == (reference / "bpe.codes").read_bytes()


# --- processes and the command ---


def test_map_lines_is_the_same_whatever_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_LINES", 7)
    lines = [f"Line {number}, it's “here”." for number in range(200)]
    function = partial(corpus.tokenize, language="en", lowercase=True)
    expected = [function(line) for line in lines]
    for workers in (1, 2, 3):
        assert list(corpus.map_lines(function, iter(lines), workers)) == expected
    assert list(corpus.map_lines(function, [], 2)) == []


def test_map_lines_reads_only_a_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_LINES", 10)
    taken = 0

    def lines() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "x"

    results: Any = corpus.map_lines(str.upper, lines(), 2)
    assert next(results) == "X"
    assert taken <= 10 * (2 * 2 + 2)  # chunks for each process, and one in hand
    results.close()


def test_map_lines_passes_errors_on(tmp_path: Path) -> None:
    function = partial(corpus.apply_bpe, codes=str(tmp_path / "missing"))
    with pytest.raises(FairseqError, match="missing: cannot read"):
        list(corpus.map_lines(function, ["a"] * 5000, 2))


def test_command_prepares_a_corpus(tmp_path: Path) -> None:
    raw = {
        "en": "It's a dog.\nYes, a well-known dog!\nOne.\n",
        "de": "Ein Hund.\nJa, ein Hund!\nEins zwei drei vier.\n",
    }
    for lang, text in raw.items():
        write(tmp_path / f"raw.{lang}", text)
        files = tmp_path / f"raw.{lang}", tmp_path / f"tok.{lang}"
        out = prepare("tokenize", "-l", lang, "--lowercase", "--aggressive-hyphens", "--workers", 2, *files)
        assert out == "tokenize: 3 lines\n"
    paths = [tmp_path / f"{name}.{lang}" for name in ("tok", "clean") for lang in ("en", "de")]
    assert prepare("clean", "--ratio", 2, "--max-words", 20, *paths) == "clean: kept 2 of 3 pairs\n"
    assert (tmp_path / "clean.en").read_text() == "it &apos;s a dog .\nyes , a well @-@ known dog !\n"
    codes = "--codes", tmp_path / "codes"
    assert prepare("learn-bpe", *codes, "--merges", 4, *paths[2:]) == "learn-bpe: 4 merges\n"
    prepare("apply-bpe", *codes, tmp_path / "clean.de", tmp_path / "bpe.de")
    assert (tmp_path / "bpe.de").read_text().replace("@@ ", "") == (tmp_path / "clean.de").read_text()
    out = prepare("split", "--every", 2, tmp_path / "bpe.de", tmp_path / "train.de", tmp_path / "valid.de")
    assert out == "split: 1 lines for training, 1 for validation\n"
    prepare("detokenize", "-l", "en", tmp_path / "clean.en", tmp_path / "plain.en")
    assert (tmp_path / "plain.en").read_text() == "it's a dog.\nyes, a well-known dog!\n"


def test_command_error_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "segments", str(tmp_path / "missing.xml"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == f"error: {tmp_path / 'missing.xml'}: cannot read: No such file or directory"
    assert subprocess.run(command[:2], capture_output=True).returncode == 2


@few_files
@given(st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("xyz")), max_size=60), st.integers(2, 5))
def test_split_pairs_holds_out_distinct_left_sides(tmp_path_factory, pairs: list[tuple[str, str]], every: int) -> None:
    directory = tmp_path_factory.mktemp("pairs")
    (directory / "all").write_text("".join(f"{left}\t{right}\tlicence\n" for left, right in pairs))
    outputs = [(directory / f"{part}.l", directory / f"{part}.r") for part in ("train", "valid", "test")]
    counts = corpus.split_pairs(directory / "all", outputs, every)
    parts = [list(zip(*(path.read_text().splitlines() for path in pair), strict=True)) for pair in outputs]
    assert [len(part) for part in parts] == counts
    assert sorted(chain(*parts)) == sorted(pairs)
    lefts = [{left for left, _ in part} for part in parts]
    distinct = list(dict.fromkeys(left for left, _ in pairs))
    assert lefts[1] == {left for i, left in enumerate(distinct, start=1) if i % every == 0}
    assert sum(map(len, lefts)) == len(distinct)  # none in two parts


def test_split_pairs_names_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "all").write_text("a\tb\nc\n")
    outputs = [(tmp_path / f"{part}.l", tmp_path / f"{part}.r") for part in ("train", "valid", "test")]
    with pytest.raises(FairseqError, match="line 2: not two texts"):
        corpus.split_pairs(tmp_path / "all", outputs, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["all"]
