"""``--compile``: the same losses, the same names, and a way on when the compiler fails."""

from __future__ import annotations

import logging

import pytest
import torch

from fairseq.training.compile import compile_layers
from tests.training_runs import RECIPE, train_updates, trainer_and_batches


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "count"), [(("--init-type", "adaptive"), 200), (("--init-type", "b2t", "--checkpoint-activations"), 4)]
)
def test_compiled_layers_train_the_same(toy_databin, flags, count):
    torch.compiler.reset()
    flags += (*RECIPE, "--encoder-layers", 2, "--decoder-layers", 2)
    trainer, batches = trainer_and_batches(toy_databin, *flags)
    names, expected = set(trainer.model.state_dict()), train_updates(trainer, batches, count)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainer, batches = trainer_and_batches(toy_databin, *flags, "--compile")
    losses = train_updates(trainer, batches, count)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert losses == pytest.approx(expected, rel=1e-5)
    assert set(trainer.model.state_dict()) == names
    assert 2 <= graphs <= 4  # not one a layer and shape


def test_a_failing_compiler_is_said_once(caplog):
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    x = torch.ones(1, 2)
    expected = [layer(x) for layer in layers]
    compile_layers(layers)

    def fail(*args):
        raise RuntimeError("no compiler found\nand more")

    for layer in layers:
        layer._compiled_call_impl._compiled = fail
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert [record.message for record in caplog.records] == [
        "--compile failed, going on without: RuntimeError: no compiler found"
    ]
