"""The optimiser's state in fairseq's checkpoints -> ours.

fairseq numbers parameters as its model had them, and those that get no gradient are numbered too. Which they are, the
checkpoint's ``model`` entry tells, whose order is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairseq.models.state_dict import fairseqs_parameters, from_fairseq
from fairseq.models.transformer import Transformer

FAIRSEQS_NAMES = {"FairseqAdam": "adam", "FairseqAdafactor": "adafactor", "SGD": "sgd"}  # classes there -> ours


def from_fairseqs(state: Mapping[str, Any], stored: Mapping[str, Tensor], model: Transformer) -> dict[int, Any]:
    """``last_optimizer_state`` of fairseq as what our optimiser's ``state_dict()`` calls ``state``.

    stored: the checkpoint's ``model`` entry. Raises ValueError unless it fits the model's parameters.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = fairseqs_parameters(stored, own)
    [group] = state["param_groups"]
    if len(group["params"]) != len(names):
        raise ValueError(f"its optimiser has {len(group['params'])} parameters, its model {len(names)}")
    kinds: dict[str, dict[str, Tensor]] = {}  # exp_avg and others, by fairseq's names
    steps = [0]
    for number, name in zip(group["params"], names, strict=True):
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim():
                kinds.setdefault(key, {})[name] = value
            elif key == "step":
                steps.append(int(value))
    if not kinds:
        return {}
    ours: dict[str, dict[str, Any]] = {name: {} for name in own}
    for key, values in kinds.items():
        for name, value in from_fairseq(values).items():
            if name not in own:
                continue
            if value.dim() == own[name].dim() and value.shape != own[name].shape:
                raise ValueError(f"its {key} of {name} has shape {tuple(value.shape)}")
            ours[name][key] = value
    for name, entries in ours.items():
        if not entries:
            raise ValueError(f"its optimiser has nothing of {name}")
        entries |= {"step": max(steps)} if max(steps) else {}
    return dict(enumerate(ours.values()))
