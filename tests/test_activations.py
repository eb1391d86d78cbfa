"""Activation checkpointing: the same training to the last bit, in less memory."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from fairseq.admin.residual import PROFILING
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.registry import RESIDUAL_RULES
from fairseq.training import activations
from fairseq.training.activations import checkpoint_layers
from tests.training_runs import assert_fails, assert_same, command_line, last, load_script, train, updates

KINDS = [*(name for name in RESIDUAL_RULES.names() if name != PROFILING), "pre-ln"]
DROPOUTS = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}
TWO = ("--distributed-world-size", "2")


def deep_model(kind: str = "default", layers: int = 4, **settings: object) -> Transformer:
    """A small model in training mode, the same for the same arguments."""
    pre_ln = {"encoder_normalize_before": True, "decoder_normalize_before": True} if kind == "pre-ln" else {}
    shape = {"encoder_layers": layers, "decoder_layers": layers, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(1)
    init_type = "default" if kind == "pre-ln" else kind
    cfg = TransformerConfig(**{**shape, **heads, **DROPOUTS, **pre_ln, "init_type": init_type, **settings})
    return Transformer(cfg, 30, 30).train()


def backward(model: Transformer, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Logits, every parameter's gradient, and the random number generator's next draw."""
    torch.manual_seed(2)
    src, tgt = torch.randint(4, 30, (3, 7)), torch.randint(4, 30, (3, 5))
    src[0, :3], tgt[1, 4:] = 1, 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits, _ = model(src, None, tgt)
    logits.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, "next draw": torch.rand(1)}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_identical(kind, bf16):
    plain, checkpointed = deep_model(kind), deep_model(kind)
    checkpoint_layers(checkpointed)
    expected = backward(plain, bf16)
    assert len(expected) == 2 + len(list(plain.parameters()))
    assert_same(expected, backward(checkpointed, bf16))
    assert list(plain.state_dict()) == list(checkpointed.state_dict())


def runs(model: Transformer) -> list[int]:
    """How often each layer of the encoder, then of the decoder, has run so far, counted by its first projection."""
    counts = [0] * (len(model.encoder.layers) + len(model.decoder.layers))

    def count(index):
        return lambda *_: counts.__setitem__(index, counts[index] + 1)

    for index, layer in enumerate([*model.encoder.layers, *model.decoder.layers]):
        layer.self_attn.q_proj.register_forward_pre_hook(count(index))
    return counts


def test_which_layers_run_twice():
    model = deep_model(layers=5)
    counts = runs(model)
    checkpoint_layers(model, every=2)
    backward(model)
    assert counts == [1, 2, 1, 2, 1] * 2


def test_off_in_evaluation_and_without_gradients():
    model = deep_model()
    checkpoint_layers(model)
    counts = runs(model)
    backward(model.eval())
    with torch.no_grad():
        model.train()(torch.full((1, 3), 5), None, torch.full((1, 3), 5))
    assert counts == [2] * 8


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """scripts/bench_memory.py"""
    return load_script("bench_memory")


SHAPE = ("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2, "--vocab", 32)
SHAPE += ("--decoder-attention-heads", 2, "--max-tokens", 2048, "--dropout", 0.1, "--share-all-embeddings")
CHECKPOINT = "--checkpoint-activations"


def peak(bench: ModuleType, layers: int, *flags: object, fake: bool = True) -> int:
    """Bytes at the peak of an update."""
    depth = ("--encoder-layers", layers, "--decoder-layers", layers)
    return bench.count(bench.parse([*map(str, (*SHAPE, *depth, *flags))]), fake)["peak"]


def test_a_checkpointed_layer_keeps_its_input_alone(bench):
    """One more in each stack: 16 bytes a parameter, 4 for each element of its input."""
    more = peak(bench, 4, CHECKPOINT) - peak(bench, 3, CHECKPOINT)
    parameters = sum(p.numel() for p in deep_model(layers=4).parameters())
    parameters -= sum(p.numel() for p in deep_model(layers=3).parameters())
    assert more == 16 * parameters + 2 * 4 * 2048 * 16
    plain, every = peak(bench, 4), peak(bench, 4, CHECKPOINT, "--checkpoint-activations-every", 2)
    assert peak(bench, 4, CHECKPOINT) < every < plain
    assert plain - peak(bench, 3) > 5 * more


def test_autocast_keeps_no_weights_of_checkpointed_layers(bench):
    more = [peak(bench, 4, CHECKPOINT, *flags) - peak(bench, 3, CHECKPOINT, *flags) for flags in ((), ("--bf16",))]
    assert more[0] == more[1]


def test_counting_without_contents_is_counting(bench):
    for flags in ((), (CHECKPOINT,)):
        assert peak(bench, 2, *flags) == pytest.approx(peak(bench, 2, *flags, fake=False), rel=0.01)


def test_offloading_moves_the_inputs_of_layers_alone(monkeypatch):
    """Away and back again, one tensor a layer: not the encoder's output, which all layers of the decoder share."""
    moved = []

    class Host(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            assert not pin_memory  # on the CPU
            super().__init__(self.pack, torch.from_numpy)

        def pack(self, tensor):
            moved.append(tuple(tensor.shape))
            return tensor.detach().numpy().copy()

    monkeypatch.setattr(activations, "save_on_cpu", Host)
    plain, offloaded = deep_model("adaptive"), deep_model("adaptive")
    checkpoint_layers(offloaded, offload=True)
    assert_same(backward(plain), backward(offloaded))
    assert [shape for shape in moved if shape != (0,)] == [(3, 7, 16)] * 4 + [(3, 5, 16)] * 4


@pytest.mark.slow
def test_training_is_identical_in_one_process_and_in_two(toy_databin, tmp_path):
    flags = ("--init-type", "b2t", "--encoder-layers", 2, "--decoder-layers", 3, "--max-update", 3, "--bf16")
    for name, processes in (("one", ()), ("two", TWO)):
        expected = train(toy_databin, tmp_path / name, *flags, *processes)
        lines = train(toy_databin, tmp_path / f"{name}-again", *flags, *processes, CHECKPOINT)
        assert updates(lines) == updates(expected)
        for key in ("model", "last_optimizer_state"):
            assert_same(last(tmp_path / name)[key], last(tmp_path / f"{name}-again")[key])


def test_flags_that_would_do_nothing(toy_databin, tmp_path, capsys):
    argv = command_line(toy_databin, tmp_path, "--max-update", 1)
    message = "--checkpoint-activations-every does nothing without --checkpoint-activations"
    assert_fails(capsys, 2, message, *argv, "--checkpoint-activations-every", 2)
    assert_fails(capsys, 1, "--offload-activations needs a GPU", *argv, "--offload-activations")
