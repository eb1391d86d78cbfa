"""``--ddp-backend fully_sharded``: the training of one process, in less memory a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fairseq.errors import FairseqError
from fairseq.training.sharding import gather, local, scatter_optimizer_state, shard, whole_parameters
from tests.test_activations import backward, deep_model
from tests.training_runs import (
    CAN_SHARD,
    SGD,
    assert_fails,
    assert_same,
    command_line,
    files,
    last,
    needs_sharding,
    train,
    updates,
)

SHARDED = ("--distributed-world-size", "2", "--ddp-backend", "fully_sharded")


def assert_same_losses(one: list[dict[str, float]], other: list[dict[str, float]], tolerance: float = 1.1e-3) -> None:
    a, b = updates(one), updates(other)
    assert a.keys() == b.keys()
    for number, line in a.items():
        for key, value in line.items():  # three digits are logged
            assert b[number][key] == pytest.approx(value, abs=tolerance, rel=1e-4), (number, key)


@needs_sharding
@pytest.mark.slow
def test_one_process_two_sharded_one_again(toy_databin, tmp_path):
    """Each resumes from the other's checkpoint, in the middle of an epoch too, and nothing tells them apart."""
    flags = ("--init-type", "adaptive", "--omega-file", tmp_path / "omega", "--clip-norm", 0.3, "--sentence-avg")
    freq = ("--update-freq", 2)
    expected = train(toy_databin, tmp_path / "one", *flags, *freq, "--max-update", 9)
    resumed = tmp_path / "resumed"
    lines = train(toy_databin, resumed, *flags, *freq, "--max-update", 3)
    lines += train(toy_databin, resumed, *flags, *SHARDED, "--max-update", 6)
    sharded = last(resumed)
    lines += train(toy_databin, resumed, *flags, *freq, "--max-update", 9)
    assert_same_losses(expected, lines)
    assert any(line["clip"] for line in updates(lines).values())
    for key in ("model", "last_optimizer_state"):
        assert_same(last(tmp_path / "one")[key], last(resumed)[key], atol=5e-5)
        assert sharded[key].keys() == last(resumed)[key].keys()
    assert files(resumed) == files(tmp_path / "one")


@needs_sharding
@pytest.mark.slow
def test_update_freq_bf16_checkpointing_and_bleu(toy_databin, tmp_path):
    """Four batches an update in one process, or two processes with two each, a dummy batch among them."""
    flags = (*SGD, "--init-type", "rezero_postln", "--bf16", "--max-epoch", 2, "--lr", 0.1, "--eval-bleu")
    flags += ("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric", "--keep-best-checkpoints", 1)
    flags += ("--eval-bleu-args", '{"beam": 2, "max_len_b": 12}', "--share-all-embeddings", "--max-tokens-valid", 90)
    expected = train(toy_databin, tmp_path / "one", *flags, "--update-freq", 4)
    lines = train(toy_databin, tmp_path / "two", *flags, *SHARDED, "--update-freq", 2, "--checkpoint-activations")
    assert_same_losses(expected, lines, tolerance=3e-3)
    assert_same(last(tmp_path / "one")["model"], last(tmp_path / "two")["model"], atol=1e-3)
    for key in ("valid_loss", "valid_bleu"):
        values = [[line[key] for line in part if key in line] for part in (expected, lines)]
        assert len(values[0]) == 2
        assert values[0] == pytest.approx(values[1], abs=0.01)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_adafactor_is_refused(toy_databin, tmp_path, capsys):
    argv = command_line(toy_databin, tmp_path, *SHARDED, "--optimizer", "adafactor")
    assert_fails(capsys, 2, "--optimizer adafactor needs whole matrices", *argv)


def _in_each(rank: int, directory: Path) -> None:
    """What one of two processes sees; written where the test reads it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=2)
    try:
        whole, model = deep_model("rezero"), deep_model("rezero")
        names = [name for name, _ in whole.named_parameters()]
        shard(model, torch.device("cpu"))
        parameters = list(model.parameters())
        expected, got = backward(whole), backward(model)
        assert names == [name for name, _ in model.named_parameters()]
        torch.testing.assert_close(expected["logits"], got["logits"])
        gradients = [p.grad for p in parameters]
        norm = torch.nn.utils.get_total_norm([local(g) for g in gradients]).square()
        dist.all_reduce(norm)
        reference = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
        torch.testing.assert_close(norm.sqrt(), reference)

        with whole_parameters(model):  # the second process runs more often than the first, and decodes
            model.eval()
            assert not any(hasattr(p, "to_local") for p in model.parameters())
            for _ in range(1 + rank):
                with torch.no_grad():
                    outputs = [m.eval()(torch.full((2, 3), 7), None, torch.full((2, 3), 9))[0] for m in (whole, model)]
                torch.testing.assert_close(*outputs)
                cache = model.decoder.new_cache(model.encoder(torch.full((2, 3), 7)))
                model.decoder.step(torch.tensor([9, 9]), cache)
        assert all(hasattr(p, "to_local") for p in model.parameters())

        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()
        state = gather(optimizer.state_dict(), keep=True)
        assert {name: part.shape for name, part in state["state"][0].items()}["exp_avg"] == parameters[0].shape
        own = optimizer.state_dict()["state"]
        again = scatter_optimizer_state(state, parameters)["state"]
        for index, entries in own.items():
            for name, value in entries.items():
                assert type(value) is type(again[index][name])
                torch.testing.assert_close(local(value), local(again[index][name]), rtol=0, atol=0)
        held = [tensor for p in parameters for tensor in (p, p.grad)]
        held += [value for entries in own.values() for key, value in entries.items() if key != "step"]
        torch.save((sum(local(t).numel() for t in held), sum(t.numel() for t in held)), directory / str(rank))
    finally:
        dist.destroy_process_group()


def test_a_torch_that_adds_gradients_up_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def refuses(mean, ones, op):
        raise RuntimeError("Cannot use ReduceOp.AVG")

    for behaviour in (refuses, lambda mean, ones, op: mean.fill_(2)):
        monkeypatch.setattr(dist, "reduce_scatter_tensor", behaviour)
        with pytest.raises(FairseqError, match="cannot average gradients"):
            shard(deep_model(), torch.device("cpu"))


@pytest.mark.slow
def test_in_each_process(tmp_path):
    """Gradients and their norm, computing with the whole, states gathered and divided again, and the memory held."""
    try:
        mp.spawn(_in_each, (tmp_path,), nprocs=2)
    except mp.ProcessRaisedException as error:
        if CAN_SHARD or "cannot average gradients on this device (cpu)" not in str(error):
            raise
        return
    (first, whole), (second, _) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first + second == whole
    assert max(first, second) < 0.52 * whole
