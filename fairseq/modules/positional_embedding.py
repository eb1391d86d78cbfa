"""Token positions, counted from ``padding_idx + 1`` over real tokens, so that left padding does not shift them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def make_positions(tokens: Tensor, padding_idx: int) -> Tensor:
    """tokens: (batch, time) -> int64 positions, same shape: padding_idx + 1, + 2, ... ; padding_idx on padding."""
    mask = tokens.ne(padding_idx)
    return mask.cumsum(dim=1) * mask + padding_idx


def sinusoidal_table(num_positions: int, embed_dim: int, padding_idx: int) -> Tensor:
    """(num_positions, embed_dim): sines in the first half of the channels, cosines in the second; padding row 0.

    Frequencies run geometrically from 1 to 1/10000, both included (tensor2tensor's variant of Vaswani et al. 2017).
    """
    half = embed_dim // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / max(half - 1, 1)))
    angle = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequency[None, :]
    table = torch.cat([angle.sin(), angle.cos(), torch.zeros(num_positions, embed_dim % 2)], dim=1)
    table[padding_idx] = 0
    return table


class PositionalEmbedding(nn.Module):
    """Sinusoidal (fixed, not in the checkpoint) or learned (N(0, 1/dim)) positions for up to ``max_positions``."""

    def __init__(self, max_positions: int, embed_dim: int, padding_idx: int, learned: bool) -> None:
        super().__init__()
        self.padding_idx = padding_idx
        rows = max_positions + padding_idx + 1
        if learned:
            self.weight = nn.Parameter(torch.randn(rows, embed_dim) * embed_dim**-0.5)
            with torch.no_grad():
                self.weight[padding_idx] = 0
        else:
            self.register_buffer("weight", sinusoidal_table(rows, embed_dim, padding_idx), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, time) -> (batch, time, dim)."""
        return nn.functional.embedding(make_positions(tokens, self.padding_idx), self.weight, self.padding_idx)

    def at(self, step: int | Tensor) -> Tensor:
        """The embedding of the token after ``step`` others: (dim,), or step's shape and dim."""
        return self.weight[self.padding_idx + 1 + step]
