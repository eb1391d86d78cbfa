"""Encoder and decoder layers: sub-layers wrapped in residual rules that they know nothing about."""

from __future__ import annotations

from torch import Tensor, nn

from fairseq.modules.attention import MultiheadAttention
from fairseq.modules.decoder_cache import DecoderCache
from fairseq.modules.feed_forward import FeedForward


class TransformerEncoderLayer(nn.Module):
    """Self-attention, then feed-forward; ``fairseq.admin.residual`` decides what surrounds each."""

    def __init__(
        self,
        self_attn: MultiheadAttention,
        self_attn_residual: nn.Module,
        feed_forward: FeedForward,
        ffn_residual: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.self_attn_residual = self_attn_residual
        self.feed_forward = feed_forward
        self.ffn_residual = ffn_residual

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, src_len, dim) -> same shape. mask: bool (batch, 1, 1, src_len), True on real tokens."""
        x = self.self_attn_residual(x, lambda q: self.self_attn(q, q, mask=mask))
        return self.ffn_residual(x, self.feed_forward)


class TransformerDecoderLayer(nn.Module):
    """Causal self-attention, attention over the encoder's output, then feed-forward."""

    def __init__(
        self,
        self_attn: MultiheadAttention,
        self_attn_residual: nn.Module,
        encoder_attn: MultiheadAttention,
        encoder_attn_residual: nn.Module,
        feed_forward: FeedForward,
        ffn_residual: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.self_attn_residual = self_attn_residual
        self.encoder_attn = encoder_attn
        self.encoder_attn_residual = encoder_attn_residual
        self.feed_forward = feed_forward
        self.ffn_residual = ffn_residual

    def forward(self, x: Tensor, mask: Tensor, encoder_out: Tensor, encoder_mask: Tensor) -> Tensor:
        """x: (batch, tgt_len, dim) -> same shape.

        mask: bool, broadcastable to (batch, 1, tgt_len, tgt_len), True where a position (row) may see another.
        encoder_out: (batch, src_len, encoder_dim); encoder_mask: bool (batch, 1, 1, src_len), True on real tokens.
        """
        x = self.self_attn_residual(x, lambda q: self.self_attn(q, q, mask=mask))
        x = self.encoder_attn_residual(x, lambda q: self.encoder_attn(q, encoder_out, mask=encoder_mask))
        return self.ffn_residual(x, self.feed_forward)

    def step(self, x: Tensor, cache: DecoderCache, number: int, attn: list[Tensor] | None = None) -> Tensor:
        """One decoding step: x: (rows, dim) -> same shape; rows as ``cache`` has them.

        number: of this layer, from 0. attn: if given, the attention over the source, averaged over heads, (rows,
        src_len), is appended to it.
        """

        def encoder_attn(q: Tensor) -> Tensor:
            if attn is not None:
                attn.append(cache.encoder_attention_weights(number, self.encoder_attn, q))
            return cache.encoder_attention(number, self.encoder_attn, q)

        x = self.self_attn_residual(x, lambda q: cache.self_attention(number, self.self_attn, q))
        x = self.encoder_attn_residual(x, encoder_attn)
        return self.ffn_residual(x, self.feed_forward)
