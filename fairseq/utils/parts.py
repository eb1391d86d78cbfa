"""Work done in parts of like size."""

from __future__ import annotations


def part_size(count: int, most: int) -> int:
    """The size of the parts, at most ``most`` each, into which ``count`` are divided where they are few and alike."""
    most = max(1, most)
    return max(1, -(-count // max(1, -(-count // most))))
