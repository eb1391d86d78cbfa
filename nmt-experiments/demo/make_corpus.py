"""A made-up English-German corpus, of any size, with no download: language data put into a small grammar.

Cities, countries, languages, currencies, and all dates, times, units, amounts and lists come from CLDR (through
babel), numerals from num2words. The grammar is ours, in grammar.txt. German word order is its point: a clause is
written as subject | finite verb | middle | verb end | after-field, and a sentence frame asks for it in main order
("Anna ist in Wien angekommen"), inverted ("leider ist Anna ...") or verb-final ("dass Anna ... angekommen ist").
Inserted words stand only where German leaves them uninflected.

    python nmt-experiments/demo/make_corpus.py DESTDIR --seed 1 --train 20000 --sentencepiece 2000

writes {train,valid,test}.{en,de}, raw text; with ``--sentencepiece`` also spm.model and, in pieces,
{train,valid,test}.sp.{en,de}.
"""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from fairseq.cli import command
from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write

try:
    from babel import Locale, dates, lists, numbers, units
    from num2words import num2words

    _MISSING = None
except ImportError as error:
    _MISSING = error.name

Pair = tuple[str, str]  # English, German
Slot = Callable[[random.Random], Pair]

HELD_OUT = 500  # sentences each in valid and test
WORDS = range(5, 23)  # accepted sentence lengths, either side


class Clause(NamedTuple):
    """A clause in English, and in German in the three word orders; formats as its English."""

    english: str
    main: str
    inv: str
    sub: str

    def __str__(self) -> str:
        return self.english


@cache
def _locales() -> tuple[Locale, Locale]:
    return Locale.parse("en_US"), Locale.parse("de_DE")


def _both(function: Callable[..., str], *args: object, **kwargs: object) -> Pair:
    """``function`` called for English and for German."""
    english, german = (function(*args, locale=locale, **kwargs) for locale in _locales())
    return english, german


def _city(zone: str) -> Pair:
    plain = zone.rpartition("/")[2].replace("_", " ")  # CLDR leaves out a name that is just this
    english, german = (locale.time_zones.get(zone, {}).get("city") or plain for locale in _locales())
    return english, german


def _number(rng: random.Random) -> float:
    """From 2 up (so that the noun is a plural), small numbers more often; some have one decimal."""
    size = rng.choice((10, 30, 100, 1000, 5000))
    return rng.randrange(20, 10 * size) / 10 if rng.random() < 0.3 else rng.randrange(2, size)


def _unit(names: str, rng: random.Random) -> Pair:
    return _both(units.format_unit, _number(rng), rng.choice(names.split()), length="long")


def _degrees(rng: random.Random) -> Pair:
    return _both(units.format_unit, rng.randrange(2, 40), "temperature-celsius", length="long")


def _money(currencies: Sequence[str], form: str, rng: random.Random) -> Pair:
    return _both(numbers.format_currency, _number(rng), rng.choice(currencies), format_type=form)


def _date(first_year: int, last_year: int, form: str, rng: random.Random) -> Pair:
    """form: a CLDR date format or pattern, or the skeleton MMMMd (day and month)."""
    first, last = datetime.date(first_year, 1, 1).toordinal(), datetime.date(last_year, 12, 31).toordinal()
    day = datetime.date.fromordinal(rng.randrange(first, last + 1))
    return _both(dates.format_skeleton, form, day) if form == "MMMMd" else _both(dates.format_date, day, form)


def _quarter(rng: random.Random) -> Pair:
    (english, german), year = _date(2000, 2000, "QQQQ", rng), rng.randrange(1990, 2030)
    return f"{english} of {year}", f"{german} {year}"


def _time(rng: random.Random) -> Pair:
    return _both(dates.format_time, datetime.time(rng.randrange(24), 5 * rng.randrange(12)), "short")


def _span(sign: int, rng: random.Random) -> Pair:
    """A duration, "3 days"; with sign 1 "in 3 days", with sign -1 "3 days ago"."""
    limits = {"minute": 50, "hour": 20, "day": 6, "week": 4, "month": 11, "year": 20}
    unit = rng.choice(list(limits) if sign else ["minute", "hour"])
    span = datetime.timedelta(
        seconds=(sign or 1) * dict(dates.TIMEDELTA_UNITS)[unit] * rng.randrange(2, limits[unit] + 1)
    )
    return _both(dates.format_timedelta, span, granularity=unit, threshold=10**6, add_direction=sign != 0)


def _millions(rng: random.Random) -> Pair:
    number = rng.randrange(20, 2000) * 10**5
    return _both(numbers.format_compact_decimal, number, format_type="long", fraction_digits=1)


def _list(items: Sequence[Pair], rng: random.Random) -> Pair:
    chosen = rng.sample(items, rng.choice((2, 2, 3)))
    english, german = _locales()
    return (
        lists.format_list([pair[0] for pair in chosen], locale=english),
        lists.format_list([pair[1] for pair in chosen], locale=german),
    )


def _words(start: int, stop: int, form: str, rng: random.Random) -> Pair:
    number = rng.randrange(start, stop)
    return num2words(number, lang="en", to=form), num2words(number, lang="de", to=form)


@cache
def _sections() -> dict[str, str]:
    """The text under each [heading] of grammar.txt."""
    text = Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    for line in (line for line in text.splitlines() if line and not line.startswith("#")):
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), [])
        else:
            section.append(line)
    return {heading: "\n".join(body) for heading, body in sections.items()}


def _pick(items: Sequence[Pair]) -> Slot:
    return lambda rng: rng.choice(items)


@cache
def _slots() -> dict[str, Slot]:
    """For each slot name of grammar.txt, what draws a phrase in both languages."""
    sections, locales = _sections(), _locales()
    words = {
        heading: [(entry.split("=")[0], entry.split("=")[1]) for entry in " ".join(body.split()).split(", ")]
        for heading, body in sections.items()
        if "=" in body
    }
    names = [(name, name) for name in sections["names"].split()]
    countries, languages = (
        [(getattr(locales[0], field)[code], getattr(locales[1], field)[code]) for code in sections[heading].split()]
        for field, heading in (("territories", "countries"), ("languages", "languages"))
    )
    return {
        "name": _pick(names),
        "who": lambda rng: rng.choice(words["persons"] if rng.random() < 0.4 else names),
        "city": _pick([_city(zone) for zone in sections["cities"].split()]),
        "country": _pick(countries),
        "countries": partial(_list, countries),
        "language": _pick(languages),
        "languages": partial(_list, languages),
        "stuff": _pick(words["stuff"]),
        "liquid": _pick(words["liquids"]),
        "groceries": partial(_list, words["stuff"] + words["liquids"]),
        "things": _pick(words["things"]),
        "event": _pick(words["events"]),
        "building": _pick(words["buildings"]),
        "size": _pick(words["sizes"]),
        "times": _pick(words["times"]),
        "past": partial(_date, 1950, 2019, "long"),
        "future": partial(_date, 2020, 2035, "full"),
        "short": partial(_date, 2001, 2029, "short"),
        "month": partial(_date, 1990, 2029, "MMMM y"),
        "day": partial(_date, 2020, 2020, "MMMMd"),
        "weekday": partial(_date, 2020, 2020, "EEEE"),
        "quarter": _quarter,
        "time": _time,
        "duration": partial(_span, 0),
        "ago": partial(_span, -1),
        "soon": partial(_span, 1),
        "distance": partial(_unit, "length-kilometer length-mile length-meter length-nautical-mile"),
        "length": partial(_unit, "length-meter length-foot length-centimeter length-inch"),
        "mass": partial(_unit, "mass-kilogram mass-gram mass-pound mass-ounce mass-tonne"),
        "volume": partial(_unit, "volume-liter volume-milliliter volume-gallon volume-teaspoon"),
        "speed": partial(_unit, "speed-kilometer-per-hour speed-mile-per-hour speed-meter-per-second"),
        "bytes": partial(_unit, "digital-byte digital-kilobyte digital-megabyte digital-gigabyte"),
        "power": partial(_unit, "power-kilowatt power-megawatt power-gigawatt power-horsepower"),
        "degrees": _degrees,
        "percent": lambda rng: _both(numbers.format_percent, rng.randrange(2, 96) / 100),
        "price": partial(_money, ["EUR", "USD", "GBP", "JPY"], "standard"),
        "money": partial(_money, sections["currencies"].split(), "name"),
        "millions": _millions,
        "count": partial(_words, 2, 100, "cardinal"),
        "rank": partial(_words, 2, 40, "ordinal"),
        "year": partial(_words, 1801, 2000, "year"),
    }  # fmt: skip


def _fill(rng: random.Random, template: str) -> tuple[dict[str, str], dict[str, str]]:
    """Values for the slots of an English template, in English and in German, no two alike."""
    values: dict[str, Pair] = {}
    for _, slot, _, _ in string.Formatter().parse(template):
        while slot and slot not in "ab" and slot not in values:
            pair = _slots()[slot.rstrip("2")](rng)
            if pair not in values.values():
                values[slot] = pair
    return {slot: en for slot, (en, _) in values.items()}, {slot: de for slot, (_, de) in values.items()}


def _clause(rng: random.Random, english: str, german: str) -> Clause:
    values_en, values_de = _fill(rng, english)
    fields = [field.strip() for field in german.format(**values_de).split("|")]
    subject, finite, middle, end, after = fields + [""] * (5 - len(fields))
    prefix = end.removesuffix("~")
    final = prefix + finite if end.endswith("~") else f"{end} {finite}"  # abfährt; angekommen ist
    orders = ((subject, finite, middle, prefix), (finite, subject, middle, prefix), (subject, middle, final))
    main, inv, sub = (" ".join(" ".join(order).split()) + after for order in orders)
    return Clause(english.format(**values_en), main, inv, sub)


def _tidy(sentence: str) -> str:
    """Plain spaces for CLDR's no-break ones, and a capital first."""
    sentence = " ".join(sentence.split())
    return sentence[0].upper() + sentence[1:]


def sentence_pairs(seed: int = 1) -> Iterator[Pair]:
    """Endless English-German sentence pairs, each side new; the same for the same seed and library versions.

    Raises FairseqError if babel or num2words is missing.
    """
    if _MISSING:
        raise FairseqError(f"the demo corpus needs {_MISSING}: pip install 'transformer-clinic[demo]'")
    rng = random.Random(seed)
    lines = _sections()["clauses"].split("\n")
    clauses = list(zip(lines[::2], lines[1::2], strict=True))
    lines = _sections()["frames"].split("\n")
    frames = [(en[2:], de) for en, de in zip(lines[::2], lines[1::2], strict=True) for _ in range(int(en[0]))]
    seen: set[str] = set()
    while True:
        frame_en, frame_de = rng.choice(frames)
        parts = {name: _clause(rng, *rng.choice(clauses)) for name in "ab" if f"{{{name}}}" in frame_en}
        values_en, values_de = _fill(rng, frame_en)
        english = _tidy(frame_en.format(**parts, **values_en))
        german = _tidy(frame_de.format(**parts, **values_de))
        if all(len(side.split()) in WORDS and side not in seen for side in (english, german)):
            seen.update((english, german))
            yield english, german


def make_corpus(seed: int = 1, train: int = 20000) -> dict[str, list[Pair]]:
    """Pairs for "test" and "valid" (500 each) and "train"; no sentence of either language occurs twice.

    The held-out sets do not depend on ``train``.
    """
    pairs, sizes = sentence_pairs(seed), {"test": HELD_OUT, "valid": HELD_OUT, "train": train}
    return {split: list(itertools.islice(pairs, size)) for split, size in sizes.items()}


def _write(destdir: Path, name: str, columns: Sequence[Iterable[str]]) -> None:
    for language, lines in zip(("en", "de"), columns, strict=True):
        with atomic_write(destdir / f"{name}.{language}") as handle:
            handle.writelines(line + "\n" for line in lines)


def write_text(destdir: Path, corpus: dict[str, list[Pair]]) -> None:
    """Write SPLIT.en and SPLIT.de."""
    for split, pairs in corpus.items():
        _write(destdir, split, list(zip(*pairs, strict=True)))


def write_pieces(destdir: Path, corpus: dict[str, list[Pair]], vocabulary: int) -> None:
    """Train one SentencePiece model on both sides of train; write it and all splits in pieces, SPLIT.sp.{en,de}."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain.from_iterable(corpus["train"]),
            model_writer=model,
            vocab_size=vocabulary,
            model_type="bpe",
            character_coverage=1.0,
            normalization_rule_name="identity",  # decoding gives back the very sentence
            split_digits=True,
            num_threads=1,  # the same model on every run
            minloglevel=2,
        )
    except RuntimeError as error:
        raise FairseqError(f"--sentencepiece {vocabulary}: no such vocabulary for this corpus: {error}") from error
    with atomic_write(destdir / "spm.model", "wb") as handle:
        handle.write(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for split, pairs in corpus.items():
        pieces = (processor.encode(list(side), out_type=str) for side in zip(*pairs, strict=True))
        _write(destdir, f"{split}.sp", [[" ".join(line) for line in side] for side in pieces])


def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a generated English-German corpus as plain text files.")
    parser.add_argument("destdir", type=Path, help="directory for {train,valid,test}.{en,de}")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus (default: %(default)s)")
    parser.add_argument("--train", type=int, default=20000, help="number of training pairs (default: %(default)s)")
    parser.add_argument("--sentencepiece", type=int, metavar="SIZE", help="also write pieces of a joint vocabulary")
    args = parser.parse_args(argv)
    if args.train < 1:
        parser.error("--train must be at least 1")
    corpus = make_corpus(args.seed, args.train)
    write_text(args.destdir, corpus)
    if args.sentencepiece:
        write_pieces(args.destdir, corpus, args.sentencepiece)
    print(f"{args.destdir}: " + ", ".join(f"{len(pairs)} {split} pairs" for split, pairs in corpus.items()))


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main)(argv)


if __name__ == "__main__":
    main()
