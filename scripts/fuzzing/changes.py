"""A valid file with one to six changes: of its bytes, or, where it is JSON, of its values."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = [
    *(b"0", b"-1", b"1e400", b"nan", b"inf", b"9" * 400, b"(" * 200, b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\r\n"),
    *(b"\n", b" ", b"#fairseq:overwrite", b"os\nsystem\n", b"R", b".", b"(", b"h\x00", b"\x8f", b"@@", b"\xe2\x80\xa8"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2.5, -0.0, 1e308, 2**31, 2**63, 10**400, float("nan"), float("inf")),
    *("", "0", "a", "\ud800", "\u2028", "x" * 2000, "<script>", [], [[]], [None], [1, 2.5], ["a"], [{}], {}, {"a": []}),
]


class Changes:
    """Where changes come from: an integer below a limit. Hypothesis, atheris and `random` all serve."""

    def __init__(self, below: Callable[[int], int]) -> None:
        self.below = below

    def of(self, items: Sequence[Any]) -> Any:
        """One of ``items``."""
        return items[self.below(len(items))]


def mutated(data: bytes, others: list[bytes], words: list[bytes], changes: Changes) -> bytes:
    """``data`` with changes. others: files to take parts from; words: bytes that mean something in such files."""
    if data[:1] in (b"{", b"[") and changes.below(2):
        try:
            return _mutated_json(json.loads(data), changes)
        except (ValueError, RecursionError):
            pass
    out = bytearray(data)
    for _ in range(1 + changes.below(6)):
        at = changes.below(len(out) + 1)
        kind = changes.below(10)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << changes.below(8)
        elif kind == 1 and out:
            out[at % len(out)] = changes.below(256)
        elif kind == 2:
            size = changes.of((1, 2, 4, 8))
            number = changes.of(NUMBERS) % 256**size
            out[at : at + size] = number.to_bytes(size, changes.of(("little", "big")))
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + 1 + changes.below(16)]
        elif kind == 5:
            out[at:at] = out[at : at + 1 + changes.below(64)] * changes.of((1, 2, 20))
        elif kind == 6:
            out[at:at] = changes.of(words)
        elif kind == 7:
            word = changes.of(words)
            out[at : at + len(word)] = word
        elif kind == 8:
            other = changes.of(others)
            start = changes.below(len(other) + 1)
            out[at : at + changes.below(64)] = other[start : start + changes.below(256)]
        else:
            out[at:at] = bytes(changes.below(256) for _ in range(changes.below(9)))
    return bytes(out)


def _mutated_json(value: Any, changes: Changes) -> bytes:
    """Values replaced, exchanged, removed or wrapped; the result is still JSON, as Python understands it."""
    root = [value]
    for _ in range(1 + changes.below(3)):
        places = _places(root)
        holder, key = changes.of(places)
        kind = changes.below(6)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1:
            other, other_key = changes.of(places)
            holder[key] = copy.deepcopy(other[other_key])  # or it may come to hold itself
        elif kind == 2:
            for _ in range(changes.of((1, 5, 100))):
                holder[key] = changes.of(([holder[key]], {"a": holder[key]}))
        elif kind == 3 and isinstance(holder, dict):
            holder[changes.of(("", "a", "\ud800", "x" * 300, "0"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(changes.of(VALUES))  # which a later change may fill
    return json.dumps(root[0], ensure_ascii=changes.below(4) > 0).encode("utf-8", "surrogatepass")


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every (dict or list, key) below ``root``."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
    return found
