"""Multi-head attention with separate q, k, v projections (Vaswani et al. 2017, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# cuDNN's attention builds a plan for every new shape, which in translation is nearly every batch and decoding step
torch.backends.cuda.enable_cudnn_sdp(False)


def attention_mask(keep: Tensor, x: Tensor) -> Tensor:
    """What attention is fastest with: on a GPU, what is added to the scores, in the precision that they have there.

    keep: bool (..., mem), True where attention is allowed; the result has its shape. x: what will attend. Of a bool
    mask torch makes the sum's operand anew in every layer, and of rows that do not begin at multiples of eight elements
    a copy where they do.
    """
    device = x.device.type
    if device != "cuda":
        return keep
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    mem = keep.size(-1)
    bias = torch.zeros(*keep.shape[:-1], -(-mem // 8) * 8, dtype=dtype, device=keep.device)[..., :mem]
    return bias.masked_fill_(~keep, -math.inf)


class MultiheadAttention(nn.Module):
    """Scaled dot-product attention over ``num_heads`` heads, batch first.

    ``forward`` is ``attend(query, *project_kv(memory))``; incremental decoding calls the two halves itself and keeps
    the keys and values in between.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, kdim: int | None = None) -> None:
        """kdim: width of the memory when it differs from ``embed_dim``."""
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        kdim = embed_dim if kdim is None else kdim
        self.k_proj = nn.Linear(kdim, embed_dim)
        self.v_proj = nn.Linear(kdim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.inner_norm: nn.Module = nn.Identity()  # a residual rule may put a LayerNorm here
        gain = 1 / math.sqrt(2) if kdim == embed_dim else 1.0  # that of one fused (3 * dim, dim) Xavier matrix
        for projection in (self.k_proj, self.v_proj, self.q_proj):
            nn.init.xavier_uniform_(projection.weight, gain)
            nn.init.zeros_(projection.bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project_kv(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory: (batch, mem, kdim) -> keys and values, each (batch, heads, mem, head_dim)."""
        return self._split_heads(self.k_proj(memory)), self._split_heads(self.v_proj(memory))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query: (batch, time, dim) -> (batch, time, dim).

        key, value: from ``project_kv``. mask: bool, broadcastable to (batch, heads, time, mem), True where attention
        is allowed; or what ``attention_mask`` makes of it.
        """
        q_BHTD = self._split_heads(self.q_proj(query))
        dropout = self.dropout if self.training else 0.0
        context_BHTD = F.scaled_dot_product_attention(q_BHTD, key, value, mask, dropout)
        return self.out_proj(self.inner_norm(context_BHTD.transpose(1, 2).flatten(2)))

    def attention_weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention distribution, averaged over heads: (batch, time, mem), float32. For alignments. mask: as
        ``attend``'s.
        """
        q_BHTD = self._split_heads(self.q_proj(query)).float()
        scores_BHTM = q_BHTD @ key.float().transpose(-2, -1) / math.sqrt(q_BHTD.size(-1))
        if mask is not None:
            scores_BHTM = scores_BHTM.masked_fill(~mask if mask.dtype == torch.bool else mask != 0, -math.inf)
        return torch.softmax(scores_BHTM, dim=-1).mean(dim=1)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """query: (batch, time, dim), memory: (batch, mem, kdim) -> (batch, time, dim). mask: as ``attend``'s."""
        device = query.device.type
        if device == "cuda" and torch.is_autocast_enabled(device):  # which would convert them for each projection
            dtype = torch.get_autocast_dtype(device)
            same = query is memory
            memory = memory.to(dtype)
            query = memory if same else query.to(dtype)
        return self.attend(query, *self.project_kv(memory), mask=mask)
