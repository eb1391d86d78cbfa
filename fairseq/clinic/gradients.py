"""Gradient norms of every sub-layer, as the first update would see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.clinic.stability import geometric_mean, mean_loss
from fairseq.clinic.subjects import stream_of, sublayers
from fairseq.data.translation import Batch
from fairseq.models.transformer import Transformer


def gradient_norms(model: Transformer, batch: Batch) -> dict[str, dict[str, list[Any]]]:
    """For ``encoder`` and ``decoder``, lists with an item a sub-layer, in order:

    kind: self_attn, encoder_attn or ffn; parameters: norm of the loss's gradient in the branch's parameters; output: in
    the stream after the sub-layer, (batch, time, dim). The loss is label-smoothed (0.1), in nats a target token. The
    model's parameters are left without gradients.
    """
    streams: dict[nn.Module, Tensor] = {}

    def keep(residual: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream = stream_of(output)
        stream.retain_grad()
        streams[residual] = stream

    stacks = {name: sublayers(getattr(model, name)) for name in ("encoder", "decoder")}
    handles = [rule.register_forward_hook(keep) for stack in stacks.values() for _, _, rule in stack]
    model.zero_grad(set_to_none=True)
    try:
        loss = mean_loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    loss.backward()
    result: dict[str, dict[str, list[Any]]] = {
        name: {
            "kind": [kind for kind, _, _ in stack],
            "parameters": [_norm(p.grad for p in branch.parameters()) for _, branch, _ in stack],
            "output": [_norm([streams[rule].grad]) for _, _, rule in stack],
        }
        for name, stack in stacks.items()
    }
    model.zero_grad(set_to_none=True)
    return result


def mean(runs: Sequence[dict[str, dict[str, list[Any]]]]) -> dict[str, dict[str, list[Any]]]:
    """The geometric mean over several models of one shape."""
    result = {}
    for stack, first in runs[0].items():
        means = {
            what: [geometric_mean(values) for values in zip(*(run[stack][what] for run in runs), strict=True)]
            for what in ("parameters", "output")
        }
        result[stack] = {"kind": first["kind"], **means}
    return result


def as_text(model: dict[str, Any]) -> str:
    """A line a stack: the range of the parameters' gradient norms. model: a label and ``mean``'s result."""
    lines = []
    for stack in ("encoder", "decoder"):
        norms = model[stack]["parameters"]
        lines.append(
            f"{model['label']}, {stack}: gradient norm {norms[0]:.3g} in the first sub-layer, {norms[-1]:.3g} in the "
            f"last; least {min(norms):.3g}, most {max(norms):.3g}"
        )
    return "\n".join(lines)


def _norm(gradients: Any) -> float:
    found = [g.norm() for g in gradients if g is not None]
    return float(torch.stack(found).norm()) if found else 0.0
