"""Layer dependency against float64 by hand, and as the theory has it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq.clinic.dependency import StackDependency, layer_dependency
from fairseq.clinic.subjects import fresh_model, variant
from fairseq.data.translation import Batch
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from tests import reference_transformer as reference
from tests.test_residual_rules import PRE_LN, Settings, fresh, moved, some_batch, variants

PAD = 1
STACKS = ("encoder", "decoder")
# sinusoidal positions are rounded to float32 in the model; learned ones are the same numbers in the reference
LEARNED: Settings = {"encoder_learned_pos": True, "decoder_learned_pos": True}


def perturbed(**settings: Any) -> Transformer:
    """In float64 and away from the initialisation."""
    return moved(**LEARNED, **settings).double()


def toy_batch() -> Batch:
    src, prev, target = some_batch()
    net_input = {"src_tokens": src, "src_lengths": src.ne(PAD).sum(1), "prev_output_tokens": prev}
    size = {"id": torch.arange(len(src)), "nsentences": len(src), "ntokens": int(target.ne(PAD).sum())}
    return {**size, "net_input": net_input, "target": target}  # type: ignore[typeddict-item]


def inputs_of(padding: int = 0) -> dict[str, Tensor]:
    """padding: columns of it added to both sides of the translation."""
    inputs = toy_batch()["net_input"]
    src = F.pad(inputs["src_tokens"], (padding, 0), value=PAD)
    prev = F.pad(inputs["prev_output_tokens"], (0, padding), value=PAD)
    return {"src_tokens": src, "src_lengths": inputs["src_lengths"], "prev_output_tokens": prev}


def real_of(stack: str) -> Tensor:
    return inputs_of()["src_tokens" if stack == "encoder" else "prev_output_tokens"] != PAD


def hooks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def std_of(u: Tensor) -> Tensor:
    """What LayerNorm divides by."""
    return (centred(u).square().mean(-1, keepdim=True) + 1e-5).sqrt()


def assert_row(found: StackDependency, i: int, parts: list[Tensor], x: Tensor, real: Tensor) -> None:
    """Row i is the shares of ``parts`` (of the biases, the embedding, branch 1, 2, ...) in the stream x."""
    torch.testing.assert_close(sum(parts)[real], x[real], rtol=0, atol=1e-11)  # or the test is wrong
    squares = [(centred(part.expand_as(x)) ** 2).mean(-1)[real] for part in parts]
    variance = x.var(-1, correction=0)[real]
    expected = [float((square / variance).mean()) for square in squares]
    np.testing.assert_allclose([found.bias[i], *found.beta2[i]], np.array(expected) / sum(expected), rtol=0, atol=1e-9)
    assert found.spread[i] == pytest.approx(sum(expected), abs=1e-9)


@pytest.mark.parametrize("init_type", ["default", "adaptive"])
def test_post_ln_by_hand(init_type):
    model = perturbed(init_type=init_type, encoder_layers=1)
    w, src, real = reference.weights_of(model), inputs_of()["src_tokens"], real_of("encoder")
    names = ("encoder.layers.0.self_attn", "encoder.layers.0.ffn")
    omega1, omega2 = (w[f"{name}_residual.omega"] if init_type == "adaptive" else 1 for name in names)
    (gain1, bias1), (gain2, bias2) = (
        (w[f"{name}_residual.norm.weight"], w[f"{name}_residual.norm.bias"]) for name in names
    )
    with torch.no_grad():
        x0 = reference.embed(w, model.cfg, "encoder", src)
        a1 = reference.attention(w, names[0], x0, x0, real[:, None, :], 4, sub_ln=False)
        u1 = omega1 * x0 + a1
        x1 = gain1 * centred(u1) / std_of(u1) + bias1
        a2 = reference.feed_forward(w, "encoder.layers.0.feed_forward", x1, "relu", sub_ln=False)
        u2 = omega2 * x1 + a2
        x2 = gain2 * centred(u2) / std_of(u2) + bias2
        first = [bias1, gain1 * centred(omega1 * x0) / std_of(u1), gain1 * centred(a1) / std_of(u1)]
        second = [gain2 * centred(omega2 * part) / std_of(u2) for part in first] + [gain2 * centred(a2) / std_of(u2)]
        second[0] = second[0] + bias2
        found = layer_dependency(model, inputs_of())["encoder"]
        assert_row(found, 0, first, x1, real)
        assert_row(found, 1, second, x2, real)
    assert min(found.bias) > 0.01 and [len(row) for row in found.beta2] == [2, 3]


def test_pre_ln_by_hand():
    """A branch enters the stream once and stays as it is."""
    model = perturbed(**PRE_LN, encoder_layers=1)
    w, src, real = reference.weights_of(model), inputs_of()["src_tokens"], real_of("encoder")
    with torch.no_grad():
        x0 = reference.embed(w, model.cfg, "encoder", src)
        q = reference.layer_norm(w, "encoder.layers.0.self_attn_residual.norm", x0)
        a1 = reference.attention(w, "encoder.layers.0.self_attn", q, q, real[:, None, :], 4, sub_ln=False)
        q = reference.layer_norm(w, "encoder.layers.0.ffn_residual.norm", x0 + a1)
        a2 = reference.feed_forward(w, "encoder.layers.0.feed_forward", q, "relu", sub_ln=False)
        found = layer_dependency(model, inputs_of())["encoder"]
        assert_row(found, 0, [torch.zeros(16), x0, a1], x0 + a1, real)
        assert_row(found, 1, [torch.zeros(16), x0, a1, a2], x0 + a1 + a2, real)
    assert found.bias == [0, 0]


@dataclass
class LinearSite(reference.Site):
    """LayerNorm's std is noted, or fixed to what was noted."""

    stds: dict[str, Tensor]
    fixed: bool = True
    biased: bool = False

    def ln(self, x: Tensor) -> Tensor:
        if not self.fixed:
            self.stds[self.name] = std_of(x)
            return super().ln(x)
        norm = f"{self.name}_residual.norm"
        y = self.w[f"{norm}.weight"] * centred(x) / self.stds[self.name]
        return y + self.w[f"{norm}.bias"] if self.biased else y


def run_stack(
    w: reference.Weights,
    cfg: TransformerConfig,
    x: Tensor,
    branches: dict[str, Tensor],
    site: Callable[..., LinearSite],
) -> list[Tensor]:
    """The stream after each sub-layer when the branches, by the sub-layers' names, give ``branches``."""
    rule = reference.EQUATIONS[reference.equation_name(cfg, next(iter(branches)).split(".")[0])]
    streams, layer_input = [], x
    for name, branch in branches.items():
        layer_input = x if name.endswith("self_attn") else layer_input
        x = rule(site(w, cfg, name, layer_input, name.endswith("ffn")), x, lambda q, branch=branch: branch)
        streams.append(x)
    return streams


def record(model: Transformer, stack: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(stream before the first layer, branch outputs by sub-layer, stream after the last layer) of a forward pass."""
    module = getattr(model, stack)
    ends: list[Tensor] = []
    branches: dict[str, Tensor] = {}
    handles = [
        module.layers[0].register_forward_pre_hook(lambda m, args: ends.append(args[0])),
        module.layers[-1].register_forward_hook(lambda m, args, output: ends.append(output)),
    ]
    for name, branch in module.named_modules(prefix=stack):
        if re.search(r"\.(self_attn|encoder_attn|feed_forward)$", name):
            name = name.replace("feed_forward", "ffn")
            handles.append(branch.register_forward_hook(lambda m, args, x, name=name: branches.update({name: x})))
    model(**inputs_of())
    for handle in handles:
        handle.remove()
    return ends[0], branches, ends[1]


@pytest.mark.parametrize("stack", STACKS)
@variants
def test_each_branch_alone_through_the_equations(settings, stack):
    """Contribution j is what the rest of the stack makes of branch j when all other branches are silent."""
    model = perturbed(**settings)
    w = reference.weights_of(model)
    with torch.no_grad():
        x0, branches, end = record(model, stack)
        silent = {name: torch.zeros_like(a) for name, a in branches.items()}
        stds: dict[str, Tensor] = {}
        run = partial(run_stack, w, model.cfg)
        linear = partial(LinearSite, stds=stds)
        streams = run(x0, branches, partial(linear, fixed=False))
        torch.testing.assert_close(streams[-1], end)
        zero = torch.zeros_like(x0)
        parts = [run(zero, silent, partial(linear, biased=True)), run(x0, silent, linear)]
        parts += [run(zero, silent | {name: branches[name]}, linear) for name in branches]
        found = layer_dependency(model, inputs_of())[stack]
        assert len(found.beta2) == len(streams)
        for i, x in enumerate(streams):
            assert len(found.beta2[i]) == i + 2
            assert_row(found, i, [part[i] for part in parts[: i + 3]], x, real_of(stack))


@variants
def test_padding_does_not_count(settings):
    model = perturbed(**settings)
    once, padded = layer_dependency(model, inputs_of()), layer_dependency(model, inputs_of(padding=3))
    for stack in STACKS:
        for row, same in zip(once[stack].beta2, padded[stack].beta2, strict=True):
            np.testing.assert_allclose(row, same, rtol=0, atol=1e-11)
        np.testing.assert_allclose(once[stack].bias, padded[stack].bias, rtol=0, atol=1e-11)


@variants
def test_biases_have_no_share_at_the_start(settings):
    found = layer_dependency(fresh(**settings).double(), inputs_of())
    assert all(set(stack.bias) == {0.0} for stack in found.values())


@pytest.mark.parametrize("name", ["post-ln", "pre-ln", "adaptive"])
def test_own_share_by_depth(name):
    """About constant for Post-LN, about 1/i for the others (Liu et al. 2020, section 4.1).

    Over depths that differ by six, a factor of two on either side tells the two laws apart.
    """
    shape = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_layers": 12, "decoder_layers": 12}
    cfg = variant(TransformerConfig(**shape, encoder_attention_heads=2, decoder_attention_heads=2), name)
    runs = [layer_dependency(fresh_model(cfg, (20, 20), seed, inputs_of()), inputs_of()) for seed in (1, 2, 3)]
    for stack in STACKS:
        own = np.mean([[row[-1] for row in run[stack].beta2] for run in runs], axis=0)
        parts = np.arange(2, len(own) + 2)  # in row i, the embedding's among them
        quarter = len(own) // 4
        if name == "post-ln":
            assert 0.5 < own[-quarter:].mean() / own[:quarter].mean() < 2
            assert own[-quarter:].mean() > 4 / len(own)
        else:
            for places in (slice(None, quarter), slice(-quarter, None)):
                assert 0.5 < own[places].mean() / (1 / parts[places]).mean() < 2


class Squashed(nn.Module):
    """``tanh(x + f(x))``: no rule that the theory speaks of."""

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.tanh(x + sublayer(x))


class BareNorm(nn.Module):
    """Post-LN without gain and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, elementwise_affine=False)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return self.norm(x + sublayer(x))


def test_a_rule_that_is_not_affine_is_refused():
    model = fresh().double()
    model.encoder.layers[1].ffn_residual = Squashed()
    with pytest.raises(FairseqError, match=r"^Squashed: .* affine in stream and branch$"):
        layer_dependency(model, inputs_of())
    assert hooks_of(model) == []


def test_a_rule_of_ones_own():
    expected = layer_dependency(fresh().double(), inputs_of())["encoder"]
    model = fresh().double()
    for layer in model.encoder.layers:
        layer.self_attn_residual, layer.ffn_residual = BareNorm(), BareNorm()
    found = layer_dependency(model, inputs_of())["encoder"]
    np.testing.assert_allclose(found.beta2[-1], expected.beta2[-1], rtol=1e-12)


def test_no_hook_is_left():
    model = fresh().double()
    layer_dependency(model, inputs_of())
    assert hooks_of(model) == []
    with pytest.raises(IndexError):
        layer_dependency(model, inputs_of() | {"prev_output_tokens": torch.tensor([[2, 20]])})
    assert hooks_of(model) == []
