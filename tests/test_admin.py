"""Profiling against float64 and against the original implementation; the omega file; loading it."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq import admin
from fairseq.admin.residual import AdminResidual
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.errors import FairseqError
from fairseq.models.state_dict import from_fairseq
from tests.test_transformer import some_batch, tiny
from tests.toys import original_admin_model


def batch_of(model_seed: int = 0) -> dict[str, torch.Tensor]:
    src, lengths, prev = some_batch(model_seed)
    prev[2, 3:] = 1  # padding counts in the variances
    return {"src_tokens": src, "src_lengths": lengths, "prev_output_tokens": prev}


def test_admin_residual_is_its_equation():
    torch.manual_seed(0)
    model = tiny(init_type="adaptive").double()
    residual = next(m for m in model.modules() if isinstance(m, AdminResidual))
    with torch.no_grad():
        residual.omega.uniform_(0.5, 2)
        residual.norm.weight.uniform_(0.5, 2)
        residual.norm.bias.uniform_(-1, 1)
    x = torch.randn(2, 3, 16, dtype=torch.double)
    total = residual.omega * x + torch.tanh(x)
    mean, variance = total.mean(-1, keepdim=True), total.var(-1, correction=0, keepdim=True)
    expected = (total - mean) / (variance + 1e-5).sqrt() * residual.norm.weight + residual.norm.bias
    torch.testing.assert_close(residual(x, torch.tanh), expected)


def recursion(x: torch.Tensor, sublayers: list) -> tuple[list[float], torch.Tensor]:
    """Run (norm, branch) after (norm, branch) on x with the definition of omega written out; returns omega, output."""
    omega, omegas = 1.0, []
    for norm, branch in sublayers:
        omegas.append(omega)
        f, shortcut = branch(x), omega * x
        x = norm(shortcut + f)
        omega = math.sqrt(shortcut.var(correction=0) + f.var(correction=0))
    return omegas, x


@torch.no_grad()
def test_profile_is_the_recursion_in_float64():
    """Both stacks run by hand, sub-layer after sub-layer, on a batch with padding on both sides."""
    model = tiny(init_type="adaptive-profiling", encoder_layers=3).double()
    batch = batch_of()
    src, prev = batch["src_tokens"], batch["prev_output_tokens"]
    profile = admin.profile(model, batch)
    source = src.ne(1)[:, None, None, :]
    target = torch.ones(5, 5, dtype=torch.bool).tril() & prev.ne(1)[:, None, None, :]
    encoder: list = []
    for layer in model.encoder.layers:
        encoder += [
            (layer.self_attn_residual.norm, lambda q, f=layer.self_attn: f(q, q, mask=source)),
            (layer.ffn_residual.norm, layer.feed_forward),
        ]
    x = model.encoder.embed(src, model.encoder.embed_positions(src))
    expected, encoder_out = recursion(x, encoder)
    np.testing.assert_allclose(profile.encoder, expected, rtol=1e-5)  # variances are taken in float32
    decoder: list = []
    for layer in model.decoder.layers:
        decoder += [
            (layer.self_attn_residual.norm, lambda q, f=layer.self_attn: f(q, q, mask=target)),
            (layer.encoder_attn_residual.norm, lambda q, f=layer.encoder_attn: f(q, encoder_out, mask=source)),
            (layer.ffn_residual.norm, layer.feed_forward),
        ]
    x = model.decoder.embed(prev, model.decoder.embed_positions(prev))
    expected, _ = recursion(x, decoder)
    np.testing.assert_allclose(profile.decoder, expected, rtol=1e-5)
    assert len(profile.encoder) == len(profile.decoder) == 6


def test_profiling_leaves_no_trace():
    model = tiny(init_type="adaptive").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    admin.profile(model, batch_of())
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_dropout_is_part_of_what_is_measured():
    model = tiny(init_type="adaptive", dropout=0.3)
    torch.manual_seed(7)
    noisy = admin.profile(model, batch_of())
    torch.manual_seed(7)
    assert admin.profile(model, batch_of()).encoder == noisy.encoder  # the same seed, bit for bit
    calm = admin.profile(model, batch_of(), deterministic=True)
    assert calm.encoder != noisy.encoder
    assert admin.profile(tiny(init_type="adaptive"), batch_of()).encoder == calm.encoder


def test_several_batches_average_variances():
    model = tiny(init_type="adaptive")
    batches = [batch_of(), batch_of(1), batch_of(2)]
    runs = [admin.profile(model, batch) for batch in batches]
    together = admin.profile(model, batches)
    for stack in ("encoder", "decoder"):
        squares = np.square([getattr(run, stack) for run in runs])
        np.testing.assert_allclose(getattr(together, stack), np.sqrt(squares.mean(0)), rtol=1e-12)
        assert len(set(map(tuple, squares.tolist()))) == 3


def test_profiling_keeps_no_graph_and_one_layer_at_a_time():
    """Each layer's activations are gone when the next one runs."""
    model = tiny(init_type="adaptive", encoder_layers=6)
    alive: list[weakref.ref] = []
    most = 0

    def watch(module, args, output):
        nonlocal most
        assert output.grad_fn is None
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))

    for layer in model.encoder.layers:
        for module in (layer.feed_forward.fc1, layer.self_attn.q_proj):
            module.register_forward_hook(watch)
    admin.profile(model, batch_of())
    assert len(alive) == 12 and most == 1


def test_apply_fills_vectors_and_they_train():
    model = tiny(init_type="adaptive")
    profile = admin.profile(model, batch_of())
    admin.apply_profile(model, profile)
    values = [r.omega.detach() for r in model.decoder.modules() if isinstance(r, AdminResidual)]
    assert [v.unique().tolist() for v in values] == [[pytest.approx(o)] for o in profile.decoder]
    batch = batch_of()
    model(batch["src_tokens"], None, batch["prev_output_tokens"])[0].square().sum().backward()
    assert all(r.omega.grad.abs().max() > 0 for r in model.modules() if isinstance(r, AdminResidual))


def test_a_model_without_omega_has_no_profile():
    with pytest.raises(FairseqError, match="adaptive-profiling"):
        admin.profile(tiny(), batch_of())


def test_reference_omega_loss_logits_and_gradients(shared):
    """A freshly initialised model of the original Admin code: omega, and what the model computes with it."""
    data = np.load(shared / "reference" / "admin_3x2_init.npz")
    model = original_admin_model(data)
    batch = {key.removeprefix("batch/"): torch.tensor(data[key]) for key in data.files if key.startswith("batch/")}
    profile = admin.profile(model, batch)
    np.testing.assert_allclose(profile.encoder, data["omega/encoder"], rtol=1e-5)
    np.testing.assert_allclose(profile.decoder, data["omega/decoder"], rtol=1e-5)
    admin.apply_profile(model, profile)
    logits, extra = model(batch["src_tokens"], batch["src_lengths"], batch["prev_output_tokens"])
    np.testing.assert_allclose(logits[:2].detach(), data["logits_first2"], atol=1e-5)
    np.testing.assert_allclose(extra["encoder_out"].x.detach().transpose(0, 1), data["encoder_out_tbc"], atol=1e-5)
    loss, nll = smoothed_nll(logits, batch["target"], 0.1, 1)
    assert loss.item() == pytest.approx(float(data["label_smoothed_loss_sum_nats"]), rel=1e-6)
    assert nll.item() == pytest.approx(float(data["nll_loss_sum_nats"]), rel=1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for key in data.files:
        if key.startswith("grad_norm/"):
            parts = from_fairseq({key.split("/", 1)[1]: torch.zeros(3)})
            norm = torch.stack([gradients[n].norm() for n in parts if n in gradients]).norm().item()
            assert norm == pytest.approx(float(data[key]), rel=2e-5), key


positive = st.floats(min_value=1e-30, max_value=1e30)


@given(st.lists(positive, min_size=1), st.lists(positive, min_size=1))
def test_file_round_trip(tmp_path_factory, encoder, decoder):
    path = tmp_path_factory.mktemp("omega") / "profile"
    admin.OmegaProfile(encoder, decoder, ["model: a=1"]).save(path)
    loaded = admin.OmegaProfile.load(path)
    assert (loaded.encoder, loaded.decoder, loaded.comments) == (encoder, decoder, ["model: a=1"])


def test_published_format_loads(tmp_path: Path):
    path = tmp_path / "profile.ratio.init"
    path.write_text("1 1.0\n2 1.3190397024154663\n1 1.0\n2 1.1\n3 1.2\n")
    profile = admin.OmegaProfile.load(path)
    assert profile.encoder == [1.0, 1.3190397024154663] and profile.decoder == [1.0, 1.1, 1.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1.0\n2 x\n", "line 2: '2 x' is not"),
        ("1 1.0\n3 1.0\n1 1.0\n", "line 2: index 3 is out of order"),
        ("1 1.0\n2 nan\n1 1.0\n", "line 2: omega nan"),
        ("1 -1.0\n1 1.0\n", "line 1: omega -1.0"),
        ("1 1.0\n1 1e39\n", "line 2: omega 1e[+]39 is not a positive finite number in float32"),
        ("1 1e-46\n1 1.0\n", "line 1: omega 1e-46 is not"),
        ("1 1.0\n", "expected encoder and decoder"),
        ("1 1.0\n1 1.0\n1 1.0\n", "line 3: index 1 is out of order"),
        ("", "expected encoder and decoder"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, text, message):
    path = tmp_path / "omega"
    path.write_text(text)
    with pytest.raises(FairseqError, match=message):
        admin.OmegaProfile.load(path)


def test_a_profile_of_another_model_is_refused(tmp_path: Path):
    model = tiny(init_type="adaptive")
    with pytest.raises(FairseqError, match="3 encoder sub-layers and the model 4"):
        admin.apply_profile(model, admin.OmegaProfile([1.0] * 3, [1.0] * 6))
    profile = admin.OmegaProfile([1.0] * 4, [1.0] * 6, admin.describe(tiny(encoder_ffn_embed_dim=32).cfg, ""))
    with pytest.raises(FairseqError, match="encoder_ffn_embed_dim=32, this model has 24"):
        admin.check_comments(profile, model.cfg, "omega")
    admin.check_comments(admin.OmegaProfile([1.0] * 4, [1.0] * 6), model.cfg, "omega")
