"""``fairseq-export``: what it writes, that this translates as the original does, and when it writes nothing."""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from fairseq import admin
from fairseq.checkpoint import load_checkpoint, load_model
from fairseq.cli import generate
from fairseq.cli.export import main
from fairseq.export.self_check import ROWS, check_agreement, random_batch
from fairseq.models import TransformerModel
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import fused, to_fairseq
from fairseq.models.transformer import Transformer
from tests import training_runs
from tests.test_fold import largest_difference, logits, residuals, trained_like
from tests.toys import VOCAB, toy_model, toy_sentences, write_toy_checkpoint, write_toy_databin
from tests.training_runs import assert_same, last, load, train

SEPARATE = {f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")}


def admin_model(**settings: object) -> Transformer:
    """A model of varied translations with omega that is nowhere 1."""
    model = toy_model(**({"share_all_embeddings": True, "init_type": "adaptive"} | settings))
    torch.manual_seed(5)
    for residual in residuals(model):
        if isinstance(getattr(residual, "omega", None), nn.Parameter):
            nn.init.uniform_(residual.omega, 0.5, 2)
    return model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_toy_checkpoint(admin_model(), tmp_path / "trained.pt")


def export(*argv: object) -> None:
    main([*map(str, argv)])


def assert_fails(capsys: pytest.CaptureFixture[str], status: int, message: str, *argv: object) -> None:
    training_runs.assert_fails(capsys, status, message, *argv, main=main)


def hypotheses(capsys: pytest.CaptureFixture[str], databin: Path, path: Path) -> dict[str, tuple[float, str]]:
    """H- lines of ``fairseq-generate``: number -> score and words."""
    capsys.readouterr()
    flags = ["--cpu", "--max-len-b", "12", "--no-repeat-ngram-size", "1", "--num-workers", "0"]
    generate.main([str(databin), "--path", str(path), *flags])
    found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", capsys.readouterr().out, re.MULTILINE)
    return {number: (float(score), words) for number, score, words in found}


# -- the file


def test_folded(checkpoint, tmp_path, capsys):
    export(checkpoint, "--format", "fairseq", "--fold", "--output", tmp_path / "new" / "out")
    path = tmp_path / "new" / "out" / "model.pt"
    first, *notes, check = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"wrote {path}: [\d,]+ parameters", first)
    assert notes[0] == "note: init type adaptive is folded into an ordinary Post-LN Transformer"
    assert len(notes) == 3 and "three" in notes[1] and "--encoder-learned-pos" in notes[2]
    assert re.fullmatch(
        r"self-check on 8 random sentences: largest logit difference \S+ .*, (\d+) of \1 argmax tokens agree", check
    )
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]

    state = load(path)  # plain torch reads it, with no class but Namespace
    assert state.keys() == {"args", "model", "optimizer_history", "extra_state", "last_optimizer_state"}
    assert state["last_optimizer_state"] is None
    args = vars(state["args"])
    assert not any("omega" in name for name in [*args, *state["model"]])
    expected = {"init_type": "default", "arch": "transformer", "task": "translation", "source_lang": "xx"}
    expected |= {"target_lang": "yy", "share_all_embeddings": False, "share_decoder_input_output_embed": False}
    expected |= {"encoder_learned_pos": True, "decoder_learned_pos": True, "max_source_positions": 1024}
    assert expected.items() <= args.items()
    assert {name for name, value in args.items() if value is None} == {"max_tokens", "max_sentences"}
    original, folded = load_model(checkpoint), load_model(path)
    assert largest_difference(logits_of_toys(folded), logits_of_toys(original)) < 1e-4


def logits_of_toys(model: Transformer) -> torch.Tensor:
    return logits(model, random_batch(model, seed=7))


def test_omega_is_kept_without_fold(checkpoint, tmp_path, capsys):
    export(checkpoint, "--output", tmp_path / "small.pt")
    assert "plain fairseq cannot read init type adaptive; --fold makes" in capsys.readouterr().out
    original, kept = load_model(checkpoint), load_model(tmp_path / "small.pt")
    assert original.cfg == kept.cfg
    assert_same(dict(original.state_dict()), dict(kept.state_dict()))


def test_of_a_training_run(toy_databin, tmp_path, capsys):
    """A whole checkpoint, the optimiser's state with it, becomes a smaller one that can be trained further."""
    train(toy_databin, tmp_path / "run", "--init-type", "deepnet", "--max-epoch", 1)
    before = last(tmp_path / "run")
    assert before["last_optimizer_state"] is not None
    export(tmp_path / "run" / "checkpoint_last.pt", "--fold", "--output", tmp_path)
    assert "init type deepnet is folded" in capsys.readouterr().out
    after = load(tmp_path / "model.pt")
    assert after["optimizer_history"][-1]["num_updates"] == before["optimizer_history"][-1]["num_updates"]
    assert (after["args"].source_lang, after["args"].criterion) == ("xx", "label_smoothed_cross_entropy")
    learned = ("--encoder-learned-pos", "--decoder-learned-pos", "--max-update", 1)
    lines = train(toy_databin, tmp_path / "tuned", "--finetune-from-model", tmp_path / "model.pt", *learned)
    assert lines


@pytest.mark.parametrize("name", ["fairseq08_postln_3x3", "fairseq08_admin_1x1_full", "fairseq012_tiny"])
def test_of_the_originals(shared, tmp_path, capsys, name):
    path = shared / "reference" / f"{name}.pt"
    export(path, "--output", tmp_path, "--fold")
    assert "note: there was nothing to fold" in capsys.readouterr().out
    before, after = load_checkpoint(path)["args"], load(tmp_path / "model.pt")["args"]
    assert isinstance(after, Namespace)
    keys = ("arch", "task", "source_lang", "target_lang", "encoder_layers", "share_all_embeddings", "dropout")
    assert all(getattr(after, key) == before[key] for key in keys)
    assert_same(dict(load_model(path).state_dict()), dict(load_model(tmp_path / "model.pt").state_dict()))


def test_without_positions_there_is_nothing_of_them(toy_databin, tmp_path):
    """fairseq refuses a file with more than its model has."""
    train(toy_databin, tmp_path, "--max-update", 1, "--no-token-positional-embeddings")
    export(tmp_path / "checkpoint_last.pt", "--output", tmp_path / "out.pt")
    for name in ("checkpoint_last.pt", "out.pt"):
        parameters = load_checkpoint(tmp_path / name)["model"]
        assert parameters and not [key for key in parameters if "embed_positions" in key]


def test_names_and_shapes_are_fairseqs(shared):
    """A folded model's against a checkpoint of fairseq's own, of the same structure."""
    state = load_checkpoint(shared / "reference" / "fairseq08_postln_3x3.pt")["model"]
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    sizes = {"layers": 3, "embed_dim": 256, "ffn_embed_dim": 512, "attention_heads": 4}
    shape = {f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in sizes.items()}
    model = Transformer(TransformerConfig(**shape, share_all_embeddings=True, init_type="adaptive"), 9712, 9712)

    def shapes() -> dict[str, tuple[int, ...]]:
        exported = fused(to_fairseq(admin.fold(model).state_dict()))
        return {name: tuple(tensor.shape) for name, tensor in exported.items()}

    for residual in residuals(model):
        nn.init.constant_(residual.omega, 2.0)
    for stack in (model.encoder, model.decoder):
        nn.init.ones_(stack.layers[0].self_attn_residual.omega)
    assert shapes() == theirs
    for stack in (model.encoder, model.decoder):
        nn.init.constant_(stack.layers[0].self_attn_residual.omega, 1.5)
    for stack_name in ("encoder", "decoder"):
        del theirs[f"{stack_name}.embed_positions._float_tensor"]
        theirs[f"{stack_name}.embed_positions.weight"] = (1026, 256)
    assert shapes() == theirs | {"decoder.embed_out": (9712, 256)}


@pytest.mark.parametrize(
    ("settings", "encoder_attn"),
    [
        ({"init_type": "default"}, {"in_proj_weight", "in_proj_bias"}),
        ({"init_type": "default", "share_all_embeddings": False, "decoder_embed_dim": 24}, SEPARATE),
        ({"init_type": "default", "no_scale_embedding": True}, SEPARATE),
        ({"init_type": "deepnet"}, SEPARATE),
    ],
    ids=["plain", "decoder of another width", "no scale", "deepnet"],
)
def test_fairseq_08_gets_what_it_knows(tmp_path, settings, encoder_attn):
    """It takes a model of another rule, or without scaled embeddings, for an ordinary one, if the names are its own."""
    path = write_toy_checkpoint(admin_model(**settings), tmp_path / "trained.pt")
    export(path, "--output", tmp_path / "out.pt")
    layer = "decoder.layers.1.encoder_attn."
    names = {name.removeprefix(layer) for name in load(tmp_path / "out.pt")["model"] if name.startswith(layer)}
    assert names == encoder_attn | {"out_proj.weight", "out_proj.bias"}


# -- translating with it


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_all_embeddings": False, "share_decoder_input_output_embed": True},
        {"share_all_embeddings": False, "decoder_embed_dim": 24, "decoder_ffn_embed_dim": 24},
        {"layernorm_embedding": True},
        {"init_type": "deepnet"},
        {"init_type": "adaptive-closed-form", "rule_settings": {"omega": "constant"}},
    ],
    ids=str,
)
def test_same_translations(tmp_path, capsys, settings):
    databin = write_toy_databin(tmp_path / "bin", 20)
    original = write_toy_checkpoint(admin_model(**settings), tmp_path / "trained.pt")
    export(original, "--fold", "--output", tmp_path / "folded")
    export(original, "--output", tmp_path / "kept")
    expected = hypotheses(capsys, databin, original)
    assert len(expected) == 20
    assert len(set(expected.values())) > 5
    assert hypotheses(capsys, databin, tmp_path / "kept" / "model.pt") == expected
    found = hypotheses(capsys, databin, tmp_path / "folded" / "model.pt")
    assert {number: words for number, (_, words) in found.items()} == {n: words for n, (_, words) in expected.items()}
    assert all(score == pytest.approx(expected[number][0], abs=2e-4) for number, (score, _) in found.items())


def test_python_interface(checkpoint, tmp_path):
    export(checkpoint, "--fold", "--output", tmp_path / "out")
    databin = write_toy_databin(tmp_path / "bin")
    for language in ("xx", "yy"):
        shutil.copy(databin / f"dict.{language}.txt", tmp_path / "out")
    folded = TransformerModel.from_pretrained(tmp_path / "out")
    original = TransformerModel.from_pretrained(tmp_path, "trained.pt", "bin")
    sentences = [" ".join(words) for words in toy_sentences(5)]
    assert folded.translate(sentences, max_len_b=9) == original.translate(sentences, max_len_b=9)


# -- the self-check


def test_random_batch_respects_the_model():
    model = trained_like(max_source_positions=3, max_target_positions=5)
    src, prev = random_batch(model)
    assert (src.shape, prev.shape) == ((ROWS, 3), (ROWS, 5))
    assert src[src.ne(1)].min() >= 2 and src.max() < model.encoder.embed_tokens.num_embeddings
    assert (src.ne(1).int().diff(dim=1) >= 0).all()  # padded on the left
    assert (prev.ne(1).int().diff(dim=1) <= 0).all()  # on the right
    assert src.eq(1).any() and prev.eq(1).any()
    assert prev.max() < model.decoder.embed_tokens.num_embeddings
    assert check_agreement(model, lambda src, prev: model(src, None, prev)[0]).difference == 0


@pytest.fixture
def wrong_fold(monkeypatch) -> Iterator[None]:
    """Folding that forgets one thing."""
    fold = admin.fold

    def forgetful(model: Transformer) -> Transformer:
        plain = fold(model)
        with torch.no_grad():
            plain.encoder.layers[1].feed_forward.fc1.weight.mul_(1.01)
        return plain

    monkeypatch.setattr(admin, "fold", forgetful)
    yield


@pytest.mark.usefixtures("wrong_fold")
def test_what_computes_something_else_is_not_written(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.pt").write_text("older")
    for output in ("out", "new", "new.pt"):
        assert_fails(capsys, 1, "computes something else", checkpoint, "--fold", "--output", tmp_path / output)
    assert (tmp_path / "out" / "model.pt").read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"trained.pt", "out"}


def test_what_is_not_finite_is_not_written(tmp_path, capsys):
    model = admin_model()
    nn.init.constant_(model.decoder.layers[0].feed_forward.fc2.bias, float("nan"))
    path = write_toy_checkpoint(model, tmp_path / "nan.pt")
    assert_fails(capsys, 1, "computes something else", path, "--fold", "--output", tmp_path / "out")


# -- errors


def test_bad_files(checkpoint, tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    assert_fails(capsys, 1, "no such file", tmp_path / "no.pt", *out)
    (tmp_path / "bad.pt").write_bytes(b"PK")
    assert_fails(capsys, 1, "damaged or not a checkpoint", tmp_path / "bad.pt", *out)
    assert_fails(capsys, 1, "is a directory", tmp_path, *out)
    assert not (tmp_path / "out").exists()
    below = ("--output", checkpoint / "below")
    assert_fails(capsys, 1, "cannot write", checkpoint, *below)
    (tmp_path / "dir.pt").mkdir()
    assert_fails(capsys, 1, "dir.pt: cannot write", checkpoint, "--output", tmp_path / "dir.pt")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.pt", "dir.pt", "trained.pt"]


def test_not_over_itself(checkpoint, tmp_path, capsys):
    before = checkpoint.read_bytes()
    assert_fails(capsys, 1, "is the checkpoint itself", checkpoint, "--fold", "--output", checkpoint)
    shutil.copy(checkpoint, tmp_path / "model.pt")
    assert_fails(capsys, 1, "is the checkpoint itself", tmp_path / "model.pt", "--output", tmp_path)
    assert checkpoint.read_bytes() == (tmp_path / "model.pt").read_bytes() == before


def test_what_does_not_fold(tmp_path, capsys):
    pre_ln = {"encoder_normalize_before": True, "decoder_normalize_before": True, "init_type": "default"}
    path = write_toy_checkpoint(admin_model(**pre_ln), tmp_path / "pre.pt")
    assert_fails(capsys, 1, "init type default cannot be folded", path, "--fold", "--output", tmp_path / "out")
    model = admin_model()
    nn.init.zeros_(model.encoder.layers[1].ffn_residual.omega)
    path = write_toy_checkpoint(model, tmp_path / "zero.pt")
    message = "omega of encoder.layers.1.ffn_residual is 0 in channel 0"
    assert_fails(capsys, 1, message, path, "--fold", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_usage(checkpoint, capsys):
    assert_fails(capsys, 2, "--output DIR is missing", checkpoint)
    assert_fails(capsys, 2, "invalid choice: 'onnx'", checkpoint, "--format", "onnx", "--output", "x")
    assert_fails(capsys, 2, "required: CHECKPOINT", "--output", "x")


def test_user_dir(tmp_path, capsys):
    package = tmp_path / "exported_rules"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fairseq.admin.residual import PostLN\n"
        "from fairseq.registry import RESIDUAL_RULES\n\n"
        "class Mine(PostLN):\n    pass\n\n"
        "RESIDUAL_RULES.add('exported_mine', Mine)\n"
    )
    path = write_toy_checkpoint(admin_model(init_type="default"), tmp_path / "mine.pt")
    state = torch.load(path, weights_only=False)
    state["args"].init_type = "exported_mine"
    torch.save(state, path)
    assert_fails(capsys, 1, "unknown init type 'exported_mine'", path, "--output", tmp_path / "out")
    flags = ("--user-dir", package, "--output", tmp_path / "out")
    export(path, *flags)
    out = capsys.readouterr().out
    assert "plain fairseq cannot read init type exported_mine\n" in out
    assert_fails(capsys, 1, "exported_mine cannot be folded", path, "--fold", *flags)
    assert load_model(tmp_path / "out" / "model.pt").encoder.embed_tokens.num_embeddings == VOCAB
