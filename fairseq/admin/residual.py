"""Every residual rule: how a sub-layer's output joins the stream, and where LayerNorm stands.

A Transformer stack is a chain of residual sub-layers ``f_1 ... f_N`` (encoder layer: self-attention, feed-forward;
decoder layer: self-attention, encoder attention, feed-forward). The layers hand the stream ``x`` and the sub-layer to a
rule and take back the new stream; a new rule is one class and one registration here, and ``--init-type`` knows it.

Why Post-LN diverges when deep (Liu et al. 2020): unroll the normalised output of sub-layer i as a weighted sum of all
branches below it. Post-LN gives its own branch about half the weight at every depth, so that a small change of all
parameters changes the output of N sub-layers by O(N): the amplification effect. Pre-LN's own share falls as 1/i and the
change grows as O(log N). Admin keeps Post-LN and its final quality, and starts it with Pre-LN's shares: the shortcut is
scaled by ``omega_i``, set so that branch i enters with the weight 1/i that it would have there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fairseq.errors import FairseqError
from fairseq.registry import RESIDUAL_RULES

Sublayer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ResidualSite:
    """Where in a model a residual rule stands."""

    dim: int
    dropout: float
    normalize_before: bool
    stack: str  # "encoder" or "decoder"
    layer: int  # from 0
    encoder_layers: int
    decoder_layers: int
    siblings: list[nn.Module] = field(default_factory=list)  # rules of this layer's earlier sub-layers


class PostLN(nn.Module):
    """``LN(x + f(x))``, Vaswani et al. 2017."""

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(x + self.dropout(sublayer(x)))


class PreLN(nn.Module):
    """``x + f(LN(x))``; the stack ends with one more LayerNorm."""

    needs_final_norm = True

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return x + self.dropout(sublayer(self.norm(x)))


class AdminResidual(nn.Module):
    """Post-LN with a scaled shortcut: ``LN(omega * x + f(x))``, Liu et al. 2020, section 4.2.

    omega: (dim,), trainable; 1 until ``fairseq.admin.apply_profile`` sets it.
    """

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = nn.Dropout(site.dropout)
        self.omega = nn.Parameter(torch.ones(site.dim))

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(self.omega * x + self.dropout(sublayer(x)))


@RESIDUAL_RULES.register("default")
def default_rule(site: ResidualSite) -> nn.Module:
    """Post-LN, or Pre-LN where ``--encoder-normalize-before`` or ``--decoder-normalize-before`` asks for it."""
    return PreLN(site) if site.normalize_before else PostLN(site)


@RESIDUAL_RULES.register("adaptive-profiling")
@RESIDUAL_RULES.register("adaptive")
def admin_rule(site: ResidualSite) -> nn.Module:
    """Admin. Raises FairseqError with Pre-LN, which it has no use for."""
    if site.normalize_before:
        raise FairseqError(
            f"--init-type adaptive with --{site.stack}-normalize-before: Admin initialises Post-LN; drop one of the two"
        )
    return AdminResidual(site)
