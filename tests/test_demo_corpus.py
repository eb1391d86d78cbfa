"""The generated demo corpus: sizes, disjoint splits, the same bytes every time, and its German."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("babel", reason="the [demo] extra is not installed")
pytest.importorskip("num2words", reason="the [demo] extra is not installed")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "nmt-experiments" / "demo" / "make_corpus.py"
Corpus = dict[str, list[tuple[str, str]]]
# What English and German text may hold: letters, digits, currency signs, plain punctuation, the plain space.
ALLOWED = re.compile(r"[A-Za-zÄÖÜäöüßéãô0-9 .,?:%/$€£¥'-]+")


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("make_corpus")


@pytest.fixture(scope="module")
def corpus(demo: ModuleType) -> Corpus:
    return demo.make_corpus(seed=1, train=20000)


def test_sizes_and_no_sentence_twice(corpus: Corpus) -> None:
    assert {split: len(pairs) for split, pairs in corpus.items()} == {"test": 500, "valid": 500, "train": 20000}
    for side in (0, 1):
        assert len({pair[side] for pairs in corpus.values() for pair in pairs}) == 21000


def test_sentences_are_plain_text_of_reasonable_length(corpus: Corpus) -> None:
    for pairs in corpus.values():
        for sentence in (sentence for pair in pairs for sentence in pair):
            assert ALLOWED.fullmatch(sentence), sentence
            assert "  " not in sentence and not re.search(r" [.,?]", sentence), sentence
            assert sentence[0].isupper() or sentence[0].isdigit() or sentence[0] in "€$£¥", sentence
            assert sentence[-1] in ".?" and 5 <= len(sentence.split()) <= 22, sentence
    lengths = [len(english.split()) for english, _ in corpus["train"]]
    assert 8 < sum(lengths) / len(lengths) < 16
    assert len({word for english, _ in corpus["train"] for word in english.split()}) > 4000


def test_held_out_sets_do_not_depend_on_the_size_of_train(demo: ModuleType, corpus: Corpus) -> None:
    small = demo.make_corpus(seed=1, train=10)
    assert (small["test"], small["valid"], small["train"]) == (
        corpus["test"],
        corpus["valid"],
        corpus["train"][:10],
    )


def test_another_seed_is_another_corpus(demo: ModuleType, corpus: Corpus) -> None:
    other = demo.make_corpus(seed=2, train=1)
    assert len(set(other["test"]) & set(corpus["test"])) < 25


def test_every_clause_frame_and_slot_is_used(demo: ModuleType, corpus: Corpus) -> None:
    text = "\n".join(english for english, _ in corpus["train"])
    german = "\n".join(german for _, german in corpus["train"])
    for section, side, haystack in (("clauses", 0, text), ("clauses", 1, german), ("frames", 1, german)):
        for line in demo._sections()[section].split("\n")[side::2]:
            for piece in re.split(r"\{[^}]*\}|\||~", line):
                words = piece.strip(" .,?0123456789")
                assert words[1:] in haystack, (line, words)
    used = set(re.findall(r"\{(\w+?)2?\}", demo._sections()["clauses"] + demo._sections()["frames"])) - {"a", "b"}
    assert used == set(demo._slots())


@pytest.mark.parametrize(
    ("english", "german", "orders"),
    [
        (
            "Anna arrived in Vienna",
            "Anna | ist | in Wien | angekommen",
            ["Anna ist in Wien angekommen", "ist Anna in Wien angekommen", "Anna in Wien angekommen ist"],
        ),
        (
            "the train leaves today",
            "der Zug | fährt | heute | ab~",
            ["der Zug fährt heute ab", "fährt der Zug heute ab", "der Zug heute abfährt"],
        ),
        (
            "it is true",
            "es | ist | wahr | | , dass es regnet",
            ["es ist wahr, dass es regnet", "ist es wahr, dass es regnet", "es wahr ist, dass es regnet"],
        ),
    ],
)
def test_german_word_orders(demo: ModuleType, english: str, german: str, orders: list[str]) -> None:
    clause = demo._clause(random.Random(0), english, german)
    assert str(clause) == english
    assert [clause.main, clause.inv, clause.sub] == orders


@pytest.mark.parametrize(
    ("slot", "english", "german"),
    [
        ("city", "Vienna", "Wien"),
        ("city", "Moscow", "Moskau"),
        ("country", "Spain", "Spanien"),
        ("language", "Dutch", "Niederländisch"),
        ("weekday", "Wednesday", "Mittwoch"),
        ("time", "5:05 PM", "17:05"),
        ("day", "March 5", "5. März"),
        ("count", "twenty-one", "einundzwanzig"),
        ("rank", "third", "dritte"),
        ("year", "nineteen ninety-nine", "neunzehnhundertneunundneunzig"),
        ("percent", "12%", "12 %"),
        ("degrees", "5 degrees Celsius", "5 Grad Celsius"),
        ("ago", "3 days ago", "vor 3 Tagen"),
        ("soon", "in 2 weeks", "in 2 Wochen"),
        ("things", "gloves", "Handschuhe"),
    ],
)
def test_components(demo: ModuleType, slot: str, english: str, german: str) -> None:
    rng = random.Random(3)
    drawn = {demo._tidy(e): demo._tidy(g) for e, g in (demo._slots()[slot](rng) for _ in range(4000))}
    assert drawn[english[0].upper() + english[1:]] == german[0].upper() + german[1:]


@pytest.mark.parametrize(
    ("number", "unit", "english", "german"),
    [
        (1234.5, "length-kilometer", "1,234.5 kilometers", "1.234,5 Kilometer"),
        (28, "length-foot", "28 feet", "28 Fuß"),
        (3, "mass-ounce", "3 ounces", "3 Unzen"),
        (2.5, "speed-mile-per-hour", "2.5 miles per hour", "2,5 Meilen pro Stunde"),
    ],
)
def test_units(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, number: float, unit: str, english: str, german: str
) -> None:
    monkeypatch.setattr(demo, "_number", lambda rng: number)
    assert demo._unit(unit, random.Random(0)) == (english, german)


def test_slots_never_repeat_within_a_clause(demo: ModuleType) -> None:
    rng = random.Random(5)
    for _ in range(300):
        english, german = demo._fill(rng, "from {city} to {city2}, {name} and {who}")
        assert len(set(english.values())) == 4 and english.keys() == german.keys()


def test_command_writes_the_same_bytes_every_time(demo: ModuleType, corpus: Corpus, tmp_path: Path) -> None:
    digests = []
    for run in ("one", "two"):
        out = tmp_path / run
        environment = {**os.environ, "PYTHONHASHSEED": run.replace("one", "1").replace("two", "2"), "LC_ALL": "C"}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, str(SCRIPT), str(out), "--train", "2000", "--sentencepiece", "500"]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
        names = sorted(path.name for path in out.iterdir())
        digests.append({name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names})
    assert digests[0] == digests[1]
    text = [f"{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de")]
    pieces = [name.replace(".", ".sp.") for name in text]
    assert sorted(digests[0]) == sorted([*text, *pieces, "spm.model"])
    assert (out / "train.en").read_text(encoding="utf-8").split("\n")[:-1] == [e for e, _ in corpus["train"][:2000]]


def test_pieces_decode_to_the_text(demo: ModuleType, tmp_path: Path) -> None:
    corpus = demo.make_corpus(seed=1, train=2000)
    demo.write_pieces(tmp_path, corpus, 500)
    for column, language in enumerate(("en", "de")):
        lines = (tmp_path / f"valid.sp.{language}").read_text(encoding="utf-8").splitlines()
        decoded = [line.replace(" ", "").replace("▁", " ").strip() for line in lines]
        assert decoded == [pair[column] for pair in corpus["valid"]]


def test_missing_library_is_one_clear_message(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MISSING", "babel")
    with pytest.raises(demo.FairseqError, match=r"needs babel: pip install 'transformer-clinic\[demo\]'"):
        list(islice(demo.sentence_pairs(), 1))
