"""omega of every sub-layer: what training started from, and what it has become."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fairseq import admin
from fairseq.checkpoint import load_checkpoint, starting_omega
from fairseq.errors import FairseqError
from fairseq.models.state_dict import from_fairseq

_OMEGA = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(self_attn|encoder_attn|ffn)_residual\.omega")
_ORDER = ("self_attn", "encoder_attn", "ffn")
_FIRST_BYTES = (b"PK", b"\x80")  # of a checkpoint: a zip archive, or a bare pickle


@dataclass
class StackOmega:
    """Lists with an item a sub-layer, in order. start: the value all elements began at; None if it is not known.

    mean, std, least, most: over the elements of the trained vector; None for an omega file.
    """

    start: list[float] | None
    mean: list[float] | None = None
    std: list[float] | None = None
    least: list[float] | None = None
    most: list[float] | None = None


def read_omega(path: str | Path) -> dict[str, StackOmega]:
    """omega of ``encoder`` and ``decoder`` in a checkpoint or an omega file.

    Raises FairseqError when it can be read as neither, or has no omega.
    """
    try:
        with open(path, "rb") as handle:
            is_checkpoint = handle.read(2).startswith(_FIRST_BYTES)
    except OSError as error:
        raise FairseqError(f"{path}: cannot read: {error.strerror}") from error
    if not is_checkpoint:
        profile = admin.OmegaProfile.load(path)
        return {"encoder": StackOmega(profile.encoder), "decoder": StackOmega(profile.decoder)}
    state = load_checkpoint(path)
    start = starting_omega(state)
    vectors: dict[str, dict[tuple[int, int], Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in from_fairseq(state["model"]).items():
        if match := _OMEGA.fullmatch(name):
            if not tensor.numel():
                raise FairseqError(f"checkpoint {path}: {name} is empty")
            stack, layer, kind = match.groups()
            vectors[stack][int(layer), _ORDER.index(kind)] = tensor.double()
    if not vectors["encoder"] and not vectors["decoder"]:
        raise FairseqError(f"checkpoint {path}: no omega in it; it is not of an Admin model, or was folded")
    return {
        stack: _statistics([found[place] for place in sorted(found)], getattr(start, stack) if start else None)
        for stack, found in vectors.items()
    }


def _statistics(vectors: list[Tensor], start: list[float] | None) -> StackOmega:
    def of(function: Any) -> list[float]:
        return [float(function(vector)) for vector in vectors]

    return StackOmega(
        start=start if start and len(start) == len(vectors) else None,
        mean=of(Tensor.mean),
        std=of(lambda v: v.std(correction=0)),
        least=of(Tensor.min),
        most=of(Tensor.max),
    )


def table(stacks: dict[str, StackOmega]) -> str:
    """All sub-layers, a line each."""
    columns = ("start", "mean", "std", "least", "most")
    lines = []
    for name, stack in stacks.items():
        present = [column for column in columns if getattr(stack, column) is not None]
        lines.append(f"{name:>9} " + " ".join(f"{column:>9}" for column in present))
        for i in range(len(getattr(stack, present[0]))):
            lines.append(f"{i + 1:9} " + " ".join(f"{getattr(stack, column)[i]:9.4f}" for column in present))
    return "\n".join(lines)
