"""Residual rules of ``--user-dir`` with settings of their own: CONTRIBUTING.md's example, from flag to translation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fairseq.admin import profile
from fairseq.admin.residual import AdminResidual
from fairseq.checkpoint import load_model
from fairseq.cli import average, clinic, export, generate
from fairseq.clinic.subjects import variant
from fairseq.errors import FairseqError
from fairseq.hub import TransformerModel
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.options import parse_clinic_args, parse_train_args, section
from fairseq.registry import RESIDUAL_RULES, import_user_dir
from tests.training_runs import ROOT, SMOOTHED, assert_fails, command_line, last, logged, train

CLASH = """
from dataclasses import dataclass
from fairseq.admin.residual import PostLN
from fairseq.registry import RESIDUAL_RULES
from fairseq.utils.flags import flag

@dataclass
class Config:
    NAME: float = flag(0.5, "a setting"ALIAS)

RESIDUAL_RULES.add("clashing", PostLN, Config)
"""


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    for name in ("_entries", "_configs"):
        monkeypatch.setattr(RESIDUAL_RULES, name, dict(getattr(RESIDUAL_RULES, name)))


@pytest.fixture
def package(tmp_path) -> Path:
    """The Python of CONTRIBUTING.md's section, as the package that it tells to make."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding an init type")[1].split("\n## ")[0]
    return write_package(tmp_path / "rules", "\n\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)))


def write_package(directory: Path, code: str) -> Path:
    directory.mkdir()
    (directory / "__init__.py").write_text(code)
    return directory


def weighted(package: Path, *flags: object) -> tuple[object, ...]:
    return ("--user-dir", package, "--init-type", "weighted", "--encoder-layers", 2, *flags)


def alphas(path: Path) -> list[float]:
    return [layer.ffn_residual.alpha for layer in load_model(path).encoder.layers]


def saved(directory: Path) -> tuple[float, float]:
    args = last(directory)["args"]
    return args.my_alpha, args.my_decay


def test_from_flag_to_translation(toy_databin, tmp_path, package, capsys):
    run = tmp_path / "run"
    train(toy_databin, run, *weighted(package, "--my-alpha", 0.75, "--max-update", 1))
    assert saved(run) == (0.75, 0)  # the default too
    checkpoint = run / "checkpoint_last.pt"
    assert alphas(checkpoint) == [0.75, 0.75]

    average.main(["--inputs", str(checkpoint), "--output", str(tmp_path / "mean.pt")])
    export.main([str(checkpoint), "--user-dir", str(package), "--output", str(tmp_path / "exported")])
    assert alphas(tmp_path / "mean.pt") == alphas(tmp_path / "exported/model.pt") == [0.75, 0.75]
    exported = vars(torch.load(tmp_path / "exported/model.pt", weights_only=False)["args"])
    assert (exported["my_alpha"], "omega" in exported, "rule_settings" in exported) == (0.75, False, False)

    argv = [str(toy_databin), "--path", str(checkpoint), "--user-dir", str(package), "--gen-subset", "valid", "--cpu"]
    generate.main(argv)
    assert "H-0\t" in capsys.readouterr().out
    overridden = TransformerModel.from_pretrained(run, "checkpoint_last.pt", toy_databin, my_decay=1.0)
    assert [layer.ffn_residual.alpha for layer in overridden.models[0].encoder.layers] == [0.75, 0.375]


def test_resuming_takes_what_is_not_given_from_the_checkpoint(toy_databin, tmp_path, package):
    run = tmp_path / "run"
    train(toy_databin, run, *weighted(package, "--my-alpha", 0.75, "--max-update", 2))
    train(toy_databin, tmp_path / "whole", *weighted(package, "--my-alpha", 0.75, "--max-update", 4))
    train(toy_databin, run, *weighted(package, "--max-update", 4))
    losses = [[line["loss"] for line in logged(d) if "update" in line] for d in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]
    assert saved(run) == (0.75, 0)
    train(toy_databin, run, *weighted(package, "--my-decay", 1, "--max-update", 5))
    assert saved(run) == (0.75, 1)
    train(toy_databin, run, *weighted(package, "--my-alpha", 0.5, "--max-update", 6))  # the default, given, wins
    assert saved(run) == (0.5, 1)


def test_a_checkpoint_with_a_value_that_the_flag_refuses(toy_databin, tmp_path, package, capsys):
    flags = weighted(package, "--my-alpha", 0.75)
    train(toy_databin, tmp_path, *flags, "--max-update", 1)
    state = last(tmp_path)
    state["args"].my_alpha = -1.0
    torch.save(state, tmp_path / "checkpoint_last.pt")
    assert_fails(
        capsys, 1, "'-1.0' is no my_alpha", *command_line(toy_databin, tmp_path, *flags[:-2], "--max-update", 2)
    )


def test_resuming_with_another_init_type(toy_databin, tmp_path, package, capsys):
    """The parameters of many rules have the same names and shapes."""
    train(toy_databin, tmp_path, *weighted(package, "--max-update", 1))
    argv = command_line(toy_databin, tmp_path, "--encoder-layers", 2, "--max-update", 2)
    assert_fails(capsys, 1, "was trained with --init-type weighted, not default; give that, or start afresh", *argv)


def test_the_omega_of_a_variant_is_of_its_settings(toy_databin, tmp_path, package, capsys):
    flags = ("--user-dir", package, "--init-type", "admin-weighted", "--omega-file", tmp_path / "omega")
    train(toy_databin, tmp_path / "run", *flags, "--my-alpha", 0.75, "--max-update", 1)
    assert "init_type=admin-weighted dropout=0.2" in (tmp_path / "omega").read_text()
    argv = command_line(toy_databin, tmp_path / "other", *flags, "--max-update", 1)
    assert_fails(capsys, 1, "was profiled with my_alpha=0.75, this model has 0.5; profile it", *argv)


def small(rule: str, **settings: object) -> Transformer:
    torch.manual_seed(2)
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 2, "encoder_layers": 3}
    shape |= {"decoder_layers": 1, "decoder_attention_heads": 2, "init_type": rule}
    return Transformer(TransformerConfig(**(shape | settings)), 20, 20)


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(4, 20, (5, 9))
    return {"src_tokens": tokens, "src_lengths": torch.full((5,), 9), "prev_output_tokens": tokens}


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_a_variant_is_profiled_with_what_it_adds(package, alpha):
    import_user_dir(str(package))
    model, inputs = small("admin-weighted", rule_settings={"my_alpha": alpha}), batch()
    found = profile(model, inputs, deterministic=True).encoder
    model.eval()
    x, omega, expected = (
        model.encoder.embed(inputs["src_tokens"], model.encoder._positions(inputs["src_tokens"])),
        1.0,
        [],
    )
    for layer in model.encoder.layers:
        for residual, branch in (
            (layer.self_attn_residual, lambda q, layer=layer: layer.self_attn(q, q)),
            (layer.ffn_residual, layer.feed_forward),
        ):
            expected.append(omega)
            added = alpha * branch(x)
            x, omega = (
                residual.norm(omega * x + added),
                ((omega * x).var(correction=0) + added.var(correction=0)).sqrt(),
            )
    assert found == pytest.approx(list(map(float, expected)), rel=1e-5)


def test_a_variant_without_its_norm_cannot_be_profiled():
    @RESIDUAL_RULES.register("admin-without-norm")
    class WithoutNorm(AdminResidual):
        def forward(self, x, sublayer):
            return self.omega * x + sublayer(x)

    with pytest.raises(FairseqError, match=r"WithoutNorm cannot be profiled: it has not called self.norm; end its"):
        profile(small("admin-without-norm"), batch())


def test_what_is_refused(toy_databin, tmp_path, package, capsys):
    known = command_line(toy_databin, tmp_path, *weighted(package))
    assert_fails(capsys, 2, "argument --my-alpha: -1: must be at least 0", *known, "--my-alpha", "-1")
    other = command_line(toy_databin, tmp_path, "--user-dir", package, "--my-alpha", 0.5)
    message = r"unrecognized arguments: --my-alpha 0.5 (--my-alpha: a flag of --init-type weighted)"
    assert_fails(capsys, 2, message, *other)


def test_help_lists_them(package, capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--user-dir", str(package), "--help"])
    text = capsys.readouterr().out
    assert "\ninit type admin-weighted, weighted:\n  --my-alpha X " in text
    assert "weight of the branches of layer 1 (default: 0.5)" in text


def test_the_clinic_has_the_flags_of_its_models(toy_databin, package, capsys):
    argv = [str(toy_databin), "--user-dir", str(package), "--my-alpha", "0"]
    args = parse_clinic_args("dependency", "", clinic.MEASURE, [*argv, "--models", "post-ln,weighted"])
    assert variant(section(TransformerConfig, args), "weighted").own_settings() == {"my_alpha": 0, "my_decay": 0}
    with pytest.raises(SystemExit) as exit_info:
        clinic.main(["dependency", *argv, "--models", "post-ln"])
    assert exit_info.value.code == 2
    assert "--my-alpha: a flag of --models weighted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "alias", "clash"),
    [
        ("dropout", "", "--dropout"),
        ("data", "", "--data"),
        ("momentum", "", "--momentum"),  # sgd's, which is not chosen
        ("my_setting", ", '--relu-dropout'", "--relu-dropout"),
    ],
)
def test_a_flag_that_is_there_already(toy_databin, tmp_path, capsys, name, alias, clash):
    package = write_package(tmp_path / "clash", CLASH.replace("NAME", name).replace("ALIAS", alias))
    message = f"init type 'clashing' has a flag {clash} of its own, which fairseq-train has already; give it another"
    assert_fails(capsys, 1, message, *command_line(toy_databin, tmp_path, *SMOOTHED, "--user-dir", package))


def test_a_flag_that_the_clinic_has_already(toy_databin, tmp_path, capsys):
    package = write_package(tmp_path / "clash", CLASH.replace("NAME", "depths").replace("ALIAS", ""))
    with pytest.raises(SystemExit) as exit_info:
        clinic.main(["stability", str(toy_databin), "--user-dir", str(package)])
    assert exit_info.value.code == 1
    assert "'clashing' has a flag --depths of its own, which fairseq-clinic stability has" in capsys.readouterr().err
