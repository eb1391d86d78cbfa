"""Checkpoints: which files a run writes, keeps and starts from; names of parameters; the originals' checkpoints."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq.checkpoint import (
    build_from_checkpoint,
    load_checkpoint,
    load_model,
    load_parameters,
    model_config,
    stored_settings,
)
from fairseq.cli.train import main
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import from_fairseq, to_fairseq
from fairseq.models.transformer import Transformer
from fairseq.options import parse_train_args
from fairseq.training.fairseq_optimizer import from_fairseqs
from tests.training_runs import (
    EPOCH,
    ROOT,
    SGD,
    assert_fails,
    assert_same,
    command_line,
    files,
    last,
    load,
    logged,
    train,
    updates,
    write_databin,
)

LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"

# -- which files a run writes


def epochs(*numbers: int) -> set[str]:
    return {f"checkpoint{n}.pt" for n in numbers}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), epochs(1, 2, 3) | {LAST, BEST}),
        (("--save-interval", 2), epochs(2) | {LAST, BEST}),
        (("--keep-last-epochs", 2), epochs(2, 3) | {LAST, BEST}),
        (("--no-epoch-checkpoints",), {LAST, BEST}),
        (("--no-last-checkpoints",), epochs(1, 2, 3) | {BEST}),
        (("--no-save",), set()),
        (("--disable-validation",), epochs(1, 2, 3) | {LAST}),
        (("--validate-interval", 2, "--no-epoch-checkpoints", "--no-last-checkpoints"), {BEST}),
        (
            ("--save-interval-updates", 5),
            epochs(1, 2, 3) | {LAST, BEST} | {f"checkpoint_{e}_{u}.pt" for e, u in ((1, 5), (2, 10), (3, 15), (3, 20))},
        ),
        (
            ("--save-interval-updates", 5, "--keep-interval-updates", 2, "--no-epoch-checkpoints"),
            {LAST, BEST, "checkpoint_3_15.pt", "checkpoint_3_20.pt"},
        ),
        (("--max-update", 10), epochs(1) | {LAST, BEST}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_names(toy_databin, tmp_path, flags, expected):
    train(toy_databin, tmp_path / "run", "--max-epoch", 3, *flags)
    if not (tmp_path / "run").exists():
        assert expected == set()
        return
    assert files(tmp_path / "run") == expected
    for name in expected & epochs(1, 2, 3):
        state = load(tmp_path / "run" / name)
        number = int(name.removeprefix("checkpoint").removesuffix(".pt"))
        assert state["optimizer_history"][-1]["num_updates"] == number * EPOCH
        assert state["extra_state"]["train_iterator"]["epoch"] == number + 1


@pytest.mark.parametrize(
    ("save", "save_updates", "check", "check_updates", "end"),
    [(1, 0, 1, 0, 16), (2, 5, 1, 3, 28), (3, 4, 2, 0, 24), (2, 7, 3, 7, 27), (9, 0, 9, 6, 20)],
    ids=str,
)
def test_what_is_due_when(toy_databin, tmp_path, caplog, save, save_updates, check, check_updates, end):
    """Each update's validation and files, by fairseq's conditions; the best and the last besides."""

    def due(interval: int, number: int) -> bool:
        return interval > 0 and number % interval == 0

    flags = ("--save-interval", save, "--save-interval-updates", save_updates, "--max-update", end)
    flags += ("--validate-interval", check, "--validate-interval-updates", check_updates)
    lines = train(toy_databin, tmp_path, *flags)
    validated = {line["valid_num_updates"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    matches = [re.match(r"saved (.*) in .* \(epoch (\d) @ (\d+) updates\)", message) for message in caplog.messages]
    saved = {int(m[3]): (int(m[2]), set(m[1].split(", "))) for m in matches if m}
    best = float("inf")
    for update in range(1, end + 1):
        epoch, is_end = -(-update // EPOCH), update % EPOCH == 0
        by_epoch, by_updates = is_end and due(save, epoch), due(save_updates, update)
        saves = by_epoch or by_updates or update == end
        validates = (saves and not is_end) or (is_end and due(check, epoch)) or due(check_updates, update)
        assert (update in validated) == (validates or update == end), update
        names = {f"checkpoint{epoch}.pt"} if by_epoch else set()
        names |= {f"checkpoint_{epoch}_{update}.pt"} if by_updates and not is_end else set()
        names |= {LAST} if saves else set()
        if update in validated and validated[update] <= best:
            best = validated[update]
            names |= {BEST, LAST}
        assert saved.get(update, (epoch, set())) == (epoch, names), update
    assert len(validated) > 1


def test_best_is_the_best_validation_even_between_saves(toy_databin, tmp_path):
    flags = ("--lr", 0.05, "--max-epoch", 4, "--validate-interval-updates", 3, "--save-interval", 4)
    lines = train(toy_databin, tmp_path, *flags, "--keep-best-checkpoints", 2)
    losses = {line["valid_num_updates"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    assert len(losses) > 8
    best = min(losses, key=lambda n: losses[n])
    assert load(tmp_path / BEST)["optimizer_history"][-1]["num_updates"] == best
    assert load(tmp_path / BEST)["extra_state"]["best"] == pytest.approx(losses[best], abs=6e-4)
    kept = sorted(float(m[1]) for name in files(tmp_path) if (m := re.match(r"checkpoint\.best_loss_(.+)\.pt", name)))
    assert kept == pytest.approx(sorted(losses.values())[:2], abs=6e-4)
    running = [line["valid_best_loss"] for line in lines if "valid_loss" in line]
    assert running == [min(list(losses.values())[: i + 1]) for i in range(len(losses))]


def test_best_by_bleu(tmp_path):
    databin = write_databin(tmp_path / "bin", 100, seed=1, words=3)
    flags = ("--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 20}', "--best-checkpoint-metric", "bleu")
    flags += ("--maximize-best-checkpoint-metric", "--keep-best-checkpoints", 1, "--eval-tokenized-bleu")
    lines = train(databin, tmp_path / "run", "--max-epoch", 3, "--lr", 0.02, *flags)
    scores = [line["valid_bleu"] for line in lines if "valid_bleu" in line]
    assert len(scores) == 3
    assert max(scores) > 0
    assert load(tmp_path / "run" / BEST)["extra_state"]["best"] == pytest.approx(max(scores), abs=6e-3)
    assert len([name for name in files(tmp_path / "run") if name.startswith("checkpoint.best_bleu_")]) == 1


def test_checkpoint_that_cannot_be_written(toy_databin, tmp_path):
    """A full disk, here a limit on the size of files: one line, status 1, nothing half-written."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "from fairseq.cli.train import main; main(sys.argv[1:])"
    )
    argv = command_line(toy_databin, tmp_path, "--max-update", 1)
    done = subprocess.run([sys.executable, "-c", limited, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*checkpoint_best\.pt: cannot write: .*\n", done.stderr)
    assert files(tmp_path) == set()


def test_leftovers_of_a_killed_run_go(toy_databin, tmp_path):
    train(toy_databin, tmp_path, "--max-update", 1)
    expected = files(tmp_path)
    for name in (".checkpoint_last.pt.x1y2.tmp", ".checkpoint7.pt.abc.tmp", ".other.tmp"):
        (tmp_path / name).write_bytes(b"half")
    train(toy_databin, tmp_path, "--max-update", 2)
    assert files(tmp_path) == expected | {".other.tmp"}


# -- what a run starts from


def test_restore_and_reset_flags(toy_databin, tmp_path):
    flags = ("--max-epoch", 2, "--save-interval-updates", 5, "--lr", "0.02")
    train(toy_databin, tmp_path / "first", *flags)
    start = tmp_path / "first" / "checkpoint_2_10.pt"
    state = load(start)

    def resumed(name: str, *more: object) -> tuple[int, int, int]:
        """First update of the continued run, its epoch, and Adam's count of updates in the end."""
        lines = train(toy_databin, tmp_path / name, "--restore-file", start, "--max-epoch", 2, *more)
        line = next(line for line in lines if "update" in line)
        return (
            line["num_updates"],
            line["epoch"],
            int(last(tmp_path / name)["last_optimizer_state"]["state"][0]["step"]),
        )

    assert resumed("all") == (11, 2, 14)
    assert resumed("data", "--reset-dataloader", "--max-update", 13) == (11, 1, 13)
    assert resumed("schedule", "--reset-lr-scheduler") == (1, 2, 14)
    assert resumed("optimizer", "--reset-optimizer") == (1, 2, 4)
    assert resumed("new", "--reset-optimizer", "--reset-dataloader", "--max-update", 3) == (1, 1, 3)
    lines = logged(tmp_path / "all")
    assert lines[0]["lr"] == pytest.approx(0.01 * (5 / 11) ** 0.5, rel=1e-5)  # the rate is the flags'
    best = next(line["valid_best_loss"] for line in lines if "valid_loss" in line)
    assert best <= state["extra_state"]["best"] + 6e-4


@pytest.mark.parametrize("reset", [(), ("--reset-meters",)], ids=["changed", "reset"])
def test_the_best_of_another_metric_does_not_count(toy_databin, tmp_path, caplog, reset):
    flags = (*SGD, "--lr", 0)  # no validation is better than the first
    train(toy_databin, tmp_path, *flags, "--max-epoch", 2)
    assert last(tmp_path)["extra_state"]["bad_validations"] == 1
    flags = (*flags, "--best-checkpoint-metric", "ppl", "--patience", 1, "--max-epoch", 9, *reset)
    epochs = [line for line in train(toy_databin, tmp_path, *flags) if "valid_ppl" in line]
    assert [line["epoch"] for line in epochs] == [3, 4]  # perplexities are larger than losses
    assert epochs[0]["valid_best_ppl"] == epochs[0]["valid_ppl"]
    assert last(tmp_path)["extra_state"]["best"] == pytest.approx(epochs[0]["valid_ppl"], abs=6e-3)
    assert load(tmp_path / BEST)["extra_state"]["best"] == last(tmp_path)["extra_state"]["best"]
    said = [
        message
        for message in caplog.messages
        if re.match(r"best loss so far, 5\.\d+, left aside: from now on ppl counts", message)
    ]
    assert len(said) == (not reset)
    if not reset:  # that of the same metric does count
        epochs = [line for line in train(toy_databin, tmp_path, *flags, "--patience", 2) if "valid_ppl" in line]
        assert [line["epoch"] for line in epochs] == [5]


@pytest.mark.parametrize(
    ("flags", "now"),
    [
        (("--criterion", "cross_entropy"), "of --criterion cross_entropy"),
        (("--label-smoothing", 0.3), "of --label-smoothing 0.3"),
        (("--label-smoothing", 0.3, "--best-checkpoint-metric", "nll_loss"), ""),
        ((), None),
    ],
)
def test_the_best_of_another_loss_does_not_count(toy_databin, tmp_path, caplog, flags, now):
    start = (*SGD, "--lr", 0, "--max-epoch", 1)
    metric = flags[-2:] if "nll_loss" in flags else ()
    train(toy_databin, tmp_path, *start, *metric)
    train(toy_databin, tmp_path, *start, "--max-epoch", 2, *flags)
    extra = last(tmp_path)["extra_state"]
    assert extra["best"] == pytest.approx(extra["val_loss"], abs=6e-4)
    assert extra["bad_validations"] == (0 if now else 1)
    assert any(f"left aside: from now on loss {now} counts" in message for message in caplog.messages) == bool(now)


@pytest.mark.parametrize(
    ("extra", "epoch"),
    [
        (None, 1),
        ({}, 1),
        ({"train_iterator": {"epoch": 4}}, 4),
        ({"train_iterator": {"epoch": 3, "iterations_in_epoch": EPOCH}}, 4),  # an epoch that has been done
    ],
)
def test_what_others_say_of_where_training_stood(toy_databin, tmp_path, extra, epoch):
    """What is not said begins anew; updates are counted with the optimiser's state."""
    train(toy_databin, tmp_path, "--max-update", 2)
    torch.save(last(tmp_path) | {"extra_state": extra}, tmp_path / LAST)
    lines = train(toy_databin, tmp_path, "--max-epoch", epoch)
    assert [line["epoch"] for line in lines if "train_loss" in line] == [epoch]
    assert list(updates(lines)) == list(range(3, 3 + EPOCH))


def test_finetuning_takes_the_parameters_alone(toy_databin, tmp_path):
    train(toy_databin, tmp_path / "first", "--max-epoch", 1)
    source = tmp_path / "first" / LAST
    flags = ("--finetune-from-model", source, "--max-update", 1, "--lr", 0)
    lines = train(toy_databin, tmp_path / "tuned", *flags)
    assert min(updates(lines)) == 1
    assert_same(load(source)["model"], last(tmp_path / "tuned")["model"])
    # checkpoint_last.pt, once there, comes first
    lines = train(toy_databin, tmp_path / "tuned", *flags, "--max-update", 2)
    assert min(updates(lines)) == 2


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--finetune-from-model", "nowhere.pt"), 1, "--finetune-from-model nowhere.pt: no such file"),
        (("--finetune-from-model", "a.pt", "--restore-file", "b.pt"), 2, "contradict"),
        (("--save-dir", f"{__file__}/below"), 1, "--save-dir"),
        (("--log-file", f"{__file__}/below"), 1, "--log-file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_paths(toy_databin, tmp_path, capsys, flags, status, message):
    assert_fails(capsys, status, message, *command_line(toy_databin, tmp_path, "--max-update", 1, *flags))


def test_restore_file_that_is_not_there(toy_databin, tmp_path, capsys, caplog):
    """Commands that are published name one so as not to continue; what is there is not overwritten."""
    flags = ("--restore-file", "x.pt", "--max-update", 2)
    assert updates(train(toy_databin, tmp_path / "x", *flags)) == updates(
        train(toy_databin, tmp_path / "plain", "--max-update", 2)
    )
    assert "--restore-file x.pt: no such file; training from scratch" in caplog.messages
    before = (tmp_path / "x" / LAST).read_bytes()
    assert_fails(capsys, 1, f"would overwrite {tmp_path}/x/{LAST}", *command_line(toy_databin, tmp_path / "x", *flags))
    flags = ("--restore-file", "checkpoint_best.pt", "--max-update", 2)
    best = tmp_path / "x" / "checkpoint_best.pt"
    assert_fails(capsys, 1, f"is it --restore-file {best}?", *command_line(toy_databin, tmp_path / "x", *flags))
    assert (tmp_path / "x" / LAST).read_bytes() == before


def test_embeddings_that_differ_are_not_loaded_into_shared_ones(toy_databin, tmp_path, capsys):
    """One of the two would be lost; those of a model that shares them go into one that does not."""
    flags = ("--max-update", 1, "--reset-optimizer")
    share = "--share-decoder-input-output-embed"
    train(toy_databin, tmp_path / "apart", "--max-update", 1)
    train(toy_databin, tmp_path / "shared", "--max-update", 1, share)
    message = "shares decoder.embed_tokens.weight and decoder.output_projection.weight: they differ"
    apart = command_line(toy_databin, tmp_path / "new", *flags, share, "--restore-file", tmp_path / "apart" / LAST)
    assert_fails(capsys, 1, message, *apart)
    assert updates(train(toy_databin, tmp_path / "new", *flags, "--restore-file", tmp_path / "shared" / LAST))


def test_checkpoint_that_does_not_fit(toy_databin, tmp_path, capsys):
    train(toy_databin, tmp_path, "--max-update", 1, "--no-save-optimizer-state")
    before = (tmp_path / LAST).read_bytes()
    for flags, message in (
        ((), "no optimiser state; continue with --reset-optimizer"),
        (("--encoder-layers", 2), "lacks encoder.layers.1"),
        (("--encoder-ffn-embed-dim", 32), "(24, 16) in the file and (32, 16) in the model"),
        (("--init-type", "adaptive"), "was trained with --init-type default, not adaptive; give that, or start afresh"),
    ):
        assert_fails(capsys, 1, message, *command_line(toy_databin, tmp_path, "--max-update", 2, *flags))
    assert (tmp_path / LAST).read_bytes() == before
    # a file that nobody has named may be left where it is
    otherwise, flags = ", or start afresh with another --save-dir", ("--max-update", 2, "--encoder-layers", 2)
    assert_fails(capsys, 1, otherwise, *command_line(toy_databin, tmp_path, *flags))
    for name in ("--restore-file", "--finetune-from-model"):
        with pytest.raises(SystemExit):
            main(command_line(toy_databin, tmp_path / "new", *flags, name, tmp_path / LAST))
        error = capsys.readouterr().err
        assert "lacks encoder.layers.1" in error and otherwise not in error
    assert min(updates(train(toy_databin, tmp_path, "--max-update", 2, "--reset-optimizer"))) == 1
    assert_fails(
        capsys,
        1,
        "holds the state of optimiser adam",
        *command_line(toy_databin, tmp_path, "--max-update", 5, "--optimizer", "radam"),
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"extra_state": {"train_iterator": {"epoch": "x"}}},
        {"extra_state": {"train_iterator": 3}},
        {"extra_state": [1]},
        {"extra_state": {"best": "x"}},
        {"optimizer_history": 7},
        {"optimizer_history": [{"optimizer_name": "adam"}]},
        {"last_optimizer_state": {"state": {}}},
        {"last_optimizer_state": [1, 2]},
        {
            "optimizer_history": [{"optimizer_name": "FP16Optimizer", "num_updates": 1}],
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]},
        },
    ],
    ids=str,
)
def test_checkpoint_that_says_nonsense(toy_databin, tmp_path, capsys, broken):
    train(toy_databin, tmp_path, "--max-update", 1)
    torch.save(last(tmp_path) | broken, tmp_path / LAST)
    assert_fails(capsys, 1, str(tmp_path / LAST), *command_line(toy_databin, tmp_path, "--max-update", 2))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer", "radam", "--init-type", "looklinear"),
        ("--lr-scheduler", "linear", "--max-update", 9),
        ("--lr-scheduler", "polynomial_decay", "--max-update", 9),
        ("--eval-bleu", "--eval-bleu-args", '{"beam": 2}', "--distributed-world-size", 2),
    ],
)
def test_settings_are_such_as_fairseq_reads(flags):
    """What fairseq 0.12.2 refused of all flags' values: unset numbers, an object, parts that it lacks."""
    args = vars(parse_train_args(command_line("data", Path("unused"), *flags)))
    kept = vars(stored_settings(args))
    changed = {"eval_bleu_args"} if "--eval-bleu" in flags else set()
    assert all(kept[name] == args[name] for name in kept.keys() - changed)
    refused = {name for name in ("distributed_world_size", "min_lr", "total_num_update") if args.get(name, 0) is None}
    refused |= {name for name, value in (("optimizer", "radam"), ("lr_scheduler", "linear")) if args.get(name) == value}
    assert args.keys() - kept.keys() == refused
    assert not changed or json.loads(kept["eval_bleu_args"]) == {"beam": 2}


@pytest.mark.parametrize("init_type", ["deepnet", "b2t", "adaptive"])
def test_settings_are_such_as_fairseq_refuses(init_type):
    """It would translate with the parameters of some as if they were an ordinary Transformer's."""
    flags = ("--init-type", init_type, "--distributed-world-size", 2)
    args = vars(parse_train_args(command_line("data", Path("unused"), *flags)))
    assert vars(stored_settings(args)) == args | {"distributed_world_size": None}


# -- names of parameters


def build(**settings: object) -> Transformer:
    shape = {"encoder_embed_dim": 8, "encoder_ffn_embed_dim": 12, "encoder_attention_heads": 2, "encoder_layers": 2}
    shape |= {"decoder_layers": 2, "decoder_attention_heads": 2}
    torch.manual_seed(3)
    vocab = 20 if settings.get("share_all_embeddings") else 24
    return Transformer(TransformerConfig(**(shape | settings)), 20, vocab)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_all_embeddings": True},
        {"share_decoder_input_output_embed": True},
        {"init_type": "adaptive"},
        {"encoder_normalize_before": True, "decoder_normalize_before": True, "layernorm_embedding": True},
        {"encoder_learned_pos": True, "decoder_learned_pos": True},
        {"decoder_embed_dim": 6, "decoder_ffn_embed_dim": 10},
    ],
    ids=str,
)
def test_round_trip(tmp_path, settings):
    model = build(**settings)
    args = argparse.Namespace(**model.cfg.flat())
    torch.save({"args": args, "model": to_fairseq(model.state_dict())}, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert_same(dict(model.state_dict()), dict(loaded.state_dict()))
    assert loaded.cfg == model.cfg


@pytest.mark.parametrize("setting", ["cross_self_attention", "no_cross_attention", "layer_wise_attention"])
def test_attention_that_is_not_here(tmp_path, setting):
    """fairseq writes these settings always; where they are on, parameters of the same names mean another model."""
    model = build()
    for value in (False, True):
        args = argparse.Namespace(**model.cfg.flat(), **{setting: value})
        torch.save({"args": args, "model": to_fairseq(model.state_dict())}, tmp_path / f"{value}.pt")
    load_model(tmp_path / "False.pt")
    with pytest.raises(FairseqError, match=f"trained with --{setting.replace('_', '-')}, which is not supported"):
        load_model(tmp_path / "True.pt")


def test_fused_and_old_names():
    model = build(share_decoder_input_output_embed=True)
    current = to_fairseq(model.state_dict())
    old: dict[str, torch.Tensor] = {}
    norms = {"self_attn_layer_norm": 0, "encoder_attn_layer_norm": 1, "final_layer_norm": 2}
    for name, tensor in current.items():
        if match := re.fullmatch(r"(.*attn\.)q_proj\.(weight|bias)", name):
            parts = [current[f"{match[1]}{part}_proj.{match[2]}"] for part in "qkv"]
            name, tensor = f"{match[1]}in_proj_{match[2]}", torch.cat(parts)
        elif re.search(r"\.[kv]_proj\.", name):
            continue
        if match := re.fullmatch(r"(encoder|decoder)(\.layers\.\d)\.(\w+_layer_norm)\.(\w+)", name):
            number = norms[match[3]] if match[1] == "decoder" else min(norms[match[3]], 1)
            name = f"{match[1]}{match[2]}.layer_norms.{number}.{match[4]}"
        old[name] = tensor
    assert "encoder.layers.0.self_attn.in_proj_weight" in old
    assert "decoder.layers.1.layer_norms.2.bias" in old
    other = build(share_decoder_input_output_embed=True, dropout=0.5)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    load_parameters(other, from_fairseq(old), "old")
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_names_of_a_wider_decoder():
    """What fairseq 0.8.0 calls the attention of a decoder of 12 dimensions to an encoder of 8, which it cannot fuse."""
    shapes = {"k_proj_weight": (12, 8), "v_proj_weight": (12, 8), "q_proj_weight": (12, 12), "in_proj_bias": (36,)}
    layer, current = "decoder.layers.0.encoder_attn.", to_fairseq(build(decoder_embed_dim=12).state_dict())
    theirs = {name: tensor for name, tensor in current.items() if not re.match(layer + "[qkv]_proj", name)}
    theirs |= {layer + name: torch.rand(shape) for name, shape in shapes.items()}
    other = build(decoder_embed_dim=12)
    load_parameters(other, from_fairseq(theirs), "old")
    attention = other.decoder.layers[0].encoder_attn
    for part, number in (("q", 0), ("k", 1), ("v", 2)):
        projection = getattr(attention, f"{part}_proj")
        assert torch.equal(projection.weight, theirs[f"{layer}{part}_proj_weight"])
        assert torch.equal(projection.bias, theirs[layer + "in_proj_bias"][12 * number :][:12])


@pytest.mark.parametrize("name", ["fairseq08_postln_3x3.pt", "fairseq08_admin_1x1_full.pt", "fairseq012_tiny.pt"])
def test_our_names_are_the_originals(shared, name):
    state = load_checkpoint(shared / "reference" / name)
    model = build_from_checkpoint(state, name)
    ours, theirs = to_fairseq(model.state_dict()), state["model"]
    unfused = {key: t for key, t in theirs.items() if "in_proj_" not in key}
    fused = {re.sub("in_proj_", f"{p}_proj.", key) for key in theirs if "in_proj_" in key for p in "qkv"}
    # 0.9 and later repeat a shared output embedding; the positional buffer went in 0.12; both read files without
    assert ours.keys() - {"encoder.embed_positions._float_tensor", "decoder.embed_positions._float_tensor"} == (
        unfused.keys() | fused
    ) - {"decoder.output_projection.weight"} - {k for k in theirs if "_float_tensor" in k}
    for key in unfused.keys() & ours.keys():
        if "version" not in key and "_float_tensor" not in key:
            torch.testing.assert_close(ours[key], theirs[key].float(), rtol=0, atol=0)


def test_keys_of_the_file_are_fairseqs(shared, toy_databin, tmp_path):
    train(toy_databin, tmp_path, "--max-update", 1)
    ours, theirs = last(tmp_path), load_checkpoint(shared / "reference" / "fairseq08_admin_1x1_full.pt")
    assert ours.keys() == theirs.keys()
    assert ours["optimizer_history"][0].keys() == theirs["optimizer_history"][0].keys()
    assert set(ours["last_optimizer_state"]) == set(theirs["last_optimizer_state"])
    assert {"train_iterator", "val_loss", "best"} <= ours["extra_state"].keys()
    assert {"epoch", "iterations_in_epoch"} <= ours["extra_state"]["train_iterator"].keys()
    assert isinstance(ours["args"], argparse.Namespace)
    wanted = {"arch", "task", "criterion", "source_lang", "target_lang", "encoder_layers", "init_type"}
    assert wanted <= vars(ours["args"]).keys()


# -- the originals' checkpoints


def reference_flags(args: dict[str, object]) -> list[str]:
    """The model's flags, from a checkpoint's settings."""
    flags = ["--dropout", "0.1", "--attention-dropout", "0"]
    for stack in ("encoder", "decoder"):
        for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads"):
            flags += [f"--{stack}-{name}".replace("_", "-"), str(args[f"{stack}_{name}"])]
    return flags + ["--share-all-embeddings"] * bool(args["share_all_embeddings"])


@pytest.mark.parametrize("name", ["fairseq08_admin_1x1_full.pt", "fairseq012_tiny.pt"])
def test_finetuning_the_originals(shared, tmp_path, name):
    path, databin = shared / "reference" / name, shared / "reference" / "multi30k-databin"
    original = load_checkpoint(path)
    flags = [*reference_flags(original["args"]), "--disable-validation", "--max-update", "1", "--lr", "0"]
    train(databin, tmp_path, "--finetune-from-model", path, *flags)
    ours = from_fairseq(last(tmp_path)["model"])
    assert_same(ours, {key: t.float() for key, t in from_fairseq(original["model"]).items()})


def test_continuing_an_original(shared, tmp_path):
    """With its optimiser's state, and without; more of that in test_fairseq_runs.py."""
    path, databin = shared / "reference" / "fairseq08_admin_1x1_full.pt", shared / "reference" / "multi30k-databin"
    state = load_checkpoint(path)
    flags = [*reference_flags(state["args"]), "--disable-validation"]
    lines = train(databin, tmp_path / "on", "--restore-file", path, "--max-update", 21, *flags)
    assert sorted(updates(lines)) == [21]
    assert last(tmp_path / "on")["extra_state"]["best"] == pytest.approx(13.93661248071683)
    model, fused = build_from_checkpoint(state, path), state["last_optimizer_state"]["state"][1]
    moments = from_fairseqs(state["last_optimizer_state"], state["model"], model)
    by_name = {name: moments[number] for number, (name, _) in enumerate(model.named_parameters())}
    for key in ("exp_avg", "exp_avg_sq"):
        parts = [by_name[f"encoder.layers.0.self_attn.{part}_proj.weight"][key] for part in "qkv"]
        assert torch.equal(torch.cat(parts), fused[key])
    fused["exp_avg_sq_col"] = fused["exp_avg_sq"].mean(dim=0)  # adafactor's, of all three at once
    with pytest.raises(ValueError, match=r"exp_avg_sq_col of encoder\.layers.*three matrices"):
        from_fairseqs(state["last_optimizer_state"], state["model"], model)
    lines = train(databin, tmp_path, "--restore-file", path, "--reset-optimizer", "--max-update", 2, *flags)
    assert sorted(updates(lines)) == [1, 2]
    assert last(tmp_path)["extra_state"]["train_iterator"]["epoch"] == 1
    assert last(tmp_path)["extra_state"]["best"] is None  # as in fairseq


def test_settings_in_groups(tmp_path):
    """Those of fairseq 0.10 and later: the model's win, and the name of a component is its group's."""
    cfg = {
        "model": None,
        "common": {"seed": 3, "encoder_layers": 8},
        "task": argparse.Namespace(_name="translation", source_lang="de", encoder_layers=9),
        "criterion": {"_name": "cross_entropy"},
        "bmuf": None,
        "optimizer": {"_name": None, "seed": 4},
    }
    expected = {"task": "translation", "source_lang": "de", "criterion": "cross_entropy", "model": "transformer"}
    own = {"_name": "transformer", "encoder_layers": 2}
    for model in (own, argparse.Namespace(**own)):
        torch.save({"cfg": cfg | {"model": model}, "model": {}}, tmp_path / "model.pt")
        assert load_checkpoint(tmp_path / "model.pt")["args"] == expected | {"encoder_layers": 2, "seed": 4}
    torch.save({"cfg": cfg, "args": None, "model": {}}, tmp_path / "model.pt")
    args = load_checkpoint(tmp_path / "model.pt")["args"]
    assert (args["encoder_layers"], "model" in args) == (9, False)


@pytest.mark.parametrize(
    ("said", "with_omega", "without"),
    [
        ("default", "adaptive", "default"),
        ("adaptive", "adaptive", "default"),
        ("adaptive-profiling", "adaptive", "default"),
        ("adaptive-closed-form", "adaptive-closed-form", "default"),
        ("looklinear", "looklinear", "looklinear"),
    ],
)
def test_parameters_decide_whether_a_model_is_admin(said, with_omega, without):
    """What the settings say may be of the run that profiled, or of the original code, which has no init types."""
    names = ("encoder.layers.0.fc1.weight", "encoder.layers.0.attn_residual.omega")
    plain, admin = ({name: torch.ones(2) for name in names[:count]} for count in (1, 2))
    assert model_config({"init_type": said}, plain).init_type == without
    assert model_config({"init_type": said}, admin).init_type == with_omega


@pytest.mark.parametrize(
    "content", [[], {"args": {}}, {"model": [1]}, {"model": {"w": 1}}, {"model": {3: torch.ones(1)}}]
)
def test_what_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(FairseqError, match=r"model\.pt: (not a fairseq checkpoint|'model' holds something)"):
        load_checkpoint(tmp_path / "model.pt")


def test_foreign_objects_are_no_obstacle(tmp_path):
    with pytest.raises(FairseqError, match="no settings"):
        torch.save({"model": {}}, tmp_path / "empty.pt")
        load_checkpoint(tmp_path / "empty.pt")


def test_what_to_do_about_a_checkpoint_that_does_not_fit():
    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24}
    admin, plain = (Transformer(TransformerConfig(**shape, init_type=i), 9, 9) for i in ("adaptive", "default"))
    for model, other in ((admin, plain), (plain, admin)):
        with pytest.raises(FairseqError, match=r"give the flags it was trained with, --init-type included, or else$"):
            load_parameters(model, other.state_dict(), "model.pt", ", or else")
