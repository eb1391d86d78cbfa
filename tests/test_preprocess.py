"""fairseq-preprocess by its command line: what it writes, its flags, and bad input."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.cli.preprocess import main
from fairseq.data import binarizer
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset

EN = ["a b c", "", "b  b\u2003x", "u\u2028v \x85 w\r", "<unk> rare </s>"]
DE = ["A B", "C", "A A A", "D", "E"]


def _write(path: Path, lines: list[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory, made current, with train, valid and two test sets."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "valid", "test1", "test2"):
        _write(tmp_path / f"{name}.en", EN if name == "train" else EN[:2])
        _write(tmp_path / f"{name}.de", DE if name == "train" else DE[:2])
    return tmp_path


def _run(*flags: str) -> None:
    main(["-s", "en", "-t", "de", "--destdir", "bin", *flags])


def _fails(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that a failing command prints."""
    with pytest.raises(SystemExit) as exit_:
        _run(*flags)
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [line for line in captured.err.splitlines() if "| INFO |" not in line]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def _sentences(prefix: str, language: str) -> list[str]:
    dictionary = Dictionary.load(f"bin/dict.{language}.txt")
    dataset = IndexedDataset(f"bin/{prefix}.{language}")
    assert all(dataset[i][-1] == dictionary.eos() for i in range(len(dataset)))
    return [" ".join(dictionary[int(i)] for i in dataset[n][:-1]) for n in range(len(dataset))]


def test_splits_and_content(corpus: Path) -> None:
    _run("--trainpref", "train", "--validpref", "valid", "--testpref", "test1,test2")
    names = [
        f"{s}.en-de.{lang}.{end}"
        for s in ("train", "valid", "test", "test1")
        for lang in ("en", "de")
        for end in ("bin", "idx")
    ]
    assert sorted(p.name for p in Path("bin").iterdir()) == sorted([*names, "dict.en.txt", "dict.de.txt"])
    # Tokens are those of str.split(): U+2028 and U+0085 are blanks and end no line.
    assert _sentences("train.en-de", "en") == [" ".join(line.split()) for line in EN]
    assert _sentences("train.en-de", "de") == DE
    assert _sentences("test1.en-de", "en") == [" ".join(line.split()) for line in EN[:2]]
    counts = Counter(" ".join(EN).split())
    del counts["<unk>"], counts["</s>"]
    assert Dictionary.load("bin/dict.en.txt") == Dictionary.build(counts)


def test_reports_what_it_replaced(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _run("--trainpref", "train", "--thresholdsrc", "2")
    # 12 tokens and 5 </s>; a, c, x, u, v, w, rare are replaced, <unk> and </s> in the text are what they were.
    assert "[en] train.en: 5 sentences, 17 tokens, 41.176% replaced by <unk>" in caplog.text
    assert "[de] train.de: 5 sentences, 13 tokens, 0.000% replaced by <unk>" in caplog.text
    assert "[en] dictionary: 8 types" in caplog.text


def test_joined_dictionary(corpus: Path) -> None:
    _run("--trainpref", "train", "--joined-dictionary", "--nwordssrc", "7", "--nwordstgt", "7", "--padding-factor", "1")
    assert Path("bin/dict.en.txt").read_text() == Path("bin/dict.de.txt").read_text() == "A 4\nb 3\nB 1\n"


def test_given_dictionaries(corpus: Path) -> None:
    Path("d.txt").write_text("b 1\na 1\nA 1\n")
    _run("--trainpref", "train", "--srcdict", "d.txt", "--tgtdict", "d.txt")
    assert Path("bin/dict.en.txt").read_text() == Path("bin/dict.de.txt").read_text() == "b 1\na 1\nA 1\n"
    assert _sentences("train.en-de", "en")[0] == "a b <unk>"
    main(
        [
            "-s",
            "en",
            "-t",
            "de",
            "--testpref",
            "test1",
            "--joined-dictionary",
            "--tgtdict",
            "d.txt",
            "--destdir",
            "bin2",
        ]
    )
    assert sorted(p.name for p in Path("bin2").glob("*.txt")) == ["dict.de.txt", "dict.en.txt"]


def test_only_source(corpus: Path) -> None:
    _run("--only-source", "--trainpref", "train", "--testpref", "test1")
    names = ["dict.en.txt", *(f"{s}.en-de.en.{end}" for s in ("test", "train") for end in ("bin", "idx"))]
    assert sorted(p.name for p in Path("bin").iterdir()) == names
    main(["-s", "en", "--only-source", "--trainpref", "train", "--destdir", "bin3"])
    assert sorted(p.name for p in Path("bin3").iterdir()) == [
        "dict.en.txt",
        "train.en-None.en.bin",
        "train.en-None.en.idx",
    ]


def test_only_source_of_a_joined_dictionary(corpus: Path) -> None:
    _run("--only-source", "--joined-dictionary", "--trainpref", "train", "--padding-factor", "1")
    # fairseq 0.12.2's: the target's tokens are in it
    expected = "A 4\nb 3\nB 1\nC 1\nD 1\nE 1\na 1\nc 1\nrare 1\nu 1\nv 1\nw 1\nx 1\n"
    assert Path("bin/dict.en.txt").read_text() == expected
    assert not list(Path("bin").glob("*.de*"))


def test_large_dictionary_needs_four_bytes(corpus: Path) -> None:
    Path("d.txt").write_text("".join(f"t{n} 1\n" for n in range(65_496)))
    _run("--testpref", "test1", "--joined-dictionary", "--srcdict", "d.txt")
    assert IndexedDataset("bin/test.en-de.en").tokens.dtype.itemsize == 4
    Path("d.txt").write_text("".join(f"t{n} 1\n" for n in range(65_495)))
    main(
        [
            "-s",
            "en",
            "-t",
            "de",
            "--testpref",
            "test1",
            "--joined-dictionary",
            "--srcdict",
            "d.txt",
            "--destdir",
            "bin2",
        ]
    )
    assert IndexedDataset("bin2/test.en-de.en").tokens.dtype.itemsize == 2


def test_the_number_of_workers_changes_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binarizer, "CHUNK_BYTES", 500)
    rng = random.Random(0)
    words = [f"w{n}" for n in range(300)] + ["é", "中文", "\u2028"]
    for language in ("en", "de"):
        lines = [" ".join(rng.choices(words, k=rng.choice([0, 1, 5, 20, 300]))) for _ in range(200)]
        (corpus / f"train.{language}").write_bytes("\n".join(lines).encode())  # no line end at the end of the file
    for workers in ("1", "3"):
        main(["-s", "en", "-t", "de", "--trainpref", "train", "--destdir", f"bin{workers}", "--workers", workers])
    for path in Path("bin1").iterdir():
        assert path.read_bytes() == (Path("bin3") / path.name).read_bytes(), path.name
    monkeypatch.setattr(binarizer, "CHUNK_BYTES", 2**21)
    _run("--trainpref", "train")
    for path in Path("bin").iterdir():
        assert path.read_bytes() == (Path("bin3") / path.name).read_bytes(), path.name


def test_dictionaries_alone(corpus: Path) -> None:
    _run("--trainpref", "train", "--dict-only", "--task", "translation")
    assert sorted(path.name for path in Path("bin").iterdir()) == ["dict.de.txt", "dict.en.txt"]
    before = {path.name: path.read_bytes() for path in Path("bin").iterdir()}
    _run("--trainpref", "train")
    assert before.items() < {path.name: path.read_bytes() for path in Path("bin").iterdir()}.items()


def test_again_and_more_splits(corpus: Path) -> None:
    _run("--trainpref", "train")
    before = Path("bin/train.en-de.en.bin").read_bytes()
    _run("--trainpref", "train")
    assert Path("bin/train.en-de.en.bin").read_bytes() == before
    _run("--testpref", "test1", "--srcdict", "bin/dict.en.txt", "--tgtdict", "bin/dict.de.txt")
    assert Path("bin/test.en-de.en.bin").is_file()


def test_flags_that_do_not_fit(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trainpref, --validpref or --testpref" in _fails(capsys)
    assert "--joined-dictionary" in _fails(
        capsys, "--trainpref", "train", "--joined-dictionary", "--srcdict", "x", "--tgtdict", "y"
    )
    assert "no dictionary for en" in _fails(capsys, "--testpref", "test1")
    assert "both en" in _fails(capsys, "--trainpref", "train", "-t", "en")
    for flag in ("--workers", "--padding-factor"):
        with pytest.raises(SystemExit) as usage_error:
            _run("--trainpref", "train", flag, "0")
        assert usage_error.value.code == 2 and f"{flag}: 0: must be at least 1" in capsys.readouterr().err
    assert not Path("bin").exists()


def test_bad_text(corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--trainpref", "train", "--validpref", "valid")
    _write(corpus / "valid.de", DE[:3])
    assert _fails(capsys, *flags) == (
        "valid.en has 2 lines and valid.de has 3 lines; parallel files must have the same number"
    )
    (corpus / "valid.de").write_bytes(b"")
    assert _fails(capsys, *flags) == "valid.de: the file is empty"
    (corpus / "valid.de").unlink()
    assert _fails(capsys, *flags) == "valid.de: cannot read: No such file or directory"
    _write(corpus / "valid.de", DE[:2])
    monkeypatch.setattr(binarizer, "CHUNK_BYTES", 100)
    monkeypatch.setattr(binarizer, "READ_BYTES", 7)
    for name in ("train", "valid"):
        lines = [b"abc \xc3\xa9"] * 100
        _write(corpus / f"{name}.en", ["a"] * 100)
        for bad in (0, 57, 99):
            (corpus / f"{name}.de").write_bytes(b"\n".join([*lines[:bad], b"x \xc3", *lines[bad + 1 :]]))
            for workers in ("1", "2"):
                message = _fails(capsys, *flags, "--workers", workers)
                assert message.startswith(f"{name}.de, line {bad + 1}: not UTF-8")
        (corpus / f"{name}.de").write_bytes(b"\n".join(lines))
    assert not Path("bin").exists()


def test_bad_dictionary_leaves_the_data_bin_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("--trainpref", "train")
    before = {path.name: path.read_bytes() for path in Path("bin").iterdir()}
    Path("d.txt").write_text("b 1\nb 1\n")
    message = _fails(capsys, "--trainpref", "train", "--srcdict", "d.txt")
    assert message.startswith("d.txt, line 2: 'b' is in the dictionary already")
    message = _fails(capsys, "--trainpref", "valid")
    assert message.startswith("bin/dict.en.txt: another dictionary is there already")
    (corpus / "valid.de").write_bytes(b"a\n\xff\n")
    assert "valid.de, line 2" in _fails(capsys, "--trainpref", "train", "--validpref", "valid")
    assert {path.name: path.read_bytes() for path in Path("bin").iterdir()} == before


def test_destination_is_a_file(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bin").write_text("")
    assert _fails(capsys, "--trainpref", "train").startswith("bin: cannot write: ")


def test_reference_data_bin_byte_for_byte(shared: Path, tmp_path: Path) -> None:
    from subword_nmt.apply_bpe import BPE

    reference = shared / "reference" / "multi30k-databin"
    with open(reference / "bpe.codes", encoding="utf-8") as codes:
        bpe = BPE(codes)
    for name in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            text = (shared / "data" / "multi30k" / f"{name}.lc.norm.tok.{language}").read_bytes().decode()
            _write(tmp_path / f"{name}.{language}", [bpe.process_line(line) for line in text.rstrip("\n").split("\n")])
    flags = ["-s", "en", "-t", "de", "--joined-dictionary", "--destdir", "bin", "--workers", "2"]
    prefixes = ["--trainpref", "train", "--validpref", "val", "--testpref", "test_2016_flickr"]
    command = [sys.executable, "-m", "fairseq.cli.preprocess", *flags, *prefixes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train.en: 29,000 sentences, 426,793 tokens, 0.000% replaced by <unk>" in done.stderr
    made = {path.name: path.read_bytes() for path in (tmp_path / "bin").iterdir()}
    assert made == {path.name: path.read_bytes() for path in reference.iterdir() if path.name != "bpe.codes"}


CHARACTERS = st.sampled_from("ab é中\t\r\v\x1c\x1f\x85\xa0\u2003\u2028\u3000\0@") | st.characters(
    exclude_categories=["Cs"]
)
LINES = st.lists(st.text(CHARACTERS).map(lambda line: line.replace("\n", " ")), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LINES, st.booleans(), st.integers(1, 40), st.booleans(), st.integers(0, 3))
def test_equals_a_loop_over_lines(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    ends: bool,
    chunk: int,
    is_given: bool,
    threshold: int,
) -> None:
    directory = tmp_path_factory.mktemp("loop")
    lines = lines if ends or lines[-1] else [*lines, "a"]  # without its end, an empty last line is none
    content = "\n".join(lines) + "\n" * ends
    (directory / "text").write_bytes(content.encode())
    counts = Counter(token for line in lines for token in line.split())
    dictionary = Dictionary.build(counts, threshold=threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binarizer, "CHUNK_BYTES", chunk)
        if is_given:
            summary = binarizer.binarize(directory / "text", dictionary, directory / "out")
        else:
            with binarizer.NumberedText(directory / "text", directory) as text:
                assert text.counts() == counts
                summary = text.binarize(dictionary, directory / "out")
    expected = [[*(dictionary.index(token) for token in line.split()), 2] for line in lines]
    dataset = IndexedDataset(directory / "out")
    assert [sentence.tolist() for sentence in map(dataset.__getitem__, range(len(dataset)))] == expected
    unknown = sum(count for token, count in counts.items() if token not in dictionary)
    assert summary == binarizer.BinarizeSummary(len(lines), sum(map(len, expected)), unknown)
    assert sorted(path.name for path in directory.iterdir()) == ["out.bin", "out.idx", "text"]
