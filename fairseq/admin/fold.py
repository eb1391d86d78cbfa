"""Folding omega away: the same outputs from an ordinary Post-LN Transformer.

Sub-layer i computes ``x_i = LN_i(omega_i * x_{i-1} + f_i(x_{i-1}))``, the product taken by channel. Let the stream
carry ``omega_i * x_{i-1}`` instead of ``x_{i-1}``, and the shortcut needs no factor. For that, what makes x_{i-1} is
scaled by omega_i: gain and bias of LN_{i-1} or, before the first sub-layer, the embeddings. The projections of f_i that
read the stream divide by omega_i. Nothing scales a stack's last output: the encoder's is read by every decoder layer,
the decoder's by the output projection. A factor of the branch, ReZero's alpha, goes into f_i's last projection.

An input embedding that is scaled can no longer be the output projection too, and scaled sinusoids are sinusoids no
more: such matrices part, and such positions become learned ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq.admin.residual import (
    ADMIN,
    B2T,
    CLOSED_FORM,
    AdminResidual,
    DeepNet,
    LookLinear,
    PostLN,
    PreLN,
    ReZero,
    ReZeroPostLN,
    SubLN,
)
from fairseq.errors import FairseqError

if TYPE_CHECKING:  # the Transformer's module imports this package
    from fairseq.models.config import TransformerConfig
    from fairseq.models.transformer import Transformer

PLAIN = ("default", "looklinear")  # init types whose trained models are ordinary Transformers
FOLDABLE = (*PLAIN, ADMIN, CLOSED_FORM, "deepnet", "rezero_postln")
_STACKS = ("encoder", "decoder")
_FOLDABLE_RULES = (PostLN, LookLinear, AdminResidual, DeepNet, ReZeroPostLN)
_WHY_NOT = {
    PreLN: ", whose stream is never normalised",
    ReZero: ", which has no LayerNorm",
    SubLN: ", which has a LayerNorm inside each branch",
    B2T: ", which adds the layer's input once more",
}


class _Sublayer(NamedTuple):
    """name: the residual's in the model. readers: the branch's projections of the stream, weights (out, dim). last: the
    projection that makes the branch's output, weight (dim, in).
    """

    name: str
    residual: nn.Module
    readers: list[nn.Linear]
    last: nn.Linear


@torch.no_grad()
def fold(model: Transformer) -> Transformer:
    """An ordinary Post-LN Transformer (init type default) with the outputs of ``model``, of init type in FOLDABLE.

    Mode, device and type are the model's, which is left untouched; products are taken in float64. Raises FairseqError
    for another init type, for Pre-LN, and where an omega has elements that cannot be divided by.
    """
    scales = {stack: [_shortcut_scale(s, model) for s in _sublayers(model, stack)] for stack in _STACKS}
    plain = _build(model, _plain_config(model.cfg, *(bool(scales[stack][0].ne(1).any()) for stack in _STACKS)))
    for stack in _STACKS:
        _fold_stack(plain, stack, scales[stack], [_branch_scale(s) for s in _sublayers(model, stack)])
    return plain


def fold_notes(before: TransformerConfig, after: TransformerConfig) -> list[str]:
    """What folding changed besides values, a sentence each. before, after: the settings of the two models."""
    notes = []
    if before.share_all_embeddings and not after.share_all_embeddings:
        if after.share_decoder_input_output_embed:
            notes.append(
                "the encoder's input embedding is untied from the decoder's: its columns are scaled by omega of the "
                "first sub-layer"
            )
        else:
            notes.append(
                "encoder input, decoder input and output projection, one matrix before, are three: omega of a stack's "
                "first sub-layer scales the columns of its input embedding"
            )
    elif before.share_decoder_input_output_embed and not after.share_decoder_input_output_embed:
        notes.append(
            "the decoder's input embedding is untied from the output projection: its columns are scaled by omega of "
            "the first sub-layer"
        )
    for stack in _STACKS:
        if getattr(after, f"{stack}_learned_pos") and not getattr(before, f"{stack}_learned_pos"):
            notes.append(
                f"sinusoidal positions of the {stack} are stored as learned ones, scaled by omega of the first "
                f"sub-layer: fairseq reads them with --{stack}-learned-pos"
            )
    return notes


def _sublayers(model: Transformer, stack: str) -> list[_Sublayer]:
    """The residual sub-layers of a stack, in order."""
    found = []
    for i, layer in enumerate(getattr(model, stack).layers):
        parts = [("self_attn", ["q_proj", "k_proj", "v_proj"], "out_proj", "self_attn_residual")]
        if stack == "decoder":  # keys and values are the encoder's
            parts.append(("encoder_attn", ["q_proj"], "out_proj", "encoder_attn_residual"))
        parts.append(("feed_forward", ["fc1"], "fc2", "ffn_residual"))
        for branch, readers, last, residual in parts:
            *modules, end = (cast("nn.Linear", layer.get_submodule(f"{branch}.{name}")) for name in [*readers, last])
            found.append(_Sublayer(f"{stack}.layers.{i}.{residual}", layer.get_submodule(residual), modules, end))
    return found


def _shortcut_scale(sublayer: _Sublayer, model: Transformer) -> Tensor:
    """What the shortcut of a Post-LN is multiplied by: (dim,), float64, 1 where the rule has no factor."""
    rule = type(sublayer.residual)  # itself, since a subclass may compute something else
    residual: Any = sublayer.residual
    if rule not in _FOLDABLE_RULES:
        raise FairseqError(
            f"init type {model.cfg.init_type} cannot be folded: {sublayer.name} is {rule.__name__}"
            f"{_WHY_NOT.get(rule, '')}; what can be is Post-LN of init type {', '.join(FOLDABLE)}"
        )
    weight = residual.norm.weight
    scale = torch.ones_like(weight, dtype=torch.float64)
    if rule is AdminResidual:
        scale = residual.omega.double()
    elif rule is DeepNet:
        scale *= residual.alpha
    usable = scale.isfinite() & scale.reciprocal().to(weight.dtype).isfinite()  # of what is tiny it overflows
    if not usable.all():
        channel = int(usable.logical_not().nonzero()[0])
        raise FairseqError(
            f"cannot fold: omega of {sublayer.name} is {scale[channel].item():g} in channel {channel}, which cannot be "
            "divided by"
        )
    return scale


def _branch_scale(sublayer: _Sublayer) -> float:
    """What the branch of a Post-LN is multiplied by."""
    residual: Any = sublayer.residual
    return residual.alpha.item() if type(residual) is ReZeroPostLN else 1.0


def _plain_config(cfg: TransformerConfig, encoder_scaled: bool, decoder_scaled: bool) -> TransformerConfig:
    """The folded model's settings. encoder_scaled, decoder_scaled: whether omega of the first sub-layer is not 1."""
    cfg = replace(cfg, init_type="default", rule_settings={})
    if cfg.layernorm_embedding:  # it takes omega, and the embeddings stay
        return cfg
    tied_output = cfg.share_all_embeddings or cfg.share_decoder_input_output_embed
    if (encoder_scaled or decoder_scaled) and tied_output:
        cfg.share_all_embeddings = False
        cfg.share_decoder_input_output_embed = not decoder_scaled
    if not cfg.no_token_positional_embeddings:
        cfg.encoder_learned_pos |= encoder_scaled
        cfg.decoder_learned_pos |= decoder_scaled
    return cfg


def _build(model: Transformer, cfg: TransformerConfig) -> Transformer:
    """A model of settings ``cfg`` with the parameters of ``model`` but omega and alpha."""
    factors = ("_residual.omega", "_residual.alpha")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(factors)}
    for stack in _STACKS:
        positions = getattr(model, stack).embed_positions
        if positions is not None and getattr(cfg, f"{stack}_learned_pos"):
            state[f"{stack}.embed_positions.weight"] = positions.weight
    src_embedding, tgt_embedding = model.encoder.embed_tokens, model.decoder.embed_tokens
    with torch.random.fork_rng(devices=[]):  # it is built on the CPU, and its random values are overwritten
        plain = type(model)(cfg, src_embedding.num_embeddings, tgt_embedding.num_embeddings)
    plain.to(src_embedding.weight.device, src_embedding.weight.dtype).load_state_dict(state)
    return plain.train(model.training)


def _fold_stack(plain: Transformer, stack_name: str, scales: list[Tensor], branch_scales: list[float]) -> None:
    """Move the scales of shortcuts, one (dim,) a sub-layer, and of branches into the parameters around them."""
    stack = getattr(plain, stack_name)
    if stack.layernorm_embedding is not None:
        source = [stack.layernorm_embedding.weight, stack.layernorm_embedding.bias]
    else:
        source = [stack.embed_tokens.weight]
        if stack.embed_positions is not None:
            source.append(stack.embed_positions.weight)
    for sublayer, scale, branch_scale in zip(_sublayers(plain, stack_name), scales, branch_scales, strict=True):
        for tensor in source:  # each (dim,) or (rows, dim)
            tensor.copy_(tensor.double() * scale)
        for linear in sublayer.readers:
            linear.weight.copy_(linear.weight.double() / scale)
        for tensor in (sublayer.last.weight, sublayer.last.bias):
            tensor.copy_(tensor.double() * branch_scale)
        norm: Any = sublayer.residual.norm
        source = [norm.weight, norm.bias]
