"""Encoder and decoder layers: sub-layers wrapped in residual rules that they know nothing about."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fairseq.modules.attention import MultiheadAttention
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

    def step(
        self,
        x: Tensor,
        extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        encoder_kv: tuple[Tensor, Tensor],
        encoder_mask: Tensor,
        attn: list[Tensor] | None = None,
    ) -> Tensor:
        """One decoding step: x: (rows, 1, dim) -> same shape; rows = sentences x beam, a sentence's rows adjacent.

        extend: takes this step's self-attention keys and values, (rows, heads, 1, head_dim), keeps them, and returns
        those of all steps up to now. encoder_kv, encoder_mask: of the sentences. attn: if given, the encoder attention
        of this layer, averaged over heads, (rows, src_len), is appended to it.
        """
        keys, values = encoder_kv

        def encoder_attn(q: Tensor) -> Tensor:
            # A sentence's hypotheses are successive positions of one query: its keys and values need no copies.
            q_by_sentence = q.view(keys.size(0), -1, q.size(-1))
            if attn is not None:
                attn.append(self.encoder_attn.attention_weights(q_by_sentence, keys, encoder_mask).flatten(0, 1))
            return self.encoder_attn.attend(q_by_sentence, keys, values, encoder_mask).view_as(q)

        x = self.self_attn_residual(x, lambda q: self.self_attn.attend(q, *extend(*self.self_attn.project_kv(q))))
        x = self.encoder_attn_residual(x, encoder_attn)
        return self.ffn_residual(x, self.feed_forward)
