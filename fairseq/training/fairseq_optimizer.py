"""The optimiser's state in fairseq's checkpoints -> ours.

fairseq numbers parameters as its model had them, and those that get no gradient are numbered too. Which they are, the
checkpoint's ``model`` entry tells, whose order is the same. With ``--fp16`` they are one vector, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fairseq.models.state_dict import fairseqs_parameters, from_fairseq
from fairseq.models.transformer import Transformer

# Classes there -> ours; radam's is the one that the original Admin code's recipes train with
_NAMES = {"FairseqAdam": "adam", "FairseqAdafactor": "adafactor", "SGD": "sgd", "FairseqRAdam": "radam"}
_MIXED_PRECISION = ("FP16Optimizer", "MemoryEfficientFP16Optimizer")  # around the one that the settings name


def stored_optimizer(name: Any, args: Mapping[str, Any]) -> tuple[Any, bool]:
    """(our name of the optimiser, whether fairseq wrote its state). name: in ``optimizer_history``; args: settings."""
    if name in _MIXED_PRECISION:
        return args.get("optimizer"), True
    return _NAMES.get(name, name), name in _NAMES


def from_fairseqs(state: Mapping[str, Any], stored: Mapping[str, Tensor], model: Transformer) -> dict[int, Any]:
    """``last_optimizer_state`` of fairseq as what our optimiser's ``state_dict()`` calls ``state``.

    stored: the checkpoint's ``model`` entry. Raises ValueError unless it fits the model's parameters.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = fairseqs_parameters(stored, own)
    [group] = state["param_groups"]
    numbers, entries_of = group["params"], state["state"]
    if len(numbers) == 1 < len(names) and entries_of:
        entries_of = _unflattened(entries_of[numbers[0]], [stored[name] for name in names])
        numbers = list(entries_of)
    if len(numbers) != len(names):
        raise ValueError(f"its optimiser has {len(numbers)} parameters, its model {len(names)}")
    kinds: dict[str, dict[str, Tensor]] = {}  # exp_avg and others, by fairseq's names
    steps = [0]
    for number, name in zip(numbers, names, strict=True):
        for key, value in entries_of.get(number, {}).items():
            if isinstance(value, Tensor) and value.dim():
                if name.endswith("in_proj_weight") and value.shape != stored[name].shape:  # adafactor
                    raise ValueError(f"its {key} of {name} is that of three matrices as one")
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


def _unflattened(flat: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[int, dict[str, Any]]:
    """The state of each of ``parameters`` from that of all of them in one vector, as fairseq's ``--fp16`` keeps it.

    Raises ValueError when it is of another length.
    """
    sizes = [parameter.numel() for parameter in parameters]
    parts: dict[int, dict[str, Any]] = {number: {} for number in range(len(sizes))}
    for key, value in flat.items():
        if not isinstance(value, Tensor) or not value.dim():
            parts[0][key] = value
            continue
        if value.numel() != sum(sizes):
            raise ValueError(f"its {key} has {value.numel():,} elements, its model's parameters {sum(sizes):,}")
        for number, part in enumerate(value.split(sizes)):
            parts[number][key] = part.reshape(parameters[number].shape).clone()
    return parts
