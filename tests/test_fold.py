"""Folding omega: the same outputs from an ordinary Post-LN model, whatever is tied and however positions are made."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq import admin
from fairseq.admin.fold import FOLDABLE, fold_notes
from fairseq.admin.residual import AdminResidual, PostLN, ReZeroPostLN
from fairseq.checkpoint import load_model
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from tests.toys import original_admin_model
from tests.training_runs import train

VOCAB = 23
SHAPES: list[dict[str, Any]] = [
    {"share_all_embeddings": True},
    {"share_all_embeddings": True, "share_decoder_input_output_embed": True, "decoder_learned_pos": True},
    {"share_decoder_input_output_embed": True, "encoder_learned_pos": True},
    {"share_decoder_input_output_embed": True, "no_token_positional_embeddings": True},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "no_scale_embedding": True},
    {"decoder_embed_dim": 24, "decoder_ffn_embed_dim": 20, "share_decoder_input_output_embed": True},
    {"layernorm_embedding": True, "share_all_embeddings": True},
    {"layernorm_embedding": True, "decoder_embed_dim": 24, "no_token_positional_embeddings": True},
    {"init_type": "adaptive-closed-form", "share_all_embeddings": True},
    {"init_type": "adaptive-closed-form", "rule_settings": {"omega": "constant"}},
    {"init_type": "deepnet", "share_all_embeddings": True},
    {"init_type": "looklinear", "share_all_embeddings": True},
    {"init_type": "rezero_postln", "share_all_embeddings": True},
    {"init_type": "default"},
]


def trained_like(seed: int = 1, **settings: Any) -> Transformer:
    """An Admin model, in float64, no vector of which is as it starts: omega 0.3 to 3, a quarter of it negative."""
    torch.manual_seed(seed)
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 28, "encoder_attention_heads": 2, "encoder_layers": 2}
    shape |= {"decoder_layers": 2, "decoder_attention_heads": 2, "dropout": 0.3, "attention_dropout": 0.1}
    shape |= {"init_type": "adaptive", "max_source_positions": 40, "max_target_positions": 50}
    cfg = TransformerConfig(**(shape | settings))
    model = Transformer(cfg, VOCAB, VOCAB if cfg.share_all_embeddings else VOCAB + 6).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.uniform_(-0.3, 0.3)
            elif isinstance(module, AdminResidual) and isinstance(module.omega, nn.Parameter):
                module.omega.uniform_(0.3, 3)
                module.omega[torch.rand_like(module.omega) < 0.25] *= -1
            elif isinstance(module, ReZeroPostLN):
                module.alpha.uniform_(-1.5, 1.5)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """src_tokens (4, 9), padded on the left, and prev_output_tokens (4, 7), padded on the right."""
    generator = torch.Generator().manual_seed(0)
    src, prev = (
        torch.randint(4, VOCAB, (4, 9), generator=generator),
        torch.randint(4, VOCAB, (4, 7), generator=generator),
    )
    src[:, -1] = prev[:, 0] = 2
    src[1, :4] = src[2, :1] = prev[0, 5:] = prev[3, 2:] = 1
    return src, prev


@torch.no_grad()
def logits(model: Transformer, tokens: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(batch, time, vocab)."""
    src, prev = tokens or batch()
    return model(src, None, prev)[0]


@torch.no_grad()
def stepwise(model: Transformer) -> Tensor:
    """The logits of a batch without padding in the target, one token at a time, two hypotheses a sentence."""
    src, prev = batch()
    rows = prev[1:3].repeat_interleave(2, dim=0)
    rows[1] = rows[3].roll(2)
    cache = model.decoder.new_cache(model.encoder(src[1:3]))
    features = [model.decoder.step(rows[:, t], cache)[0] for t in range(rows.size(1))]
    return model.decoder.output_projection(torch.stack(features, dim=1))


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def tied(model: Transformer) -> tuple[bool, bool]:
    """Whether the encoder's and the decoder's input embedding are one, and the decoder's and the output projection."""
    encoder, decoder = model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight
    return encoder is decoder, decoder is model.decoder.output_projection.weight


def residuals(model: Transformer) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("_residual")]


# -- outputs


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_same_outputs(settings, layers):
    model = trained_like(encoder_layers=layers, decoder_layers=layers, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cfg = asdict(model.cfg)
    plain = admin.fold(model)
    assert largest_difference(logits(plain), logits(model)) < 1e-9
    assert largest_difference(stepwise(plain), stepwise(model)) < 1e-9
    torch.testing.assert_close(plain.encoder(batch()[0]).x, model.encoder(batch()[0]).x, rtol=0, atol=1e-9)
    single = model.float()
    assert largest_difference(logits(admin.fold(single)), logits(single)) < 1e-4
    assert largest_difference(stepwise(admin.fold(single)), stepwise(single)) < 1e-4

    assert {type(residual) for residual in residuals(plain)} == {PostLN}
    assert plain.cfg.init_type == "default"
    assert (plain.cfg.dropout, plain.cfg.attention_dropout) == (0.3, 0.1)
    assert not any("omega" in name for name in plain.state_dict())
    ordinary = Transformer(plain.cfg, VOCAB, plain.decoder.embed_tokens.num_embeddings).double().eval()
    ordinary.load_state_dict(plain.state_dict())
    assert torch.equal(logits(ordinary), logits(plain))

    assert asdict(model.cfg) == cfg
    assert all(torch.equal(tensor.float(), model.state_dict()[name]) for name, tensor in before.items())
    assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_the_original_models_logits(shared):
    """A model of the original Admin code, its omega as profiled, and the logits that it computed."""
    data = np.load(shared / "reference" / "admin_3x2_init.npz")
    model = original_admin_model(data)
    admin.apply_profile(model, admin.OmegaProfile(data["omega/encoder"].tolist(), data["omega/decoder"].tolist()))
    plain = admin.fold(model)
    src, prev = (torch.tensor(data[f"batch/{name}"]) for name in ("src_tokens", "prev_output_tokens"))
    np.testing.assert_allclose(logits(plain, (src[:2], prev[:2])), data["logits_first2"], atol=1e-5)
    assert plain.cfg.share_all_embeddings  # omega_1 is 1


def test_a_checkpoint_of_the_original(shared):
    model = load_model(shared / "reference" / "fairseq08_admin_1x1_full.pt")
    assert torch.equal(logits(admin.fold(model)), logits(model))


def test_a_trained_model(toy_databin, tmp_path):
    omega = ("--omega-file", tmp_path / "omega")
    train(toy_databin, tmp_path / "profile", "--init-type", "adaptive-profiling", *omega)
    train(toy_databin, tmp_path / "run", "--init-type", "adaptive", *omega, "--max-epoch", 2)
    model = load_model(tmp_path / "run" / "checkpoint_last.pt")
    vectors = [residual.omega for residual in residuals(model)]
    assert all(vector.std() > 1e-3 for vector in vectors)
    assert largest_difference(logits(admin.fold(model)), logits(model)) < 1e-4
    model.double()
    assert largest_difference(logits(admin.fold(model)), logits(model)) < 1e-9


# -- what parts and what stays


def test_first_omega_of_one_leaves_embeddings_alone():
    model = trained_like(share_all_embeddings=True)
    for stack in (model.encoder, model.decoder):
        nn.init.ones_(stack.layers[0].self_attn_residual.omega)
    plain = admin.fold(model)
    assert tied(plain) == (True, True)
    assert asdict(plain.cfg) == asdict(model.cfg) | {"init_type": "default"}
    assert torch.equal(plain.encoder.embed_tokens.weight, model.encoder.embed_tokens.weight)
    assert largest_difference(logits(plain), logits(model)) < 1e-9
    assert fold_notes(model.cfg, plain.cfg) == []


@pytest.mark.parametrize(
    ("share", "scaled", "expected", "flags"),
    [
        ("share_all_embeddings", "encoder", (False, True), (False, True)),
        ("share_all_embeddings", "decoder", (False, False), (False, False)),
        ("share_decoder_input_output_embed", "encoder", (False, True), (False, True)),
        ("share_decoder_input_output_embed", "decoder", (False, False), (False, False)),
    ],
)
def test_only_what_must_part_does(share, scaled, expected, flags):
    model = trained_like(**{share: True})
    other = "decoder" if scaled == "encoder" else "encoder"
    nn.init.ones_(getattr(model, other).layers[0].self_attn_residual.omega)
    plain = admin.fold(model)
    assert tied(plain) == expected
    assert (plain.cfg.share_all_embeddings, plain.cfg.share_decoder_input_output_embed) == flags
    assert getattr(plain.cfg, f"{scaled}_learned_pos") and not getattr(plain.cfg, f"{other}_learned_pos")
    assert largest_difference(logits(plain), logits(model)) < 1e-9
    assert torch.equal(plain.decoder.output_projection.weight, model.decoder.output_projection.weight)
    first = getattr(model, scaled).layers[0].self_attn_residual.omega
    for part in ("embed_tokens", "embed_positions"):
        new, old = (getattr(getattr(m, scaled), part).weight for m in (plain, model))
        torch.testing.assert_close(new, old * first, rtol=1e-15, atol=0)
        assert not new[1].any()  # padding
        unscaled, same = (getattr(getattr(m, other), part).weight for m in (plain, model))
        assert torch.equal(unscaled, same)


def test_layernorm_after_embeddings_takes_the_first_omega():
    model = trained_like(share_all_embeddings=True, layernorm_embedding=True)
    plain = admin.fold(model)
    assert tied(plain) == (True, True)
    assert not plain.cfg.encoder_learned_pos
    first = model.encoder.layers[0].self_attn_residual.omega
    norm, folded = model.encoder.layernorm_embedding, plain.encoder.layernorm_embedding
    torch.testing.assert_close(folded.weight, norm.weight * first)
    torch.testing.assert_close(folded.bias, norm.bias * first)


def test_notes():
    def notes(**settings: Any) -> list[str]:
        model = trained_like(**settings)
        return fold_notes(model.cfg, admin.fold(model).cfg)

    assert [note[:40] for note in notes(share_all_embeddings=True)] == [
        "encoder input, decoder input and output ",
        "sinusoidal positions of the encoder are ",
        "sinusoidal positions of the decoder are ",
    ]
    untied, positions = notes(share_decoder_input_output_embed=True, encoder_learned_pos=True)
    assert untied.startswith("the decoder's input embedding is untied from the output projection")
    assert positions.endswith("fairseq reads them with --decoder-learned-pos")
    assert notes(layernorm_embedding=True) == notes(init_type="default") == []
    before = TransformerConfig(share_all_embeddings=True)
    after = TransformerConfig(share_decoder_input_output_embed=True)
    assert "the encoder's input embedding is untied" in fold_notes(before, after)[0]


def test_mode_type_and_random_numbers_are_as_they_were():
    model = trained_like().bfloat16().train()
    state = torch.get_rng_state()
    plain = admin.fold(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in plain.modules())
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(module.training for module in admin.fold(trained_like()).modules())


# -- what cannot be folded


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e-320])
def test_omega_that_cannot_be_divided_by(value):
    model = trained_like()
    with torch.no_grad():
        model.decoder.layers[1].encoder_attn_residual.omega[5] = value
    with pytest.raises(FairseqError, match=r"omega of decoder\.layers\.1\.encoder_attn_residual is \S+ in channel 5"):
        admin.fold(model)


@pytest.mark.parametrize(
    ("init_type", "reason"),
    [
        ("rezero", "is ReZero, which has no LayerNorm"),
        ("subln", "is SubLN, which has a LayerNorm inside"),
        ("b2t", "is B2T, which adds the layer's input once more"),
    ],
)
def test_other_rules(init_type, reason):
    with pytest.raises(FairseqError, match=f"{init_type} cannot be folded: .*{reason}.*{', '.join(FOLDABLE)}"):
        admin.fold(trained_like(init_type=init_type))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_pre_ln(stack):
    model = trained_like(init_type="default", **{f"{stack}_normalize_before": True})
    expected = f"init type default cannot be folded: {stack}.layers.0.self_attn_residual is PreLN, whose "
    with pytest.raises(FairseqError, match=re.escape(expected)):
        admin.fold(model)


def test_a_rule_derived_from_a_known_one():
    class Halved(PostLN):
        def forward(self, x: Tensor, sublayer: Any) -> Tensor:
            return self.norm(x + sublayer(x) / 2)

    model = trained_like(init_type="default")
    model.encoder.layers[1].ffn_residual.__class__ = Halved
    with pytest.raises(FairseqError, match="ffn_residual is Halved"):
        admin.fold(model)
