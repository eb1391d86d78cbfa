"""``--compile``: the same losses, the same names, and a way on when the compiler fails."""

from __future__ import annotations

import logging

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

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


def test_a_backward_pass_that_cannot_be_compiled(caplog):
    """It is known before the forward pass has run, so that the whole layer goes on without."""
    torch.compiler.reset()

    def fails(graph, inputs):
        raise RuntimeError("no backward pass today")

    class Layer(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    layer = Layer(2, 3)
    torch.nn.init.ones_(layer.weight)
    backend = aot_autograd(fw_compiler=make_boxed_func, bw_compiler=fails)
    compile_layers([layer])
    layer._compiled_call_impl._compiled = torch.compile(layer._call_impl, backend=backend, dynamic=True)
    with caplog.at_level(logging.WARNING):
        layer(torch.ones(4, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [[4, 4]] * 3
    [message] = [record.message for record in caplog.records if record.name == "fairseq.train"]
    assert message.startswith("--compile failed, going on without: ")


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
