"""The Transformer, its settings and presets.

``TransformerModel``, a trained model ready to translate, is found here as in fairseq. It stands above this package, in
``fairseq.hub``, and is loaded when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq.hub import TransformerModel

__all__ = ["TransformerModel"]


def __getattr__(name: str) -> Any:
    if name == "TransformerModel":
        from fairseq.hub import TransformerModel

        return TransformerModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
