"""Validation: the same loss from training, from ``fairseq-validate`` and by hand; BLEU as ``fairseq-generate``'s."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from fairseq.checkpoint import load_checkpoint, load_model
from fairseq.cli import generate, validate
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fairseq.generation.history import Hypothesis
from fairseq.generation.translate import Translation
from fairseq.training import validation
from tests.training_runs import assert_fails, command_line, last, logged, train, write_databin

LAST = "checkpoint_last.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A data-bin of three words, on which BLEU soon is above 0, a run on it, and what that logged."""
    databin = write_databin(tmp_path_factory.mktemp("data") / "bin", 100, seed=1, words=3)
    directory = tmp_path_factory.mktemp("run")
    flags = ("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 15}', "--eval-tokenized-bleu")
    lines = train(databin, directory, "--max-epoch", 12, "--lr", 0.02, "--batch-size-valid", 7, *flags)
    return databin, directory, lines


@pytest.fixture
def measured(caplog, trained):
    """Run ``fairseq-validate`` on the run's last checkpoint; returns its statistics, by subset."""

    def run(*flags: object) -> dict[str, dict[str, Any]]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            argv = [
                trained[0],
                "--path",
                trained[1] / LAST,
                "--cpu",
                "--num-workers",
                0,
                "--log-format",
                "json",
                *flags,
            ]
            validate.main([*map(str, argv)])
        return {record.name: json.loads(record.message) for record in caplog.records if record.message[0] == "{"}

    return run


def sums_by_hand(databin: Path, path: Path, subset: str) -> dict[str, float]:
    """Loss (0.1) and nll in nats, tokens and sentences, in float64, one sentence at a time."""
    model = load_model(path).double()
    sides = [IndexedDataset(databin / f"{subset}.xx-yy.{language}") for language in ("xx", "yy")]
    sums = {"loss": 0.0, "nll_loss": 0.0, "ntokens": 0, "nsentences": len(sides[0])}
    for i in range(len(sides[0])):
        src, tgt = (torch.from_numpy(side[i].astype("int64"))[None] for side in sides)
        with torch.no_grad():
            log_probs = model(src, None, torch.cat([tgt[:, -1:], tgt[:, :-1]], 1))[0].log_softmax(-1)
        nll = -log_probs.gather(-1, tgt[..., None]).sum().item()
        sums["loss"] += 0.9 * nll + 0.1 * -log_probs.mean(-1).sum().item()
        sums["nll_loss"] += nll
        sums["ntokens"] += tgt.numel()
    return sums


def test_loss_is_the_same_everywhere(trained, measured):
    databin, directory, lines = trained
    sums = sums_by_hand(databin, directory / LAST, "valid")
    loss, nll = (sums[key] / sums["ntokens"] / math.log(2) for key in ("loss", "nll_loss"))
    (found,) = measured("--batch-size", 3).values()
    training = [line for line in lines if "valid_loss" in line][-1]
    for stats in (found, training):
        assert stats["valid_loss"] == pytest.approx(loss, abs=6e-4)
        assert stats["valid_nll_loss"] == pytest.approx(nll, abs=6e-4)
        assert stats["valid_ppl"] == pytest.approx(2**nll, abs=6e-3)
    assert last(directory)["extra_state"]["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert found["valid_num_updates"] == training["valid_num_updates"]
    for stats, batches in ((found, 7), (training, 3)):  # of 20 sentences: by 3, and as --batch-size-valid says
        assert stats["valid_bsz"] == pytest.approx(20 / batches, abs=0.06)
        assert stats["valid_wpb"] == pytest.approx(sums["ntokens"] / batches, abs=0.06)
    assert "epoch" not in found


def test_several_subsets(trained, measured):
    databin, directory, _ = trained
    stats = measured("--valid-subset", "train,valid")
    assert list(stats) == ["train", "valid"]
    sums = sums_by_hand(databin, directory / LAST, "train")
    assert stats["train"]["train_loss"] == pytest.approx(sums["loss"] / sums["ntokens"] / math.log(2), abs=6e-4)


def test_the_first_subset_decides_what_is_best(toy_databin, tmp_path, monkeypatch):
    losses = iter((math.nan, 1.0, 3.0, 2.0))
    monkeypatch.setattr(validation.Validator, "measure", lambda *_: {"loss": next(losses)})
    flags = ("--max-update", 2, "--validate-interval-updates", 1, "--valid-subset", "valid,test")
    lines = train(toy_databin, tmp_path, *flags)
    assert [line["valid_best_loss"] for line in lines if "valid_loss" in line] == ["nan", 3]
    assert [line.get("test_best_loss") for line in lines if "test_loss" in line] == [None, None]
    assert load_checkpoint(tmp_path / "checkpoint_best.pt")["extra_state"]["val_loss"] == 3


def test_sentence_avg_divides_the_loss_by_sentences(toy_databin, tmp_path):
    lines = train(toy_databin, tmp_path, "--max-update", 1, "--sentence-avg")
    sums = sums_by_hand(toy_databin, tmp_path / LAST, "valid")
    [stats] = [line for line in lines if "valid_loss" in line]
    assert stats["valid_loss"] == pytest.approx(sums["loss"] / sums["nsentences"] / math.log(2), rel=1e-4)
    assert stats["valid_nll_loss"] == pytest.approx(sums["nll_loss"] / sums["ntokens"] / math.log(2), abs=6e-4)


def test_bleu_is_that_of_generate(trained, measured, capsys):
    databin, directory, lines = trained
    flags = ("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 15}', "--eval-tokenized-bleu")
    bleu = measured(*flags)["valid"]["valid_bleu"]
    assert bleu > 0
    assert [line["valid_bleu"] for line in lines if "valid_bleu" in line][-1] == bleu
    argv = [databin, "--path", directory / LAST, "--gen-subset", "valid", "--beam", 2, "--max-len-b", 15, "--cpu"]
    generate.main([*map(str, argv), "--quiet", "--num-workers", "0"])
    match = re.search(r"BLEU4 = ([\d.]+)", capsys.readouterr().out)
    assert match
    assert bleu == float(match[1])


def test_an_unknown_word_is_one_word_and_never_right(measured, monkeypatch):
    """As in fairseq, where --eval-bleu has a word of its own for it in references and in hypotheses."""
    tokens = torch.tensor([3, 4, 5, 6, 4, 5, 2])
    found = Translation(0, tokens, tokens, [Hypothesis(tokens, 0.0, torch.zeros(7))])
    monkeypatch.setattr(validation, "translate_dataset", lambda *_, **__: [found])
    expected = sacrebleu.corpus_bleu(["hyp w00 w01 w02 w00 w01"], [["ref w00 w01 w02 w00 w01"]]).score
    for more in ((), ("--eval-tokenized-bleu",)):
        assert measured("--eval-bleu", *more)["valid"]["valid_bleu"] == pytest.approx(expected, abs=0.01)


def test_further_validation_sets_are_named(tmp_path, caplog):
    databin = write_databin(tmp_path / "bin", 20, seed=3, held_out={"valid": 3, "valid1": 3, "valid2": 3})
    for subsets, left_out in (("valid", "valid1, valid2"), ("valid2,valid", "valid1"), ("valid,valid1,valid2", "")):
        caplog.clear()
        train(databin, tmp_path / "run", "--max-update", 1, "--no-save", "--valid-subset", subsets)
        assert [message for message in caplog.messages if "not validated on" in message] == (
            [f"not validated on: {left_out}; --valid-subset {subsets},{left_out.replace(' ', '')} does"]
            if left_out
            else []
        )


def test_samples_and_subwords(trained, tmp_path):
    """--eval-bleu-print-samples, with subwords undone."""
    databin = tmp_path / "bin"
    write_databin(databin, 30, seed=2, words=3)
    for language in ("xx", "yy"):
        dictionary = Dictionary.build({"a@@": 9, "b": 8, "c@@": 7})
        dictionary.save(databin / f"dict.{language}.txt")
    flags = ("--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 9}', "--eval-bleu-remove-bpe", "subword_nmt")
    train(databin, tmp_path / "run", "--max-update", 1, *flags, "--eval-bleu-print-samples")
    log = (tmp_path / "run" / "log").read_text()
    match = re.search(r"example hypothesis: (.*)\n.* example reference: (.*)\n", log)
    assert match
    assert "@@" not in match[2].removesuffix("@@")
    train(databin, tmp_path / "quiet", "--max-update", 1, *flags)
    assert "example" not in (tmp_path / "quiet" / "log").read_text()


def test_options_of_validation_do_not_change_training(toy_databin, tmp_path):
    flags = ("--max-epoch", 2)
    train(toy_databin, tmp_path / "plain", *flags)
    more = ("--validate-interval-updates", 2, "--eval-bleu", "--valid-subset", "valid,test")
    search = '{"beam": 1, "sampling": true, "max_len_b": 9}'
    train(toy_databin, tmp_path / "more", *flags, *more, "--eval-bleu-args", search)
    for name, tensor in last(tmp_path / "plain")["model"].items():
        assert torch.equal(tensor, last(tmp_path / "more")["model"][name])
    subsets = {key for line in logged(tmp_path / "more") for key in line if key.endswith("_nll_loss")}
    assert subsets == {"train_nll_loss", "valid_nll_loss", "test_nll_loss"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--path", "nowhere.pt"), "nowhere.pt: no such file"),
        (("-s", "yy", "-t", "xx"), "translates xx-yy, not yy-xx"),
        (("--valid-subset", "nowhere"), "nowhere"),
        (("--eval-bleu", "--eval-bleu-args", '{"beem": 1}'), "beem"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors(trained, capsys, flags, message):
    argv = [trained[0], "--path", trained[1] / LAST, "--cpu", *flags]
    assert_fails(capsys, 1, message, *argv, main=validate.main)


@pytest.mark.parametrize(("path", "message"), [("", "--path FILE is missing"), ("a.pt:b.pt", "not an ensemble")])
def test_usage_errors(trained, capsys, path, message):
    assert_fails(capsys, 2, message, trained[0], "--path", path, main=validate.main)


def test_log_interval(trained, caplog):
    argv = [trained[0], "--path", trained[1] / LAST, "--cpu", "--batch-size", "8"]
    with caplog.at_level("INFO"):
        validate.main([*map(str, argv), "--no-progress-bar", "--log-interval", "2"])
    batches = [message for message in caplog.messages if message.startswith("valid: ")]
    assert batches == ["valid: 2 of 3 batches"]


def test_flags_of_training_are_refused(trained, capsys):
    argv = [trained[0], "--path", trained[1] / LAST, "--validate-interval", "2"]
    assert_fails(capsys, 2, "--validate-interval", *argv, main=validate.main)


def test_resuming_the_other_direction_is_refused(trained, capsys, tmp_path):
    flags = ("-s", "yy", "-t", "xx", "--restore-file", trained[1] / LAST, "--max-epoch", 9)
    assert_fails(capsys, 1, "translates xx-yy, not yy-xx", *command_line(trained[0], tmp_path, *flags))


def test_sentences_longer_than_the_model_reads(trained, capsys, tmp_path):
    """The checkpoint's limits count, not the flags' defaults."""
    databin = trained[0]
    flags = ("--max-source-positions", 8, "--max-target-positions", 8, "--skip-invalid-size-inputs-valid-test")
    train(databin, tmp_path, "--max-update", 1, *flags)
    argv = [databin, "--path", tmp_path / LAST, "--cpu", "--num-workers", "0"]
    assert_fails(capsys, 1, "--max-source-positions 8", *argv, main=validate.main)
    validate.main([*map(str, argv), "--skip-invalid-size-inputs-valid-test"])


def test_fairseqs_own_validation_loss(shared, tmp_path, caplog):
    """A 0.12 checkpoint says what its validation loss was; fairseq had dropped the 6 longest of 1,014 sentences."""
    reference, databin = shared / "reference", shared / "reference" / "multi30k-databin"
    sides = {language: IndexedDataset(databin / f"valid.en-de.{language}") for language in ("en", "de")}
    kept = np.lexsort((sides["de"].sizes, sides["en"].sizes))[:1008]
    for language, side in sides.items():
        shutil.copy(databin / f"dict.{language}.txt", tmp_path)
        with IndexedDatasetWriter(tmp_path / f"valid.en-de.{language}", np.uint16) as writer:
            for i in kept:
                writer.add(side[i])
    argv = [tmp_path, "--path", reference / "fairseq012_tiny.pt", "--cpu", "--num-workers", 0, "--log-format", "json"]
    with caplog.at_level(logging.INFO):
        validate.main([*map(str, argv)])
    (stats,) = [json.loads(record.message) for record in caplog.records if record.message[0] == "{"]
    said = load_checkpoint(reference / "fairseq012_tiny.pt")["extra_state"]["val_loss"]
    assert said == 4.613
    assert stats["valid_loss"] == said
    assert stats["valid_num_updates"] == 1440
