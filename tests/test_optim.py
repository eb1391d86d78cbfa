"""Optimisers against the formulas, written out in float64."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.optim.optimizers import AdafactorConfig, Adam, AdamConfig, SGDConfig, rectification
from fairseq.registry import OPTIMIZERS

BETAS = (0.9, 0.98)


def _gradients(updates: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    scales = 10.0 ** torch.arange(-6, 1, dtype=torch.float64)  # the smallest are of eps's size
    return [(torch.randn(5, 7, generator=generator, dtype=torch.float64) * scales).to(dtype) for _ in range(updates)]


def _run(optimizer: torch.optim.Optimizer, param: Tensor, grads: list[Tensor], lrs: list[float]) -> list[Tensor]:
    values = []
    for grad, lr in zip(grads, lrs, strict=True):
        param.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        values.append(param.detach().clone())
    return values


def _adam_reference(start: Tensor, grads: list[Tensor], lrs: list[float], config: AdamConfig) -> list[Tensor]:
    """fairseq's Adam as PAPER.md states it: decay first, step size with both corrections, bare eps."""
    (beta1, beta2), p = config.adam_betas, start.clone()
    m, v, values = torch.zeros_like(p), torch.zeros_like(p), []
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        p = p - config.weight_decay * lr * p
        p = p - lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * m / (v.sqrt() + config.adam_eps)
        values.append(p)
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adam_is_fairseqs(dtype: torch.dtype) -> None:
    config = AdamConfig(adam_betas=BETAS, adam_eps=1e-6, weight_decay=0.1)
    start = torch.randn(5, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    lrs = [1e-2 * (t + 1) for t in range(12)]
    param = torch.nn.Parameter(start.clone())
    values = _run(OPTIMIZERS.get("adam")([param], config, 0.0), param, _gradients(12, dtype), lrs)
    reference = _adam_reference(start.double(), _gradients(12), lrs, config)
    for value, expected in zip(values, reference, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 2e-6)
    # eps is what makes the difference to torch's own AdamW
    other = torch.nn.Parameter(start.clone())
    torchs = torch.optim.AdamW([other], betas=BETAS, eps=1e-6, weight_decay=0.1)
    assert (_run(torchs, other, _gradients(12, dtype), lrs)[-1] - values[-1]).abs().max() > 1e-3


def test_radam_is_the_papers_and_rests_while_undefined() -> None:
    config = AdamConfig(adam_betas=BETAS, adam_eps=1e-6, weight_decay=0.1)
    start = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads, lrs = _gradients(20), [1e-2] * 20
    param = torch.nn.Parameter(start.clone())
    values = _run(OPTIMIZERS.get("radam")([param], config, 0.0), param, grads, lrs)

    # Algorithm 2 of the paper, decoupled decay, without its un-adapted early steps
    (beta1, beta2), p = BETAS, start.clone()
    m, v, rho_inf, rested = torch.zeros_like(p), torch.zeros_like(p), 2 / (1 - BETAS[1]) - 1, 0
    for t, (grad, value) in enumerate(zip(grads, values, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            adaptive = math.sqrt(1 - beta2**t) / (v.sqrt() + config.adam_eps)
            p = p * (1 - 1e-2 * config.weight_decay) - 1e-2 * r * m / (1 - beta1**t) * adaptive
        else:
            rested += 1
            assert torch.equal(value, start)
        torch.testing.assert_close(value, p, rtol=0, atol=1e-14)
    assert rested == 5


def test_radam_steps_as_torchs_once_rectified() -> None:
    config = AdamConfig(adam_betas=BETAS, weight_decay=0.1)
    grads = _gradients(30)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 7, dtype=torch.float64)) for _ in range(2))
    lrs = [0.0] * 5 + [1e-2] * 25
    torchs = torch.optim.RAdam([theirs], betas=BETAS, weight_decay=0.1, decoupled_weight_decay=True)
    expected = _run(torchs, theirs, grads, lrs)[-1]
    actual = _run(OPTIMIZERS.get("radam")([ours], config, 0.0), ours, grads, [1e-2] * 30)[-1]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_rectification_grows_to_one() -> None:
    factors = [rectification(t, 0.999) for t in range(1, 20000)]
    assert factors[:5] == [0.0] * 5 and factors[5] > 0
    assert factors == sorted(factors) and 0.999 < factors[-1] < 1


CONFIGS = [
    ("adam", AdamConfig(adam_betas=BETAS, weight_decay=1e-2)),
    ("radam", AdamConfig(adam_betas=BETAS, weight_decay=1e-2)),
    ("sgd", SGDConfig(momentum=0.9, weight_decay=1e-2)),
    ("adafactor", AdafactorConfig(weight_decay=1e-2)),
]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_state_dict_continues_bit_for_bit(name: str, config: Any, tmp_path: Path) -> None:
    grads, lrs = _gradients(14, torch.float32), [1e-2] * 14
    whole = torch.nn.Parameter(torch.ones(5, 7))
    expected = _run(OPTIMIZERS.get(name)([whole], config, 0.0), whole, grads, lrs)
    first = torch.nn.Parameter(torch.ones(5, 7))
    optimizer = OPTIMIZERS.get(name)([first], config, 0.0)
    _run(optimizer, first, grads[:7], lrs[:7])
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    torch.save({"model": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = torch.nn.Parameter(state["model"])
    optimizer = OPTIMIZERS.get(name)([resumed], config, 0.0)
    optimizer.load_state_dict(state["optimizer"])
    assert optimizer.state_dict()["param_groups"] == before
    assert torch.equal(_run(optimizer, resumed, grads[7:], lrs[7:])[-1], expected[-1])


@pytest.mark.parametrize("name", ["adam", "radam"])
def test_captured_steps_are_steps(name: str) -> None:
    """Skipped ones change nothing, and the one after takes its rate and its number, though both were counted before."""
    config, skipped = AdamConfig(adam_betas=BETAS, weight_decay=0.1), {1, 2, 6, 9}
    grads, one, other = _gradients(12), *(torch.nn.Parameter(torch.ones(5, 7, dtype=torch.float64)) for _ in range(2))
    eager, captured = (OPTIMIZERS.get(name)([p], config, 0.0) for p in (one, other))
    assert isinstance(captured, Adam)
    captured.complete_state()
    done, counted, skipped_before = 0, 0, None
    for number, grad in enumerate(grads):
        skip = number in skipped
        if not skip:
            _run(eager, one, [grad], [1e-2 * (done + 1)])
            done += 1
        captured.set_next(1e-2 * (counted + 1), None if skipped_before is None else 1e-2 * counted)
        other.grad = grad.clone()
        captured.captured_step(torch.tensor(skip), torch.tensor(skipped_before or False))
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)  # the step size is in float32
        if skipped_before:  # the host learns of it now
            captured.forget_step()
            counted -= 1
        counted, skipped_before = counted + 1, skip
    assert counted == done == captured._updates == eager._updates == 8
    assert captured.param_groups[0]["weight_decay"] == 0.1


def test_a_state_of_no_updates_can_be_loaded() -> None:
    """That of a training whose updates have all been skipped."""
    first, second = (OPTIMIZERS.get("adam")([torch.nn.Parameter(torch.ones(3))], AdamConfig(), 0.1) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    param = second.param_groups[0]["params"][0]
    _run(second, param, [torch.ones(3)], [0.1])
    assert second.state_dict()["state"][0]["step"] == 1


def test_settings_stay_what_they_were_given() -> None:
    param = torch.nn.Parameter(torch.ones(5, 7))
    optimizer = OPTIMIZERS.get("radam")([param], AdamConfig(adam_eps=1e-7, weight_decay=0.3), 0.0)
    _run(optimizer, param, _gradients(8, torch.float32), [0.5] * 8)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.5, 1e-7, 0.3)


def test_sgd_formula() -> None:
    param = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    grads = [torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)] * 2
    values = _run(
        OPTIMIZERS.get("sgd")([param], SGDConfig(momentum=0.5, weight_decay=0.1), 0.0), param, grads, [0.1] * 2
    )
    first = grads[0] + 0.1 * 2.0
    p = 2.0 - 0.1 * first
    torch.testing.assert_close(values[0], p)
    torch.testing.assert_close(values[1], p - 0.1 * (0.5 * first + grads[1] + 0.1 * p))


@pytest.mark.parametrize("scaled", [False, True])
def test_adafactor_formula_of_a_vector(scaled: bool) -> None:
    config = AdafactorConfig((2.0, 1e-3), decay_rate=-0.7, weight_decay=0.1, beta1=0.5, scale_parameter=scaled)
    start = torch.tensor([3.0, -4.0], dtype=torch.float64)
    grads = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-2.0, 5.0], dtype=torch.float64)]
    param = torch.nn.Parameter(start.clone())
    values = _run(OPTIMIZERS.get("adafactor")([param], config, 0.0), param, grads, [1e-2] * 2)
    p, v, m = start, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for t, (grad, value) in enumerate(zip(grads, values, strict=True), start=1):
        decay = 1 - t**-0.7
        v = decay * v + (1 - decay) * (grad**2 + 2.0)
        update = grad / v.sqrt()
        update = update / max(1.0, update.square().mean().sqrt().item())
        size = 1e-2 * p.square().mean().sqrt() if scaled else 1e-2
        m = (m + size * update) / 2
        p = p - 0.1 * size * p - m
        torch.testing.assert_close(value, p, rtol=1e-12, atol=0)


def test_adafactor_of_a_matrix_of_rank_one_is_that_of_its_entries() -> None:
    """Where a squared gradient is a product of a row's and a column's factor, keeping these loses nothing."""
    row, column = (
        torch.tensor([[1.0], [-3.0]], dtype=torch.float64),
        torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64),
    )
    matrix = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    vector = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    for param, grad in ((matrix, row * column), (vector, (row * column).flatten())):
        _run(OPTIMIZERS.get("adafactor")([param], AdafactorConfig(), 0.0), param, [grad, 2 * grad], [1e-2] * 2)
    torch.testing.assert_close(matrix.flatten(), vector, rtol=1e-12, atol=0)


def test_adafactor_bears_rows_without_gradient() -> None:
    param = torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    start = param.detach().clone()
    grad = torch.zeros(4, 6)
    grad[0, 0] = 1e-3
    after = _run(OPTIMIZERS.get("adafactor")([param], AdafactorConfig(), 0.0), param, [grad] * 2, [1e-2] * 2)[-1]
    assert torch.isfinite(after).all()
    assert torch.equal(after[1:], start[1:]) and after[0, 0] != start[0, 0]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("adam", AdamConfig(adam_betas=(0.9,)), "two numbers"),  # type: ignore[arg-type]
        ("adam", AdamConfig(adam_betas=(0.9, 1.5)), "beta"),
        ("radam", AdamConfig(adam_betas=(0.9, 0.5)), "never updates"),
        ("sgd", SGDConfig(momentum=-1.0), "momentum"),
        ("adafactor", AdafactorConfig(clip_threshold=0.5), "threshold"),
    ],
)
def test_impossible_settings_are_one_message(name: str, config: Any, message: str) -> None:
    with pytest.raises(FairseqError, match=message):
        OPTIMIZERS.get(name)([torch.nn.Parameter(torch.ones(2))], config, 0.1)


USES_ADAM = """
import sys, torch
import fairseq.training.train
from fairseq.optim.optimizers import Adam
p = torch.nn.Parameter(torch.ones(3))
optimizer = Adam([p], lr=0.1)
p.square().sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
print([name for name in ("torch._dynamo", "torch.distributed.tensor", "sacrebleu") if name in sys.modules])
"""


def test_training_starts_without_what_it_does_not_use() -> None:
    """Two seconds of processor time for each process."""
    done = subprocess.run([sys.executable, "-c", USES_ADAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
