"""Dictionary: ids, file format, bad files, text of ids."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.data.dictionary import Dictionary, post_process
from fairseq.errors import FairseqError


def test_build_sorts_by_count_then_code_point_and_pads() -> None:
    dictionary = Dictionary.build(Counter(["b", "b", "a", "a", "Z", "é", "中", "中", "中"]))
    assert dictionary.symbols[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert dictionary.symbols[4:9] == ["中", "a", "b", "Z", "é"]
    assert dictionary.symbols[9:] == [f"madeupword{n:04d}" for n in range(7)]
    assert dictionary.counts[4:] == [3, 2, 2, 1, 1] + [0] * 7


def test_build_threshold_and_nwords() -> None:
    counts = Counter({"a": 5, "b": 3, "c": 3, "d": 1})
    assert Dictionary.build(counts, threshold=3, padding_factor=1).symbols[4:] == ["a", "b", "c"]
    assert Dictionary.build(counts, nwords=6, padding_factor=1).symbols[4:] == ["a", "b"]  # special symbols count
    assert len(Dictionary.build(counts, nwords=6, padding_factor=8)) == 8
    assert len(Dictionary.build(counts, nwords=2, padding_factor=1)) == 4


def test_build_with_special_and_filler_symbols_in_the_text() -> None:
    dictionary = Dictionary.build(Counter({"<unk>": 9, "</s>": 2, "a": 1, "madeupword0000": 1}))
    assert dictionary.symbols[4:] == ["a", "madeupword0000", "madeupword0001", "madeupword0002"]


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    dictionary = Dictionary.build(Counter({"a\u00a0b": 3, "#": 2, "\u2028x": 1, "1": 1, "#fairseq:overwrite": 1}))
    dictionary.save(tmp_path / "dict.txt")
    again = Dictionary.load(tmp_path / "dict.txt")
    assert (again.symbols, again.counts) == (dictionary.symbols, dictionary.counts)
    assert again == dictionary


def test_reference_dictionary_survives_a_round_trip(shared: Path, tmp_path: Path) -> None:
    path = shared / "reference" / "multi30k-databin" / "dict.en.txt"
    dictionary = Dictionary.load(path)
    assert len(dictionary) == 9712
    dictionary.save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_bytes() == path.read_bytes()
    counts = dict(zip(dictionary.symbols[4:], dictionary.counts[4:], strict=True))
    assert Dictionary.build({t: c for t, c in reversed(counts.items()) if c}) == dictionary


def test_overwrite_flag(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_text("a 1\n<s> 7 #fairseq:overwrite\nb 2\n", encoding="utf-8")
    dictionary = Dictionary.load(path)
    assert dictionary.index("<s>") == 5
    assert dictionary.bos() == 0
    assert dictionary[5] == "<s>"
    assert dictionary.index("b") == 6
    dictionary.save(tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == path.read_bytes()


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_bytes(b"a 1\r\nb 2\r\n")
    assert Dictionary.load(tmp_path / "dict.txt").symbols[4:] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"a 1\nb 2\na 3\n", 3, "'a' is in the dictionary already"),
        (b"a 1\n<unk> 2\n", 2, "'<unk>' is in the dictionary already"),
        (b"a 1\nb\n", 2, "not 'token count'"),
        (b"a 1\n\nb 1\n", 2, "not 'token count'"),
        (b"a x\n", 1, "not 'token count'"),
        (b"a -1\n", 1, "not 'token count'"),
        (b"a 1\n\xff 1\n", 2, "not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(FairseqError) as error:
        Dictionary.load(path)
    assert str(error.value).startswith(f"{path}, line {line}: ")
    assert what in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FairseqError, match=r"dict\.txt: cannot read"):
        Dictionary.load(tmp_path / "dict.txt")


def test_encode_line() -> None:
    dictionary = Dictionary.build(Counter(["a", "b"]))
    ids = dictionary.encode_line("  a\u2003x \t b\n")
    assert ids.dtype == np.int64
    assert ids.tolist() == [4, 3, 5, 2]
    assert dictionary.encode_line("a", append_eos=False).tolist() == [4]
    assert dictionary.encode_line("").tolist() == [2]


def test_string() -> None:
    dictionary = Dictionary.build(Counter({"hel@@": 2, "lo": 1}))
    ids = [0, 1, 4, 5, 3, 2]
    for form in (ids, np.array(ids), torch.tensor(ids)):
        assert dictionary.string(form) == "hel@@ lo <unk>"
    assert dictionary.string(ids, "subword_nmt") == "hello <unk>"
    assert dictionary.string(ids, escape_unk=True) == "hel@@ lo <<unk>>"
    assert dictionary.string(ids, unk_string="?") == "hel@@ lo ?"
    assert dictionary.string(ids, extra_symbols_to_ignore=[3, 5]) == "hel@@"
    assert dictionary[10**6] == "<unk>"


@pytest.mark.parametrize(
    ("symbol", "sentence", "expected"),
    [
        (None, "a@@ b", "a@@ b"),
        ("subword_nmt", "a@@ b c@@", "ab c"),
        ("@@ ", "a@@ b@@ c", "abc"),
        ("subword_nmt", "", ""),
        ("sentencepiece", "\u2581Hel lo \u2581wor ld", "Hello world"),
        ("sentencepiece", "", ""),
    ],
)
def test_post_process(symbol: str | None, sentence: str, expected: str) -> None:
    assert post_process(sentence, symbol) == expected
