"""The mean of several checkpoints' parameters: the cheapest ensemble, one model at the end.

A training run moves around a minimum; the mean of its last checkpoints is nearer to it than each of them, usually by
half a BLEU point to one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.checkpoint import load_checkpoint, without_optimizer
from fairseq.errors import FairseqError

_EPOCH_FILE = re.compile(r"checkpoint(\d+)\.pt")
_UPDATE_FILE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def last_checkpoints(
    directory: str | Path, count: int, *, by_updates: bool = False, upper_bound: int | None = None
) -> list[Path]:
    """The ``count`` latest ``checkpointEPOCH.pt`` of a directory, or ``checkpoint_EPOCH_UPDATES.pt``; latest first.

    upper_bound: none after this epoch or update. Raises FairseqError when there are fewer.
    """
    if count < 1:
        raise FairseqError(f"{count} checkpoints to average: must be at least 1")
    if not os.path.isdir(directory):
        raise FairseqError(f"--inputs {directory}: no such directory")
    pattern = _UPDATE_FILE if by_updates else _EPOCH_FILE
    found = [(int(m[1]), path) for path in Path(directory).iterdir() if (m := pattern.fullmatch(path.name))]
    found = sorted((number, path) for number, path in found if upper_bound is None or number <= upper_bound)
    if len(found) < count:
        kind = "checkpoint_EPOCH_UPDATES.pt" if by_updates else "checkpointEPOCH.pt"
        limit = "" if upper_bound is None else f" up to {upper_bound}"
        raise FairseqError(f"{directory}: {len(found)} files {kind}{limit}, and {count} are to be averaged")
    return [path for _, path in reversed(found[-count:])]


@torch.no_grad()
def average_checkpoints(paths: Sequence[str | Path]) -> dict[str, Any]:
    """A checkpoint with the mean of the parameters of ``paths``, summed in float64, in the first one's types;
    that of float16, as ``--fp16`` trainings of fairseq save it, in float32, as by fairseq's script.

    All else is the first one's, the optimiser's state left out, which would not fit. What is no floating-point number
    is not averaged. Raises FairseqError when a file cannot be read or its parameters are not those of the first.
    """
    if not paths:
        raise FairseqError("no checkpoints to average")
    first = load_checkpoint(paths[0])
    parameters: dict[str, Tensor] = first["model"]
    sums = {name: tensor.double() for name, tensor in parameters.items() if tensor.is_floating_point()}
    for path in paths[1:]:
        other = load_checkpoint(path)["model"]
        _check_same(parameters, other, paths[0], path)
        for name, total in sums.items():
            total += other[name]
    means = {name: (total / len(paths)).to(_type_of_mean(parameters[name])) for name, total in sums.items()}
    return without_optimizer(first) | {"model": parameters | means}


def _type_of_mean(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _check_same(
    first: dict[str, Tensor],
    other: dict[str, Tensor],
    first_path: str | Path,
    path: str | Path,
) -> None:
    for name in sorted(first.keys() ^ other.keys()):
        has, lacks = (first_path, path) if name in first else (path, first_path)
        raise FairseqError(f"{has} has parameter {name} and {lacks} has not; average checkpoints of one model")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            raise FairseqError(
                f"{path}: {name} is {tuple(other[name].shape)}, and {tuple(tensor.shape)} in {first_path}; "
                "average checkpoints of one model"
            )
