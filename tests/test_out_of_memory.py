"""Batches that do not fit into memory are left out; where nothing can be left out, one line says what did not fit."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq.cli import average, clinic, generate, interactive, preprocess, validate
from fairseq.cli import train as train_command
from fairseq.data.reading import describe_batch
from fairseq.errors import OutOfMemory, is_out_of_memory, out_of_memory_ends
from fairseq.hub import TransformerModel
from fairseq.optim.optimizers import Adam
from fairseq.training.divergence import ForwardTrace
from fairseq.training.out_of_memory import smallest_batch
from fairseq.training.trainer import Trainer
from fairseq.utils import safe_pickle
from tests.training_runs import (
    ROOT,
    TINY,
    assert_fails,
    assert_same,
    command_line,
    epoch_of_batches,
    files,
    last,
    logged,
    needs_sharding,
    run_updates,
    start,
    state_of,
    train,
    trainer_and_batches,
    write_databin,
)


def starve(module: nn.Module, calls: set[int], backward: bool = False) -> None:
    """Have ``module`` run out of memory in its ``calls``, from 1."""
    count = [0]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        count[0] += 1
        if count[0] in calls:
            if backward:
                output.register_hook(fail)
            else:
                fail()

    module.register_forward_hook(hook)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("expected scalar type Float but found Half"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as error_info:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error_info.value)
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))


def allocate_tensor() -> None:
    torch.empty(2**52, dtype=torch.uint8)


def allocate_array() -> None:
    np.empty(2**52, dtype=np.uint8)


def gpu_is_full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3 GiB")


@pytest.mark.parametrize(
    ("allocate", "size"),
    [(allocate_tensor, "4,294,967,296.0 MiB"), (allocate_array, "4.0 PiB"), (gpu_is_full, "2.0 GiB")],
)
def test_how_much_was_asked_for(allocate, size):
    with pytest.raises(OutOfMemory) as error_info, out_of_memory_ends("baking", "buy flour"):
        allocate()
    assert str(error_info.value) == f"out of memory ({size} more): baking; buy flour"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_batch_without_memory_is_left_out(toy_databin, caplog, backward):
    flags = ("--dropout", 0, "--attention-dropout", 0)
    trainer, itr = trainer_and_batches(toy_databin, *flags)
    starve(trainer.model.decoder.layers[0].feed_forward.fc1, {2}, backward)
    batches = epoch_of_batches(itr)[:3]
    assert run_updates(trainer, batches) == [True, False, True]
    clean, _ = trainer_and_batches(toy_databin, *flags)
    run_updates(clean, [batches[0], batches[2]])
    assert_same(state_of(trainer), state_of(clean))
    stats = trainer.take_stats()
    assert (stats["updates"], stats["ooms"], stats["skipped"]) == (2, 1, 1)
    assert "update 2 skipped: none of its batches fitted into memory" in caplog.messages
    assert trainer.skipped.in_a_row == 0
    where = "backward" if backward else "forward"
    assert f"out of memory in the {where} pass on {describe_batch(batches[1])}: left out" in caplog.text
    ids = ", ".join(map(str, batches[1]["id"][:10].tolist()))
    assert f"{len(batches[1]['id'])} sentences of up to" in caplog.text
    assert f"(sentences {ids}" in caplog.text


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_rest_of_an_update_counts(toy_databin, backward):
    """The second of three batches: its own gradients are left out, and in the backward pass those before it too."""
    flags = ("--dropout", 0, "--attention-dropout", 0)
    trainer, itr = trainer_and_batches(toy_databin, *flags)
    starve(trainer.model.encoder.layers[0].feed_forward.fc1, {2}, backward)
    batches = epoch_of_batches(itr)[:3]
    assert trainer.train_step(batches)
    clean, _ = trainer_and_batches(toy_databin, *flags)
    clean.train_step([batches[2]] if backward else [batches[0], batches[2]])
    assert_same(state_of(trainer), state_of(clean))
    assert trainer.take_stats()["ntokens"] == clean.take_stats()["ntokens"]


def test_too_many_batches_without_memory_end_training(toy_databin, tmp_path, capsys, monkeypatch, caplog):
    caplog.set_level("INFO")
    init = Trainer.__init__

    def starved(trainer: Trainer, *rest: Any) -> None:
        init(trainer, *rest)
        starve(trainer.model.encoder.layers[0], {1, *range(3, 99)})

    monkeypatch.setattr(Trainer, "__init__", starved)
    argv = command_line(toy_databin, tmp_path, "--max-epoch", 3, "--disable-validation")
    assert_fails(capsys, 1, ", the 10th batch in a row; lower --max-tokens, or take a smaller model", *argv)
    assert last(tmp_path)["optimizer_history"][-1]["num_updates"] == 1
    assert [line["train_ooms"] for line in logged(tmp_path) if "train_loss" in line] == [6]
    assert sum("left out" in message for message in caplog.messages) == 1 + 9  # one that fits begins the row anew


def test_other_errors_are_not_taken_for_it(toy_databin):
    trainer, itr = trainer_and_batches(toy_databin)

    def fail(*_: Any) -> None:
        raise RuntimeError("a matrix is too small")

    trainer.model.encoder.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a matrix is too small"):
        trainer.train_step(next(itr.updates(1)))
    assert trainer.take_stats()["ooms"] == 0


# -- where nothing can be left out


@pytest.fixture(scope="module")
def trained(toy_databin, tmp_path_factory) -> Path:
    """A directory with ``checkpoint_last.pt`` and a text ``text.xx``."""
    directory = tmp_path_factory.mktemp("trained")
    train(toy_databin, directory, "--max-update", 1)
    (directory / "text.xx").write_text("w01 w02\nw03\n")
    return directory


TRAIN = f"train BIN {shlex.join(TINY)} --save-dir out --max-epoch 1"
ADAPTIVE = "--init-type adaptive --omega-file out/omega"
TOY = "BIN --path checkpoint_last.pt --cpu"
CLINIC = "BIN --path checkpoint_last.pt --cpu --max-tokens 100 --out-dir out"
SIZE = r"[\d,]+ parameters on cpu"
SMALLER = "take a smaller model, or divide it among GPUs with --ddp-backend fully_sharded"
BATCH = r"on a batch of \d+ sentences of up to \d+ source and \d+ target tokens \(sentences [\d, .]+\)"
CASES = [  # what runs out of memory, the command, what it says
    ("training.train.Transformer", TRAIN, "making a model of architecture transformer; take a smaller one"),
    ("models.transformer.Transformer.to", TRAIN, f"placing {SIZE}; {SMALLER}"),
    (
        "optim.optimizers.Adam.step",
        TRAIN,
        f"the update of {SIZE}, for which adam keeps a state; lower --max-tokens, {SMALLER}",
    ),
    ("training.profiling.admin.profile", f"{TRAIN} {ADAPTIVE}", f"profiling on cpu, {BATCH}; lower --max-tokens"),
    ("training.validation.batch_losses", TRAIN, f"validating on 'valid', {BATCH}; lower --max-tokens-valid"),
    (
        "generation.beam_search.output_lengths",
        f"{TRAIN} --eval-bleu",
        f"--eval-bleu on 'valid', {BATCH}; lower --max-tokens-valid",
    ),
    (
        "training.checkpoint_manager.to_host",
        TRAIN,
        "copying the checkpoint; give --write-checkpoints-asynchronously False",
    ),
    ("checkpoint.torch.save", TRAIN, "writing out/checkpoint1.pt; close other programs, or take *"),
    (
        "utils.safe_pickle._read",
        f"{TRAIN} --restore-file ./checkpoint_last.pt",
        "reading checkpoint checkpoint_last.pt; *",
    ),
    ("training.train.EpochBatchIterator", TRAIN, "the work goes no further; *"),
    ("checkpoint.Transformer", f"generate {TOY}", "making the model of checkpoint checkpoint_last.pt; *"),
    (
        "models.transformer.Transformer.to",
        f"generate {TOY}",
        "placing checkpoint_last.pt on cpu; take a smaller model, or give --cpu",
    ),
    (
        "generation.beam_search.output_lengths",
        f"generate {TOY} --num-workers 0",
        f"translating 'test', {BATCH}; lower --max-tokens, --batch-size or --beam",
    ),
    (
        "generation.beam_search.output_lengths",
        f"interactive {TOY} --input text.xx",
        r"translating, on a batch of 1 sentences of up to 3 source tokens \(sentences 0\); lower *",
    ),
    (
        "training.validation.batch_losses",
        f"validate {TOY}",
        f"validating on 'valid', {BATCH}; lower --max-tokens-valid",
    ),
    (
        "clinic.gradients.gradient_norms",
        f"clinic gradients {CLINIC}",
        "fairseq-clinic gradients; lower *",
    ),
    ("cli.average.average_checkpoints", "average --inputs checkpoint_last.pt --output out.pt", "the work goes *"),
    ("data.preprocess._write", "preprocess -s xx --only-source --trainpref text --destdir out", "the work goes *"),
]
COMMANDS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (average, clinic, generate, interactive, preprocess, train_command, validate)
}


@pytest.mark.parametrize("failure", [gpu_is_full, allocate_array])
@pytest.mark.parametrize(("place", "line", "message"), CASES, ids=[f"{line.split()[0]}-{p}" for p, line, _ in CASES])
def test_one_line_says_what_did_not_fit(toy_databin, trained, capsys, monkeypatch, place, line, message, failure):
    monkeypatch.chdir(trained)
    shutil.rmtree("out", ignore_errors=True)
    before = files(trained)

    def fail(*_: Any, **__: Any) -> None:
        failure()

    monkeypatch.setattr(f"fairseq.{place}", fail)
    command, *argv = shlex.split(line.replace("BIN", str(toy_databin)))
    with pytest.raises(SystemExit) as exit_info:
        COMMANDS[command](argv)
    said = [text for text in capsys.readouterr().err.splitlines() if " | " not in text]  # log lines have a time
    assert exit_info.value.code == 1
    (error,) = said
    asked = r" \([\d.]+ [GP]iB more\)"
    assert re.fullmatch(f"error: out of memory{asked}: {message.replace('*', '.*')}", error), error
    assert files(trained) - {"out"} == before
    assert not Path("out").exists() or files(Path("out")) == set()


def test_a_checkpoint_without_memory_is_not_taken_for_a_damaged_one(toy_databin, tmp_path, capsys, monkeypatch):
    train(toy_databin, tmp_path, "--max-update", 1, "--save-interval-updates", 1)
    argv = command_line(toy_databin, tmp_path, "--max-update", 2, "--restore-fallback")
    monkeypatch.setattr(safe_pickle, "_read", lambda *_: gpu_is_full())
    assert_fails(capsys, 1, f"more): reading checkpoint {tmp_path}/checkpoint_last.pt; ", *argv)


def test_the_update_on_a_device_that_skips_by_itself(toy_databin, monkeypatch):
    trainer, itr = trainer_and_batches(toy_databin)
    trainer._check_every_update = False
    monkeypatch.setattr(Adam, "step_unless", lambda *_: gpu_is_full())
    with pytest.raises(OutOfMemory, match=r"the update of [\d,]+ parameters on cpu"):
        trainer.train_step([next(itr.updates(1))[0]])


def test_the_next_translation_works_again(trained, toy_databin, monkeypatch):
    model = TransformerModel.from_pretrained(trained, "checkpoint_last.pt", toy_databin)
    expected = model.translate("w01")
    with monkeypatch.context() as patch:
        patch.setattr("fairseq.generation.beam_search.output_lengths", lambda *_: gpu_is_full())
        with pytest.raises(OutOfMemory, match="translating, on a batch of 1 sentences of up to 2 source tokens"):
            model.translate("w01")
    assert model.translate("w01") == expected


def test_smallest_batch(toy_databin):
    trainer, itr = trainer_and_batches(toy_databin)
    for batch in epoch_of_batches(itr):
        small = smallest_batch(batch)
        assert trainer.train_step([small])
        assert small["net_input"]["src_tokens"].shape == small["target"].shape == (1, 1)
    assert trainer.take_stats()["skipped"] == 0


def test_compiled_layers_stay_compiled():
    from fairseq.training.compile import _Fallback

    class Layer(nn.Module):
        def _compiled(self, *_: Any) -> None:
            raise torch.OutOfMemoryError

    layer = Layer()
    layer._compiled_call_impl = layer._compiled  # type: ignore[assignment]
    with pytest.raises(torch.OutOfMemoryError):
        _Fallback(layer, [layer])()
    assert layer._compiled_call_impl is not None
    with ForwardTrace(layer):
        assert layer._compiled_call_impl is None  # compiled code runs no hooks
    assert layer._compiled_call_impl is not None


LIMITS = [  # of the address space, in sizes of the parameters, beyond the rest of the process
    (0.5, r"\([\d.]+ MiB more\): making a model of architecture transformer; take a smaller one"),
    (1.6, "in the (for|back)ward pass on a batch of .*, the 10th batch in a row; lower .*"),
    (3.5, r"\([\d.]+ MiB more\): the update of [\d,]+ parameters on cpu, for which adam keeps a state; lower .*"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space as Linux does")
def test_memory_that_is_really_not_there(tmp_path):
    """As ``ulimit -v`` does it: parameters take 256 MiB, gradients and each of Adam's two moments as much."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    size = "import fairseq.cli.train; print(open('/proc/self/statm').read().split()[0])"
    pages = subprocess.run([sys.executable, "-c", size], env=environment, capture_output=True, text=True).stdout
    databin = write_databin(tmp_path / "bin", 60, seed=0)
    flags = ("--encoder-ffn-embed-dim", 2**20, "--max-tokens", 15, "--max-epoch", 9)
    for share, message in LIMITS:
        limit = int(pages) * resource.getpagesize() + int(share * 2**28) + 100 * 2**20
        process = subprocess.run(
            [sys.executable, "-m", "fairseq.cli.train", *command_line(databin, tmp_path / "run", *flags)],
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit)),
        )
        assert process.returncode == 1, process.stderr
        assert re.fullmatch(f"error: out of memory {message}\n", process.stderr), process.stderr
        assert share != 1.6 or process.stdout.count(": left out; if this comes often") == 9
        assert files(tmp_path / "run") == set()


# -- out of memory in one process of several

USER_DIR = """
import os, torch
from fairseq.criterions.cross_entropy import SmoothedCrossEntropy
from fairseq.registry import CRITERIONS

class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("CUDA out of memory.")

@CRITERIONS.register("{name}")
def starved(config, padding_idx):
    calls = []
    criterion = SmoothedCrossEntropy(0.1, padding_idx)
    class Starved:
        def from_features(self, features, weight, target, grad_scale=1.0):
            calls.append(1)
            if len(calls) == {call} and os.environ.get("RANK", "0") == "{rank}":
                if {backward}:
                    features = _Backward.apply(features)
                else:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
            return criterion.from_features(features, weight, target, grad_scale)
        def __call__(self, logits, target):
            return criterion(logits, target)
    return Starved()
"""
TORCHRUN = ("torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")


def starved_criterion(directory: Path, name: str, rank: int, call: int, backward: bool = False) -> tuple[object, ...]:
    """Flags of a criterion that runs out of memory in its ``call`` on process ``rank``."""
    directory.mkdir()
    code = USER_DIR.format(name=name, rank=rank, call=call, backward=backward)
    (directory / "__init__.py").write_text(code)
    return "--user-dir", directory, "--criterion", name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("during", "more"),
    [("forward", ()), ("backward", ("--ddp-backend", "legacy_ddp"))],  # which waits for nobody in a backward pass
    ids=["forward", "backward"],
)
def test_one_process_without_memory_leaves_the_others_their_share(toy_databin, tmp_path, during, more):
    """Rank 1 loses its second batch: as one process with two batches an update that loses the same."""
    flags = ("--max-update", 4, "--dropout", 0, "--attention-dropout", 0, "--disable-validation")
    starved = starved_criterion(tmp_path / "a", f"starved_a_{during}", 1, 2, during == "backward")
    process = start(toy_databin, tmp_path / "two", *flags, *starved, *more, launcher=TORCHRUN)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"process 1 of 2: out of memory in the {during} pass on a batch of" in output
    starved = starved_criterion(tmp_path / "b", f"starved_b_{during}", 0, 4)
    train(toy_databin, tmp_path / "one", *flags, *starved, "--update-freq", 2)
    assert_same(last(tmp_path / "one")["model"], last(tmp_path / "two")["model"], atol=1e-5)
    for directory in ("one", "two"):
        lines = [line for line in logged(tmp_path / directory) if "update" in line]
        assert [line.get("ooms") for line in lines] == [None, 1, None, None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backward", "more"),
    [
        pytest.param("starved_c", True, (), id="backward"),
        pytest.param("starved_d", False, ("--ddp-backend", "fully_sharded"), id="sharded", marks=needs_sharding),
    ],
)
def test_what_several_processes_cannot_survive_ends_them(toy_databin, tmp_path, name, backward, more):
    starved = starved_criterion(tmp_path / "user", name, 1, 2, backward)
    process = start(toy_databin, tmp_path / "run", "--max-update", 4, *starved, *more, launcher=TORCHRUN)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: process 1 of 2: out of memory in the" in errors
    assert "the other processes cannot go on without it; lower --max-tokens" in errors
