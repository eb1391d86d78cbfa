"""Output change, gradients, memory and omega, against float64 by hand, finite differences and properties."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq import admin
from fairseq.clinic import check, stability
from fairseq.clinic.gradients import gradient_norms
from fairseq.clinic.omega import read_omega
from fairseq.clinic.subjects import first_batch, fresh_model, variant
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.data.translation import TranslationData
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.options import DataConfig
from tests import reference_transformer as reference
from tests.test_clinic_dependency import LEARNED, PAD, STACKS, hooks_of, inputs_of, perturbed, real_of, toy_batch
from tests.test_residual_rules import PRE_LN, fresh, variants
from tests.toys import write_toy_checkpoint

# -- output change


@torch.no_grad()
def layer_normed(model: Transformer) -> Tensor:
    """The encoder's output at real positions, normalised."""
    return F.layer_norm(model.encoder(inputs_of()["src_tokens"]).x[real_of("encoder")], (16,), eps=0)


def test_moved_parameters_come_back_to_the_bit():
    model = fresh()
    parameters = [*model.parameters()]
    before = [p.detach().clone() for p in parameters]
    with stability.moved(parameters, torch.rand_like):
        assert not any(map(torch.equal, parameters, before))
    with pytest.raises(ZeroDivisionError), stability.moved(parameters, torch.rand_like):
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), stability.moved(parameters, lambda p: p + 1 / (p.dim() - 1)):
        pytest.fail("a vector cannot be moved so")
    assert all(map(torch.equal, parameters, before))


def test_normalized():
    x = torch.randn(3, 5, 16, dtype=torch.double) * 3 + 2
    real = real_of("decoder")
    expected = F.layer_norm(x, (16,), eps=0)[real]
    torch.testing.assert_close(stability.normalized(x, real), expected)


def test_outputs_are_those_of_the_model():
    model = perturbed(**PRE_LN)
    _, extra = model(**inputs_of())
    outputs = [extra["encoder_out"].x[real_of("encoder")], extra["features"][real_of("decoder")]]
    expected = torch.cat([F.layer_norm(x, (16,), eps=0) for x in outputs])
    torch.testing.assert_close(stability.all_outputs(model, inputs_of()), expected)
    torch.testing.assert_close(stability.encoder_output(model, inputs_of()), expected[: len(outputs[0])])


def test_random_change_of_a_matrix_is_its_xavier_variance():
    matrix = torch.randn(300, 200, dtype=torch.double)
    change = stability.random_change(lambda: matrix.clone(), [matrix], seed=1)
    assert change == pytest.approx(2 / (300 + 200), rel=0.03)  # 60,000 draws: 0.6 % is one standard deviation


def test_random_change_is_the_linear_prediction():
    """For tiny noise: half the noise gives the same, and so does a hundredth of it, added and measured by hand."""
    model = fresh(**LEARNED).double()
    moving = stability.matrices(model.encoder)
    output = partial(stability.encoder_output, model, inputs_of())
    whole, half = (stability.random_change(output, moving, 5, noise) for noise in (1e-4, 5e-5))
    assert whole == pytest.approx(half, rel=0.01)
    before, generator = layer_normed(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in moving:
            xavier = math.sqrt(2 / (p.size(0) + p.size(1)))
            p += 1e-6 * xavier * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    by_hand = float(((layer_normed(model) - before) / 1e-6).square().mean())
    assert half == pytest.approx(by_hand, rel=0.01)


def test_only_the_layers_matrices_are_moved():
    model = fresh(init_type="adaptive")
    moving = {id(p) for p in stability.matrices(model.encoder)}
    names = {name for name, p in model.named_parameters() if id(p) in moving}
    expected = {
        f"encoder.layers.{i}.{linear}.weight"
        for i in range(model.cfg.encoder_layers)
        for linear in (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "feed_forward.fc1", "feed_forward.fc2")
    }
    assert names == expected


def test_rezero_does_not_move_at_the_start():
    model = fresh(init_type="rezero").double()
    output = partial(stability.encoder_output, model, inputs_of())
    assert stability.random_change(output, stability.matrices(model.encoder), seed=1) == 0
    assert stability.gradient_change(model, toy_batch(), output, stability.matrices(model.encoder)) == 0


def test_gradient_change_is_a_step_of_sgd():
    model = fresh(**LEARNED).double()
    output = partial(stability.encoder_output, model, inputs_of())
    moving = stability.matrices(model.encoder)
    found = stability.gradient_change(model, toy_batch(), output, moving, step=0.01)

    stepped, batch = copy.deepcopy(model), toy_batch()
    w = reference.weights_of(stepped)
    logits = reference.forward(w, model.cfg, batch["net_input"]["src_tokens"], batch["net_input"]["prev_output_tokens"])
    grads = reference.gradients(w, reference.loss_sum(logits, batch["target"], 0.1) / batch["ntokens"])
    with torch.no_grad():
        for name, parameter in stepped.encoder.layers.named_parameters():
            if parameter.dim() == 2:
                parameter -= 0.01 * grads[f"encoder.layers.{name}"]
    change = (layer_normed(stepped) - layer_normed(model)) / 0.01
    assert found == pytest.approx(float(change.square().mean()), rel=1e-9)


def test_fit_growth():
    depths = [6, 12, 24, 50, 100]
    line = stability.fit_growth(depths, [3 + 0.5 * n for n in depths])
    assert line.growth == "linear"
    assert line.linear == pytest.approx((3, 0.5)) and line.linear_r2 == pytest.approx(1)
    assert line.logarithmic_r2 < 0.95
    log = stability.fit_growth(depths, [3 + 0.5 * math.log(n) for n in depths])
    assert log.growth == "logarithmic"
    assert log.logarithmic == pytest.approx((3, 0.5)) and log.logarithmic_r2 == pytest.approx(1)
    assert stability.fit_growth(depths, [7 * n**1.5 for n in depths]).exponent == pytest.approx(1.5)
    assert stability.fit_growth(depths, [0.0] * len(depths)).exponent is None
    residual = np.array([1.0, -1, -1, 1])  # orthogonal to 1 and N: R^2 = 1 - 4 / (4 + 5 * 16)
    found = stability.fit_growth([1, 3, 5, 7], 2 * np.array([1, 3, 5, 7]) + residual)
    assert found.linear == pytest.approx((0, 2)) and found.linear_r2 == pytest.approx(1 - 4 / 84)


@pytest.mark.slow
def test_output_change_grows_as_the_paper_says(toy_databin):
    """O(N) for Post-LN, O(log N) for Pre-LN and Admin: over seeds enough, narrow models show it too."""
    data = TranslationData.open(DataConfig(str(toy_databin)))
    vocabularies = len(data.src_dict), len(data.tgt_dict)
    depths, seeds = (6, 12, 24, 48), range(1, 10)
    batches = [first_batch(data, 128, seed, torch.device("cpu"), (1024, 1024)) for seed in seeds]
    fits = {}
    for name in ("post-ln", "pre-ln", "adaptive"):
        means = []
        for depth in depths:
            shape = {"encoder_layers": depth // 2, "encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128}
            cfg = variant(TransformerConfig(**shape, decoder_layers=1), name)
            changes = []
            for seed, batch in zip(seeds, batches, strict=True):
                model = fresh_model(cfg, vocabularies, seed, batch["net_input"])
                output = partial(stability.encoder_output, model, batch["net_input"])
                changes.append(stability.random_change(output, stability.matrices(model.encoder), seed))
            means.append(stability.geometric_mean(changes))
        fits[name] = stability.fit_growth(depths, means)
    growth = {name: fit.growth for name, fit in fits.items()}
    assert growth == {"post-ln": "linear", "pre-ln": "logarithmic", "adaptive": "logarithmic"}
    assert fits["post-ln"].exponent > 0.8 > 0.6 > max(fits[name].exponent for name in ("pre-ln", "adaptive"))


# -- gradients


@variants
def test_gradient_norms(settings):
    model, batch = perturbed(**settings), toy_batch()
    found = gradient_norms(model, batch)
    assert all(p.grad is None for p in model.parameters()) and hooks_of(model) == []

    w = reference.weights_of(model)
    logits = reference.forward(w, model.cfg, batch["net_input"]["src_tokens"], batch["net_input"]["prev_output_tokens"])
    grads = reference.gradients(w, reference.loss_sum(logits, batch["target"], 0.1) / batch["ntokens"])
    streams: dict[str, list[Tensor]] = {stack: [] for stack in STACKS}

    def enters(stack: str, residual: nn.Module, args: tuple[Any, ...]) -> None:
        streams[stack].append(args[0] if isinstance(args[0], Tensor) else args[0][0])

    kinds = {"encoder": ["self_attn", "ffn"], "decoder": ["self_attn", "encoder_attn", "ffn"]}
    for stack in STACKS:
        layers = getattr(model, stack).layers
        for layer in layers:
            for kind in kinds[stack]:
                getattr(layer, f"{kind}_residual").register_forward_pre_hook(partial(enters, stack))
        layers[-1].register_forward_hook(lambda m, args, output, stack=stack: streams[stack].append(output))
    loss, _ = smoothed_nll(model(**batch["net_input"])[0], batch["target"], 0.1, PAD)
    for stack, own in streams.items():
        layers = len(own) // len(kinds[stack])
        assert found[stack]["kind"] == kinds[stack] * layers
        norms = [
            math.hypot(
                *(float(g.norm()) for name, g in grads.items() if name.startswith(f"{stack}.layers.{i}.{branch}."))
            )
            for i in range(layers)
            for branch in (kind.replace("ffn", "feed_forward") for kind in kinds[stack])
        ]
        np.testing.assert_allclose(found[stack]["parameters"], norms, rtol=1e-9)
        outputs = torch.autograd.grad(loss / batch["ntokens"], own[1:], retain_graph=True)
        np.testing.assert_allclose(found[stack]["output"], [float(g.norm()) for g in outputs], rtol=1e-9)


# -- memory


@pytest.mark.parametrize(
    "settings",
    [{}, PRE_LN | {"attention_dropout": 0.1}, {"init_type": "adaptive", "share_all_embeddings": True, "dropout": 0.1}],
)
def test_memory_is_what_a_forward_pass_on_the_cpu_keeps(settings):
    model, batch = fresh(**settings).train(), toy_batch()
    parameters = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        loss = smoothed_nll(model(**batch["net_input"])[0], batch["target"], 0.1, PAD)
    counted, activations = check.count_memory(model.cfg, (20, 20), batch["net_input"], batch["target"])
    assert loss[0].requires_grad  # and has kept all that was counted until here
    assert counted == sum(p.numel() for p in model.parameters())
    assert activations == pytest.approx(sum(kept.values()), rel=0.02)


# -- omega


def test_omega_of_a_file(tmp_path: Path):
    admin.OmegaProfile([1.0, 1.5], [1.0, 2.0, 2.5], ["model: x=1"]).save(tmp_path / "omega")
    found = read_omega(tmp_path / "omega")
    assert (found["encoder"].start, found["decoder"].start) == ([1.0, 1.5], [1.0, 2.0, 2.5])
    assert found["encoder"].mean is None


def test_omega_of_what_has_none(tmp_path: Path):
    write_toy_checkpoint(fresh(), tmp_path / "plain.pt")
    (tmp_path / "garbage").write_bytes(bytes(range(255, 0, -1)))
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "empty").touch()
    for name, message in (
        *(("plain.pt", "no omega"), ("garbage", "not a text file"), ("zip", "zip"), ("empty", "0 runs of indices")),
        *(("nowhere", "No such file"), ("", "Is a directory")),
    ):
        with pytest.raises(FairseqError, match=message):
            read_omega(tmp_path / name)
