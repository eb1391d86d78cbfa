"""bf16, and fp16 with its loss scale; the latter on the CPU too, which the command line leaves to GPUs."""

from __future__ import annotations

import pytest
import torch

from fairseq.errors import FairseqError
from fairseq.options import TrainLogConfig
from fairseq.training.precision import ConvertedWeights, DynamicLossScaler, make_loss_scaler
from tests.toys import VOCAB, toy_model
from tests.training_runs import (
    SGD,
    assert_fails,
    assert_same,
    command_line,
    last,
    train,
    trainer_and_batches,
    updates,
)


def test_bf16_trains_near_float32(toy_databin, tmp_path):
    plain = updates(train(toy_databin, tmp_path / "float32", "--max-update", 20))
    mixed = updates(train(toy_databin, tmp_path / "bf16", "--max-update", 20, "--bf16"))
    assert mixed != plain
    assert mixed[20]["loss"] == pytest.approx(plain[20]["loss"], rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in last(tmp_path / "bf16")["model"].values())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_converted_together_are_those_of_autocast(tied):
    """The same loss and gradients, and nothing of it stays in the model."""
    found = []
    model = toy_model(share_all_embeddings=tied).float()
    src_tokens, tgt_tokens = torch.randint(4, VOCAB, (3, 5)), torch.randint(4, VOCAB, (3, 6))
    for called in (model, ConvertedWeights(model, model.decoder.output_projection)):
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = called(src_tokens=src_tokens, src_lengths=None, prev_output_tokens=tgt_tokens)
        logits.float().square().mean().backward()
        found.append({"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert all(isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 for p in model.parameters())


def test_fp16_on_the_cpu_is_refused(toy_databin, tmp_path, capsys):
    argv = command_line(toy_databin, tmp_path, "--fp16", "--max-update", 1)
    assert_fails(capsys, 2, "--fp16 needs a GPU", *argv)
    if not torch.cuda.is_available():
        assert_fails(capsys, 1, "--fp16 needs a GPU", *[flag for flag in argv if flag != "--cpu"])


def test_fp16_overflow_skips_the_update_and_lowers_the_scale(toy_databin):
    trainer, itr = trainer_and_batches(toy_databin, *SGD, "--fp16-init-scale", 2**30, fp16=True)
    before = [p.clone() for p in trainer.parameters]
    batches = itr.updates(1)
    first = next(batches)
    assert not trainer.train_step(first)
    assert trainer.scaler is not None
    assert trainer.scaler.scale == 2**29
    assert trainer.num_updates == 0
    assert trainer.take_stats()["updates"] == 0
    assert_same(before, trainer.parameters)
    while not trainer.train_step(first):
        assert trainer.scaler.scale >= 2**5
    plain, _ = trainer_and_batches(toy_databin, *SGD, "--fp16-init-scale", 1, fp16=True)
    plain.train_step(first)
    assert_same(plain.parameters, trainer.parameters, atol=1e-4)  # the scale leaves no trace in the update
    stats, expected = trainer.take_stats(), plain.take_stats()
    assert stats["gnorm"] == pytest.approx(expected["gnorm"], rel=1e-2)
    assert stats["loss"] == pytest.approx(expected["loss"])
    # the scaler's state goes with the optimiser's
    other, _ = trainer_and_batches(toy_databin, *SGD, fp16=True)
    other.load_optimizer_state(trainer.optimizer_state())
    assert other.scaler is not None
    assert other.scaler.state_dict() == trainer.scaler.state_dict()


def test_fp16_scale_grows_with_updates_that_are_done(toy_databin):
    trainer, itr = trainer_and_batches(toy_databin, *SGD, "--fp16-init-scale", 4, "--fp16-scale-window", 2, fp16=True)
    scales = []
    for micro_batches in itr.updates(1):
        assert trainer.train_step(micro_batches)
        assert trainer.scaler is not None
        scales.append(trainer.scaler.scale)
    assert scales == [4, 8, 8, 16, 16, 32, 32]


def test_fp16_without_a_way_down_ends(toy_databin):
    trainer, itr = trainer_and_batches(
        toy_databin, *SGD, "--fp16-init-scale", 2**30, "--min-loss-scale", 2**29, fp16=True
    )
    batch = next(itr.updates(1))
    assert not trainer.train_step(batch)
    with pytest.raises(FairseqError, match="--min-loss-scale"):
        trainer.train_step(batch)


def test_loss_scaler_by_hand():
    scaler = DynamicLossScaler(init_scale=8, scale_window=3)
    scales = []
    for overflow in (0, 0, 0, 0, 1, 0, 0, 0, 1, 1):
        scaler.update(bool(overflow))
        scales.append(scaler.scale)
    # doubled when the updates since the last overflow (the first one counts from -1) are a multiple of the window
    assert scales == [8, 8, 16, 16, 8, 8, 8, 16, 8, 4]
    fairseqs = DynamicLossScaler(init_scale=8, scale_window=3)
    fairseqs.load_state_dict({"scale": 32})  # all that its checkpoints have
    fairseqs.update(overflow=True)
    assert fairseqs.scale == 16


def test_loss_scaler_tolerates_a_share_of_overflows():
    scaler = DynamicLossScaler(init_scale=8, scale_window=100, tolerance=0.5)
    scales = []
    for overflow in (0, 0, 0, 1, 1, 1, 1, 0):
        scaler.update(bool(overflow))
        scales.append(scaler.scale)
    # overflows / updates since the last change, at the overflows: 1/4, 2/5, 3/6 (halved, counted anew), 1/1
    assert scales == [8, 8, 8, 8, 8, 4, 2, 2]


def test_shares_of_overflows_count_from_the_last_change():
    scaler = DynamicLossScaler(init_scale=8, scale_window=100, tolerance=0.5)
    for overflow in (0, 0, 0, 1, 1, 1, 0, 0, 0, 1):
        scaler.update(bool(overflow))
    assert scaler.scale == 4  # halved once, at 3/6; after that 1/4
    scaler = DynamicLossScaler(init_scale=8, scale_window=2, tolerance=0.5)
    scales = []
    for overflow in (0, 0, 0, 1):
        scaler.update(bool(overflow))
        scales.append(scaler.scale)
    assert scales == [8, 16, 16, 8]  # 1/2 since it was doubled


def test_loss_scaler_threshold_and_state():
    scaler = DynamicLossScaler(init_scale=4, scale_window=2, threshold=2)
    for _ in range(5):
        scaler.update(overflow=True)
    assert scaler.scale == 2
    other = DynamicLossScaler(scale_window=2, threshold=2)
    other.load_state_dict(scaler.state_dict())
    for overflow in (False, False, True, False, False, False):
        scaler.update(overflow)
        other.update(overflow)
        assert scaler.state_dict() == other.state_dict()


def test_loss_scaler_of_the_flags():
    """The default window is fairseq's: 2^14 micro-batches of all processes, at least one update."""
    assert [make_loss_scaler(TrainLogConfig(), n).scale_window for n in (1, 8, 2**15)] == [2**14, 2**11, 1]
    flags = {"fp16_init_scale": 16, "fp16_scale_tolerance": 0.25, "min_loss_scale": 0.5, "threshold_loss_scale": 2.0}
    scaler = make_loss_scaler(TrainLogConfig(fp16_scale_window=5, **flags), 8)
    assert (scaler.scale, scaler.scale_window, scaler.tolerance) == (16, 5, 0.25)
    assert (scaler.min_scale, scaler.threshold) == (0.5, 2.0)
