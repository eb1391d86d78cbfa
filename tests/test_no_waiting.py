"""An update waits for no GPU: run on torch's device without data, ``meta``, where our code takes a GPU's branches.

A result that the host would have to read (``.item()``, a branch on a tensor, a shape that depends on values) is not
there and raises, and so does a tensor on another device. Not noticed: a copy from the host's pageable memory, and a
kernel that waits by itself. Not possible there: autocast; `tests/test_capture.py` has that on the CPU. With a GPU,
`tests/test_cuda.py` has torch watch for both.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from fairseq.options import parse_train_args
from fairseq.registry import RESIDUAL_RULES
from fairseq.training import trainer as trainer_module
from fairseq.training.distributed import World
from fairseq.training.train import build_model
from fairseq.training.trainer import Trainer
from tests.training_runs import SMOOTHED, TINY

META = torch.device("meta")
ROWS, SRC, TGT, VOCAB = 4, 7, 6, 32


def _batch():
    source, target = torch.full((ROWS, SRC), 5, device=META), torch.full((ROWS, TGT), 5, device=META)
    net_input = {"src_tokens": source, "src_lengths": source[:, 0], "prev_output_tokens": target}
    return {"id": source[:, 0], "nsentences": ROWS, "ntokens": ROWS * TGT, "net_input": net_input, "target": target}


def _trainer(monkeypatch, *flags):
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(trainer_module, "on_its_way_to_host", lambda outcome: lambda: [0.0, 1.0, 1.0, 1.0])
    criterion = () if "--criterion" in flags else SMOOTHED
    args = parse_train_args(["data", *TINY, *criterion, "--clip-norm", "1", "--weight-decay", "0.1", *flags])
    trainer = Trainer(args, build_model(args, VOCAB, VOCAB), World(0, 1, META))
    trainer.optimizer.complete_state()
    return trainer


FLAGS = [
    *(("--init-type", name) for name in RESIDUAL_RULES.names() if name != "adaptive-profiling"),
    ("--encoder-normalize-before", "--decoder-normalize-before"),
    ("--share-all-embeddings", "--encoder-learned-pos", "--decoder-learned-pos", "--layernorm-embedding"),
    ("--criterion", "cross_entropy", "--sentence-avg"),
    ("--optimizer", "radam"),
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_eager_update_waits_for_nothing(monkeypatch, flags):
    trainer = _trainer(monkeypatch, *flags)
    for _ in range(2):
        assert trainer.train_step([_batch(), _batch()])
    assert trainer.num_updates == 2
    assert all(parameter.grad.device == META for parameter in trainer.parameters)


@pytest.mark.parametrize("flags", FLAGS[-2:], ids=" ".join)
def test_what_a_graph_records_waits_for_nothing(monkeypatch, flags):
    kernels = []
    # torch has no version without data of the kernel that takes the step size from the device
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **settings: kernels.append((args, settings)))
    trainer = _trainer(monkeypatch, *flags)
    trainer.optimizer.set_next(0.1)
    trainer.optimizer.set_next(0.1, 0.2)
    sums, batch = trainer.new_sums(), _batch()
    for _ in range(2):
        loss, nll = trainer.losses(batch)
        trainer.backpropagate(batch, loss, nll, sums)
    trainer.update_parameters(sums)
    assert loss.device == trainer.outcome.device == META
    [(tensors, settings)] = kernels
    assert len(tensors[0]) == len(trainer.parameters)
    assert {tensor.device for group in tensors for tensor in group} == {META}
    assert settings["lr"].device == settings["found_inf"].device == META


def test_reading_back_is_noticed(monkeypatch):
    trainer = _trainer(monkeypatch)
    losses = trainer.losses

    def reads(batch):
        loss, nll = losses(batch)
        return loss * float(loss.detach()), nll

    trainer.losses = reads
    with pytest.raises(RuntimeError, match="meta tensors"):
        trainer.train_step([_batch()])


def test_another_device_is_noticed(monkeypatch):
    trainer = _trainer(monkeypatch)
    batch = _batch()
    batch["net_input"]["src_tokens"] = torch.full((ROWS, SRC), 5)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"device|meta"):
        trainer.model(**batch["net_input"])
