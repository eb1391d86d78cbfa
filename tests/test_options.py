"""The command lines: what is accepted, what is refused and how, presets, ``--user-dir``."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from fairseq.admin.omega import OmegaProfile
from fairseq.models.config import TransformerConfig, setting_names
from fairseq.options import parse_train_args
from fairseq.registry import ARCHITECTURES, CRITERIONS, LR_SCHEDULERS, OPTIMIZERS, RESIDUAL_RULES, import_user_dir
from fairseq.utils.flags import from_namespace
from tests.training_runs import ROOT, assert_fails, command_line, flags_of, last, logged, train

ENOUGH = ("data-bin", "--max-tokens", "100")


def parse(*flags: str) -> object:
    return parse_train_args([*ENOUGH, *flags])


# -- presets, as published with fairseq: layers, dim, FFN, heads of both stacks; dropout, of attention, of activation

PRESETS = {
    "transformer": (6, 512, 2048, 8, 0.1, 0.0, 0.0),
    "transformer_iwslt_de_en": (6, 512, 1024, 4, 0.1, 0.0, 0.0),
    "transformer_wmt_en_de": (6, 512, 2048, 8, 0.1, 0.0, 0.0),
    "transformer_vaswani_wmt_en_de_big": (6, 1024, 4096, 16, 0.3, 0.0, 0.0),
    "transformer_vaswani_wmt_en_fr_big": (6, 1024, 4096, 16, 0.1, 0.0, 0.0),
    "transformer_wmt_en_de_big": (6, 1024, 4096, 16, 0.3, 0.1, 0.0),
    "transformer_wmt_en_de_big_t2t": (6, 1024, 4096, 16, 0.3, 0.1, 0.1),
    "transformer_tiny": (4, 128, 256, 4, 0.1, 0.0, 0.0),
}


@pytest.mark.parametrize("arch", PRESETS)
def test_presets(arch):
    args = parse("--arch", arch)
    for stack in ("encoder", "decoder"):
        names = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
        assert tuple(getattr(args, f"{stack}_{name}") for name in names) == PRESETS[arch][:4]
    assert (args.dropout, args.attention_dropout, args.activation_dropout) == PRESETS[arch][4:]
    pre_ln = arch.endswith("_t2t")
    assert (args.encoder_normalize_before, args.decoder_normalize_before) == (pre_ln, pre_ln)
    assert (args.activation_fn, args.decoder_learned_pos) == ("relu", False)
    assert not (args.share_all_embeddings or args.share_decoder_input_output_embed or args.layernorm_embedding)
    assert (args.max_source_positions, args.max_target_positions) == (1024, 1024)


def test_every_preset_is_tested():
    assert set(PRESETS) <= set(ARCHITECTURES.names())


def test_flags_win_over_the_preset():
    args = parse("--arch", "transformer_wmt_en_de_big", "--encoder-embed-dim", "64", "--dropout", "0")
    assert (args.encoder_embed_dim, args.decoder_embed_dim, args.dropout) == (64, 1024, 0)
    assert (args.encoder_ffn_embed_dim, args.decoder_ffn_embed_dim) == (4096, 4096)
    args = parse("--encoder-embed-dim", "64", "--decoder-embed-dim", "32")
    assert (args.encoder_embed_dim, args.decoder_embed_dim) == (64, 32)


@pytest.mark.parametrize(
    ("arch", "dims"),
    [
        ("transformer", (64, 96)),
        ("transformer_wmt_en_de", (64, 96)),
        ("transformer_iwslt_de_en", (512, 1024)),
        ("transformer_vaswani_wmt_en_fr_big", (1024, 4096)),
        ("transformer_wmt_en_de_big_t2t", (1024, 4096)),
        ("transformer_tiny", (64, 96)),
    ],
)
def test_decoders_follow_the_encoders_flags_where_fairseqs_do(arch, dims):
    """The widths that fairseq 0.9, 0.10 and 0.12 gave its decoder with these flags."""
    args = parse("--arch", arch, "--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "96")
    assert (args.decoder_embed_dim, args.decoder_ffn_embed_dim) == dims


def test_defaults_are_fairseqs():
    args = parse("--optimizer", "adam", "--lr-scheduler", "inverse_sqrt", "--criterion", "label_smoothed_cross_entropy")
    expected = {
        "lr": [0.25], "clip_norm": 0.0, "update_freq": [1], "max_epoch": 0, "max_update": 0, "seed": 1,
        "adam_betas": (0.9, 0.999), "adam_eps": 1e-8, "weight_decay": 0.0, "warmup_updates": 4000,
        "warmup_init_lr": -1, "label_smoothing": 0.0, "required_batch_size_multiple": 8, "num_workers": 1,
        "save_dir": "checkpoints", "restore_file": "checkpoint_last.pt", "save_interval": 1, "patience": -1,
        "keep_last_epochs": -1, "keep_interval_updates": -1, "best_checkpoint_metric": "loss",
        "train_subset": "train", "valid_subset": "valid", "fp16_init_scale": 128, "min_loss_scale": 1e-4,
        "log_interval": 100, "left_pad_source": True, "stop_min_lr": -1.0, "omega_file": "profile.ratio.init",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        (("--relu-dropout", "0.25"), "activation_dropout", 0.25),
        (("--max-sentences", "7"), "batch_size", 7),
        (("--max-sentences-valid", "7"), "batch_size_valid", 7),
        (("--min-lr", "1e-9"), "stop_min_lr", 1e-9),
        (("--learning-rate", "0.5"), "lr", [0.5]),
        (("--me", "5"), "max_epoch", 5),
        (("--mu", "70"), "max_update", 70),
        (("--no-progress-bar",), "no_progress_bar", True),
        (("-s", "de", "-a", "transformer_tiny"), "source_lang", "de"),
        (("--wd", "0.01"), "weight_decay", 0.01),
        (("--adam-betas", "(0.9, 0.98)"), "adam_betas", (0.9, 0.98)),
        (("--adam-betas", "[0.9,0.98]"), "adam_betas", (0.9, 0.98)),
        (("--update-freq", "4,2"), "update_freq", [4, 2]),
        (("--update-freq=[4]",), "update_freq", [4]),
        (("--left-pad-source", "False"), "left_pad_source", False),
        (("--left-pad-source",), "left_pad_source", True),
        (("--eval-bleu-args", '{"beam": 4}'), "eval_bleu_args", {"beam": 4}),
        (("--eval-bleu-args", "{'beam': 4}"), "eval_bleu_args", {"beam": 4}),
        (("--eval-bleu-remove-bpe",), "eval_bleu_remove_bpe", "subword_nmt"),
        (("--eval-bleu-remove-bpe", "sentencepiece"), "eval_bleu_remove_bpe", "sentencepiece"),
    ],
    ids=str,
)
def test_spellings(old, name, value):
    assert getattr(parse(*old), name) == value


# -- usage errors


@pytest.mark.parametrize("command", ["preprocess", "train", "validate", "generate", "interactive"])
def test_fairseqs_flags_are_there_or_answered(command, capsys):
    """fairseq_flags.txt: what 0.12.2's parsers of the translation task have, with Adam and inverse_sqrt, or 0.8.0's."""
    text = (ROOT / "tests/fairseq_flags.txt").read_text()
    [theirs] = [part.split() for part in text.split("fairseq-") if part.startswith(command)]
    main = importlib.import_module(f"fairseq.cli.{command}").main
    unknown = [flag for flag in theirs[1:] if flag not in flags_of(f"fairseq-{command}")]
    assert 15 < len(unknown) < len(theirs) - 15
    with pytest.raises(SystemExit):
        main([*(["x"] if command != "preprocess" else []), *unknown])
    [message] = [line for line in capsys.readouterr().err.splitlines() if "unrecognized arguments" in line]
    assert [flag for flag in unknown if f"{flag}: " not in message] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--no-such-flag",), "error: unrecognized arguments: --no-such-flag"),
        (("--max-epo", "3"), "(--max-epo: did you mean --max-epoch?)"),  # no abbreviations
        (("--amp", "--max-tokns=3"), "(--amp: use --fp16 alone; parameters stay in float32; --max-tokns: did you mean"),
        (
            ("--beam", "4", "--buffer-size=9"),
            "(--beam: a flag of fairseq-generate; --buffer-size: a flag of fairseq-int",
        ),
        (("--encoder-layerdrop", "0.2"), "(--encoder-layerdrop: fairseq's, not supported here)"),
        (("--distributed-wrapper", "DDP"), "(--distributed-wrapper: leave it out)"),  # 0.10's
        (("--optimizer", "sgd", "--adam-betas", "(0.9, 0.98)"), "--adam-betas"),
        (("--optimizer", "adam", "--momentum", "0.9"), "--momentum"),
        (("--lr-scheduler", "fixed", "--power", "2"), "--power"),
        (("--lr-scheduler", "cosine", "--fa", "2"), "(--fa: a flag of --lr-scheduler fixed)"),
        (
            ("--criterion", "cross_entropy", "--label-smoothing", "0.1"),
            "(--label-smoothing: a flag of --criterion label_smoothed_cross_entropy)",
        ),
        (("--optimizer", "nope"), "--optimizer"),
        (("--optimizer",), "--optimizer"),
        (("--arch", "nope"), "--arch"),
        (("--init-type", "nope"), "--init-type"),
        (("--dropout", "1.5"), "--dropout: 1.5: must be at least 0 and below 1"),
        (("--dropout", "-0.1"), "--dropout"),
        (("--dropout", "nan"), "--dropout: nan: must be a finite number"),
        (("--attention-dropout", "1"), "--attention-dropout"),
        (("--encoder-layers", "0"), "--encoder-layers"),
        (("--encoder-embed-dim", "-8"), "--encoder-embed-dim"),
        (("--decoder-attention-heads", "0"), "--decoder-attention-heads"),
        (("--clip-norm", "-1"), "--clip-norm: -1: must be at least 0"),
        (("--clip-norm", "inf"), "--clip-norm"),
        (("--num-workers", "-1"), "--num-workers"),
        (("--lr", "-0.1"), "--lr"),
        (("--lr", "0.1,nan"), "--lr"),
        (("--lr", "x"), "--lr"),
        (("--update-freq", "0"), "--update-freq"),
        (("--update-freq", "2,-1"), "--update-freq"),
        (("--max-tokens", "0"), "--max-tokens"),
        (("--max-tokens", "4k"), "--max-tokens: invalid int value: '4k'"),
        (("--batch-size", "-4"), "--batch-size"),
        (("--max-epoch", "-1"), "--max-epoch"),
        (("--max-update", "-1"), "--max-update"),
        (("--log-interval", "0"), "--log-interval"),
        (("--seed", "-1"), "--seed"),
        (("--save-interval", "0"), "--save-interval"),
        (("--distributed-port", "70000"), "--distributed-port"),
        (("--adam-betas", "os.system('x')"), "--adam-betas"),
        (("--eval-bleu-args", "{beam}"), "--eval-bleu-args"),
        (("--left-pad-source", "maybe"), "--left-pad-source"),
        (("--fp16", "--bf16"), "--fp16 and --bf16"),
        (("--fp16", "--cpu"), "--fp16 needs a GPU"),
        (("--best-checkpoint-metric", "accuracy"), "--best-checkpoint-metric"),
        (("--best-checkpoint-metric", "bleu"), "--eval-bleu"),
        (("--best-checkpoint-metric", "bleu", "--eval-bleu"), "--maximize-best-checkpoint-metric"),
        (("--maximize-best-checkpoint-metric",), "--maximize-best-checkpoint-metric"),
        (("--patience", "3", "--disable-validation"), "--patience"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage_errors(capsys, flags, message):
    with pytest.raises(SystemExit) as exit_info:
        parse(*flags)
    assert exit_info.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: fairseq-train DATA [flags]; --help lists them" and message in error


def test_an_unlike_flag_gets_no_advice(capsys):
    with pytest.raises(SystemExit):
        parse("--no-such-flag", "3")
    assert capsys.readouterr().err.endswith("unrecognized arguments: --no-such-flag 3\n")


def test_missing_limit_and_missing_data(capsys):
    for argv, message in ((["data-bin"], "--max-tokens or --batch-size"), (["--max-tokens", "9"], "DATA")):
        with pytest.raises(SystemExit) as exit_info:
            parse_train_args(argv)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err


# -- errors of one line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--label-smoothing", "2"), "--label-smoothing 2.0"),
        (("--lr", "0.1,0.2"), "--lr 0.1,0.2: --lr-scheduler inverse_sqrt takes one rate"),
        (("--adam-betas", "(0.9,)"), "--adam-betas"),
        (("--adam-betas", "(0.9, 2)"), "beta"),
        (("--weight-decay", "-1"), "weight_decay"),
        (("--lr-scheduler", "polynomial_decay", "--max-epoch", "1", "--max-update", "0"), "--total-num-update"),
        (("--encoder-attention-heads", "3"), "--encoder-embed-dim 16 is no multiple of --encoder-attention-heads 3"),
        (("--encoder-embed-dim", "32", "--decoder-embed-dim", "16", "--share-all-embeddings"), "--encoder-embed-dim"),
        (("--valid-subset", "valid,nowhere"), "nowhere"),
        (("--train-subset", "nowhere"), "nowhere"),
        (("-s", "yy", "-t", "zz"), "zz"),
        (("-t", "zz"), "zz"),
        (("--max-tokens", "5"), "--max-tokens 5"),
        (("--max-target-positions", "6"), "--skip-invalid-size-inputs-valid-test"),
        (("--max-source-positions", "1", "--skip-invalid-size-inputs-valid-test"), "--max-source-positions 1"),
        (("--eval-bleu", "--eval-bleu-args", '{"beem": 4}'), "beem"),
        (("--eval-bleu", "--eval-bleu-args", '{"beam": 999}'), "--eval-bleu-args: --beam 999: the target dictionary"),
        (("--user-dir", "nowhere"), "--user-dir nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_of_one_line(toy_databin, tmp_path, capsys, flags, message):
    assert_fails(capsys, 1, message, *command_line(toy_databin, tmp_path, "--max-update", 1, *flags))


def test_missing_data_bin(tmp_path, capsys):
    assert_fails(capsys, 1, "no such data-bin", *command_line(tmp_path / "none", tmp_path, "--max-update", 1))
    (tmp_path / "empty").mkdir()
    assert_fails(capsys, 1, "has no SPLIT", *command_line(tmp_path / "empty", tmp_path, "--max-update", 1))


def test_languages_in_the_other_order_are_the_other_direction(toy_databin, tmp_path):
    train(toy_databin, tmp_path, "-s", "yy", "-t", "xx", "--max-update", 1)
    args = last(tmp_path)["args"]
    assert (args.source_lang, args.target_lang) == ("yy", "xx")


# -- every flag does something

ONE_CHOICE = {"task", "dataset_impl"}  # accepted, as fairseq's, and there is nothing to choose


def test_every_flag_is_read():
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "fairseq").rglob("*.py")]
    nodes = [node for module in modules for node in ast.walk(module)]
    declared = {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and "flag(" in ast.unparse(n.value or n)}
    assert len(declared) > 150
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}  # getattr's
    texts |= {
        stack + text
        for text in texts
        if text.isidentifier()
        for stack in ("encoder", "decoder", "encoder_", "decoder_")
    }
    assert declared - read - texts <= ONE_CHOICE


# -- help

COMMANDS = ["preprocess", "train", "validate", "generate", "interactive", "score", "average", "export"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete_and_grouped(capsys, name):
    command = importlib.import_module(f"fairseq.cli.{name}")
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fairseq-{name}")
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.match(r"  -", line):
            assert re.search(r"\S {2,}\S", line) or following.startswith(" " * 20), f"no help: {line}"
    assert len(re.findall(r"^(\w.*):$", text, flags=re.M)) >= 2  # groups of flags
    assert "==SUPPRESS==" not in text
    assert "None" not in text


def test_help_of_train_has_every_component(capsys):
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    text = capsys.readouterr().out
    for registry in (ARCHITECTURES, OPTIMIZERS, LR_SCHEDULERS, CRITERIONS, RESIDUAL_RULES):
        for name in registry.names():
            assert name in text
    for flag_name in ("--adam-betas", "--momentum", "--clip-threshold", "--warmup-updates", "--t-mult", "--power"):
        assert flag_name in text
    for name in setting_names():
        assert "--" + name.replace("_", "-") in text


# -- user code

USER_DIR = '''
from torch import nn
from fairseq.admin.omega import OmegaProfile
from fairseq.models.config import register_architecture
from fairseq.registry import RESIDUAL_RULES

register_architecture("transformer_NAME", encoder_layers=1, decoder_layers=1, encoder_embed_dim=8,
                      encoder_ffn_embed_dim=8, encoder_attention_heads=2, decoder_attention_heads=2)

@RESIDUAL_RULES.register("half_NAME")
class Half(nn.Module):
    """LN(x + f(x) / 2)"""
    needs_final_norm = False

    def __init__(self, site):
        super().__init__()
        self.norm = nn.LayerNorm(site.dim)
        self.dropout = nn.Dropout(site.dropout)

    def forward(self, x, sublayer):
        return self.norm(x + self.dropout(sublayer(x)) / 2)
'''


def test_user_dir_adds_an_architecture_and_a_residual_rule(toy_databin, tmp_path):
    directory = tmp_path / "user_half"
    directory.mkdir()
    (directory / "__init__.py").write_text(USER_DIR.replace("NAME", "user_half"))
    flags = ("--user-dir", directory, "--arch", "transformer_user_half", "--init-type", "half_user_half")
    size = ("--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8")
    train(toy_databin, tmp_path / "run", *flags, *size, "--max-update", 2)
    train(toy_databin, tmp_path / "run", *flags, *size, "--max-update", 4)
    assert last(tmp_path / "run")["args"].init_type == "half_user_half"
    assert last(tmp_path / "run")["model"]["encoder.layers.0.fc1.weight"].shape == (8, 8)
    assert [line["num_updates"] for line in logged(tmp_path / "run") if "update" in line] == [1, 2, 3, 4]


ADMIN_VARIANT = """
from functools import partial
from fairseq.admin.residual import AdminResidual
from fairseq.registry import RESIDUAL_RULES

class Variant(AdminResidual):
    def __init__(self, site, scale):
        super().__init__(site)
        self.scale = scale

    def forward(self, x, sublayer):
        return self.norm(self.omega * x + self.scale * self.dropout(sublayer(x)))

RESIDUAL_RULES.add("variant-2", partial(Variant, scale=2.0))
"""


def test_a_variant_of_admin_is_profiled_as_admin_is(toy_databin, tmp_path, capsys):
    directory = tmp_path / "variant"
    directory.mkdir()
    (directory / "__init__.py").write_text(ADMIN_VARIANT)
    omega_file = tmp_path / "omega"
    flags = ("--omega-file", omega_file, "--max-update", 1)
    train(toy_databin, tmp_path / "run", "--user-dir", directory, "--init-type", "variant-2", *flags)
    profile = OmegaProfile.load(omega_file)
    assert profile.encoder[0] == 1 and profile.encoder[-1] != 1
    start = last(tmp_path / "run")["extra_state"]["omega"]
    assert start == {name: pytest.approx(values, rel=1e-6) for name, values in profile.to_dict().items()}
    argv = command_line(toy_databin, tmp_path / "other", "--init-type", "adaptive", *flags)
    assert_fails(capsys, 1, "was profiled with init_type=variant-2, this model has adaptive", *argv)


@pytest.mark.parametrize("content", ["import nowhere_at_all", "1 / 0", "def"])
def test_user_dir_that_fails(toy_databin, tmp_path, capsys, content):
    directory = tmp_path / f"user_failing_{len(content)}"
    directory.mkdir()
    (directory / "__init__.py").write_text(content)
    argv = command_line(toy_databin, tmp_path, "--max-update", 1, "--user-dir", directory)
    assert_fails(capsys, 1, f"--user-dir {directory}: ", *argv)


# -- dataclass fields as flags


def test_from_namespace_knows_aliases():
    cfg = from_namespace(TransformerConfig, {"relu_dropout": 0.5, "encoder_layers": 2, "unknown": 1}, dropout=0.3)
    assert (cfg.activation_dropout, cfg.encoder_layers, cfg.dropout) == (0.5, 2, 0.3)


def test_two_user_dirs_of_one_name(tmp_path):
    for parent in ("a", "b"):
        package = tmp_path / parent / "mine"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"open({str(tmp_path / f'ran-{parent}')!r}, 'w').close()")
        import_user_dir(str(package))
    assert (tmp_path / "ran-a").exists()
    assert (tmp_path / "ran-b").exists()
