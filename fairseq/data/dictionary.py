"""Tokens and their ids.

``dict.LANG.txt`` has one ``token count`` line an entry; ids 0-3 are ``<s> <pad> </s> <unk>`` and are not in the file.
Text becomes tokens by ``str.split()`` and nothing else.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write, refuse_bom
from fairseq.utils.symbols import BOS, EOS, PAD, SPECIAL_SYMBOLS, UNK

LONGEST_LINE = 2**16  # bytes of a line in a dictionary
OVERWRITE_FLAG = "#fairseq:overwrite"  # a line with it may repeat an earlier symbol, which it replaces
MERGING = ("subword_nmt", "fastbpe")  # segmentations by merges, which both apply and mark in the same way


def post_process(sentence: str, symbol: str | None) -> str:
    """Undo the subword segmentation of ``sentence``.

    symbol: ``"subword_nmt"`` or ``"fastbpe"`` (or any continuation mark, such as ``"@@ "``), ``"sentencepiece"``, or
    None to leave the sentence as it is.
    """
    if symbol is None:
        return sentence
    if symbol == "sentencepiece":
        return sentence.replace(" ", "").replace("\u2581", " ").strip()
    mark = "@@ " if symbol in (*MERGING, "@@") else symbol
    return f"{sentence} ".replace(mark, "").rstrip()  # the added blank lets a mark at the very end match


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Lines of a file, without their ends; of one that is longer than `LONGEST_LINE` only the beginning."""
    try:
        with open(path, "rb") as handle:
            while line := handle.readline(LONGEST_LINE + 2):
                yield line.removesuffix(b"\n")
    except OSError as error:
        raise FairseqError(f"{path}: cannot read the dictionary: {error.strerror or error}") from error


class Dictionary:
    """A two-way table of tokens and ids, with each token's count in the training text."""

    def __init__(self) -> None:
        self.symbols: list[str] = []
        self.counts: list[int] = []
        self._ids: dict[str, int] = {}
        for symbol in SPECIAL_SYMBOLS:
            self._add(symbol, 0)

    @classmethod
    def build(
        cls, counts: Mapping[str, int], *, threshold: int = 0, nwords: int = -1, padding_factor: int = 8
    ) -> Dictionary:
        """A dictionary of the tokens in ``counts``, most frequent first, ties by code point.

        threshold: leave out tokens seen fewer times. nwords: size of the result with its special symbols and without
        its padding (below 1: no limit). padding_factor: round the size up to a multiple of this with entries
        ``madeupword0000 0``.
        """
        dictionary = cls()
        kept = [(token, count) for token, count in counts.items() if count >= threshold and token not in dictionary]
        kept.sort(key=lambda entry: (-entry[1], entry[0]))
        if nwords > 0:
            kept = kept[: max(0, nwords - len(dictionary))]
        for token, count in kept:
            dictionary._add(token, count)
        fillers = (f"madeupword{number:04d}" for number in itertools.count())
        while padding_factor > 1 and len(dictionary) % padding_factor:
            filler = next(fillers)
            if filler not in dictionary:
                dictionary._add(filler, 0)
        return dictionary

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Dictionary:
        """Read ``dict.LANG.txt``.

        Raises FairseqError, naming the line, on bytes that are not UTF-8, a line that is not ``token count``, or a
        token that is there twice without ``#fairseq:overwrite``.
        """
        dictionary = cls()
        for number, line in enumerate(_lines(path), 1):
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise FairseqError(f"{where}: more than {LONGEST_LINE:,} bytes; is it a dictionary?")
            if number == 1:
                refuse_bom(line, where)
            try:
                entry, overwrite = line.decode("utf-8").rstrip(), False
            except UnicodeDecodeError as error:
                raise FairseqError(f"{where}: not UTF-8 ({error.reason}); convert the dictionary to UTF-8") from None
            if entry.endswith(f" {OVERWRITE_FLAG}"):
                entry, overwrite = entry[: -len(OVERWRITE_FLAG) - 1], True
            token, _, count = entry.rpartition(" ")
            try:
                frequency = int(count)
            except ValueError:
                frequency = -1
            if not token or frequency < 0:
                raise FairseqError(f"{where}: '{entry[:60]}' is not 'token count'")
            if token in dictionary and not overwrite:
                raise FairseqError(
                    f"{where}: '{token}' is in the dictionary already; remove one of the two, or end this line with "
                    f"' {OVERWRITE_FLAG}' if it is to replace the other"
                )
            dictionary._add(token, frequency)
        if len(dictionary) == len(SPECIAL_SYMBOLS):
            raise FairseqError(f"{path}: the dictionary is empty; make it again with fairseq-preprocess")
        return dictionary

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``dict.LANG.txt``, special symbols left out."""
        seen = set(SPECIAL_SYMBOLS)
        with atomic_write(path) as handle:
            for token, count in zip(
                self.symbols[len(SPECIAL_SYMBOLS) :], self.counts[len(SPECIAL_SYMBOLS) :], strict=True
            ):
                handle.write(f"{token} {count} {OVERWRITE_FLAG}\n" if token in seen else f"{token} {count}\n")
                seen.add(token)

    def _add(self, token: str, count: int) -> None:
        self._ids[token] = len(self.symbols)
        self.symbols.append(token)
        self.counts.append(count)

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, index: int) -> str:
        return self.symbols[index] if 0 <= index < len(self.symbols) else SPECIAL_SYMBOLS[UNK]

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dictionary) and self.symbols == other.symbols

    __hash__ = None  # type: ignore[assignment]

    def index(self, token: str) -> int:
        """The id of ``token``, that of ``<unk>`` when it is not there."""
        return self._ids.get(token, self.unk())

    def lookup(self) -> Callable[[str, int], int]:
        """``dict.get`` of the token-to-id table, for loops over whole corpora."""
        return self._ids.get

    def bos(self) -> int:
        """The id of ``<s>``."""
        return BOS

    def pad(self) -> int:
        """The id of ``<pad>``."""
        return PAD

    def eos(self) -> int:
        """The id of ``</s>``."""
        return EOS

    def unk(self) -> int:
        """The id of ``<unk>``."""
        return UNK

    def encode_line(self, line: str, append_eos: bool = True) -> np.ndarray:
        """Ids (int64) of the whitespace-separated tokens of ``line``, then ``</s>`` if ``append_eos``."""
        ids = [self._ids.get(token, UNK) for token in line.split()]
        if append_eos:
            ids.append(self.eos())
        return np.array(ids, dtype=np.int64)

    def string(
        self,
        ids: Iterable[int],
        bpe_symbol: str | None = None,
        escape_unk: bool = False,
        extra_symbols_to_ignore: Iterable[int] | None = None,
        unk_string: str | None = None,
    ) -> str:
        """The text of ``ids`` (list, array or one-dimensional tensor), without ``<s>``, ``<pad>`` and ``</s>``.

        bpe_symbol: as `post_process`'s. escape_unk: write ``<<unk>>``, which no text has, so that an unknown word of a
        reference never equals one of a hypothesis. unk_string: write this for unknown words.
        """
        ignored = {self.bos(), self.pad(), self.eos(), *(extra_symbols_to_ignore or ())}
        symbol = SPECIAL_SYMBOLS[UNK]
        unknown = unk_string if unk_string is not None else f"<{symbol}>" if escape_unk else symbol
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        words = (unknown if index == self.unk() else self[index] for index in values if index not in ignored)
        return post_process(" ".join(words), bpe_symbol)
