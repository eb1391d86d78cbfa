"""``fairseq-train``: resuming, the arithmetic of an update, limits, divergence, Admin's two commands."""

from __future__ import annotations

import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.cli import generate
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.translation import TranslationData
from fairseq.models.transformer import Transformer
from fairseq.options import DataConfig, parse_train_args, section
from fairseq.training.train import build_model
from tests.training_runs import (
    EPOCH,
    SGD,
    assert_fails,
    assert_same,
    command_line,
    files,
    last,
    load,
    logged,
    start,
    train,
    trainer_and_batches,
    updates,
    write_databin,
)

ADAM = ("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--weight-decay", "0.01")
RADAM = ("--optimizer", "radam", *ADAM[2:])

# -- resuming


def assert_same_training(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    for key in ("model", "last_optimizer_state"):
        assert_same(a[key], b[key])
    assert a["extra_state"]["train_iterator"] == b["extra_state"]["train_iterator"]
    assert a["optimizer_history"][-1]["num_updates"] == b["optimizer_history"][-1]["num_updates"]


@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ((3,), ADAM),
        ((EPOCH,), ADAM),
        ((5, 13), RADAM),
        ((5, 13), (*ADAM, "--update-freq", "2", "--log-interval", "3")),
        ((5,), (*ADAM, "--update-freq", "3,1", "--clip-norm", "0.5", "--num-workers", "1", "--bf16")),
    ],
    ids=["within an epoch", "after an epoch", "radam", "update-freq", "bf16"],
)
def test_resumed_run_is_the_uninterrupted_one(toy_databin, tmp_path, stops, flags):
    whole = train(toy_databin, tmp_path / "whole", *flags, "--max-update", 19)
    parts = []
    for stop in (*stops, 19):
        parts += train(toy_databin, tmp_path / "parts", *flags, "--max-update", stop)
    assert updates(parts) == updates(whole)
    assert len(updates(whole)) >= 5

    def epochs(lines):
        return {line["epoch"]: (line["train_loss"], line["train_gnorm"]) for line in lines if "train_loss" in line}

    assert epochs(parts) == epochs(whole)
    assert len(epochs(whole)) >= 2
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_reading_processes_change_nothing(toy_databin, tmp_path):
    alone = train(toy_databin, tmp_path / "alone", "--max-update", EPOCH + 2)
    two = train(toy_databin, tmp_path / "two", "--max-update", EPOCH + 2, "--num-workers", 2)
    assert updates(two) == updates(alone)
    assert_same_training(tmp_path / "alone", tmp_path / "two")
    (epoch,) = (line for line in two if line.get("epoch") == 1 and "train_loss" in line)
    assert 0 < epoch["train_padding"] < 50 and 0 < epoch["train_data_wait"] < 100


def test_padding_to_a_multiple_leaves_losses_as_they_are(toy_databin, tmp_path):
    flags = ("--max-update", 3, "--dropout", 0, "--attention-dropout", 0, "--max-tokens", 10**6)
    plain = updates(train(toy_databin, tmp_path / "plain", *flags))
    padded = updates(train(toy_databin, tmp_path / "padded", *flags, "--required-seq-len-multiple", 16))
    assert [line["loss"] for line in padded.values()] == pytest.approx([line["loss"] for line in plain.values()])
    assert padded[1]["padding"] > plain[1]["padding"]


def test_further_training_sets_are_as_one(toy_databin, tmp_path, caplog):
    """Trained on in parts, it is the model of one data-bin that has them all."""
    parts, whole = (write_databin(tmp_path / name, 100, seed=5) for name in ("parts", "whole"))
    for language in ("xx", "yy"):
        pair, further = f"train.xx-yy.{language}", f"train1.xx-yy.{language}"
        for kind in ("bin", "idx"):
            shutil.copy(toy_databin / f"{pair}.{kind}", parts / f"{further}.{kind}")
        with IndexedDatasetWriter(whole / pair, np.uint16) as writer:
            for name in (pair, pair, further):
                dataset = IndexedDataset(parts / name)
                for i in range(len(dataset)):
                    writer.add(dataset[i])
    flags = ("--max-update", 17, "--num-workers", 1)
    assert updates(train(parts, tmp_path / "a", *flags, "--upsample-primary", 2)) == updates(
        train(whole, tmp_path / "b", *flags)
    )
    assert_same_training(tmp_path / "a", tmp_path / "b")
    name = parts / "train"
    assert f"2 x {name}.xx-yy.xx + {name}1.xx-yy.xx: 500 sentence pairs" in caplog.messages


def test_resuming_with_rotating_databins(toy_databin, tmp_path):
    other = write_databin(tmp_path / "bin", 200, seed=5)
    data = f"{toy_databin}:{other}"
    whole = train(data, tmp_path / "whole", "--max-update", 17)
    parts = []
    for stop in (EPOCH, EPOCH + 2, 13, 17):
        parts += train(data, tmp_path / "parts", "--max-update", stop)
    assert updates(parts) == updates(whole)
    sentences = {n: line["bsz"] for n, line in updates(whole).items()}
    assert sum(sentences[n] for n in range(1, EPOCH + 1)) == 300
    assert sum(bsz for n, bsz in sentences.items() if n > EPOCH) >= 200
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_killed_run_goes_on_as_if_it_had_not_been(toy_databin, tmp_path):
    flags = (*RADAM, "--save-interval-updates", 3, "--keep-interval-updates", 1, "--max-update", 150)
    seed = random.randrange(1000)
    chance = random.Random(seed)
    train(toy_databin, tmp_path / "whole", *flags)
    directory, kills = tmp_path / "parts", 0
    while kills < 2:
        before = (directory / "checkpoint_last.pt").stat().st_mtime_ns if kills else 0
        process = start(toy_databin, directory, *flags)
        try:
            path = directory / "checkpoint_last.pt"
            while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
        finally:
            process.kill()
            process.communicate()
        kills += 1
    assert last(directory)["optimizer_history"][-1]["num_updates"] < 150, f"seed {seed}"
    train(toy_databin, directory, *flags)
    assert_same_training(tmp_path / "whole", directory)


def test_clock_and_best_go_on(toy_databin, tmp_path):
    first = train(toy_databin, tmp_path, "--max-epoch", 1)
    state = last(tmp_path)
    extra = state["extra_state"]
    extra["previous_training_time"] += 1000
    extra["train_wall"] += 500
    torch.save(state, tmp_path / "checkpoint_last.pt")
    second = train(toy_databin, tmp_path, "--max-epoch", 2)
    assert first[-2]["train_wall"] < 60 < 500 <= second[-2]["train_train_wall"] < 560
    assert 1000 <= second[-2]["train_wall"] < 1100
    assert second[-1]["valid_best_loss"] <= first[-1]["valid_loss"]
    fresh = train(toy_databin, tmp_path, "--max-epoch", 3, "--reset-meters")
    assert fresh[-2]["train_wall"] < 60


# -- the arithmetic of an update, against float64


def first_update(databin: Path, *flags: object) -> tuple[Transformer, list[dict[str, float]], list[torch.Tensor]]:
    """The initial model in float64, and of the first update: each micro-batch's counts and losses (nats), and the
    gradient of the summed label-smoothed loss (0.1).
    """
    args = parse_train_args(command_line(databin, Path("unused"), *flags))
    data = TranslationData.open(section(DataConfig, args))
    model = build_model(args, len(data.src_dict), len(data.tgt_dict)).double()
    itr = EpochBatchIterator(
        lambda epoch: data.load("train", epoch),
        max_tokens=400,
        max_sentences=None,
        required_batch_size_multiple=8,
        max_positions=(1024, 1024),
        seed=args.seed,
    )
    counts, total = [], torch.zeros((), dtype=torch.float64)
    for batch in next(itr.updates(args.update_freq[0])):
        assert batch is not None
        log_probs = model(**batch["net_input"])[0].log_softmax(-1)
        real = batch["target"] != 1
        nll = -log_probs.gather(-1, batch["target"][..., None])[..., 0][real].sum()
        loss = 0.9 * nll + 0.1 * -log_probs.mean(-1)[real].sum()
        counts.append({"ntokens": int(real.sum()), "nsentences": len(real), "loss": loss.item(), "nll": nll.item()})
        total = total + loss
    total.backward()
    return model, counts, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("flags", "unit", "clip"),
    [
        ((), "ntokens", None),
        (("--sentence-avg",), "nsentences", None),
        (("--update-freq", "3"), "ntokens", None),
        (("--update-freq", "2", "--clip-norm", "0.25"), "ntokens", 0.25),
        (("--clip-norm", "1000"), "ntokens", 1000.0),
    ],
    ids=str,
)
def test_update_by_hand(toy_databin, tmp_path, flags, unit, clip):
    model, counts, gradients = first_update(toy_databin, *SGD, *flags)
    sums = {key: sum(count[key] for count in counts) for key in counts[0]}
    gradients = [g / sums[unit] for g in gradients]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    factor = 1.0 if clip is None else min(1.0, clip / norm)
    (line,) = updates(train(toy_databin, tmp_path, *SGD, *flags, "--max-update", 1)).values()
    assert line["loss"] == pytest.approx(sums["loss"] / sums[unit] / math.log(2), abs=6e-4)
    assert line["nll_loss"] == pytest.approx(sums["nll"] / sums["ntokens"] / math.log(2), abs=6e-4)
    assert line["ppl"] == pytest.approx(math.exp(sums["nll"] / sums["ntokens"]), abs=6e-3)
    assert line["gnorm"] == pytest.approx(norm, abs=6e-4)
    assert line["clip"] == (100 if factor < 1 else 0)
    assert (line["wpb"], line["bsz"]) == (sums["ntokens"], sums["nsentences"])
    expected = {name: p.detach() - 0.5 * factor * p.grad / sums[unit] for name, p in model.named_parameters()}
    saved = last(tmp_path)["model"]
    for name in ("encoder.embed_tokens.weight", "decoder.layers.0.self_attn.k_proj.weight"):
        torch.testing.assert_close(saved[name].double(), expected[name], rtol=0, atol=1e-6)
    name = "decoder.layers.0.feed_forward.fc1.weight"
    torch.testing.assert_close(saved[name.replace("feed_forward.", "")].double(), expected[name], rtol=0, atol=1e-6)


def test_update_freq_by_epoch(toy_databin, tmp_path):
    lines = train(toy_databin, tmp_path, "--update-freq", "4,2", "--max-epoch", 3)
    per_epoch = {line["epoch"]: line["train_num_updates"] for line in lines if "train_loss" in line}
    assert per_epoch == {1: 2, 2: 2 + 4, 3: 2 + 4 + 4}
    sentences = [line["train_bsz"] for line in lines if "train_loss" in line]
    assert sentences == [150, 75, 75]  # every sentence once an epoch


def test_lr_by_epoch(toy_databin, tmp_path):
    """Where an epoch ends, the update after has its epoch's rate, and a resumed run has it too."""
    flags = ("--lr-scheduler", "fixed", "--warmup-updates", 0, "--lr", "0.04,0.02", "--force-anneal", 3)
    flags += ("--lr-shrink", 0.5)
    rates: list[float] = []
    for stop in (EPOCH, 2 * EPOCH + 3, 4 * EPOCH):
        train(toy_databin, tmp_path, *flags, "--max-update", stop)
        rates.append(last(tmp_path)["last_optimizer_state"]["param_groups"][0]["lr"])
    assert rates == [0.04, 0.01, 0.005]
    lines = updates(logged(tmp_path))  # that of the next update, were it of the same epoch
    expected = [0.04] * EPOCH + [0.02] * EPOCH + [0.01] * EPOCH + [0.005] * EPOCH
    assert [lines[n]["lr"] for n in range(1, 4 * EPOCH + 1)] == pytest.approx(expected)


def test_a_process_without_a_batch_adds_nothing(toy_databin):
    flags = (*SGD, "--update-freq", 2)
    (one, itr), (other, _) = (trainer_and_batches(toy_databin, *flags) for _ in range(2))
    batch = next(itr.updates(1))[0]
    assert one.train_step([batch]) and other.train_step([batch, None])
    assert one.take_stats() == other.take_stats()
    assert_same(one.parameters, other.parameters)


# -- limits


@pytest.mark.parametrize(
    ("flags", "count", "why"),
    [
        (("--max-update", 9), 9, "--max-update 9"),
        (("--max-epoch", 2, "--max-update", 100), 2 * EPOCH, "--max-epoch 2"),
        (("--stop-min-lr", 0.0055, "--max-update", 100), 3 * EPOCH, "--stop-min-lr"),
        (("--min-lr", 0.0055), 3 * EPOCH, "--stop-min-lr"),
        (
            ("--min-lr", 0, "--lr-scheduler", "polynomial_decay", "--max-epoch", 3, "--total-num-update", 9),
            2 * EPOCH,
            "--stop-min",
        ),
        (  # its lowest rate ends no training, nor is any rate of a later period below that
            ("--lr-scheduler", "cosine", "--min-lr", 0.002, "--lr-period-updates", 4, "--max-epoch", 3),
            3 * EPOCH,
            "--max-epoch 3",
        ),
    ],
    ids=str,
)
def test_limits(toy_databin, tmp_path, flags, count, why):
    lines = train(toy_databin, tmp_path, *flags)
    assert max(updates(lines)) == count  # 0.01 * sqrt(5 / 17) is the first rate below 0.0055, in the third epoch
    assert last(tmp_path)["optimizer_history"][-1]["num_updates"] == count
    assert why in (tmp_path / "log").read_text().splitlines()[-1]
    assert [line["train_num_updates"] for line in lines if "train_loss" in line][
        -1
    ] == count  # of a part of an epoch too
    assert train(toy_databin, tmp_path, *flags) == []  # nothing is left to do


def test_the_rate_has_fallen_when_it_is_low_and_does_not_rise(toy_databin):
    trainer, _ = trainer_and_batches(toy_databin)
    rates = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.1, 0.4, 0.2]
    trainer.lr_at = lambda num_updates, epoch: rates[num_updates] + epoch  # of the first epoch
    found = []
    for trainer.num_updates in range(len(rates)):
        found.append(trainer.lr_has_fallen_to(1.2))
    assert found == [False, False, False, False, True, True, True, False, True]


def test_log_interval_is_of_updates_across_epochs(toy_databin, tmp_path):
    """fairseq's lines with epochs of 10 updates and --log-interval 15 are those of updates 15 and 30."""
    flags = ("--max-epoch", 3, "--batch-size-valid", 8)
    lines = train(toy_databin, tmp_path / "long", *flags, "--log-interval", 10)
    assert list(updates(lines)) == [10, 20]
    by_one = updates(train(toy_databin, tmp_path / "each", *flags))
    tokens = [by_one[number]["wpb"] for number in range(11, 21)]
    assert updates(lines)[20]["wpb"] == pytest.approx(sum(tokens) / 10, abs=0.06)
    (first, *_) = [line for line in lines if "valid_loss" in line]
    assert first["valid_bsz"] == 7.5  # 30 sentences in 4 batches


def test_patience_counts_validations_without_a_better_one(toy_databin, tmp_path):
    flags = (*SGD, "--lr", 0)  # the loss stays as it is
    lines = train(toy_databin, tmp_path / "epochs", *flags, "--patience", 2)
    assert [line["epoch"] for line in lines if "valid_loss" in line] == [1, 2, 3]
    flags = (*flags, "--validate-interval-updates", 2)
    lines = train(toy_databin, tmp_path / "updates", *flags, "--patience", 3)
    assert [line["valid_num_updates"] for line in lines if "valid_loss" in line] == [2, 4, 6, 7]
    assert last(tmp_path / "updates")["optimizer_history"][-1]["num_updates"] == 7
    assert train(toy_databin, tmp_path / "updates", *flags, "--patience", 3) == []  # patience is remembered


def test_training_without_end_is_refused(toy_databin, tmp_path, capsys):
    assert_fails(capsys, 1, "--max-epoch or --max-update", *command_line(toy_databin, tmp_path))


# -- divergence


def test_divergence_ends_training_and_keeps_the_checkpoint(toy_databin, tmp_path, capsys):
    train(toy_databin, tmp_path, "--max-epoch", 1)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    flags = (*SGD, "--lr", "1e6", "--max-epoch", 3, "--save-interval-updates", 1, "--reset-optimizer")
    assert_fails(capsys, 1, "training diverges", *command_line(toy_databin, tmp_path, *flags))
    after = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert after["checkpoint1.pt"] == before["checkpoint1.pt"]
    for name in after:
        for tensor in load(tmp_path / name)["model"].values():
            assert tensor.isfinite().all()


# -- Admin: profile, train, resume


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """An empty working directory: the omega file's default place."""
    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def profile(databin: Path, directory: Path, *flags: object) -> bytes:
    train(databin, directory / "none", "--init-type", "adaptive-profiling", *flags)
    return Path("profile.ratio.init").read_bytes()


def test_profile_depends_on_seed_and_model_alone(toy_databin, tmp_path, cwd):
    first = profile(toy_databin, tmp_path)
    assert [path.name for path in cwd.iterdir()] == ["profile.ratio.init"]
    assert files(tmp_path / "none") == set()  # nothing is trained
    for flags in (
        (),
        ("--bf16",),
        ("--update-freq", 3),
        ("--distributed-world-size", 2),
        (*SGD[:2], "--lr", 7, "--lr-scheduler", "fixed"),
        ("--max-epoch", 5, "--sentence-avg", "--clip-norm", 1),
    ):
        assert profile(toy_databin, tmp_path, *flags) == first, flags
    assert profile(toy_databin, tmp_path, "--seed", 2) != first
    assert profile(toy_databin, tmp_path, "--dropout", 0) != first


def test_failed_profile_leaves_the_old_file(toy_databin, tmp_path, cwd, capsys):
    first = profile(toy_databin, tmp_path)
    flags = ("--init-type", "adaptive-profiling", "--train-subset", "nowhere")
    assert_fails(capsys, 1, "nowhere", *command_line(toy_databin, tmp_path, *flags))
    assert Path("profile.ratio.init").read_bytes() == first


def test_admin_checkpoint_is_complete(toy_databin, tmp_path, cwd, capsys):
    profile(toy_databin, tmp_path)
    flags = ("--init-type", "adaptive")
    whole = train(toy_databin, tmp_path / "whole", *flags, "--max-update", 9)
    assert Path("profile.ratio.init").stat().st_size > 0
    parts = train(toy_databin, tmp_path / "parts", *flags, "--max-update", 4)
    Path("profile.ratio.init").unlink()
    parts += train(toy_databin, tmp_path / "parts", *flags, "--max-update", 9)
    assert updates(parts) == updates(whole)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert last(tmp_path / "parts")["extra_state"]["omega"] == last(tmp_path / "whole")["extra_state"]["omega"]
    omega = last(tmp_path / "parts")["model"]["decoder.layers.0.encoder_ratio_change"]
    assert omega.unique().numel() > 1  # it is trained
    path = tmp_path / "parts" / "checkpoint_last.pt"
    generate.main([str(toy_databin), "--path", str(path), "--cpu", "--gen-subset", "valid", "--num-workers", "0"])
    assert "BLEU" in capsys.readouterr().out


def test_omega_is_what_training_starts_from(toy_databin, tmp_path, cwd):
    profile(toy_databin, tmp_path)
    values = [line.split()[1] for line in Path("profile.ratio.init").read_text().splitlines() if line[0] != "#"]
    flags = ("--init-type", "adaptive", "--lr", 0, "--max-update", 1)
    train(toy_databin, tmp_path / "run", *flags)
    model = last(tmp_path / "run")["model"]
    names = ["encoder.layers.0.attention_ratio_change", "encoder.layers.0.fc_ratio_change"]
    names += [f"decoder.layers.0.{kind}_ratio_change" for kind in ("self", "encoder", "fc")]
    for name, value in zip(names, values, strict=True):
        assert (model[name] == float(value)).all()
    assert values[0] == values[2] == "1.0"


def test_adaptive_without_a_file_measures_first(toy_databin, tmp_path, cwd, caplog):
    """The file is that of a profiling run and the training that of two steps; a file that is there is used."""
    expected = profile(toy_databin, tmp_path)
    flags = ("--init-type", "adaptive", "--max-update", 3)
    two_steps = train(toy_databin, tmp_path / "two", *flags)
    Path("profile.ratio.init").unlink()
    one_step = train(toy_databin, tmp_path / "one", *flags)
    assert "no omega file profile.ratio.init: profiling first" in caplog.messages
    assert Path("profile.ratio.init").read_bytes() == expected
    assert updates(one_step) == updates(two_steps)
    assert_same_training(tmp_path / "one", tmp_path / "two")
    start = last(tmp_path / "one")["extra_state"]["omega"]
    caplog.clear()
    train(toy_databin, tmp_path / "other", *flags, "--seed", 2)
    assert "omega from profile.ratio.init" in caplog.messages
    assert last(tmp_path / "other")["extra_state"]["omega"] == start  # not what seed 2 would have measured


@pytest.mark.slow
def test_all_processes_start_from_the_omega_of_the_first(toy_databin, tmp_path, cwd):
    one = train(toy_databin, tmp_path / "one", "--init-type", "adaptive", "--update-freq", 2, "--max-update", 3)
    measured = Path("profile.ratio.init").read_bytes()
    Path("profile.ratio.init").unlink()
    flags = ("--init-type", "adaptive", "--distributed-world-size", 2, "--max-update", 3)
    two = train(toy_databin, tmp_path / "two", *flags)
    assert Path("profile.ratio.init").read_bytes() == measured
    assert [p.name for p in cwd.iterdir()] == ["profile.ratio.init"]
    assert updates(two).keys() == updates(one).keys()
    assert_same(last(tmp_path / "one")["model"], last(tmp_path / "two")["model"], atol=1e-5)


def omegas(content: bytes) -> list[float]:
    return [float(line.split()[1]) for line in content.decode().splitlines() if line[0] != "#"]


def test_profile_of_several_batches(toy_databin, tmp_path, cwd, caplog):
    first = omegas(profile(toy_databin, tmp_path))
    several = profile(toy_databin, tmp_path, "--profile-batches", 3)
    assert omegas(several) != first
    assert omegas(several) == pytest.approx(first, rel=0.2)  # of the same model and corpus
    assert b"batches=3" in several
    message = next(m for m in reversed(caplog.messages) if m.startswith("profiled 2 encoder and 3 decoder"))
    values = omegas(several)
    last_row = message.splitlines()[-1].split()
    assert last_row == ["3", f"{values[-1]:.4f}"]
    assert "wrote profile.ratio.init" in caplog.messages


def test_deterministic_profile(toy_databin, tmp_path, cwd):
    """Dropout is off: what it would have been plays no part, and a training with any dropout may start from it."""
    flags = ("--profile-deterministic", "--dropout")
    calm = profile(toy_databin, tmp_path, *flags, 0.4)
    assert calm == profile(toy_databin, tmp_path, *flags, 0.1)
    assert omegas(calm) == omegas(profile(toy_databin, tmp_path, "--dropout", 0, "--attention-dropout", 0))
    Path("profile.ratio.init").write_bytes(calm)
    train(toy_databin, tmp_path / "run", "--init-type", "adaptive", "--max-update", 1)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--init-type", "adaptive", "--profile-batches", 8), 1, "--profile-batches 8"),
        (("--init-type", "adaptive", "--profile-batches", 0), 2, "at least 1"),
        (("--init-type", "rezero", "--profile-batches", 2), 2, "--profile-batches does nothing with"),
        (("--profile-deterministic",), 2, "--profile-deterministic does nothing with --init-type default"),
        (("--init-type", "adaptive", "--output-change", "constant"), 2, "--output-change: a flag of --init-type adapt"),
        (("--init-type", "deepnet", "--omega", "constant"), 2, "--omega: a flag of --init-type adaptive-closed-form"),
    ],
)
def test_flags_of_other_init_types(toy_databin, tmp_path, cwd, capsys, flags, status, message):
    assert_fails(capsys, status, message, *command_line(toy_databin, tmp_path / "run", *flags, "--max-update", 1))
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected encoder and decoder"),
        ("1 1.0\n2 nan\n1 1.0\n2 1.1\n3 1.2\n", "line 2"),
        ("1 1.0\n2 x\n", "line 2"),
        ("1 1.0\n3 1.2\n", "line 2"),
        ("1 1.0\n2 1.1\n3 1.2\n1 1.0\n2 1.1\n3 1.2\n", "3 encoder sub-layers and the model 2"),
        ("# model: encoder_layers=9\n1 1.0\n2 1.1\n1 1.0\n2 1.1\n3 1.2\n", "encoder_layers=9"),
        ("# model: dropout=0.5\n1 1.0\n2 1.1\n1 1.0\n2 1.1\n3 1.2\n", "dropout=0.5, this model has 0.2"),
        ("1 0\n2 1.1\n1 1.0\n2 1.1\n3 1.2\n", "line 1: omega 0.0 is not a positive finite number"),
        ("\x00\xff", "line 1"),
    ],
    ids=["empty", "nan", "malformed", "order", "mismatch", "another model", "other dropout", "zero", "binary"],
)
def test_bad_omega_file(toy_databin, tmp_path, cwd, capsys, content, message):
    Path("omega").write_text(content)
    flags = ("--init-type", "adaptive", "--omega-file", "omega", "--max-update", 1)
    assert_fails(capsys, 1, message, *command_line(toy_databin, tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("flag", ["--encoder-normalize-before", "--decoder-normalize-before"])
@pytest.mark.parametrize("init_type", ["adaptive", "adaptive-profiling"])
def test_admin_is_for_post_ln(toy_databin, tmp_path, cwd, capsys, flag, init_type):
    flags = ("--init-type", init_type, flag, "--max-update", 1)
    assert_fails(capsys, 1, flag, *command_line(toy_databin, tmp_path / "run", *flags))
    assert not Path("profile.ratio.init").exists()
