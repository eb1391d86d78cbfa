"""The position-wise feed-forward sub-layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.modules.dropout import Dropout


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": _gelu_tanh,  # fairseq's name for the tanh approximation
    "gelu_fast": _gelu_tanh,
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "swish": F.silu,
}


class FeedForward(nn.Module):
    """``fc2(inner_norm(dropout(activation(fc1(x)))))``; weights Xavier-uniform, biases zero, inner_norm identity."""

    def __init__(self, embed_dim: int, ffn_embed_dim: int, activation_fn: str, dropout: float) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[activation_fn]
        self.dropout = Dropout(dropout)
        self.fc1 = nn.Linear(embed_dim, ffn_embed_dim)
        self.fc2 = nn.Linear(ffn_embed_dim, embed_dim)
        self.inner_norm: nn.Module = nn.Identity()  # a residual rule may put a LayerNorm here
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.fc2(self.inner_norm(self.dropout(self.activation(self.fc1(x)))))
