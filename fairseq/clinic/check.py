"""A verdict on a training command before it is run: size, memory, and whether the model will train.

The model's depth and residual rule decide how far its output moves when its parameters do; the width hardly matters. So
a narrow stand-in of the same depth is perturbed, and a 6-layer Post-LN Transformer of the same width for comparison,
which is known to train (Vaswani et al. 2017; Liu et al. 2020). Memory is counted without computing anything: the real
model is built on PyTorch's meta device and its saved activations are added up.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fairseq.clinic.stability import LABEL_SMOOTHING, all_outputs, geometric_mean, matrices, random_change
from fairseq.clinic.subjects import fresh_model, label_of, variant
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.utils.symbols import PAD

# Output change at the start, relative to 6L-6L Post-LN, above which training will probably diverge. See the
# section "The threshold of check" in docs/clinic.md for the runs behind it.
THRESHOLD = 1.5
NEAR = 1.2  # from here to the threshold, training may go badly
# What is known of learning rates; no measure of the start tells models that train at one from those that fail
KNOWN_RATES = (
    "at 64 dimensions Post-LN 6L-6L learned at 3e-3 and not at 6e-3, 12L-12L at 1e-3 and not at 2e-3, 18L-18L hardly "
    "at 3e-4; Admin 18L-18L at 6e-3 and not at 1.2e-2, Pre-LN 18L-18L at 1.2e-2"
)
WIDTH = 64  # of the stand-in
SEEDS = (3, 12)  # fewest and most stand-ins to average over; very deep ones are few, to answer within a minute
LAYERS_MEASURED = 432
FLOAT = 4  # bytes
MOMENTS = {"adam": 2, "radam": 2}  # numbers that an optimiser keeps for a parameter


@dataclass
class Diagnosis:
    """parameters: trained ones. state_bytes: parameters, gradients and the optimiser's state; activation_bytes: what
    the first batch, of ``tokens`` target tokens, keeps for the backward pass. change: the stand-in's output change;
    reference: 6L-6L Post-LN's. lr: the highest of ``--lr``; warmup: updates.
    """

    label: str
    layers: tuple[int, int]
    parameters: int
    state_bytes: int
    activation_bytes: int
    tokens: int
    change: float
    reference: float
    lr: float
    warmup: int

    @property
    def ratio(self) -> float:
        """Output change relative to 6L-6L Post-LN."""
        return self.change / self.reference

    @property
    def trains(self) -> bool:
        """Whether nothing speaks against it."""
        return self.ratio <= THRESHOLD

    @property
    def verdict(self) -> str:
        """What to expect, at a learning rate that suits 6 layers of Post-LN."""
        remedy = "--init-type adaptive" + ("" if self.label == "Post-LN" else " or fewer layers")
        if self.change == 0:
            return "not known: it starts as the identity, so nothing moves yet; only training tells"
        if not self.trains:
            return f"will probably diverge or stall; use {remedy}, or a lower --lr"
        if self.ratio > NEAR:
            return f"near the limit, may train poorly; {remedy} is safer, and so is a lower --lr"
        return "fine, with a learning rate that suits 6 layers"


def diagnose(cfg: TransformerConfig, vocabularies: tuple[int, int], batch: Any, args: Namespace) -> Diagnosis:
    """batch: the first training batch, on the CPU. args: fairseq-train's, of which optimiser and precision matter."""
    parameters, activations = count_memory(cfg, vocabularies, batch["net_input"], batch["target"])
    if args.fp16 or args.bf16:
        activations //= 2
    moments = MOMENTS.get(args.optimizer, 1 if getattr(args, "momentum", 0) else 0)
    inputs = _few_tokens(batch["net_input"])
    post_ln = replace(variant(cfg, "post-ln"), encoder_layers=6, decoder_layers=6)
    return Diagnosis(
        label=label_of(cfg),
        layers=(cfg.encoder_layers, cfg.decoder_layers),
        parameters=parameters,
        state_bytes=parameters * FLOAT * (2 + moments),  # parameter, gradient, moments
        activation_bytes=activations,
        tokens=batch["ntokens"],
        change=output_change(cfg, vocabularies, inputs),
        reference=output_change(post_ln, vocabularies, inputs),
        lr=max(args.lr),
        warmup=getattr(args, "warmup_updates", 0),
    )


def output_change(cfg: TransformerConfig, vocabularies: tuple[int, int], inputs: Mapping[str, Tensor]) -> float:
    """Change of both stacks' outputs for a random perturbation of all layers of a narrow stand-in, over some seeds."""
    values = []
    seeds = min(max(LAYERS_MEASURED // (cfg.encoder_layers + cfg.decoder_layers), SEEDS[0]), SEEDS[1])
    for seed in range(1, seeds + 1):
        model = fresh_model(narrow(cfg), vocabularies, seed, inputs)
        output = partial(all_outputs, model, inputs)
        values.append(random_change(output, matrices(model.encoder, model.decoder), seed))
    return geometric_mean(values)


def narrow(cfg: TransformerConfig) -> TransformerConfig:
    """``cfg`` with a width of 64 and feed-forwards as much wider as they were."""

    def ffn(ffn_dim: int | None, dim: int | None) -> int:
        assert ffn_dim is not None and dim is not None
        return max(2, round(WIDTH * ffn_dim / dim / 2) * 2)

    return replace(
        cfg,
        encoder_embed_dim=WIDTH,
        decoder_embed_dim=WIDTH,
        encoder_ffn_embed_dim=ffn(cfg.encoder_ffn_embed_dim, cfg.encoder_embed_dim),
        decoder_ffn_embed_dim=ffn(cfg.decoder_ffn_embed_dim, cfg.decoder_embed_dim),
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )


def _few_tokens(inputs: Mapping[str, Tensor], tokens: int = 512) -> dict[str, Tensor]:
    """The first sentences of a batch, about ``tokens`` target positions of them."""
    rows = max(1, tokens // inputs["prev_output_tokens"].size(1))
    return {name: tensor[:rows] for name, tensor in inputs.items()}


def count_memory(
    cfg: TransformerConfig, vocabularies: tuple[int, int], inputs: Mapping[str, Tensor], target: Tensor
) -> tuple[int, int]:
    """(trained parameters, bytes of activations that a batch keeps for its backward pass in float32), on no device.

    An upper bound on a GPU, whose attention kernels keep less than the attention weights counted here.
    """
    with torch.device("meta"):
        model = Transformer(cfg, *vocabularies).train()
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        on_meta = {name: tensor.to("meta") for name, tensor in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits, _ = model(**on_meta)
            loss, _ = smoothed_nll(logits, target.to("meta"), LABEL_SMOOTHING, PAD)
    del loss  # the graph, and with it every storage counted above, was alive until here
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(kept.values())


def as_text(diagnosis: Diagnosis) -> str:
    """The diagnosis in a few lines, the verdict last."""
    encoder, decoder = diagnosis.layers
    total = diagnosis.state_bytes + diagnosis.activation_bytes
    lines = [
        f"model: {diagnosis.label}, {encoder}L-{decoder}L, {diagnosis.parameters:,} parameters",
        f"memory: about {_size(total)}: {_size(diagnosis.state_bytes)} parameters, gradients and optimiser, at most "
        f"{_size(diagnosis.activation_bytes)} activations of the first batch, {diagnosis.tokens:,} target tokens",
        f"output change at the start: {diagnosis.ratio:.2f} times that of a 6L-6L Post-LN Transformer "
        f"(limit {THRESHOLD})",
        f"learning rate: the verdict leaves out yours, {diagnosis.lr:g} after {diagnosis.warmup} updates of warm-up. "
        f"Known: {KNOWN_RATES}",
    ]
    return "\n".join([*lines, f"verdict: {diagnosis.verdict}"])


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
