"""The encoder-decoder Transformer.

One forward pass for training, and ``TransformerDecoder.step`` for decoding one token at a time with a ``DecoderCache``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq.admin.residual import ResidualSite
from fairseq.errors import FairseqError
from fairseq.models import __getattr__  # noqa: F401  (TransformerModel is found here too, as in fairseq)
from fairseq.models.config import TransformerConfig
from fairseq.modules.attention import MultiheadAttention, attention_mask
from fairseq.modules.decoder_cache import DecoderCache
from fairseq.modules.dropout import Dropout
from fairseq.modules.feed_forward import FeedForward
from fairseq.modules.positional_embedding import PositionalEmbedding
from fairseq.modules.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer
from fairseq.registry import RESIDUAL_RULES
from fairseq.utils.symbols import PAD


class EncoderOut(NamedTuple):
    """x: (batch, src_len, dim); mask: bool (batch, 1, 1, src_len), True on real tokens."""

    x: Tensor
    mask: Tensor


def build_embedding(num_embeddings: int, embed_dim: int) -> nn.Embedding:
    """Token embeddings N(0, 1/dim), padding row 0."""
    embedding = nn.Embedding(num_embeddings, embed_dim, padding_idx=PAD)
    nn.init.normal_(embedding.weight, mean=0, std=embed_dim**-0.5)
    nn.init.zeros_(embedding.weight[PAD])
    return embedding


def _build_residuals(cfg: TransformerConfig, stack: str, layer: int, branches: list[nn.Module]) -> list[nn.Module]:
    """The residual rules of one layer's sub-layers ``branches``, in order."""
    rule, config = RESIDUAL_RULES.get(cfg.init_type), cfg.rule_config()
    encoder = stack == "encoder"
    residuals: list[nn.Module] = []
    for branch in branches:
        site = ResidualSite(
            dim=cfg.encoder_embed_dim if encoder else _int(cfg.decoder_embed_dim),
            dropout=cfg.dropout,
            normalize_before=cfg.encoder_normalize_before if encoder else cfg.decoder_normalize_before,
            stack=stack,
            layer=layer,
            encoder_layers=cfg.encoder_layers,
            decoder_layers=cfg.decoder_layers,
            siblings=list(residuals),
            sublayers=len(branches),
            init_type=cfg.init_type,
        )
        residual = rule(site) if config is None else rule(site, config)
        if hasattr(residual, "init_branch"):
            residual.init_branch(branch)
        residuals.append(residual)
    return residuals


def _int(value: int | None) -> int:
    assert value is not None  # TransformerConfig fills it in
    return value


class _Stack(nn.Module):
    """What encoder and decoder have in common: embeddings before the layers and, for some rules, a LayerNorm after."""

    layers: nn.ModuleList

    def __init__(self, cfg: TransformerConfig, embed_tokens: nn.Embedding, max_positions: int, learned: bool) -> None:
        super().__init__()
        dim = embed_tokens.embedding_dim
        self.embed_tokens = embed_tokens
        self.embed_scale = 1.0 if cfg.no_scale_embedding else math.sqrt(dim)
        self.embed_positions = (
            None if cfg.no_token_positional_embeddings else PositionalEmbedding(max_positions, dim, PAD, learned)
        )
        self.layernorm_embedding = nn.LayerNorm(dim) if cfg.layernorm_embedding else None
        self.embed_dropout = Dropout(cfg.dropout)

    def _finish(self) -> None:
        """Call when ``layers`` is there."""
        rule = cast("TransformerEncoderLayer | TransformerDecoderLayer", self.layers[-1]).ffn_residual
        self.layer_norm = nn.LayerNorm(self.embed_tokens.embedding_dim) if rule.needs_final_norm else None

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """tokens: (batch, time); positions: broadcastable to (batch, time, dim) -> (batch, time, dim); or of a decoding
        step, all without time."""
        x = self.embed_scale * self.embed_tokens(tokens)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.embed_dropout(x)

    def _positions(self, tokens: Tensor) -> Tensor | None:
        return None if self.embed_positions is None else self.embed_positions(tokens)


class TransformerEncoder(_Stack):
    """Embeddings and ``encoder_layers`` layers."""

    def __init__(self, cfg: TransformerConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(cfg, embed_tokens, cfg.max_source_positions, cfg.encoder_learned_pos)
        dim, heads = cfg.encoder_embed_dim, cfg.encoder_attention_heads
        self.layers = nn.ModuleList()
        for i in range(cfg.encoder_layers):
            self_attn = MultiheadAttention(dim, heads, cfg.attention_dropout)
            feed_forward = FeedForward(dim, cfg.encoder_ffn_embed_dim, cfg.activation_fn, cfg.activation_dropout)
            residuals = _build_residuals(cfg, "encoder", i, [self_attn, feed_forward])
            self.layers.append(TransformerEncoderLayer(self_attn, residuals[0], feed_forward, residuals[1]))
        self._finish()

    def forward(self, src_tokens: Tensor) -> EncoderOut:
        """src_tokens: (batch, src_len)."""
        keep = src_tokens.ne(PAD)
        x = self.embed(src_tokens, self._positions(src_tokens)) * keep[:, :, None]
        mask = keep[:, None, None, :]
        layers_mask = attention_mask(mask, x)
        for layer in self.layers:
            x = layer(x, layers_mask)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return EncoderOut(x, mask)


class TransformerDecoder(_Stack):
    """Embeddings, ``decoder_layers`` layers and the projection to the vocabulary."""

    def __init__(self, cfg: TransformerConfig, embed_tokens: nn.Embedding) -> None:
        super().__init__(cfg, embed_tokens, cfg.max_target_positions, cfg.decoder_learned_pos)
        dim, heads = _int(cfg.decoder_embed_dim), cfg.decoder_attention_heads
        ffn_dim = _int(cfg.decoder_ffn_embed_dim)
        self.layers = nn.ModuleList()
        for i in range(cfg.decoder_layers):
            self_attn = MultiheadAttention(dim, heads, cfg.attention_dropout)
            encoder_attn = MultiheadAttention(dim, heads, cfg.attention_dropout, kdim=cfg.encoder_embed_dim)
            feed_forward = FeedForward(dim, ffn_dim, cfg.activation_fn, cfg.activation_dropout)
            residuals = _build_residuals(cfg, "decoder", i, [self_attn, encoder_attn, feed_forward])
            self.layers.append(
                TransformerDecoderLayer(self_attn, residuals[0], encoder_attn, residuals[1], feed_forward, residuals[2])
            )
        self._finish()
        self.output_projection = nn.Linear(dim, embed_tokens.num_embeddings, bias=False)
        if cfg.share_all_embeddings or cfg.share_decoder_input_output_embed:
            self.output_projection.weight = embed_tokens.weight
        else:
            nn.init.normal_(self.output_projection.weight, mean=0, std=dim**-0.5)

    def forward(self, prev_output_tokens: Tensor, encoder_out: EncoderOut) -> Tensor:
        """prev_output_tokens: (batch, tgt_len), padded on the right -> features (batch, tgt_len, dim)."""
        x = self.embed(prev_output_tokens, self._positions(prev_output_tokens))
        length = prev_output_tokens.size(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # Real positions never see the padding to their right; it is masked for the padding's own sake, whose outputs
        # count in the variances that Admin measures.
        mask = attention_mask(causal & prev_output_tokens.ne(PAD)[:, None, None, :], x)
        encoder_mask = attention_mask(encoder_out.mask, x)
        for layer in self.layers:
            x = layer(x, mask, encoder_out.x, encoder_mask)
        return x if self.layer_norm is None else self.layer_norm(x)

    def _layers(self) -> list[TransformerDecoderLayer]:
        return cast("list[TransformerDecoderLayer]", list(self.layers))

    def new_cache(self, encoder_out: EncoderOut) -> DecoderCache:
        """A cache to decode the sentences of ``encoder_out`` with."""
        return DecoderCache([layer.encoder_attn for layer in self._layers()], encoder_out.x, encoder_out.mask)

    def step(self, tokens: Tensor, cache: DecoderCache, need_attn: bool = False) -> tuple[Tensor, Tensor | None]:
        """One more token of every hypothesis.

        tokens: (rows,), the last tokens, as many for each sentence, those of a sentence adjacent. Returns features
        (rows, dim), whose ``output_projection`` are the logits, and, with ``need_attn``, the last layer's attention
        over the source averaged over heads, (rows, src_len).
        """
        positions = None if self.embed_positions is None else self.embed_positions.at(cache.positions(len(tokens)))
        x = self.embed(tokens, positions)
        attn: list[Tensor] = []
        for i, layer in enumerate(self._layers()):
            x = layer.step(x, cache, i, attn if need_attn and i == len(self.layers) - 1 else None)
        cache.end_step()
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return x, attn[0] if attn else None


class Transformer(nn.Module):
    """``model(src_tokens, src_lengths, prev_output_tokens) -> (logits, extra)``."""

    def __init__(self, cfg: TransformerConfig, src_vocab: int, tgt_vocab: int) -> None:
        """src_vocab, tgt_vocab: dictionary sizes. Raises FairseqError for settings that contradict each other."""
        super().__init__()
        _check(cfg, src_vocab, tgt_vocab)
        self.cfg = cfg
        encoder_embedding = build_embedding(src_vocab, cfg.encoder_embed_dim)
        decoder_embedding = (
            encoder_embedding if cfg.share_all_embeddings else build_embedding(tgt_vocab, _int(cfg.decoder_embed_dim))
        )
        self.encoder = TransformerEncoder(cfg, encoder_embedding)
        self.decoder = TransformerDecoder(cfg, decoder_embedding)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None,
        prev_output_tokens: Tensor,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """src_tokens: (batch, src_len); src_lengths: (batch,), unused, the padding says it; prev_output_tokens:
        (batch, tgt_len), the target shifted right. Returns logits (batch, tgt_len, vocab) and
        ``{"encoder_out": EncoderOut, "features": (batch, tgt_len, dim)}``.

        head: called with the features and the projection's weight (vocab, dim); what it returns comes in the logits'
        place. A loss that makes do without all logits is computed here, where what wraps the model has the weight.
        """
        encoder_out = self.encoder(src_tokens)
        features = self.decoder(prev_output_tokens, encoder_out)
        extra = {"encoder_out": encoder_out, "features": features}
        if head is not None:
            return head(features, self.decoder.output_projection.weight), extra
        return self.decoder.output_projection(features), extra


def _check(cfg: TransformerConfig, src_vocab: int, tgt_vocab: int) -> None:
    for stack, dim, heads in (
        ("encoder", cfg.encoder_embed_dim, cfg.encoder_attention_heads),
        ("decoder", _int(cfg.decoder_embed_dim), cfg.decoder_attention_heads),
    ):
        if dim % heads:
            raise FairseqError(f"--{stack}-embed-dim {dim} is no multiple of --{stack}-attention-heads {heads}")
    for stack, layers in (("encoder", cfg.encoder_layers), ("decoder", cfg.decoder_layers)):
        if layers < 1:
            raise FairseqError(f"--{stack}-layers {layers}: must be at least 1")
    if cfg.share_all_embeddings:
        if src_vocab != tgt_vocab:
            raise FairseqError(
                f"--share-all-embeddings needs one dictionary, but source has {src_vocab} and target {tgt_vocab} "
                "entries; preprocess with --joined-dictionary"
            )
        if cfg.encoder_embed_dim != cfg.decoder_embed_dim:
            raise FairseqError("--share-all-embeddings needs --encoder-embed-dim equal to --decoder-embed-dim")
