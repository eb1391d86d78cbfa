"""Updates that are not finite are skipped and counted, and too many end training where it broke; batches that do not
fit into memory are left out.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq.data.reading import describe_batch
from fairseq.errors import FairseqError
from fairseq.optim.optimizers import Adam
from fairseq.training import skipping
from fairseq.training import trainer as trainer_module
from fairseq.training.divergence import ForwardTrace, advice, first_nonfinite_gradient
from fairseq.training.trainer import Trainer
from tests.toys import toy_model
from tests.training_runs import (
    SGD,
    assert_fails,
    assert_same,
    command_line,
    epoch_of_batches,
    files,
    last,
    load,
    needs_sharding,
    run_updates,
    state_of,
    train,
    trainer_and_batches,
    updates,
)

TWO = ("--distributed-world-size", "2")
ADAM = ("--clip-norm", 0.5)


def poison(module: nn.Module, calls: set[int], value: float = float("nan"), gradient: bool = False) -> None:
    """Have ``module`` put out ``value``, or be given it as a gradient, in its ``calls``, from 1."""
    count = [0]

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        count[0] += 1
        if count[0] not in calls:
            return output
        if gradient:
            output.register_hook(lambda grad: grad * value)
            return output
        return output * value

    module.register_forward_hook(hook)


# -- skipped updates


@pytest.mark.parametrize("on_device", [False, True], ids=["looking", "on-device"])
@pytest.mark.parametrize("optimizer", [("--optimizer", "adam"), ("--optimizer", "radam"), SGD], ids=lambda o: o[1])
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_skipped_update_leaves_no_trace(toy_databin, optimizer, on_device, gradient):
    """Updates 1, 4, 5 and 7 are bad: the rest is as if their batches had never been there, dropout off."""
    if on_device and optimizer is SGD:
        pytest.skip("torch's SGD is looked after in each update")
    flags = (*ADAM, *optimizer, "--dropout", 0, "--attention-dropout", 0)
    trainer, itr = trainer_and_batches(toy_databin, *flags)
    trainer._check_every_update = not on_device
    poison(trainer.model.decoder.layers[0].encoder_attn, {1, 4, 5, 7}, float("inf"), gradient)
    batches = epoch_of_batches(itr)
    done = run_updates(trainer, batches)
    # the device is believed, but not right after an update that it has skipped
    assert done == ([True, True, True, True, False, True, True] if on_device else [i in (1, 2, 5) for i in range(7)])
    stats = trainer.take_stats()
    assert (stats["updates"], stats["skipped"], trainer.num_updates, trainer.skipped.count) == (3, 4, 3, 4)
    assert trainer.skipped.in_a_row == 1
    clean, _ = trainer_and_batches(toy_databin, *flags)
    assert run_updates(clean, [batches[i] for i in (1, 2, 5)]) == [True] * 3
    assert_same(state_of(trainer), state_of(clean))
    expected = clean.take_stats()
    assert {name: value for name, value in stats.items() if name != "skipped"} == pytest.approx(
        {name: value for name, value in expected.items() if name != "skipped"}
    )


def test_looking_and_skipping_on_the_device_are_the_same_with_dropout(toy_databin):
    trainers = []
    for on_device in (False, True):
        trainer, itr = trainer_and_batches(toy_databin, *ADAM, "--update-freq", 2)
        trainer._check_every_update = not on_device
        poison(trainer.model.encoder.layers[0].feed_forward.fc1, {3, 9})
        for micro_batches in itr.updates(2):
            trainer.train_step(micro_batches)
        itr.next_epoch()
        for micro_batches in itr.updates(2):
            trainer.train_step(micro_batches)
        trainers.append(trainer)
    assert_same(*map(state_of, trainers))
    assert trainers[0].take_stats() == trainers[1].take_stats()
    assert trainers[0].skipped.count == 2


def test_step_unless_is_a_step_or_nothing():
    """torch's own Adam with found_inf is used on a GPU; on the CPU it obeys as well."""
    torch.manual_seed(1)
    optimizers = [Adam([torch.ones(5, requires_grad=True)], 0.1, weight_decay=0.1, rectify=r) for r in (False, True)]
    for optimizer in optimizers:
        (parameter,) = optimizer.param_groups[0]["params"]
        twin = Adam([torch.ones(5, requires_grad=True)], 0.1, weight_decay=0.1, rectify=optimizer._rectify)
        for number in range(12):
            parameter.grad = torch.randn(5)
            if number % 3 == 0:
                parameter.grad[number % 5] = float("nan")
                optimizer.step_unless(torch.tensor(True))
                optimizer.forget_step()
            else:
                twin.param_groups[0]["params"][0].grad = parameter.grad.clone()
                optimizer.step_unless(torch.tensor(False))
                twin.step()
        assert_same(parameter.detach(), twin.param_groups[0]["params"][0].detach())
        assert_same(optimizer.state_dict(), twin.state_dict())


def test_skips_are_logged_and_resumed_exactly(toy_databin, tmp_path, monkeypatch, caplog):
    """A run stopped between and after bad updates goes on as the uninterrupted one."""
    original = trainer_module.batch_losses
    bad = {3, 4, 9}

    def losses(model: Any, criterion: Any, batch: Any, *rest: Any) -> Any:
        loss, nll = original(model, criterion, batch, *rest)
        if model.training:
            losses.calls += 1  # type: ignore[attr-defined]
            if losses.calls in bad:  # type: ignore[attr-defined]
                return loss * float("nan"), nll
        return loss, nll

    monkeypatch.setattr(trainer_module, "batch_losses", losses)
    losses.calls = 0  # type: ignore[attr-defined]
    flags = ("--max-epoch", 2, "--save-interval-updates", 1)
    whole = train(toy_databin, tmp_path / "whole", *flags)
    assert "update 3 skipped: the loss is nan (1 in a row; training ends at --max-nonfinite-updates 10)" in caplog.text
    (first, second) = [line for line in whole if "train_loss" in line]
    assert (first["train_skipped"], second["train_skipped"]) == (2, 1)
    assert (first["train_num_updates"], second["train_num_updates"]) == (5, 11)
    assert [line["skipped"] for line in whole if "skipped" in line] == [2, 1]  # in the line of the update that succeeds
    losses.calls = 0  # type: ignore[attr-defined]
    lines = []
    for stop in (2, 3, 8, 11):
        lines += train(toy_databin, tmp_path / "parts", *flags, "--max-update", stop)
    assert losses.calls == 14  # type: ignore[attr-defined]
    assert updates(lines) == updates(whole)
    for key in ("model", "last_optimizer_state", "optimizer_history"):
        assert_same(last(tmp_path / "whole")[key], last(tmp_path / "parts")[key])
    assert last(tmp_path / "parts")["extra_state"]["skipped_updates"] == 3


def test_what_the_device_has_skipped_is_not_due(toy_databin, tmp_path, monkeypatch):
    """Update 4 is skipped on the device: it is neither saved nor validated, and counted when it succeeds."""
    init = Trainer.__init__

    def on_device(trainer: Trainer, *rest: Any) -> None:
        init(trainer, *rest)
        trainer._check_every_update = False
        poison(trainer.model.decoder.layers[0].self_attn.out_proj, {4})

    monkeypatch.setattr(Trainer, "__init__", on_device)
    flags = ("--max-update", 4, "--save-interval-updates", 2, "--log-interval", 100)
    lines = train(toy_databin, tmp_path, *flags)
    assert [line["valid_num_updates"] for line in lines if "valid_loss" in line] == [2, 4]
    assert {"checkpoint_1_2.pt", "checkpoint_1_4.pt"} <= files(tmp_path)
    state = last(tmp_path)
    assert (state["optimizer_history"][-1]["num_updates"], state["extra_state"]["skipped_updates"]) == (4, 1)


def test_the_limit_counts_a_row(toy_databin):
    trainer, itr = trainer_and_batches(toy_databin, "--max-nonfinite-updates", 3)
    poison(trainer.model.encoder.layers[0].self_attn, {1, 2, 4, 5, 6})
    batches = epoch_of_batches(itr)
    assert run_updates(trainer, batches[:5]) == [False, False, True, False, False]
    before = state_of(trainer)
    with pytest.raises(FairseqError, match="--max-nonfinite-updates 3 reached"):
        trainer.train_step([batches[5]])
    assert_same(before, state_of(trainer))
    always = trainer_and_batches(toy_databin, "--max-nonfinite-updates", 3)[0]
    always._check_every_update = False
    poison(always.model.encoder.layers[0].self_attn, set(range(9)))
    run_updates(always, batches[:2])
    with pytest.raises(FairseqError, match="--max-nonfinite-updates 3 reached"):
        always.train_step([batches[2]])
    assert always.num_updates == 0


def test_fp16_at_its_lowest_scale_ends_too(toy_databin):
    flags = ("--fp16-init-scale", 2, "--threshold-loss-scale", 1, "--max-nonfinite-updates", 2)
    trainer, itr = trainer_and_batches(toy_databin, *SGD, *flags, fp16=True)
    poison(trainer.model.encoder.layers[0].self_attn, set(range(9)))
    batches = epoch_of_batches(itr)
    assert run_updates(trainer, batches[:2]) == [False, False]
    with pytest.raises(FairseqError, match=r"--max-nonfinite-updates 2 reached.* that of encoder.layers.0.self_attn"):
        trainer.train_step([batches[2]])


# -- where it broke


class _Functional(nn.Module):
    """Breaks between its parts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x / 0)


def test_the_first_module_that_breaks_is_named():
    model = toy_model()
    tokens = torch.tensor([[5, 6, 2], [7, 8, 2]])

    def broken() -> str | None:
        with ForwardTrace(model) as trace, torch.no_grad():
            model(tokens, None, tokens)
        assert not any(module._forward_hooks for module in model.modules())
        return trace.broken

    assert broken() is None
    weight = model.decoder.layers[1].encoder_attn.out_proj.weight
    weight.data[0, 0] = float("inf")
    assert broken() == "decoder.layers.1.encoder_attn.out_proj"
    model.encoder.layers[1].feed_forward.fc2 = _Functional(model.encoder.layers[1].feed_forward.fc2)
    assert broken() == "encoder.layers.1.feed_forward.fc2"
    model.encoder.layers[0].self_attn.k_proj.weight.data.fill_(1e200)  # the scores overflow in no module
    model.encoder.layers[0].self_attn.q_proj.weight.data.fill_(1e200)
    assert broken() == "encoder.layers.0.self_attn"


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_the_end_names_sublayer_and_batch(toy_databin, checkpointed):
    flags = ("--max-nonfinite-updates", 1, "--decoder-layers", 2, "--warmup-updates", 0)
    trainer, itr = trainer_and_batches(toy_databin, *flags, *(["--checkpoint-activations"] if checkpointed else []))
    bad = next(itr.updates(2))
    trainer.model.decoder.layers[1].encoder_attn.v_proj.bias.data[0] = 3e38
    trainer.model.decoder.layers[1].encoder_attn.out_proj.weight.data[0, 0] = 2.0
    with pytest.raises(FairseqError) as error_info:
        trainer.train_step(bad)
    message = str(error_info.value)
    assert "training diverges at update 1, learning rate 0.01: the loss is nan" in message
    assert f"is that of decoder.layers.1.encoder_attn.out_proj, on {describe_batch(bad[0])}" in message
    assert message.endswith("; lower --lr or warm up longer, or clip gradients with --clip-norm")
    assert "\n" not in message


def test_the_second_look_draws_the_same_dropout_and_disturbs_nothing(toy_databin, monkeypatch):
    trainer, itr = trainer_and_batches(toy_databin, "--max-nonfinite-updates", 1)
    seen: list[Tensor] = []
    trainer.model.encoder.embed_dropout.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    states: list[Any] = []
    original = skipping.find_break

    def watched(*arguments: Any) -> str:
        def now() -> list[Any]:
            return [torch.get_rng_state(), *(p.grad.clone() for p in trainer.parameters)]

        states.append(now())
        found = original(*arguments)
        states.append(now())
        return found

    monkeypatch.setattr(skipping, "find_break", watched)
    poison(trainer.model.decoder.layers[0].feed_forward.fc2, {1, 2}, gradient=True)
    with pytest.raises(FairseqError, match=r"backward pass, is that of decoder.layers.0.feed_forward.fc2"):
        trainer.train_step(next(itr.updates(1)))
    assert len(seen) == 2
    assert_same(seen[0], seen[1])
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def test_the_first_gradient_in_backward_order():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    with ForwardTrace(model) as trace:
        output = model(torch.ones(1, 2))
    output.sum().backward()
    assert first_nonfinite_gradient(model, trace.finished) is None
    for layer in (0, 1):
        model[layer].bias.grad.fill_(float("inf"))
        found = first_nonfinite_gradient(model, trace.finished)
        assert found is not None
        assert found[1] == f"{layer}.bias"


def test_advice():
    deep = toy_model(encoder_layers=7, decoder_layers=2).cfg
    assert advice(deep, 0.0).startswith("Post-LN with 7 encoder and 2 decoder layers")
    assert "--init-type adaptive" in advice(deep, 0.0)
    for shape in (
        {"encoder_layers": 6, "decoder_layers": 6},
        {"encoder_layers": 7, "encoder_normalize_before": True},
        {"encoder_layers": 7, "init_type": "deepnet"},
    ):
        assert advice(toy_model(**shape).cfg, 0.1) == "lower --lr or warm up longer"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch_ddp", pytest.param("fully_sharded", marks=needs_sharding)])
def test_two_processes_agree_on_where(toy_databin, tmp_path, capfd, backend):
    flags = (*TWO, "--max-epoch", 5, "--optimizer", "sgd", "--lr", "1e30", "--lr-scheduler", "fixed", "--no-save")
    with pytest.raises(SystemExit):
        train(toy_databin, tmp_path, *flags, "--encoder-layers", 7, "--ddp-backend", backend)
    output = capfd.readouterr()
    (line,) = [line for line in output.err.splitlines() if "error: " in line]
    assert re.search(r"that of (en|de)coder\.layers\.\d\.[\w.]+, on a batch of \d+ sentences", line)
    assert "train it with --init-type adaptive" in line
    assert output.out.count("in a row; training ends at --max-nonfinite-updates 10") == 9


# -- a checkpoint that is not finite


@pytest.mark.parametrize("part", ["parameter", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_refused(toy_databin, tmp_path, capsys, part):
    train(toy_databin, tmp_path, "--max-update", 2)
    path = tmp_path / "checkpoint_last.pt"
    checkpoint = load(path)
    if part == "parameter":
        checkpoint["model"]["decoder.layers.0.fc1.weight"][3, 2] = float("nan")
        message = "decoder.layers.0.feed_forward.fc1.weight is not finite"
    else:
        checkpoint["last_optimizer_state"]["state"][0]["exp_avg_sq"][0, 0] = float("inf")
        message = "the optimiser's exp_avg_sq of encoder.embed_tokens.weight is not finite"
    path.unlink()
    torch.save(checkpoint, path)
    argv = command_line(toy_databin, tmp_path, "--max-update", 3)
    assert_fails(capsys, 1, f"checkpoint {path}: {message}", *argv)
