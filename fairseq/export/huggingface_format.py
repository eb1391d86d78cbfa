"""Directories that Hugging Face's transformers translates with.

Four of its architectures are ours with other names, one for each place that LayerNorm can have: Marian is Post-LN,
Pegasus Pre-LN, BART and mBART the same with a LayerNorm after the embeddings. Their position tables are parameters, of
which ours are stored. Marian alone can have several embedding matrices. Token ids are the dictionaries'; see
``huggingface_tokenizer`` for those after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.export.huggingface_tokenizer import Tokenizers
from fairseq.export.plain import Exportable, check_unique, describe, open_checkpoint
from fairseq.export.self_check import SEARCH, check_agreement, count_same_translations
from fairseq.generation.translate import pad_rows, without_padding
from fairseq.models.state_dict import to_fairseq
from fairseq.options import ExportConfig, GenerationConfig
from fairseq.utils.extras import require
from fairseq.utils.io import new_directory
from fairseq.utils.symbols import PAD, UNK

ACTIVATIONS = {  # --activation-fn -> transformers' name
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "tanh": "tanh",
    "linear": "linear",
    "swish": "silu",
}
NEVER = -1e4  # added to a logit; finite, for training with label smoothing
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}  # of a logit, or of the largest one if above 1


@dataclass(frozen=True)
class _Architecture:
    """model: class of transformers. first_position: row of our position tables that its tables start with."""

    model: str
    config: str
    first_position: int
    several_embeddings: bool = False


ARCHITECTURES = {  # (Pre-LN, LayerNorm after the embeddings)
    (False, False): _Architecture("MarianMTModel", "MarianConfig", PAD + 1, several_embeddings=True),
    (True, False): _Architecture("PegasusForConditionalGeneration", "PegasusConfig", PAD + 1),
    (False, True): _Architecture("BartForConditionalGeneration", "BartConfig", 0),
    (True, True): _Architecture("MBartForConditionalGeneration", "MBartConfig", 0),
}


def export_huggingface(config: ExportConfig) -> list[str]:
    """Write directory ``config.output``: model, generation settings and tokenizer. Returns lines to print.

    Raises FairseqError, and leaves no directory, when the model cannot be read or expressed, or when what was written
    does not compute what the original does.
    """
    transformers = require("transformers", "export", "--format huggingface")
    require("safetensors", "export", "--format huggingface")
    precision = config.quantization or "float32"
    if precision not in TOLERANCES:
        raise FairseqError(
            f"--format huggingface has no --quantization {precision}, but {', '.join(TOLERANCES)}; "
            "--format ctranslate2 has it"
        )
    exported = open_checkpoint(config)
    architecture = choose_architecture(exported)
    tokenizers = Tokenizers(config, exported)
    vocabularies = (len(tokenizers.src_ids), len(tokenizers.tgt_ids))
    with new_directory(config.output) as directory:
        _write_model(exported, architecture, vocabularies, precision, directory)
        exported.notes += tokenizers.write(directory)
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
        check = [
            check_agreement(exported.original, _logits_of(model, len(exported.tgt_dict)), TOLERANCES[precision]),
            tokenizers.check(directory),
            _check_translations(exported, model),
        ]
    if architecture.model == "MarianMTModel":
        exported.notes.append(
            "positions are stored, but save_pretrained of a MarianMTModel leaves them out: after training it further, "
            "copy model.*.embed_positions.weight from here"
        )
    return [
        *describe(exported, config.output, f"{architecture.model}, weights in {precision}"),
        *(f"self-check: {line}" for line in check),
    ]


def choose_architecture(exported: Exportable) -> _Architecture:
    """The architecture of transformers that a model is. Raises FairseqError, saying what does not match, for none."""
    model, cfg = exported.plain, exported.plain.cfg
    check_unique(exported, "a tokenizer's vocabulary has")
    pre_norm = [stack.layer_norm is not None for stack in (model.encoder, model.decoder)]
    if pre_norm[0] != pre_norm[1]:
        raise FairseqError("transformers has no architecture whose encoder and decoder differ in Pre-LN and Post-LN")
    if cfg.decoder_embed_dim != cfg.encoder_embed_dim:
        raise FairseqError(
            f"transformers has no architecture for encoders and decoders of different dimensions "
            f"({cfg.encoder_embed_dim} and {cfg.decoder_embed_dim})"
        )
    architecture = ARCHITECTURES[pre_norm[0], cfg.layernorm_embedding]
    if not architecture.several_embeddings and not cfg.share_all_embeddings:
        what = "Pre-LN" if pre_norm[0] else "a LayerNorm after the embeddings"
        raise FairseqError(
            f"transformers' architecture with {what}, {architecture.model}, has one matrix for encoder input, decoder "
            "input and output; this model has several"
        )
    return architecture


def _write_model(
    exported: Exportable, architecture: _Architecture, vocabularies: tuple[int, int], precision: str, directory: Path
) -> None:
    """vocabularies: ids of the source's and the target's tokenizer."""
    import transformers
    from safetensors.torch import save_file

    cfg, positions = exported.plain.cfg, exported.positions
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    ids["forced_eos_token_id"] = 2  # at the longest output
    config = getattr(transformers, architecture.config)(
        **ids,
        vocab_size=vocabularies[0],
        d_model=cfg.encoder_embed_dim,
        encoder_layers=cfg.encoder_layers,
        encoder_attention_heads=cfg.encoder_attention_heads,
        encoder_ffn_dim=cfg.encoder_ffn_embed_dim,
        decoder_layers=cfg.decoder_layers,
        decoder_attention_heads=cfg.decoder_attention_heads,
        decoder_ffn_dim=cfg.decoder_ffn_embed_dim,
        activation_function=ACTIVATIONS[cfg.activation_fn],
        dropout=cfg.dropout,
        attention_dropout=cfg.attention_dropout,
        activation_dropout=cfg.activation_dropout,
        scale_embedding=not cfg.no_scale_embedding,
        max_position_embeddings=positions,
        tie_word_embeddings=cfg.share_all_embeddings or cfg.share_decoder_input_output_embed,
        architectures=[architecture.model],
        **(
            {
                "decoder_vocab_size": vocabularies[1],
                "share_encoder_decoder_embeddings": cfg.share_all_embeddings,
            }
            if architecture.several_embeddings
            else {}
        ),
    )
    dtype = getattr(torch, precision)
    config.dtype = dtype
    config.save_pretrained(directory)
    parameters = _parameters(exported, architecture, vocabularies)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in parameters.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    search = GenerationConfig()
    transformers.GenerationConfig(
        **ids,
        num_beams=search.beam,
        length_penalty=search.lenpen,
        early_stopping=True,  # as here, a sentence is done when it has num_beams hypotheses
        max_length=min(search.max_len_b + 2, positions + 1),  # with both </s>, of which the last is not read
        min_new_tokens=search.min_len,
        bad_words_ids=[[PAD]],
    ).save_pretrained(directory)


def _parameters(exported: Exportable, architecture: _Architecture, vocabularies: tuple[int, int]) -> dict[str, Tensor]:
    """With transformers' names, which but for embeddings are fairseq's; a matrix that is used twice is there once."""
    model, cfg = exported.plain, exported.plain.cfg
    parameters = {
        f"model.{name}": tensor
        for name, tensor in to_fairseq(model.state_dict()).items()
        if ".layers." in name or "layer_norm." in name or "layernorm_embedding." in name
    }
    read, written = vocabularies
    if cfg.share_all_embeddings:
        parameters["model.shared.weight"] = _with_unknown(model.encoder.embed_tokens.weight, read)
    else:
        parameters["model.encoder.embed_tokens.weight"] = _with_unknown(model.encoder.embed_tokens.weight, read)
        parameters["model.decoder.embed_tokens.weight"] = _with_unknown(model.decoder.embed_tokens.weight, written)
        if not cfg.share_decoder_input_output_embed:
            parameters["lm_head.weight"] = _with_unknown(model.decoder.output_projection.weight, written)
    rows = slice(architecture.first_position, PAD + 1 + exported.positions)
    for name, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        if stack.embed_positions is None:
            table = torch.zeros(rows.stop - rows.start, stack.embed_tokens.embedding_dim)
        else:
            table = stack.embed_positions.weight[rows]
        parameters[f"model.{name}.embed_positions.weight"] = table
    bias = torch.zeros(1, written)
    bias[:, len(exported.tgt_dict) :] = NEVER
    parameters["final_logits_bias"] = bias
    return {name: tensor.detach() for name, tensor in parameters.items()}


def _with_unknown(embeddings: Tensor, size: int) -> Tensor:
    """As many rows as ``size``, the last ones that of ``<unk>``."""
    return torch.cat([embeddings, embeddings[UNK].expand(size - len(embeddings), -1)])


def _logits_of(model: Any, vocabulary: int) -> Any:
    """The loaded model as a function of src_tokens and prev_output_tokens, which it wants padded on the right.

    vocabulary: entries of the target dictionary, before those that are never written.
    """

    def logits(src_tokens: Tensor, prev_output_tokens: Tensor) -> Tensor:
        input_ids = pad_rows([without_padding(row) for row in src_tokens])
        mask = input_ids.ne(PAD).long()
        output = model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=prev_output_tokens)
        return output.logits[:, :, :vocabulary].float()

    return logits


def _check_translations(exported: Exportable, model: Any) -> str:
    def translate(sentences: Sequence[Tensor]) -> list[Tensor]:
        input_ids = pad_rows(sentences)
        longest = min(SEARCH.max_len_b + 2, exported.positions + 1)
        mask = input_ids.ne(PAD).long()
        outputs = model.generate(input_ids, attention_mask=mask, num_beams=SEARCH.beam, max_length=longest)
        return [without_padding(row[1:]) for row in outputs]

    return count_same_translations(exported.original, exported.sentences, translate)
