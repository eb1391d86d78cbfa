"""The whole Transformer a second time: float64, plain functions, one equation a residual rule. Models are held to it.

Weights are a dict of tensors, named as in ``model.state_dict()``. Written from the papers' equations, not from the
package, of which it uses nothing. Dropout is none.

B: batch, S and T: source and target length, D: model dimension, H: heads, V: vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PAD = 1
Weights = dict[str, Tensor]
Branch = Callable[[Tensor], Tensor]


def weights_of(model: nn.Module) -> Weights:
    """float64 copies of a model's parameters, which ask for gradients, and buffers. What is one tensor stays one."""
    trained = {p.data_ptr() for p in model.parameters()}
    copies: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr()
        if key not in copies:
            copies[key] = tensor.to(torch.float64, copy=True).requires_grad_(key in trained)
        weights[name] = copies[key]
    return weights


# -- what a layer is made of


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """LN(x) = gain * (x - mean) / sqrt(variance + 1e-5) + bias, over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return w[f"{name}.weight"] * centred / (variance + 1e-5).sqrt() + w[f"{name}.bias"]


def attention(
    w: Weights, name: str, query: Tensor, memory: Tensor, allowed: Tensor, heads: int, sub_ln: bool
) -> Tensor:
    """softmax(q k^T / sqrt(head size)) v, head by head. query: (B, T, D); memory: (B, S, D'); allowed: (B, T, S)."""
    q, k, v = (linear(w, f"{name}.{p}_proj", x) for p, x in (("q", query), ("k", memory), ("v", memory)))
    size = q.size(-1) // heads
    contexts = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        contexts.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v[..., part])
    context = torch.cat(contexts, -1)
    if sub_ln:
        context = layer_norm(w, f"{name}.inner_norm", context)
    return linear(w, f"{name}.out_proj", context)


ACTIVATIONS: dict[str, Branch] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}


def feed_forward(w: Weights, name: str, x: Tensor, activation: str, sub_ln: bool) -> Tensor:
    hidden = ACTIVATIONS[activation](linear(w, f"{name}.fc1", x))
    if sub_ln:
        hidden = layer_norm(w, f"{name}.inner_norm", hidden)
    return linear(w, f"{name}.fc2", hidden)


# -- the residual rules


@dataclass
class Site:
    """Where an equation is applied: sub-layer ``name`` of a layer whose input was ``layer_input``."""

    w: Weights
    cfg: Any
    name: str
    layer_input: Tensor
    last: bool  # of its layer's sub-layers

    def ln(self, x: Tensor) -> Tensor:
        return layer_norm(self.w, f"{self.name}_residual.norm", x)

    @property
    def omega(self) -> Tensor:
        return self.w[f"{self.name}_residual.omega"]

    @property
    def alpha(self) -> Tensor:
        return self.w[f"{self.name}_residual.alpha"]

    @property
    def deepnet_alpha(self) -> float:
        stack = self.name.split(".")[0]
        return deepnet_alpha(stack, self.cfg.encoder_layers, self.cfg.decoder_layers)


Equation = Callable[[Site, Tensor, Branch], Tensor]

EQUATIONS: dict[str, Equation] = {
    "post-ln": lambda s, x, f: s.ln(x + f(x)),
    "pre-ln": lambda s, x, f: x + f(s.ln(x)),
    "adaptive-profiling": lambda s, x, f: s.ln(s.omega * x + f(x)),
    "adaptive": lambda s, x, f: s.ln(s.omega * x + f(x)),
    "adaptive-closed-form": lambda s, x, f: s.ln(s.omega * x + f(x)),
    "rezero": lambda s, x, f: x + s.alpha * f(x),
    "rezero_postln": lambda s, x, f: s.ln(x + s.alpha * f(x)),
    "looklinear": lambda s, x, f: s.ln(x + f(x)),
    "deepnet": lambda s, x, f: s.ln(s.deepnet_alpha * x + f(x)),
    "subln": lambda s, x, f: x + f(s.ln(x)),
    "b2t": lambda s, x, f: s.ln(x + f(x) + (s.layer_input if s.last else 0)),
}
FINAL_NORM = ("pre-ln", "subln")  # the stack ends with a LayerNorm


def equation_name(cfg: Any, stack: str) -> str:
    if cfg.init_type == "default":
        return "pre-ln" if getattr(cfg, f"{stack}_normalize_before") else "post-ln"
    return cfg.init_type


# -- constants at the start; n_enc, n_dec: layers


def deepnet_alpha(stack: str, n_enc: int, n_dec: int) -> float:
    return 0.81 * (n_enc**4 * n_dec) ** (1 / 16) if stack == "encoder" else (3 * n_dec) ** (1 / 4)


def deepnet_beta(stack: str, n_enc: int, n_dec: int) -> float:
    return 0.87 * (n_enc**4 * n_dec) ** (-1 / 16) if stack == "encoder" else (12 * n_dec) ** (-1 / 4)


def subln_gamma(stack: str, n_enc: int, n_dec: int) -> float:
    squared = math.log(3 * n_dec)
    return math.sqrt(squared * math.log(2 * n_enc) / 3) if stack == "encoder" else math.sqrt(squared)


def closed_form_omega(output_change: str, sublayers: int) -> float:
    """sublayers: of the stack, 2 an encoder layer and 3 a decoder layer."""
    n = sublayers
    return math.sqrt({"logn": (n + 1) / math.log(n + 1) - 1, "constant": n, "linear": 1}[output_change])


# -- the model


def layer(w: Weights, cfg: Any, name: str, x: Tensor, branches: dict[str, Branch]) -> Tensor:
    """x through a layer's sub-layers. branches: by the sub-layers' names, in order."""
    rule = EQUATIONS[equation_name(cfg, name.split(".")[0])]
    layer_input = x
    for sublayer, branch in branches.items():
        x = rule(Site(w, cfg, f"{name}.{sublayer}", layer_input, sublayer == "ffn"), x, branch)
    return x


def embed(w: Weights, cfg: Any, stack: str, tokens: Tensor) -> Tensor:
    """sqrt(D) * embedding + position, positions counted from PAD + 1 over real tokens. tokens: (B, T)."""
    table = w[f"{stack}.embed_tokens.weight"]
    dim = table.size(1)
    x = table[tokens] * (1 if cfg.no_scale_embedding else math.sqrt(dim))
    position = (tokens != PAD).cumsum(1) + PAD
    if getattr(cfg, f"{stack}_learned_pos"):
        x = x + w[f"{stack}.embed_positions.weight"][position]
    elif not cfg.no_token_positional_embeddings:
        half = dim // 2
        angle = position[..., None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / (half - 1))
        x = x + torch.cat([angle.sin(), angle.cos()], -1)
    return layer_norm(w, f"{stack}.layernorm_embedding", x) if cfg.layernorm_embedding else x


def forward(w: Weights, cfg: Any, src: Tensor, prev: Tensor) -> Tensor:
    """src: (B, S), prev: (B, T), the target shifted right; padding anywhere -> logits (B, T, V)."""
    sub_ln = cfg.init_type == "subln"

    def attend(name: str, memory: Tensor | None, allowed: Tensor, heads: int) -> Branch:
        return lambda x: attention(w, name, x, x if memory is None else memory, allowed, heads, sub_ln)

    def ffn(name: str) -> Branch:
        return lambda x: feed_forward(w, name, x, cfg.activation_fn, sub_ln)

    def end(stack: str, x: Tensor) -> Tensor:
        return layer_norm(w, f"{stack}.layer_norm", x) if equation_name(cfg, stack) in FINAL_NORM else x

    real = (src != PAD)[:, None, :]  # (B, 1, S)
    x = embed(w, cfg, "encoder", src)
    for i in range(cfg.encoder_layers):
        name, heads = f"encoder.layers.{i}", cfg.encoder_attention_heads
        branches = {
            "self_attn": attend(f"{name}.self_attn", None, real, heads),
            "ffn": ffn(f"{name}.feed_forward"),
        }
        x = layer(w, cfg, name, x, branches)
    memory = end("encoder", x)

    earlier = torch.ones(prev.size(1), prev.size(1), dtype=torch.bool).tril() & (prev != PAD)[:, None, :]  # (B, T, T)
    x = embed(w, cfg, "decoder", prev)
    for i in range(cfg.decoder_layers):
        name, heads = f"decoder.layers.{i}", cfg.decoder_attention_heads
        branches = {
            "self_attn": attend(f"{name}.self_attn", None, earlier, heads),
            "encoder_attn": attend(f"{name}.encoder_attn", memory, real, heads),
            "ffn": ffn(f"{name}.feed_forward"),
        }
        x = layer(w, cfg, name, x, branches)
    return end("decoder", x) @ w["decoder.output_projection.weight"].T


def loss_sum(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """-log p against (1 - smoothing) * target + smoothing * uniform, summed over real tokens. target: (B, T)."""
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    wanted = torch.full_like(log_p, smoothing / log_p.size(-1))
    wanted.scatter_(-1, target[..., None], smoothing / log_p.size(-1) + 1 - smoothing)
    return -(wanted * log_p).sum(-1)[target != PAD].sum()


def gradients(w: Weights, loss: Tensor) -> Weights:
    """By name, of all that asks for gradients; raises RuntimeError when the loss does not depend on one of them."""
    names = [name for name, tensor in w.items() if tensor.requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [w[name] for name in names]), strict=True))


def sgd_step(w: Weights, grads: Weights, lr: float) -> None:
    """w <- w - lr * gradient; a tensor of several names moves once."""
    with torch.no_grad():
        for tensor, grad in {id(w[name]): (w[name], grad) for name, grad in grads.items()}.values():
            tensor -= lr * grad
