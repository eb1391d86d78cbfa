"""Schedules against hand-computed values and fairseq's step-by-step rules."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fairseq.errors import FairseqError
from fairseq.optim.lr_scheduler import (
    CosineConfig,
    FixedConfig,
    InverseSqrtConfig,
    LinearConfig,
    LrAt,
    PolynomialDecayConfig,
)
from fairseq.registry import LR_SCHEDULERS


def _schedule(name: str, config: Any, lrs: list[float], max_update: int = 0) -> LrAt:
    return LR_SCHEDULERS.get(name)(config, lrs, max_update)


def test_inverse_sqrt() -> None:
    lr_at = _schedule("inverse_sqrt", InverseSqrtConfig(warmup_init_lr=1e-7), [7e-4])
    assert lr_at(0, 1) == pytest.approx(1e-7)
    assert lr_at(1000, 1) == pytest.approx(1e-7 + (7e-4 - 1e-7) / 4)
    assert lr_at(4000, 1) == pytest.approx(7e-4)
    assert lr_at(16000, 5) == pytest.approx(3.5e-4)
    assert lr_at(36000, 9) == pytest.approx(7e-4 / 3)


def test_inverse_sqrt_defaults() -> None:
    lr_at = _schedule("inverse_sqrt", InverseSqrtConfig(), [1e-3])
    assert lr_at(0, 1) == 0 and lr_at(1, 1) == pytest.approx(1e-3 / 4000)
    without = _schedule("inverse_sqrt", InverseSqrtConfig(warmup_updates=0), [1e-3])
    assert [without(n, 1) for n in (0, 1, 4, 100)] == pytest.approx([1e-3, 1e-3, 5e-4, 1e-4])


def test_linear_goes_straight_to_the_end_and_never_below() -> None:
    config = LinearConfig(warmup_updates=10, warmup_init_lr=1e-8, end_learning_rate=1e-9)
    lr_at = _schedule("linear", config, [5e-4], 110)
    assert lr_at(0, 1) == pytest.approx(1e-8)
    assert lr_at(5, 1) == pytest.approx((5e-4 + 1e-8) / 2)
    assert lr_at(10, 1) == pytest.approx(5e-4)
    assert lr_at(60, 1) == pytest.approx((5e-4 + 1e-9) / 2)
    assert lr_at(110, 1) == lr_at(10**6, 1) == pytest.approx(1e-9)
    shortest = _schedule("linear", LinearConfig(total_num_update=1, end_learning_rate=0.25), [1.0])
    assert [shortest(n, 1) for n in range(3)] == [1.0, 0.25, 0.25]
    to_zero = _schedule("linear", LinearConfig(total_num_update=100), [1.0], 50)
    assert [to_zero(n, 1) for n in (0, 25, 100, 200)] == pytest.approx([1.0, 0.75, 0.0, 0.0])


def _fairseq_polynomial(lr: float, end: float, power: float, warmup: int, total: int, num_updates: int) -> float:
    if warmup > 0 and num_updates <= warmup:
        return num_updates / warmup * lr
    if num_updates >= total:
        return end
    return (lr - end) * (1 - (num_updates - warmup) / (total - warmup)) ** power + end


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("warmup", [0, 7])
def test_polynomial_decay(power: float, warmup: int) -> None:
    config = PolynomialDecayConfig(warmup_updates=warmup, end_learning_rate=1e-5, power=power, total_num_update=50)
    lr_at = _schedule("polynomial_decay", config, [1e-3])
    for n in range(70):
        assert lr_at(n, 1) == pytest.approx(_fairseq_polynomial(1e-3, 1e-5, power, warmup, 50, n), rel=1e-12)


def _fairseq_cosine(
    lr: float, lowest: float, warmup: int, period: int, t_mult: float, shrink: float, num_updates: int
) -> float:
    if num_updates < warmup:
        return lowest + num_updates * (lr - lowest) / warmup
    current = num_updates - warmup
    if t_mult != 1:
        i = math.floor(math.log(1 - current / period * (1 - t_mult), t_mult) + 1e-9)
        length = t_mult**i * period
        position = current - (1 - t_mult**i) / (1 - t_mult) * period
    else:
        i, length = math.floor(current / period), period
        position = current - period * i
    lowest, lr = lowest * shrink**i, lr * shrink**i
    return lowest + 0.5 * (lr - lowest) * (1 + math.cos(math.pi * position / length))


@pytest.mark.parametrize("t_mult", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("lowest", [0.0, 1e-5])
def test_cosine(t_mult: float, lowest: float) -> None:
    config = CosineConfig(warmup_updates=5, t_mult=t_mult, lr_period_updates=20, lr_shrink=0.5, min_lr=lowest)
    lr_at = _schedule("cosine", config, [1e-3])
    for n in range(400):
        assert lr_at(n, 1) == pytest.approx(_fairseq_cosine(1e-3, lowest, 5, 20, t_mult, 0.5, n), rel=1e-9)


def test_cosine_spans_the_training_by_default() -> None:
    lr_at = _schedule("cosine", CosineConfig(warmup_updates=100, warmup_init_lr=1e-4), [1e-3], 1100)
    assert lr_at(0, 1) == pytest.approx(1e-4)
    assert lr_at(100, 1) == pytest.approx(1e-3)
    assert lr_at(600, 1) == pytest.approx(5e-4)
    assert 0 < lr_at(1099, 1) < 1e-8


def test_cosine_at_its_edges() -> None:
    every_update = _schedule("cosine", CosineConfig(lr_period_updates=1, lr_shrink=0.5), [8.0], 100)
    assert [every_update(n, 1) for n in range(4)] == [8.0, 4.0, 2.0, 1.0]
    from_zero = _schedule("cosine", CosineConfig(warmup_updates=4, warmup_init_lr=0.0, min_lr=0.5), [1.0], 8)
    assert [from_zero(n, 1) for n in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    by_default = _schedule("cosine", CosineConfig(warmup_updates=4, min_lr=0.5), [1.0], 8)
    assert [by_default(n, 1) for n in (0, 2, 4, 6)] == pytest.approx([0.5, 0.75, 1.0, 0.75])
    whole = _schedule("cosine", CosineConfig(lr_period_updates=0), [1.0], 1)
    assert whole(0, 1) == 1.0


def test_fixed_by_epoch() -> None:
    lr_at = _schedule("fixed", FixedConfig(), [0.4, 0.2])
    assert [lr_at(1000, epoch) for epoch in (1, 2, 3, 9)] == [0.4, 0.2, 0.2, 0.2]
    annealed = _schedule("fixed", FixedConfig(force_anneal=3, lr_shrink=0.5), [0.4, 0.2])
    assert [annealed(1000, epoch) for epoch in (1, 2, 3, 4)] == pytest.approx([0.4, 0.2, 0.1, 0.05])
    late = _schedule("fixed", FixedConfig(force_anneal=4, lr_shrink=0.1), [7.0, 5.0, 3.0])
    assert [late(1000, epoch) for epoch in (1, 2, 3, 4, 5)] == pytest.approx([7.0, 5.0, 3.0, 0.3, 0.03])
    warm = _schedule("fixed", FixedConfig(warmup_updates=4), [1.0])
    assert [warm(n, 1) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "config", "lrs", "max_update", "message"),
    [
        ("inverse_sqrt", InverseSqrtConfig(), [0.1, 0.2], 0, "takes one rate"),
        ("linear", LinearConfig(), [0.1], 0, "--total-num-update or --max-update"),
        ("polynomial_decay", PolynomialDecayConfig(), [0.1], 0, "--total-num-update or --max-update"),
        ("linear", LinearConfig(warmup_updates=100), [0.1], 100, "--warmup-updates 100"),
        ("linear", LinearConfig(end_learning_rate=-1.0), [0.1], 100, "must not be negative"),
        ("cosine", CosineConfig(), [0.1], 0, "--lr-period-updates"),
        ("cosine", CosineConfig(min_lr=0.2), [0.1], 10, "above --min-lr"),
        ("cosine", CosineConfig(min_lr=0.1), [0.1], 10, "above --min-lr"),
        ("cosine", CosineConfig(warmup_updates=10), [0.1], 10, "--max-update above --warmup-updates"),
        ("linear", LinearConfig(total_num_update=0), [0.1], 10, "--total-num-update or --max-update"),
        ("cosine", CosineConfig(t_mult=0.5), [0.1], 10, "--t-mult"),
    ],
)
def test_impossible_settings_are_one_message(
    name: str, config: Any, lrs: list[float], max_update: int, message: str
) -> None:
    with pytest.raises(FairseqError, match=message):
        _schedule(name, config, lrs, max_update)
