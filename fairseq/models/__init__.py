"""The Transformer, its settings and presets, and trained models ready to translate.

``TransformerModel`` is loaded when asked for: it needs the whole package, and the rest here does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq.models.hub import TransformerModel

__all__ = ["TransformerModel"]


def __getattr__(name: str) -> Any:
    if name == "TransformerModel":
        from fairseq.models.hub import TransformerModel

        return TransformerModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
