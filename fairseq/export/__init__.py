"""Trained models for other programs: one file a format, each with a function that writes it and says what it did."""

from collections.abc import Callable
from pathlib import Path

from fairseq.export.fairseq_format import export_fairseq

# --format -> (checkpoint, --output, --fold) -> lines to print
FORMATS: dict[str, Callable[[str | Path, str | Path, bool], list[str]]] = {"fairseq": export_fairseq}

__all__ = ["FORMATS"]
