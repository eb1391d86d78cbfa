"""Trained models for other programs: one file a format, each with a function that writes it and says what it did."""

from collections.abc import Callable

from fairseq.export.ctranslate2_format import export_ctranslate2
from fairseq.export.fairseq_format import export_fairseq
from fairseq.export.huggingface_format import export_huggingface
from fairseq.options import ExportConfig

# --format -> a function of all flags that returns lines to print
FORMATS: dict[str, Callable[[ExportConfig], list[str]]] = {
    "fairseq": export_fairseq,
    "ctranslate2": export_ctranslate2,
    "huggingface": export_huggingface,
}

__all__ = ["FORMATS"]
