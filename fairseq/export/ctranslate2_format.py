"""Directories that CTranslate2 translates with, made by its own model specification.

Its Transformer is Post-LN or Pre-LN, an encoder and a decoder apart; positions are any table, counted from 0 over the
tokens there are, which is how the rows after the padding index are used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from fairseq.errors import FairseqError
from fairseq.export.plain import Exportable, check_unique, describe, open_checkpoint, refuse_flags
from fairseq.export.self_check import SEARCH, check_scores, count_same_translations
from fairseq.generation.ctranslate2_backend import CTranslate2Model
from fairseq.models.transformer import TransformerDecoder, TransformerEncoder
from fairseq.options import ExportConfig
from fairseq.utils.extras import require
from fairseq.utils.io import new_directory
from fairseq.utils.symbols import PAD

ACTIVATIONS = {  # --activation-fn -> CTranslate2's name
    "relu": "RELU",
    "gelu": "GELU",
    "gelu_accurate": "GELUTanh",
    "gelu_fast": "GELUTanh",
    "tanh": "Tanh",
    "swish": "SWISH",
}

# of the mean difference of two log-probabilities, relative to their mean where that is above 1
TOLERANCES = {"float32": 1e-4, "int16": 1e-2, "float16": 1e-2, "bfloat16": 1e-2, "int8": 5e-2}


def export_ctranslate2(config: ExportConfig) -> list[str]:
    """Write directory ``config.output``: model.bin, config.json and the vocabulary. Returns lines to print.

    Raises FairseqError, and leaves no directory, when the model cannot be read or expressed, or when what was written
    does not compute what the original does.
    """
    refuse_flags(config, "bpe", "bpe_codes", "sentencepiece_model")
    require("ctranslate2", "export", "--format ctranslate2")
    quantization = config.quantization or "float32"
    exported = open_checkpoint(config)
    spec = build_spec(exported)
    with new_directory(config.output) as directory:
        spec.validate()
        spec.optimize(quantization=quantization)
        _leave_headroom(spec)
        spec.save(str(directory))
        translator = CTranslate2Model(directory)

        def translate(sentences: Sequence[Tensor]) -> list[Tensor]:
            return [best.tokens for best, *_ in translator.translate(sentences, SEARCH, token_scores=False)]

        # a CPU computes in what it is fast in
        tolerance = max(TOLERANCES[name.split("_")[0]] for name in (quantization, translator.compute_type))
        check = [
            check_scores(exported.original, translator.score, tolerance),
            count_same_translations(exported.original, exported.sentences, translate),
        ]
    if quantization == "int16" and translator.compute_type.startswith("int8"):
        exported.notes.append(
            "this machine has no int16: CTranslate2 computes in int8, coarser than --quantization int8"
        )
    return [
        *describe(exported, config.output, f"CTranslate2, weights in {quantization}"),
        *(f"self-check, computed in {translator.compute_type}: {line}" for line in check),
    ]


def build_spec(exported: Exportable) -> Any:
    """The ``ctranslate2.specs.TransformerSpec`` of a model. Raises FairseqError for what it has no place for."""
    from ctranslate2 import specs
    from ctranslate2.specs import common_spec

    model, cfg = exported.plain, exported.plain.cfg
    if cfg.activation_fn not in ACTIVATIONS:
        raise FairseqError(f"CTranslate2 has no --activation-fn {cfg.activation_fn}; it has {', '.join(ACTIVATIONS)}")
    check_unique(exported, "CTranslate2's vocabularies have")
    shared: dict[str, Any] = {
        "activation": getattr(common_spec.Activation, ACTIVATIONS[cfg.activation_fn]),
        "layernorm_embedding": cfg.layernorm_embedding,
    }
    encoder = specs.TransformerEncoderSpec(
        cfg.encoder_layers, cfg.encoder_attention_heads, pre_norm=model.encoder.layer_norm is not None, **shared
    )
    decoder = specs.TransformerDecoderSpec(
        cfg.decoder_layers,
        cfg.decoder_attention_heads,
        pre_norm=model.decoder.layer_norm is not None,
        alignment_heads=cfg.decoder_attention_heads,  # attention is the mean of all heads of the last layer
        **shared,
    )
    _fill_stack(encoder, encoder.embeddings[0], model.encoder, cfg.max_source_positions)
    _fill_stack(decoder, decoder.embeddings, model.decoder, cfg.max_target_positions)
    _linear(decoder.projection, model.decoder.output_projection)
    spec = specs.TransformerSpec(encoder, decoder)
    spec.register_source_vocabulary(list(exported.src_dict.symbols))
    spec.register_target_vocabulary(list(exported.tgt_dict.symbols))
    spec.config.decoder_start_token = "</s>"
    spec.config.add_source_eos = True
    for name in ("source_lang", "target_lang"):
        spec.config.add_attribute(name, getattr(exported, name))
    for name in ("max_source_positions", "max_target_positions"):
        spec.config.add_attribute(name, getattr(cfg, name))
    return spec


def _leave_headroom(spec: Any) -> None:
    """Halve the range of int8 weights, to 7 bits.

    On x86 without VNNI the sum of two products of an unsigned and a signed byte saturates at 16 bits, silently: with
    weights of at most 64 it cannot. Such a CPU otherwise costs about a point of BLEU, and the lost bit a tenth.
    """
    from ctranslate2.specs.model_spec import NumpyVariable, visit_spec

    def halve(layer: Any, name: str, value: Any) -> None:
        if getattr(value, "dtype", None) == "int8" and name.endswith("/weight"):
            layer.weight = NumpyVariable(np.rint(value.numpy() / 2).astype(np.int8))
            layer.weight_scale = NumpyVariable(layer.weight_scale.numpy() / np.float32(2))

    visit_spec(spec, halve)


def _fill_stack(spec: Any, embeddings: Any, stack: TransformerEncoder | TransformerDecoder, max_positions: int) -> None:
    embeddings.weight = _array(stack.embed_tokens.weight)
    spec.scale_embeddings = stack.embed_scale != 1.0  # else by the square root of the dimension
    if stack.embed_positions is None:
        spec.position_encodings.encodings = np.zeros((max_positions, stack.embed_tokens.embedding_dim), np.float32)
    else:
        spec.position_encodings.encodings = _array(stack.embed_positions.weight[PAD + 1 :])
    if stack.layernorm_embedding is not None:
        _norm(spec.layernorm_embedding, stack.layernorm_embedding)
    if stack.layer_norm is not None:
        _norm(spec.layer_norm, stack.layer_norm)
    for layer_spec, layer in zip(spec.layer, stack.layers, strict=True):
        _fill_layer(layer_spec, layer)


def _fill_layer(spec: Any, layer: Any) -> None:
    attention = layer.self_attn
    _linear(spec.self_attention.linear[0], attention.q_proj, attention.k_proj, attention.v_proj)
    _linear(spec.self_attention.linear[1], attention.out_proj)
    _norm(spec.self_attention.layer_norm, layer.self_attn_residual.norm)
    if hasattr(layer, "encoder_attn"):
        attention = layer.encoder_attn
        _linear(spec.attention.linear[0], attention.q_proj)
        _linear(spec.attention.linear[1], attention.k_proj, attention.v_proj)
        _linear(spec.attention.linear[2], attention.out_proj)
        _norm(spec.attention.layer_norm, layer.encoder_attn_residual.norm)
    _linear(spec.ffn.linear_0, layer.feed_forward.fc1)
    _linear(spec.ffn.linear_1, layer.feed_forward.fc2)
    _norm(spec.ffn.layer_norm, layer.ffn_residual.norm)


def _linear(spec: Any, *linears: nn.Linear) -> None:
    """Several become one, their outputs side by side."""
    spec.weight = np.concatenate([_array(linear.weight) for linear in linears])
    if linears[0].bias is not None:
        spec.bias = np.concatenate([_array(linear.bias) for linear in linears])


def _norm(spec: Any, norm: nn.Module) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()  # quantisation works in place
