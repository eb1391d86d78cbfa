"""Folding omega away: the same outputs from an ordinary Post-LN Transformer.

Sub-layer i computes ``x_i = LN_i(omega_i * x_{i-1} + f_i(x_{i-1}))``, the product taken by channel. Let the stream
carry ``omega_i * x_{i-1}`` instead of ``x_{i-1}``, and the shortcut needs no factor. For that, what makes x_{i-1} is
scaled by omega_i: gain and bias of LN_{i-1} or, before the first sub-layer, the embeddings. The projections of f_i that
read the stream divide by omega_i. Nothing scales a stack's last output: the encoder's is read by every decoder layer,
the decoder's by the output projection.

An input embedding that is scaled can no longer be the output projection too, and scaled sinusoids are sinusoids no
more: such matrices part, and such positions become learned ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.admin.residual import AdminResidual, DeepNet, LookLinear, PostLN
from fairseq.errors import FairseqError

if TYPE_CHECKING:  # the Transformer's module imports this package
    from fairseq.models.config import TransformerConfig
    from fairseq.models.transformer import Transformer

PLAIN = ("default", "looklinear")  # init types whose trained models are ordinary Transformers
FOLDABLE = (*PLAIN, "adaptive", "adaptive-closed-form", "deepnet")
_STACKS = ("encoder", "decoder")


class _Sublayer(NamedTuple):
    """name: the residual's in the model. readers: the branch's projections of the stream, weights (out, dim)."""

    name: str
    residual: nn.Module
    readers: list[nn.Linear]


@torch.no_grad()
def fold(model: Transformer) -> Transformer:
    """An ordinary Post-LN Transformer (init type default) with the outputs of ``model``, of init type in FOLDABLE.

    Mode, device and type are the model's, which is left untouched; products are taken in float64. Raises FairseqError
    for another init type, for Pre-LN, and where an omega has elements that cannot be divided by.
    """
    scales = {stack: [_shortcut_scale(s, model) for s in _sublayers(model, stack)] for stack in _STACKS}
    plain = _build(model, _plain_config(model.cfg, *(bool(scales[stack][0].ne(1).any()) for stack in _STACKS)))
    for stack in _STACKS:
        _fold_stack(plain, stack, scales[stack])
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
        parts = [("self_attn_residual", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])]
        if stack == "decoder":
            parts.append(("encoder_attn_residual", ["encoder_attn.q_proj"]))  # keys and values are the encoder's
        parts.append(("ffn_residual", ["feed_forward.fc1"]))
        for residual, readers in parts:
            modules: list[Any] = [layer.get_submodule(reader) for reader in readers]
            found.append(_Sublayer(f"{stack}.layers.{i}.{residual}", layer.get_submodule(residual), modules))
    return found


def _shortcut_scale(sublayer: _Sublayer, model: Transformer) -> Tensor:
    """What the shortcut of a Post-LN is multiplied by: (dim,), float64, 1 where the rule has no factor."""
    rule = type(sublayer.residual)  # itself, since a subclass may compute something else
    residual: Any = sublayer.residual
    if rule not in (PostLN, LookLinear, AdminResidual, DeepNet):
        raise FairseqError(
            f"init type {model.cfg.init_type} cannot be folded: {sublayer.name} is {rule.__name__}; what can be is "
            f"Post-LN of init type {', '.join(FOLDABLE)}"
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


def _plain_config(cfg: TransformerConfig, encoder_scaled: bool, decoder_scaled: bool) -> TransformerConfig:
    """The folded model's settings. encoder_scaled, decoder_scaled: whether omega of the first sub-layer is not 1."""
    cfg = replace(cfg, init_type="default")
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
    """A model of settings ``cfg`` with the parameters of ``model`` but omega."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_residual.omega")}
    for stack in _STACKS:
        positions = getattr(model, stack).embed_positions
        if positions is not None and getattr(cfg, f"{stack}_learned_pos"):
            state[f"{stack}.embed_positions.weight"] = positions.weight
    src_embedding, tgt_embedding = model.encoder.embed_tokens, model.decoder.embed_tokens
    with torch.random.fork_rng(devices=[]):  # it is built on the CPU, and its random values are overwritten
        plain = type(model)(cfg, src_embedding.num_embeddings, tgt_embedding.num_embeddings)
    plain.to(src_embedding.weight.device, src_embedding.weight.dtype).load_state_dict(state)
    return plain.train(model.training)


def _fold_stack(plain: Transformer, stack_name: str, scales: list[Tensor]) -> None:
    """Move the shortcuts' scales, one (dim,) a sub-layer, into the parameters around them."""
    stack = getattr(plain, stack_name)
    if stack.layernorm_embedding is not None:
        source = [stack.layernorm_embedding.weight, stack.layernorm_embedding.bias]
    else:
        source = [stack.embed_tokens.weight]
        if stack.embed_positions is not None:
            source.append(stack.embed_positions.weight)
    for sublayer, scale in zip(_sublayers(plain, stack_name), scales, strict=True):
        for tensor in source:  # each (dim,) or (rows, dim)
            tensor.copy_(tensor.double() * scale)
        for linear in sublayer.readers:
            linear.weight.copy_(linear.weight.double() / scale)
        norm: Any = sublayer.residual.norm
        source = [norm.weight, norm.bias]
