"""Raw parallel text -> text to binarise: extraction, tokenisation, cleaning, splitting, BPE. No Perl.

Everything is a function of lines that streams, so memory stays flat whatever the corpus; `map_lines` spreads one over
processes and keeps the order. Tokenisation is sacremoses', BPE subword-nmt's; the rest, written here, does what the
widely used IWSLT'14 and WMT'14 recipes do with Moses' scripts (normalize-punctuation, remove-non-printing-char,
tokenizer, lowercase, clean-corpus-n), so that the sets keep their known sizes.
"""

from __future__ import annotations

import contextlib
import gzip
import html
import io
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write
from fairseq.utils.processes import ordered_map

if TYPE_CHECKING:
    from subword_nmt.apply_bpe import BPE

Path = str | os.PathLike[str]

CHUNK_LINES = 2000  # a task of map_lines: large against the cost of sending it
BPE_CACHE_WORDS = 1_000_000  # subword-nmt remembers every word it has split; a large corpus would fill the memory

_SEGMENT = re.compile(r"<seg\b[^>]*>(.*?)</seg>", re.IGNORECASE)
_METADATA = re.compile(r"\s*</?(doc|url|keywords|speaker|talkid|reviewer|translator)\b")  # lines about a talk
_TITLE_TAGS = re.compile(r"</?(title|description)>")  # text like any other, on both sides


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file (gzip-compressed if named ``.gz``), without their ends.

    Only a newline ends a line, not the other characters that `str.splitlines` would split at.
    Raises FairseqError if the file cannot be read, or is not UTF-8 (with the line number).
    """
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                try:
                    yield line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise FairseqError(f"{path}, line {number}: not valid UTF-8 ({error.reason})") from error
    except (OSError, EOFError) as error:
        raise FairseqError(f"{path}: cannot read: {getattr(error, 'strerror', None) or error}") from error


def read_parallel(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    """Pairs of lines of two files. Raises FairseqError, at the end, if one file is longer."""
    number = 0
    for number, (left, right) in enumerate(itertools.zip_longest(read_lines(source), read_lines(target)), start=1):
        if left is None or right is None:
            short, long = (source, target) if left is None else (target, source)
            raise FairseqError(
                f"{short} has {number - 1} lines, {long} has more: parallel files must match line by line"
            )
        yield left, right


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write ``lines`` to a UTF-8 file; returns their number. A failure in ``lines`` leaves no file."""
    count = 0
    with atomic_write(path) as handle:
        for line in lines:
            handle.write(line + "\n")
            count += 1
    return count


def extract_segments(path: Path) -> Iterator[str]:
    """The text of each ``<seg id="...">`` element of an IWSLT XML or WMT SGML file, which stands on one line.

    Entities are resolved; the right single quotation mark becomes an apostrophe, as in the known recipes.
    Raises FairseqError if an element does not end on its line.
    """
    for number, line in enumerate(read_lines(path), start=1):
        segments = _SEGMENT.findall(line)
        if len(segments) != line.lower().count("<seg"):
            raise FairseqError(f"{path}, line {number}: a <seg> element must begin and end on one line")
        for segment in segments:
            yield html.unescape(segment).strip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def extract_talks(path: Path) -> Iterator[str]:
    """The text of an IWSLT ``train.tags`` file: all lines, titles and descriptions too, but no other metadata."""
    for line in read_lines(path):
        if not _METADATA.match(line):
            yield _TITLE_TAGS.sub("", line).strip()


def replace_nonprinting(line: str) -> str:
    """A space for each control, format, unassigned or private-use character (Unicode category C)."""
    if line.isprintable():  # nearly always, and fast
        return line
    return "".join(" " if unicodedata.category(char)[0] == "C" else char for char in line)


@cache
def _tokenizer(language: str) -> Callable[..., str]:
    from sacremoses import MosesTokenizer

    return MosesTokenizer(lang=language).tokenize


@cache
def _normalizer(language: str) -> Callable[[str], str]:
    from sacremoses import MosesPunctNormalizer

    return MosesPunctNormalizer(lang=language, perl_parity=True).normalize


@cache
def _detokenizer(language: str) -> Callable[[list[str]], str]:
    from sacremoses import MosesDetokenizer

    return MosesDetokenizer(lang=language).detokenize


def tokenize(
    line: str,
    language: str,
    *,
    normalize_punctuation: bool = False,
    remove_nonprinting: bool = False,
    aggressive_hyphens: bool = False,
    escape: bool = True,
    lowercase: bool = False,
) -> str:
    """``line`` in Moses tokens, separated by single spaces; the steps asked for come in the order of the parameters.

    language: a two-letter code. aggressive_hyphens: "a-b" -> "a @-@ b". escape: "&" -> "&amp;" and so on.
    """
    if normalize_punctuation:
        line = _normalizer(language)(line)
    if remove_nonprinting:
        line = replace_nonprinting(line)
    line = _tokenizer(language)(line, aggressive_dash_splits=aggressive_hyphens, escape=escape, return_str=True)
    return " ".join((line.lower() if lowercase else line).split())


def detokenize(line: str, language: str) -> str:
    """The text of a line of Moses tokens."""
    return _detokenizer(language)(line.split())


def keep_pair(source: str, target: str, min_words: int = 1, max_words: int = 175, ratio: float = 9.0) -> bool:
    """Whether both sides have ``min_words`` to ``max_words`` words, neither more than ``ratio`` times the other's.

    The rule of Moses' clean-corpus-n, whose default ratio is 9; an empty side is never kept.
    """
    lengths = len(source.split()), len(target.split())
    short, long = min(lengths), max(lengths)
    return max(1, min_words) <= short and long <= max_words and long / short <= ratio


def clean_parallel(
    source: Path, target: Path, source_out: Path, target_out: Path, *, min_words: int, max_words: int, ratio: float
) -> tuple[int, int]:
    """Copy the pairs that `keep_pair` keeps, spaces made single; returns the numbers of kept and of all pairs."""
    kept = total = 0
    with atomic_write(source_out) as left_out, atomic_write(target_out) as right_out:
        for left, right in read_parallel(source, target):
            total += 1
            if keep_pair(left, right, min_words, max_words, ratio):
                kept += 1
                left_out.write(" ".join(left.split()) + "\n")
                right_out.write(" ".join(right.split()) + "\n")
    return kept, total


def split_valid(path: Path, train: Path, valid: Path, every: int) -> tuple[int, int]:
    """Copy each ``every``-th line to ``valid``, the others to ``train``; returns (train, valid) line counts."""
    counts = [0, 0]
    with atomic_write(train) as train_out, atomic_write(valid) as valid_out:
        for number, line in enumerate(read_lines(path), start=1):
            held_out = number % every == 0
            counts[held_out] += 1
            (valid_out if held_out else train_out).write(line + "\n")
    return counts[0], counts[1]


def split_pairs(path: Path, outputs: Sequence[tuple[Path, Path]], every: int) -> list[int]:
    """Split a file of lines ``left<TAB>right`` so that no left side is in two parts; returns the parts' pair counts.

    outputs: (left, right) files of the training, validation and test part. Of every ``every`` distinct left sides, in
    the order of their first appearance, the last goes to validation and the middle one to test, with all its pairs.
    Raises FairseqError for a line that is no pair.
    """
    numbers: dict[str, int] = {}  # distinct left side -> its number, from 1
    counts = [0] * len(outputs)
    with contextlib.ExitStack() as stack:
        files = [tuple(stack.enter_context(atomic_write(side)) for side in pair) for pair in outputs]
        for line_number, line in enumerate(read_lines(path), start=1):
            fields = line.split("\t")
            if len(fields) < 2 or not fields[0].strip() or not fields[1].strip():
                raise FairseqError(f"{path}, line {line_number}: not two texts with a tab between them")
            number = numbers.setdefault(fields[0], len(numbers) + 1)
            part = {0: 1, every // 2: 2}.get(number % every, 0)
            counts[part] += 1
            for handle, text in zip(files[part], fields, strict=False):
                handle.write(text + "\n")
    return counts


def learn_bpe(paths: Sequence[Path], merges: int, codes: Path) -> int:
    """Learn ``merges`` BPE merges on all the files together and write them to ``codes``; returns how many were found.

    Raises FairseqError if the files hold no text.
    """
    from subword_nmt import learn_bpe as subword_learn

    words: dict[str, int] = {}  # counted here, so that files stream and their order does not matter
    for line in itertools.chain.from_iterable(map(read_lines, paths)):
        for word in line.split(" "):
            if word:
                words[word] = words.get(word, 0) + 1
    if not any(len(word) > 1 for word in words):
        raise FairseqError(f"{', '.join(map(str, paths))}: no text to learn BPE from")
    result = io.StringIO()
    counted = [f"{word} {count}\n" for word, count in words.items()]
    subword_learn.learn_bpe(counted, result, merges, is_dict=True)
    with atomic_write(codes) as handle:
        handle.write(result.getvalue())
    return result.getvalue().count("\n") - 1


@cache
def _bpe(codes: str) -> BPE:
    from subword_nmt.apply_bpe import BPE

    for number, line in enumerate(read_lines(codes), start=1):
        if len(line.strip(" ").split(" ")) != 2:
            raise FairseqError(f"{codes}, line {number}: not a BPE merge, which is two symbols")
    with open(codes, encoding="utf-8", newline="\n") as handle:
        return BPE(handle)


def apply_bpe(line: str, codes: str) -> str:
    """``line``, words between spaces, in the subwords of the BPE file ``codes``: "lo@@ w"."""
    bpe = _bpe(codes)
    if len(bpe.cache) > BPE_CACHE_WORDS:
        bpe.cache.clear()
    return bpe.process_line(line)


def _map_chunk(function: Callable[[str], str], lines: list[str]) -> list[str]:
    return [function(line) for line in lines]


def map_lines(function: Callable[[str], str], lines: Iterable[str], workers: int = 1) -> Iterator[str]:
    """``function`` of each line, in order, computed by ``workers`` processes.

    function: picklable, such as a `functools.partial` of a module's function. The result does not depend on
    ``workers``; at most a few thousand lines for each process are in memory.
    """
    lines = iter(lines)
    chunks = iter(lambda: list(itertools.islice(lines, CHUNK_LINES)), [])
    for results in ordered_map(partial(_map_chunk, function), chunks, workers):
        yield from results
