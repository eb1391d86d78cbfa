"""Every init type against its equation in float64 (`tests.reference_transformer`), and wherever models are used."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq.checkpoint import load_model
from fairseq.cli import generate
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.data.translation import TranslationData
from fairseq.errors import FairseqError
from fairseq.models.transformer import Transformer
from fairseq.options import DataConfig, parse_train_args, section
from fairseq.training.distributed import World, launch
from fairseq.training.train import train as train_in_process
from tests import reference_transformer as reference
from tests.test_transformer import tiny
from tests.toys import write_toy_checkpoint
from tests.training_runs import SGD, assert_fails, assert_same, command_line, last, train, trainer_and_batches, updates

PAD = 1
N, M = 2, 3  # encoder and decoder layers
Settings = dict[str, Any]

PRE_LN: Settings = {"encoder_normalize_before": True, "decoder_normalize_before": True}
TYPES = (
    *("adaptive-profiling", "adaptive", "adaptive-closed-form"),
    *("rezero", "rezero_postln", "looklinear", "deepnet", "subln", "b2t"),
)
VARIANTS: dict[str, Settings] = {
    "post-ln": {},
    "pre-ln": PRE_LN,
    "pre-ln encoder": {"encoder_normalize_before": True},
    **{name: {"init_type": name} for name in TYPES},
    "constant omega": {
        "init_type": "adaptive-closed-form",
        "rule_settings": {"omega": "constant", "output_change": "constant"},
    },
}
SHAPES: dict[str, Settings] = {
    "plain": {},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
    "one embedding": {"share_all_embeddings": True, "no_scale_embedding": True, "activation_fn": "gelu"},
    "narrow decoder": {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 12, "no_token_positional_embeddings": True},
}
variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def fresh(**settings: Any) -> Transformer:
    """A small model as it starts, without dropout, in eval mode."""
    return tiny(**({"encoder_layers": N, "decoder_layers": M} | settings))


def moved(**settings: Any) -> Transformer:
    """Like `fresh`, all parameters and buffers 0.1 to 0.4 away from where they start: none is 0 or 1 by definition."""
    model = fresh(**settings)
    for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values():
        tensor += (0.1 + 0.3 * torch.rand_like(tensor)) * torch.randn_like(tensor).sign()
    return model


def some_batch() -> tuple[Tensor, Tensor, Tensor]:
    """src (3, 7), padded on the left; prev (3, 5) and target (3, 5), padded on the right."""
    generator = torch.Generator().manual_seed(0)
    src, target = (torch.randint(4, 20, (3, length), generator=generator) for length in (7, 5))
    src[1, :3] = PAD
    target[2, 3:] = PAD
    prev = torch.cat([torch.full((3, 1), 2), target[:, :-1]], 1)
    return src, prev, target


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Each tensor to ``tolerance`` of its largest entry; one that is 0 but for rounding, of the largest of all."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        error = (found[name].double() - tensor).abs().max()
        assert error <= tolerance * max(float(tensor.abs().max()), 1e-2 * largest), name


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Under all their names, as in the state dict."""
    return dict(model.named_parameters(remove_duplicate=False))


# -- the equations


@shapes
@variants
def test_logits_loss_and_gradients(settings, shape):
    model = moved(**settings, **shape).train()
    src, prev, target = some_batch()
    logits, _ = model(src, None, prev)
    loss, _ = smoothed_nll(logits, target, 0.1, PAD)
    loss.backward()

    weights = reference.weights_of(model)
    expected = reference.forward(weights, model.cfg, src, prev)
    expected_loss = reference.loss_sum(expected, target, 0.1)
    real = target != PAD
    assert_near({"logits": logits[real].detach()}, {"logits": expected[real].detach()}, 1e-5)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    found = {name: p.grad for name, p in parameters_by_name(model).items()}
    assert_near(found, reference.gradients(weights, expected_loss))


@shapes
@variants
def test_step_by_step(settings, shape):
    """Incremental decoding of two hypotheses a sentence."""
    model = moved(**settings, **shape)
    src, prev, _ = some_batch()
    prev = torch.stack([prev, prev.flip(0)], 1).flatten(0, 1).clamp(min=2)  # decoding knows no padding
    weights = reference.weights_of(model)
    expected = reference.forward(weights, model.cfg, src.repeat_interleave(2, 0), prev).detach()
    with torch.no_grad():
        decoder = model.decoder
        cache = decoder.new_cache(model.encoder(src))
        steps = [decoder.output_projection(decoder.step(tokens, cache)[0]) for tokens in prev.T]
    assert_near({"logits": torch.stack(steps, 1)}, {"logits": expected}, 1e-5)


def command_flags(settings: Settings) -> list[object]:
    """The model settings as flags of the command line."""
    flat = {name: value for name, value in settings.items() if name != "rule_settings"} | settings.get(
        "rule_settings", {}
    )
    pairs = [("--" + name.replace("_", "-"), value) for name, value in flat.items()]
    return [word for flag, value in pairs for word in ((flag,) if value is True else (flag, value))]


@variants
def test_five_updates(toy_databin, settings):
    """SGD from the initial weights."""
    flags = (*SGD, "--lr", 0.1, "--encoder-layers", N, "--decoder-layers", M, *command_flags(settings))
    trainer, itr = trainer_and_batches(toy_databin, *flags)
    weights = reference.weights_of(trainer.model)
    start = {name: tensor.detach().clone() for name, tensor in weights.items()}
    batches = itr.updates(1)
    padding = 0
    for _ in range(5):
        [batch] = next(batches)
        src, prev = batch["net_input"]["src_tokens"], batch["net_input"]["prev_output_tokens"]
        padding += int((src == PAD).sum()) * int((prev == PAD).sum())
        tokens = int((batch["target"] != PAD).sum())
        expected = reference.loss_sum(
            reference.forward(weights, trainer.model.cfg, src, prev), batch["target"], smoothing=0.1
        )
        gradients = reference.gradients(weights, expected / tokens)
        reference.sgd_step(weights, gradients, lr=0.1)
        assert trainer.train_step([batch])
        assert trainer.take_stats()["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert padding > 0
    assert_near(trainer.model.state_dict(), {name: tensor.detach() for name, tensor in weights.items()})
    for name, tensor in weights.items():
        if name.endswith((".omega", ".alpha")):
            assert torch.equal(tensor, start[name]) != tensor.requires_grad, name


@variants
def test_dropout_is_of_each_branch_and_of_nothing_else(settings):
    """Branches are silent when their last projection is zero."""
    model = moved(**settings, dropout=0.5)
    model.encoder.embed_dropout.p = model.decoder.embed_dropout.p = 0.0
    src, prev, _ = some_batch()
    branches = [name for name, _ in model.named_modules() if name.endswith(("out_proj", "fc2"))]
    assert len(branches) == 2 * N + 3 * M
    for speaking in (None, *branches):
        one = copy.deepcopy(model)
        for name in branches:
            if name != speaking:
                one.get_submodule(name).weight.data.zero_()
                one.get_submodule(name).bias.data.zero_()
        trained, evaluated = (one.train(mode)(src, None, prev) for mode in (True, False))
        pairs = [(trained[0], evaluated[0]), (trained[1]["encoder_out"].x, evaluated[1]["encoder_out"].x)]
        assert all(torch.equal(x, y) for x, y in pairs) == (speaking is None), speaking


# -- how training starts


def at_bound(weight: Tensor, gain: float) -> bool:
    """Whether ``weight`` is drawn Xavier-uniform: in +-gain * sqrt(6 / (fan in + fan out)), and nearly out there."""
    bound = gain * math.sqrt(6 / sum(weight.shape))
    return 0.95 * bound < float(weight.detach().abs().max()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("init_type", ["rezero", "rezero_postln"])
def test_rezero_starts_as_nothing(init_type):
    """One alpha a layer, 0: the encoder hands its input on, normalised with LayerNorm or as it is."""
    model = fresh(init_type=init_type)
    alphas = {name: p for name, p in parameters_by_name(model).items() if name.endswith(".alpha")}
    assert len(alphas) == 2 * N + 3 * M
    assert all(alpha.numel() == 1 and alpha.item() == 0 for alpha in alphas.values())
    by_layer = {name.rsplit(".", 2)[0]: alpha for name, alpha in alphas.items()}
    assert all(alpha is by_layer[name.rsplit(".", 2)[0]] for name, alpha in alphas.items())
    assert len({id(alpha) for alpha in by_layer.values()}) == N + M
    norms = sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert norms == (0 if init_type == "rezero" else 2 * N + 3 * M)
    src, _, _ = some_batch()
    x = reference.embed(reference.weights_of(model), model.cfg, "encoder", src)
    if init_type == "rezero_postln":
        x = nn.functional.layer_norm(x, (16,))
    real = src != PAD
    torch.testing.assert_close(model.encoder(src).x[real].double(), x[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation_fn", ["relu", "gelu"])
def test_looklinear_starts_linear(activation_fn):
    model = fresh(init_type="looklinear", activation_fn=activation_fn)
    x, y = torch.randn(2, 5, 16)
    for layer in (*model.encoder.layers, *model.decoder.layers):
        f = layer.feed_forward
        top, bottom = f.fc1.weight.chunk(2, 0)
        left, right = f.fc2.weight.chunk(2, 1)
        assert torch.equal(top, -bottom) and torch.equal(left, -right)
        assert at_bound(f.fc1.weight, 1) and at_bound(f.fc2.weight, 1)
        torch.testing.assert_close(f(-x), -f(x))
        torch.testing.assert_close(f(x + 2 * y), f(x) + 2 * f(y), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(f(x), x @ (left @ top).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_looklinear_needs_an_even_dimension(stack):
    flag = f"{stack}_ffn_embed_dim"
    with pytest.raises(FairseqError, match=f"--{flag.replace('_', '-')} 25"):
        fresh(init_type="looklinear", **({"decoder_ffn_embed_dim": 24} | {flag: 25}))


@pytest.mark.parametrize(("init_type", "gain"), [("deepnet", reference.deepnet_beta), ("subln", reference.subln_gamma)])
def test_xavier_gains(init_type, gain):
    model = fresh(init_type=init_type, encoder_embed_dim=32, decoder_embed_dim=24)
    checked = 0
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert parameter.abs().max() == 0, name
        elif ".layers." in name and parameter.dim() == 2:
            expected = 1 if "q_proj" in name or "k_proj" in name else gain(name.split(".")[0], N, M)
            assert at_bound(parameter, expected), name
            checked += 1
    assert checked == 6 * N + 10 * M


@pytest.mark.parametrize("kind", ["parameter", "constant"])
@pytest.mark.parametrize("output_change", ["logn", "constant", "linear"])
def test_closed_form_omega(output_change, kind):
    model = fresh(init_type="adaptive-closed-form", rule_settings={"output_change": output_change, "omega": kind})
    for stack, count in (("encoder", 2 * N), ("decoder", 3 * M)):
        module = model.get_submodule(stack)
        trained, kept = dict(module.named_parameters()), dict(module.named_buffers())
        omegas = {name: t for name, t in module.state_dict().items() if name.endswith("_residual.omega")}
        assert len(omegas) == count
        expected = torch.full((16,), reference.closed_form_omega(output_change, count))
        for name, omega in omegas.items():
            torch.testing.assert_close(omega, expected)
            assert (name in trained, name in kept) == (kind == "parameter", kind == "constant")


def test_closed_form_by_default():
    """Trained, for an output change that grows as log n; 12 sub-layers in each stack: sqrt(13 / ln 13 - 1)."""
    model = fresh(init_type="adaptive-closed-form", encoder_layers=6, decoder_layers=4)
    omegas = [p for name, p in model.named_parameters() if name.endswith(".omega")]
    assert len(omegas) == 24
    assert all(omega.tolist() == pytest.approx([2.017009] * 16, abs=1e-5) for omega in omegas)


# -- what else models go through


@variants
def test_checkpoint_round_trip(tmp_path, settings):
    model = moved(**settings)
    src, prev, _ = some_batch()
    loaded = load_model(write_toy_checkpoint(model, tmp_path / "model.pt"))
    assert torch.equal(loaded(src, None, prev)[0], model(src, None, prev)[0])
    assert parameters_by_name(loaded).keys() == parameters_by_name(model).keys()


@variants
def test_float16_forward(settings):
    model = moved(**settings)
    src, prev, _ = some_batch()
    with torch.no_grad():
        expected, _ = model(src, None, prev)
        found, _ = copy.deepcopy(model).half()(src, None, prev)
    assert found.dtype == torch.float16
    assert_near({"logits": found}, {"logits": expected.double()}, 0.01)


def model_flags(databin: Path, directory: Path, settings: Settings) -> list[object]:
    """Of the command line, for a small model with a rule; for ``adaptive`` omega is profiled first."""
    flags: list[object] = ["--encoder-layers", N, *command_flags(settings)]
    if settings.get("init_type") != "adaptive":
        return flags
    flags += ["--omega-file", directory / "omega"]
    train(databin, directory / "profiling", *flags, "--init-type", "adaptive-profiling")
    return flags


def reference_loss(model: Transformer, databin: Path, split: str) -> float:
    """Label-smoothed loss a target token, in bits, over a split in one batch."""
    args = parse_train_args(command_line(databin, Path("unused")))
    dataset = TranslationData.open(section(DataConfig, args)).load(split)
    batch = dataset.collate(range(len(dataset)))
    inputs = (batch["net_input"][name] for name in ("src_tokens", "prev_output_tokens"))
    logits = reference.forward(reference.weights_of(model), model.cfg, *inputs)
    return reference.loss_sum(logits, batch["target"], 0.1).item() / math.log(2) / batch["ntokens"]


TRAINED = {name: settings for name, settings in VARIANTS.items() if name != "adaptive-profiling"}
trained_variants = pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)


@trained_variants
def test_train_resume_validate_generate(toy_databin, tmp_path, capsys, settings):
    """By the commands, dropout on."""
    flags = model_flags(toy_databin, tmp_path, settings)
    whole = train(toy_databin, tmp_path / "whole", *flags, "--max-update", 4)
    parts = [line for n in (2, 4) for line in train(toy_databin, tmp_path / "parts", *flags, "--max-update", n)]
    assert len(updates(whole)) == 4
    assert updates(parts) == updates(whole)
    for key in ("model", "last_optimizer_state"):
        assert_same(last(tmp_path / "parts")[key], last(tmp_path / "whole")[key])

    path = tmp_path / "parts" / "checkpoint_last.pt"
    [valid_loss] = [line["valid_loss"] for line in whole if "valid_loss" in line]
    assert valid_loss == pytest.approx(reference_loss(load_model(path), toy_databin, "valid"), abs=6e-4)

    capsys.readouterr()
    generate.main([str(toy_databin), "--path", str(path), "--cpu", "--num-workers", "0", "--max-len-b", "12"])
    lines = capsys.readouterr().out.splitlines()
    assert "BLEU" in lines[-1]
    scores = [float(line.split("\t")[1]) for line in lines if line.startswith("H-")]
    assert len(scores) == 30
    assert all(-10 < score < 0 for score in scores)


@trained_variants
def test_bf16(toy_databin, tmp_path, settings):
    flags = model_flags(toy_databin, tmp_path, settings)
    lines = train(toy_databin, tmp_path / "run", *flags, "--bf16", "--max-update", 14, "--disable-validation")
    losses = [line["loss"] for line in updates(lines).values()]
    assert len(losses) == 14
    assert sum(losses[-3:]) < sum(losses[:3])  # a NaN is not smaller


def train_each(args: Namespace, world: World) -> None:
    """Several training runs in one group of processes. args.runs: their command lines."""
    for argv in args.runs:
        train_in_process(parse_train_args(argv), world)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_update_freq(toy_databin, tmp_path):
    runs = {}
    for name, settings in TRAINED.items():
        flags = (*model_flags(toy_databin, tmp_path / name, settings), "--max-update", 3, "--disable-validation")
        train(toy_databin, tmp_path / name / "one", *flags, "--update-freq", 2)
        runs[name] = command_line(toy_databin, tmp_path / name / "two", *flags)
    args = parse_train_args(runs["post-ln"])
    args.runs, args.distributed_world_size = list(runs.values()), 2
    launch(train_each, args)
    for name in runs:
        one, two = (last(tmp_path / name / run) for run in ("one", "two"))
        assert two["optimizer_history"][-1]["num_updates"] == 3
        assert_same(two["model"], one["model"], atol=1e-5)


# -- refusals


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("init_type", TYPES)
def test_other_rules_refuse_pre_ln(toy_databin, tmp_path, capsys, init_type, stack):
    flag = f"--{stack}-normalize-before"
    why = rf"--init-type {init_type} .*{flag}: .*(LN|LayerNorm)"
    with pytest.raises(FairseqError, match=why):
        fresh(init_type=init_type, **{f"{stack}_normalize_before": True})
    argv = command_line(toy_databin, tmp_path, "--init-type", init_type, flag, "--max-update", 1)
    assert_fails(capsys, 1, flag, *argv)
    assert not list(tmp_path.glob("*.pt"))


def test_looklinear_refuses_an_odd_dimension_on_the_command_line(toy_databin, tmp_path, capsys):
    argv = command_line(toy_databin, tmp_path, "--init-type", "looklinear", "--encoder-ffn-embed-dim", 25)
    assert_fails(capsys, 1, "--encoder-ffn-embed-dim 25", *argv, "--max-update", 1)
