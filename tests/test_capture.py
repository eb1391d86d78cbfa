"""``--cuda-graphs`` without a GPU: a tape in a graph's place repeats the update's operations on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.criterions import cross_entropy
from fairseq.errors import FairseqError
from fairseq.options import parse_train_args
from fairseq.training import validation
from fairseq.training.capture import UpdateGraphs, _obstacle, uses_graphs
from fairseq.training.distributed import World
from tests.tape import TapeRecorder
from tests.training_runs import batches_of_shapes, command_line, endless_updates, train, trainer_and_batches

FLAGS = ("--clip-norm", 2.0, "--weight-decay", 0.01)


@pytest.fixture(autouse=True)
def _all_rows(monkeypatch):
    """The loss as on a GPU, where padding stays in."""
    monkeypatch.setattr(cross_entropy, "without_padding", lambda features, target, padding_idx: (features, target))


def _trainer(databin, *flags, graphs=True, lazy=True, **settings):
    """A trainer, the recorder of its graphs, batches without end. lazy: it looks at outcomes late, as on a GPU."""
    trainer, _ = trainer_and_batches(databin, *FLAGS, *flags, **settings)
    trainer._check_every_update = trainer._check_every_update and not (lazy and trainer.scaler is None)
    recorder = TapeRecorder()
    if graphs:
        trainer.graphs = UpdateGraphs(trainer, recorder)
    return trainer, recorder, endless_updates(trainer, batches_of_shapes(databin, 3, 250))


def _run(trainer, batches, count, change=lambda trainer, update: None):
    lines = []
    for update in range(count):
        change(trainer, update)
        trainer.train_step(next(batches))
        if update % 7 == 6:
            lines.append(trainer.take_stats() | {"lr": trainer.lr, "num_updates": trainer.num_updates})
    return [*lines, trainer.take_stats()]


def _agree(one, other, rel=1e-4):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=rel, nan_ok=True)


def _tensors(trainer):
    return {**trainer.model.state_dict(), **dict(trainer.named_optimizer_state())}


CASES = [
    (30, ()),
    (14, ("--update-freq", 2)),
    (14, ("--update-freq", 3, "--sentence-avg", "--lr-scheduler", "polynomial_decay", "--total-num-update", 20)),
    (14, ("--bf16",)),
    (14, ("--optimizer", "radam", "--adam-betas", "(0.9,0.98)")),
    *((14, ("--init-type", name)) for name in ("adaptive", "rezero", "deepnet", "subln", "b2t", "looklinear")),
    (14, ("--encoder-normalize-before", "--decoder-normalize-before", "--share-all-embeddings")),
    (14, ("--criterion", "cross_entropy")),
]


@pytest.mark.parametrize(("count", "flags"), CASES, ids=[f"{n} {' '.join(map(str, flags))}" for n, flags in CASES])
def test_repeated_updates_are_the_eager_ones(toy_databin, count, flags):
    eager, _, batches = _trainer(toy_databin, *flags, graphs=False)
    expected = _run(eager, batches, count)
    trainer, recorder, batches = _trainer(toy_databin, *flags)
    _agree(_run(trainer, batches, count), expected)
    assert recorder.repeated > count // 2
    assert recorder.recorded <= 8
    assert all(parameter.grad is None for parameter in trainer.parameters)
    rel = 2e-2 if "--bf16" in flags else 1e-3
    for name, tensor in _tensors(eager).items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding, which Adam magnifies
            torch.testing.assert_close(_tensors(trainer)[name], tensor, rtol=rel, atol=rel, msg=name)


@pytest.mark.slow
def test_two_hundred_updates(toy_databin):
    flags = ("--dropout", 0, "--attention-dropout", 0, "--lr", 1e-3)
    eager, _, batches = _trainer(toy_databin, *flags, graphs=False)
    expected = _run(eager, batches, 200)
    trainer, recorder, batches = _trainer(toy_databin, *flags)
    _agree(_run(trainer, batches, 200), expected)
    assert recorder.repeated >= 190


def _warnings(caplog):
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def _poison(updates):
    """Make the loss of some updates infinite, by a parameter that all batches need, and mend it after."""

    def change(trainer, update):
        weight = trainer.model.encoder.layers[0].self_attn.out_proj.bias
        with torch.no_grad():
            if update in updates:
                trainer.kept = weight.clone() if update - 1 not in updates else trainer.kept
                weight.fill_(float("inf"))
            elif update - 1 in updates:
                weight.copy_(trainer.kept)

    return change


@pytest.mark.parametrize("flags", [(), ("--update-freq", 2), ("--optimizer", "radam", "--adam-betas", "(0.9,0.98)")])
@pytest.mark.parametrize("lazy", [True, False])
def test_skipped_updates(toy_databin, flags, lazy, caplog):
    bad = {9, 10, 17, 19, 24}  # those of 17 and 19 are no two in a row
    eager, _, batches = _trainer(toy_databin, *flags, graphs=False, lazy=False)
    expected = _run(eager, batches, 28, _poison(bad))
    said = [record.message for record in caplog.records if "skipped" in record.message]
    caplog.clear()
    trainer, _, batches = _trainer(toy_databin, *flags, lazy=lazy)
    result = _run(trainer, batches, 28, _poison(bad))
    for line in (*expected, *result):  # says the rate of the update after the one just done, known late
        line.pop("lr", None)
        line.pop("num_updates", None)
    _agree(result, expected)
    assert sum(line["skipped"] for line in result) == 5
    assert (trainer.num_updates, trainer.skipped.count, trainer.optimizer._updates) == (23, 5, 23)
    assert [record.message for record in caplog.records if "skipped" in record.message] == said
    for name, tensor in _tensors(eager).items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(_tensors(trainer)[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_divergence_is_explained(toy_databin):
    trainer, _, batches = _trainer(toy_databin, "--max-nonfinite-updates", 1, lazy=False)
    with pytest.raises(
        FairseqError, match=r"update 16.*parameter encoder.layers.0.self_attn.out_proj.bias is not finite"
    ):
        _run(trainer, batches, 20, _poison({15}))


def test_gradient_that_breaks_is_named_after_a_graph(toy_databin):
    trainer, recorder, batches = _trainer(toy_databin, "--max-nonfinite-updates", 1, lazy=False)
    _run(trainer, batches, 14)
    assert recorder.repeated
    real, weight = trainer.losses, trainer.model.decoder.layers[0].feed_forward.fc1.weight
    handle = weight.register_hook(lambda grad: grad * float("inf"))
    trainer.graphs._graphs.clear()  # recorded anew, with what breaks
    with pytest.raises(FairseqError, match=r"the first gradient that is not.*decoder.layers.0.feed_forward.fc1.weight"):
        _run(trainer, batches, 2)
    handle.remove()
    assert trainer.losses == real


def test_fp16_scale_is_seen_by_graphs(toy_databin):
    """Its first updates all overflow, so that the first graph is recorded before any update has counted."""
    runs = []
    for graphs in (False, True):
        flags = ("--dropout", 0, "--attention-dropout", 0, "--lr", 1e-3)
        flags += ("--fp16-init-scale", 2**22, "--fp16-scale-window", 6)
        trainer, recorder, batches = _trainer(toy_databin, *flags, graphs=graphs, fp16=True)
        scales = []
        lines = _run(trainer, batches, 28, lambda trainer, _, scales=scales: scales.append(trainer.scaler.scale))
        runs.append((lines, scales))
    assert recorder.repeated > 18
    assert scales == runs[0][1]
    assert scales[6] < scales[0]
    assert any(after > before for before, after in itertools.pairwise(scales))
    _agree(*(lines for lines, _ in runs), rel=1e-3)


def test_resuming_is_exact(toy_databin, tmp_path, monkeypatch):
    """Runs that stop and go on, by the real command, with graphs from the third update on."""
    monkeypatch.setattr("fairseq.training.trainer.with_graphs", lambda trainer: UpdateGraphs(trainer, TapeRecorder()))
    flags = ("--cuda-graphs", "--batch-shapes", 2, "--max-tokens", 250, "--no-epoch-checkpoints", *FLAGS)
    whole = train(toy_databin, tmp_path / "whole", *flags, "--max-update", 16)
    train(toy_databin, tmp_path / "parts", *flags, "--max-update", 9)
    rest = train(toy_databin, tmp_path / "parts", *flags, "--max-update", 16)
    losses = [{line["num_updates"]: line["loss"] for line in lines if "update" in line} for lines in (whole, rest)]
    assert losses[1].keys() == set(range(10, 17))
    for update, loss in losses[1].items():
        assert loss == pytest.approx(losses[0][update], rel=1e-5)


def test_failing_recording_is_said_once_and_changes_nothing(toy_databin, caplog):
    eager, _, batches = _trainer(toy_databin, graphs=False)
    expected = _run(eager, batches, 14)
    trainer, recorder, batches = _trainer(toy_databin)
    recorder.failures = [RuntimeError("operation not permitted when stream is capturing\nmore")]
    with caplog.at_level(logging.WARNING):
        assert _run(trainer, batches, 14) == expected
    assert [record.message for record in _warnings(caplog)] == [
        "--cuda-graphs failed, going on without: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert (recorder.given_up, recorder.repeated) == (1, 0)


def test_a_shape_without_memory_goes_on_without(toy_databin, caplog):
    trainer, recorder, batches = _trainer(toy_databin)
    recorder.failures = [torch.OutOfMemoryError("CUDA out of memory")]
    with caplog.at_level(logging.WARNING):
        _run(trainer, batches, 20)
    assert [record.message.partition(" for ")[0] for record in _warnings(caplog)] == ["--cuda-graphs: out of memory"]
    assert 0 < recorder.repeated < 18
    assert recorder.given_up == 0  # the other graphs go on with the generator they know


@pytest.mark.parametrize("flags", [(), ("--update-freq", 2)], ids=str)
def test_a_graph_that_computes_something_else_is_noticed(toy_databin, caplog, flags):
    trainer, recorder, batches = _trainer(toy_databin, *flags)
    record = recorder.record

    def forgets_the_scale(work):
        repeat = record(work)

        def wrong():
            repeat()
            trainer.outcome[2] *= 1.1  # the gradient norm

        return wrong

    recorder.record = forgets_the_scale
    with caplog.at_level(logging.WARNING):
        _run(trainer, batches, 14)
    [message] = [record.message for record in _warnings(caplog)]
    assert re.match(r"--cuda-graphs: a recorded update has loss (\S+) .*, an ordinary one \1 and .*going on", message)
    assert trainer.num_updates == 14
    assert 0 < recorder.repeated <= 3


def test_each_graph_is_compared_once(toy_databin, monkeypatch):
    trainer, recorder, batches = _trainer(toy_databin)
    measured = []
    real = trainer.measure
    monkeypatch.setattr(trainer, "measure", lambda batches: measured.append(1) or real(batches))
    _run(trainer, batches, 20)
    assert len(measured) == recorder.recorded
    assert recorder.repeated > 10


def test_memory_that_graphs_hold_is_there_for_others(toy_databin, tmp_path, monkeypatch, caplog):
    """The first validation runs out of memory, and fits when the graphs are gone."""
    made = []
    monkeypatch.setattr(
        "fairseq.training.trainer.with_graphs",
        lambda trainer: made.append(UpdateGraphs(trainer, TapeRecorder())) or made[0],
    )
    losses = validation.batch_losses

    def runs_out(*args):
        if made[0]._graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(*args)

    monkeypatch.setattr(validation, "batch_losses", runs_out)
    flags = ("--batch-shapes", 2, "--max-tokens", 250, "--max-update", 12, "--validate-interval-updates", 8)
    lines = train(toy_databin, tmp_path, *flags)
    assert [line["valid_num_updates"] for line in lines if "valid_loss" in line] == [8, 12]
    assert "--cuda-graphs: memory is short; going on without" in caplog.messages


def test_a_batch_that_does_not_fit_beside_graphs_ends_them(toy_databin, caplog):
    trainer, _, batches = _trainer(toy_databin)
    _run(trainer, batches, 14)
    losses, failures = trainer.losses, [torch.OutOfMemoryError("CUDA out of memory")]

    def runs_out(batch):
        if failures and batch["target"].size(0) == 3:
            raise failures.pop()
        return losses(batch)

    trainer.losses = runs_out
    one = next(batches)[0]
    small = {**one, "net_input": {k: v[:3] for k, v in one["net_input"].items()}, "target": one["target"][:3]}
    with caplog.at_level(logging.WARNING):
        assert trainer.train_step([small])
        assert trainer.take_stats()["ooms"] == 0
        _run(trainer, batches, 7)
    assert [record.message for record in _warnings(caplog)] == ["--cuda-graphs: memory is short; going on without"]
    assert trainer.num_updates == 22


def test_a_criterion_that_reads_back_goes_on_without(toy_databin, caplog):
    trainer, recorder, batches = _trainer(toy_databin)
    criterion = cross_entropy.smoothed_nll

    def reads(logits, target):
        loss, nll = criterion(logits, target, 0.1, 1)
        return loss * (1.0 if loss.item() else 0.5), nll

    trainer.criterion = reads
    with caplog.at_level(logging.WARNING):
        _run(trainer, batches, 14)
    [message] = [record.message for record in _warnings(caplog)]
    assert message.startswith("--cuda-graphs failed, going on without: RuntimeError: operation not permitted")
    assert recorder.repeated == 0
    assert trainer.num_updates == 14


@pytest.mark.parametrize(
    ("flags", "reason"),
    [((), "training is not on a GPU"), (("--optimizer", "sgd"), "training is not on a GPU")],
)
def test_says_once_that_it_does_nothing(toy_databin, caplog, flags, reason):
    with caplog.at_level(logging.WARNING):
        trainer, _ = trainer_and_batches(toy_databin, "--cuda-graphs", *flags)
    assert [record.message for record in _warnings(caplog)] == [f"--cuda-graphs does nothing here: {reason}"]
    assert trainer.graphs is None


def test_on_where_nothing_is_in_the_way(toy_databin):
    gpu, cpu = (World(0, 1, torch.device(name)) for name in ("cuda:0", "cpu"))
    line = command_line(toy_databin, Path("unused"))
    assert uses_graphs(parse_train_args(line), gpu)
    assert not uses_graphs(parse_train_args([*line, "--no-cuda-graphs"]), gpu)
    assert not uses_graphs(parse_train_args([*line, "--optimizer", "sgd"]), gpu)
    assert not uses_graphs(parse_train_args(line), cpu)


def test_switches(toy_databin):
    line = command_line(toy_databin, Path("unused"), "--compile", "--cuda-graphs", "--no-compile")
    on, off = parse_train_args(line), parse_train_args([*line, "--no-cuda-graphs"])
    assert (on.compile, on.cuda_graphs, off.cuda_graphs) == (False, True, False)


def test_obstacles(toy_databin):
    def reason(*flags, size=1):
        trainer, _ = trainer_and_batches(toy_databin, *flags)
        trainer.world = dataclasses.replace(trainer.world, size=size, device=torch.device("cuda", 0))
        return _obstacle(trainer.args, trainer.world)

    assert reason() == ""
    assert reason("--optimizer", "adafactor") == "--optimizer adafactor cannot skip an update on the device"
    assert reason(size=2) == ""
    assert "--ddp-backend fully_sharded" in reason("--ddp-backend", "fully_sharded", size=2)
    assert reason("--checkpoint-activations") == "activations are checkpointed"


def test_more_shapes_than_graphs(toy_databin, monkeypatch):
    monkeypatch.setattr("fairseq.training.capture.MOST_GRAPHS", 1)
    trainer, recorder, batches = _trainer(toy_databin)
    _run(trainer, batches, 20)
    assert recorder.recorded == 1
    assert 0 < recorder.repeated < 18


def test_tape_notices_a_number_from_the_host():
    """The stand-in is worth something: it repeats what a number was, and restores what recording has changed."""
    x, step = torch.zeros(2), 1.0
    repeat = TapeRecorder().record(lambda: x.add_(step))
    assert x.tolist() == [0, 0]
    step = 5.0
    repeat()
    assert x.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="not permitted"):
        TapeRecorder().record(lambda: x[0].item())
    assert np.isfinite(x.numpy()).all()
