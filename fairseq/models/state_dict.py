"""Parameter names: ours in the modules <-> fairseq's in checkpoint files.

In our modules a residual rule owns its LayerNorm and omega; in fairseq's checkpoints these are the layer's own
(``self_attn_layer_norm``, and the original Admin code's ``attention_ratio_change``). Older spellings are read too.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import torch
from torch import Tensor

from fairseq.errors import FairseqError

# (our prefix within a layer, fairseq's), per stack
_LAYER_NAMES = {
    "encoder": (
        ("self_attn_residual.norm.", "self_attn_layer_norm."),
        ("self_attn_residual.omega", "attention_ratio_change"),
        ("ffn_residual.norm.", "final_layer_norm."),
        ("ffn_residual.omega", "fc_ratio_change"),
        ("feed_forward.fc1.", "fc1."),
        ("feed_forward.fc2.", "fc2."),
    ),
    "decoder": (
        ("self_attn_residual.norm.", "self_attn_layer_norm."),
        ("self_attn_residual.omega", "self_ratio_change"),
        ("encoder_attn_residual.norm.", "encoder_attn_layer_norm."),
        ("encoder_attn_residual.omega", "encoder_ratio_change"),
        ("ffn_residual.norm.", "final_layer_norm."),
        ("ffn_residual.omega", "fc_ratio_change"),
        ("feed_forward.fc1.", "fc1."),
        ("feed_forward.fc2.", "fc2."),
    ),
}
_OLD_LAYER_NORMS = {  # up to fairseq 0.6
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}
# fairseq 0.12.2 keeps these beside the parameters they repeat, for a fast path, and does not train them
_FAST_PATH = re.compile(r"^encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")
_PARTS = ("q", "k", "v")  # of a fused projection, in this order
_FIRST_OF_THREE = re.compile(r"^(.+_attn\.)q_proj\.weight$")
# in fairseq 0.8's decoders of another width than the encoder, attention to which cannot be fused
_SEPARATE = re.compile(r"(?<=_attn\.[qkv])_proj_weight$")
_LAYER = re.compile(r"^(encoder|decoder)\.layers\.(\d+)\.(.+)$")
_POSITIONS = re.compile(r"^(encoder|decoder)\.embed_positions\.(_float_tensor|weights)$")
_VERSION = 3.0  # fairseq takes a stack without a version for one whose final LayerNorm is to be dropped


def to_fairseq(state: Mapping[str, Tensor], positions: bool = True) -> dict[str, Tensor]:
    """``model.state_dict()`` with the names that fairseq 0.8 to 0.12 and the original Admin code read.

    positions: whether the model has positional embeddings.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "decoder.output_projection.weight":
            if tensor.data_ptr() != state["decoder.embed_tokens.weight"].data_ptr():
                out["decoder.embed_out"] = tensor
            continue
        match = _LAYER.match(name)
        if match:
            stack, layer, rest = match.groups()
            for ours, theirs in _LAYER_NAMES[stack]:
                if rest.startswith(ours):
                    rest = theirs + rest[len(ours) :]
                    break
            name = f"{stack}.layers.{layer}.{rest}"
        out[name] = tensor
    for stack in ("encoder", "decoder"):
        out[f"{stack}.version"] = torch.tensor([_VERSION])
        if positions and f"{stack}.embed_positions.weight" not in out:
            out[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
    return out


def fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``to_fairseq``'s result with the three projections of each attention in one, as fairseq 0.8 has them; later
    versions read that too. Those of a decoder of another width than the encoder cannot be one.
    """
    out = dict(state)
    for name in state:
        if not (match := _FIRST_OF_THREE.match(name)):
            continue
        parts = {kind: [f"{match[1]}{part}_proj.{kind}" for part in _PARTS] for kind in ("weight", "bias")}
        if len({state[part].shape for part in parts["weight"]}) == 1:
            for kind, names in parts.items():
                out[f"{match[1]}in_proj_{kind}"] = torch.cat([out.pop(part) for part in names])
    return out


def from_fairseq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's ``model`` entry with our names; fused ``in_proj_weight`` is split, buffers and copies left out.

    Raises FairseqError when a fused parameter is not three in one.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".version") or _POSITIONS.match(name) or _FAST_PATH.match(name):
            continue
        match = _LAYER.match(name)
        if match is None:
            out[name] = tensor
            continue
        stack, layer, rest = match.groups()
        for old_rest, part in _split_fused(rest, tensor):
            out[f"{stack}.layers.{layer}.{_layer_name(stack, old_rest)}"] = part
    if "decoder.output_projection.weight" not in out:
        source = "decoder.embed_out" if "decoder.embed_out" in out else "decoder.embed_tokens.weight"
        if source in out:
            out["decoder.output_projection.weight"] = out[source]
    out.pop("decoder.embed_out", None)
    return out


def fairseqs_parameters(state: Mapping[str, Tensor], own: Container[str]) -> list[str]:
    """Of a checkpoint's ``model`` entry, the names of what fairseq's optimiser had, in its order: no buffers, and what
    is shared once. own: the parameters' names in our model, without those shared with an earlier one.
    """
    return [
        name
        for name, tensor in state.items()
        if _FAST_PATH.match(name) or any(ours in own for ours in from_fairseq({name: tensor}))
    ]


def _split_fused(rest: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    for fused, kind in (("in_proj_weight", "weight"), ("in_proj_bias", "bias")):
        if rest.endswith(fused):
            if tensor.dim() == 0 or tensor.size(0) % 3 or tensor.size(0) == 0:
                raise FairseqError(f"parameter {rest} of shape {tuple(tensor.shape)} is not three in one")
            attention = rest[: -len(fused)]
            return [(f"{attention}{n}_proj.{kind}", part) for n, part in zip(_PARTS, tensor.chunk(3), strict=True)]
    return [(_SEPARATE.sub(r"_proj.weight", rest), tensor)]


def _layer_name(stack: str, rest: str) -> str:
    old = re.match(r"^layer_norms\.(\d)\.(.+)$", rest)
    if old and int(old[1]) < len(_OLD_LAYER_NORMS[stack]):
        rest = f"{_OLD_LAYER_NORMS[stack][int(old[1])]}.{old[2]}"
    for ours, theirs in _LAYER_NAMES[stack]:
        if rest.startswith(theirs):
            return ours + rest[len(theirs) :]
    return rest
