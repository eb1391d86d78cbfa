"""Every residual rule: how a sub-layer's output joins the stream, and where LayerNorm stands.

A Transformer stack is a chain of residual sub-layers ``f_1 ... f_N`` (encoder layer: self-attention, feed-forward;
decoder layer: self-attention, encoder attention, feed-forward). The layers hand the stream ``x`` and the sub-layer to a
rule and take back the new stream; a new rule is one class and one registration here, and ``--init-type`` knows it.

Why Post-LN diverges when deep (Liu et al. 2020): unroll the normalised output of sub-layer i as a weighted sum of all
branches below it. Post-LN gives its own branch about half the weight at every depth, so that a small change of all
parameters changes the output of N sub-layers by O(N): the amplification effect. Pre-LN's own share falls as 1/i and the
change grows as O(log N). Admin keeps Post-LN and its final quality, and starts it with Pre-LN's shares: the shortcut is
scaled by ``omega_i``, set so that branch i enters with the weight 1/i that it would have there.

A rule may also have ``init_branch(branch)``, called once with the finished sub-layer (attention or feed-forward), for
rules that say how the branch starts. One that is registered with a dataclass of flags is called with an instance of it
too; see ``closed_form_rule``. What flows between the sub-layers of one layer is the rule's own business, as long as the
layer begins and ends with a tensor; see ``B2T``. A decoding step has one token a row: ``x`` is (batch, dim).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fairseq.errors import FairseqError
from fairseq.modules.dropout import Dropout
from fairseq.registry import RESIDUAL_RULES
from fairseq.utils.flags import flag

Sublayer = Callable[[Tensor], Tensor]

ADMIN, PROFILING, CLOSED_FORM = "adaptive", "adaptive-profiling", "adaptive-closed-form"  # init types with an omega


@dataclass(frozen=True)
class ResidualSite:
    """Where in a model a residual rule stands."""

    dim: int
    dropout: float
    normalize_before: bool  # asked for by a flag
    stack: str  # "encoder" or "decoder"
    layer: int  # from 0
    encoder_layers: int
    decoder_layers: int
    siblings: list[nn.Module] = field(default_factory=list)  # rules of this layer's earlier sub-layers
    sublayers: int = 2  # in this layer
    init_type: str = "default"


class PostLN(nn.Module):
    """``LN(x + f(x))``, Vaswani et al. 2017."""

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(x + self.dropout(sublayer(x)))


class PreLN(nn.Module):
    """``x + f(LN(x))``; the stack ends with one more LayerNorm."""

    needs_final_norm = True

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return x + self.dropout(sublayer(self.norm(x)))


class AdminResidual(nn.Module):
    """Post-LN with a scaled shortcut: ``LN(omega * x + f(x))``, Admin, Liu et al. 2020.

    omega: (dim,), every element starts at one value: 1 until ``fairseq.admin.apply_profile`` sets it to the standard
    deviation accumulated before the sub-layer, or the closed form's. Trained as an ordinary parameter, or a constant.
    """

    needs_final_norm = False
    measured = True  # omega starts from a profile; a subclass is profiled too, whatever it is registered as

    def __init__(self, site: ResidualSite, omega: float = 1.0, trained: bool = True) -> None:
        """Raises FairseqError with Pre-LN, which Admin has no use for."""
        super().__init__()
        _refuse_normalize_before(site, "Admin initialises Post-LN")
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)
        vector = torch.full((site.dim,), omega)
        self.omega: Tensor
        if trained:
            self.omega = nn.Parameter(vector)
        else:
            self.register_buffer("omega", vector)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(self.omega * x + self.dropout(sublayer(x)))


class ReZero(nn.Module):
    """``x + alpha * f(x)`` without LayerNorm, Bachlechner et al. 2020.

    alpha: (1,), trainable, 0 at the start; one a layer, shared by its sub-layers.
    """

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        _refuse_normalize_before(site, "ReZero has no LayerNorm")
        self.alpha = _layer_alpha(site)
        self.dropout = Dropout(site.dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return x + self.alpha * self.dropout(sublayer(x))


class ReZeroPostLN(nn.Module):
    """``LN(x + alpha * f(x))`` with the alpha of ``ReZero``."""

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        _refuse_normalize_before(site, "its LayerNorm comes after the sum")
        self.alpha = _layer_alpha(site)
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(x + self.alpha * self.dropout(sublayer(x)))


class LookLinear(nn.Module):
    """Post-LN whose feed-forward starts as a linear map, Balduzzi et al. 2017.

    The two halves of fc1's rows and of fc2's columns start as negatives of each other: relu(Wx) - relu(-Wx) = Wx.
    """

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        _refuse_normalize_before(site, "it starts Post-LN")
        self.stack = site.stack
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    @torch.no_grad()
    def init_branch(self, branch: nn.Module) -> None:
        """Mirror a feed-forward sub-layer; attention stays as it is."""
        fc1, fc2 = getattr(branch, "fc1", None), getattr(branch, "fc2", None)
        if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear):
            return
        half, odd = divmod(fc1.out_features, 2)
        if odd:
            raise FairseqError(
                f"--init-type looklinear with --{self.stack}-ffn-embed-dim {fc1.out_features}: it mirrors one half in "
                "the other; give an even number"
            )
        fc1.weight[half:] = -fc1.weight[:half]
        fc2.weight[:, half:] = -fc2.weight[:, :half]

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(x + self.dropout(sublayer(x)))


class DeepNet(nn.Module):
    """``LN(alpha * x + f(x))``, alpha a constant of the depth, and branches that start small: Wang et al. 2022.

    For N encoder and M decoder layers: encoder alpha = 0.81 (N^4 M)^(1/16), beta = 0.87 (N^4 M)^(-1/16); decoder
    alpha = (3M)^(1/4), beta = (12M)^(-1/4). beta is the Xavier gain of feed-forward, value and output projections; that
    of query and key is 1.
    """

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        _refuse_normalize_before(site, "DeepNorm is a Post-LN")
        n, m = site.encoder_layers, site.decoder_layers
        if site.stack == "encoder":
            self.alpha, self.beta = 0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)
        else:
            self.alpha, self.beta = (3 * m) ** (1 / 4), (12 * m) ** (-1 / 4)
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    def init_branch(self, branch: nn.Module) -> None:
        """Draw the branch's weights anew, Xavier-uniform."""
        _xavier(branch, ("v_proj", "out_proj", "fc1", "fc2"), gain=self.beta)
        _xavier(branch, ("q_proj", "k_proj"), gain=1.0)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return self.norm(self.alpha * x + self.dropout(sublayer(x)))


class SubLN(nn.Module):
    """Pre-LN with one more LayerNorm inside each branch, before its last projection: Magneto, Wang et al. 2022.

    For N encoder and M decoder layers the Xavier gain of feed-forward, value and output projections is
    sqrt(ln(3M) ln(2N) / 3) in the encoder and sqrt(ln(3M)) in the decoder; that of query and key is 1.
    """

    needs_final_norm = True

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        _refuse_normalize_before(site, "Sub-LN is a Pre-LN by itself")
        self.gain = math.sqrt(math.log(3 * site.decoder_layers))
        if site.stack == "encoder":
            self.gain *= math.sqrt(math.log(2 * site.encoder_layers) / 3)
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    def init_branch(self, branch: nn.Module) -> None:
        """Add the inner LayerNorm and draw the branch's weights anew, Xavier-uniform."""
        last = next(module for name, module in branch.named_children() if name in ("out_proj", "fc2"))
        assert isinstance(last, nn.Linear)
        branch.inner_norm = nn.LayerNorm(last.in_features)
        _xavier(branch, ("v_proj", "out_proj", "fc1", "fc2"), gain=self.gain)
        _xavier(branch, ("q_proj", "k_proj"), gain=1.0)

    def forward(self, x: Tensor, sublayer: Sublayer) -> Tensor:
        """x: (batch, time, dim) -> same shape."""
        return x + self.dropout(sublayer(self.norm(x)))


class B2T(nn.Module):
    """Post-LN whose layer input is added once more before the layer's last LayerNorm: Takase et al. 2022.

    Encoder layer: ``s = LN(x + attn(x))``, ``LN(x + s + ffn(s))``. Between the sub-layers of a layer flows the pair of
    stream and layer input.
    """

    needs_final_norm = False

    def __init__(self, site: ResidualSite) -> None:
        super().__init__()
        _refuse_normalize_before(site, "B2T is a Post-LN")
        self.is_first = not site.siblings
        self.is_last = len(site.siblings) == site.sublayers - 1
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = Dropout(site.dropout)

    def forward(self, x: Tensor | tuple[Tensor, Tensor], sublayer: Sublayer) -> Tensor | tuple[Tensor, Tensor]:
        """x: (batch, time, dim) for the first sub-layer, else that twice; returns that twice but for the last."""
        stream, layer_input = (x, x) if isinstance(x, Tensor) else x
        total = stream + self.dropout(sublayer(stream))
        return self.norm(total + layer_input) if self.is_last else (self.norm(total), layer_input)


def _layer_alpha(site: ResidualSite) -> nn.Parameter:
    """The layer's alpha: its first sub-layer's, or a new one for that."""
    if not site.siblings:
        return nn.Parameter(torch.zeros(1))
    alpha = site.siblings[0].alpha
    assert isinstance(alpha, nn.Parameter)
    return alpha


def _xavier(branch: nn.Module, names: tuple[str, ...], gain: float) -> None:
    for name, module in branch.named_children():
        if name in names and isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain)


def _refuse_normalize_before(site: ResidualSite, reason: str) -> None:
    if site.normalize_before:
        raise FairseqError(
            f"--init-type {site.init_type} with --{site.stack}-normalize-before: {reason}; drop one of the two"
        )


def closed_form_omega(sublayers: int, output_change: str) -> float:
    """omega of every sub-layer of a stack of ``sublayers``, without profiling, from the wanted growth of the output
    change: "logn" (O(log n)), "constant" (O(1)) or "linear" (O(n), plain Post-LN). Source: the admin-torch package.
    """
    n = sublayers
    return math.sqrt({"logn": (n + 1) / math.log(n + 1) - 1, "constant": float(n), "linear": 1.0}[output_change])


def measures_omega(init_type: str) -> bool:
    """Whether training with ``init_type`` starts from a measured omega: the attribute ``measured`` of its rule."""
    rule = RESIDUAL_RULES.get(init_type)
    return getattr(rule.func if isinstance(rule, partial) else rule, "measured", False)


@RESIDUAL_RULES.register("default")
def default_rule(site: ResidualSite) -> nn.Module:
    """Post-LN, or Pre-LN where ``--encoder-normalize-before`` or ``--decoder-normalize-before`` asks for it."""
    return PreLN(site) if site.normalize_before else PostLN(site)


@dataclass
class ClosedFormConfig:
    """Flags of adaptive-closed-form."""

    output_change: str = flag(
        "logn", "growth of the output change with depth to aim at", choices=("logn", "constant", "linear")
    )
    omega: str = flag("parameter", "whether omega is trained", choices=("parameter", "constant"))


@RESIDUAL_RULES.register(CLOSED_FORM, config=ClosedFormConfig)
def closed_form_rule(site: ResidualSite, config: ClosedFormConfig) -> nn.Module:
    """Admin without profiling; see ``closed_form_omega``. Raises FairseqError with Pre-LN."""
    layers = site.encoder_layers if site.stack == "encoder" else site.decoder_layers
    omega = closed_form_omega(layers * site.sublayers, config.output_change)
    return AdminResidual(site, omega, trained=config.omega == "parameter")


RESIDUAL_RULES.add(ADMIN, AdminResidual)
RESIDUAL_RULES.add(PROFILING, AdminResidual)
RESIDUAL_RULES.add("rezero", ReZero)
RESIDUAL_RULES.add("rezero_postln", ReZeroPostLN)
RESIDUAL_RULES.add("looklinear", LookLinear)
RESIDUAL_RULES.add("deepnet", DeepNet)
RESIDUAL_RULES.add("subln", SubLN)
RESIDUAL_RULES.add("b2t", B2T)
