"""Learning-rate schedules as pure functions.

A schedule is ``lr_at(num_updates, epoch) -> lr``: the rate of the update that follows ``num_updates`` finished ones, in
epoch 1, 2, .... It has no state, so a resumed run needs nothing but its count of updates. A registered factory is
``(config, lrs, max_update) -> lr_at``, ``lrs`` being ``--lr`` and ``max_update`` 0 when there is no limit.
Formulas are fairseq's; all factories raise FairseqError for settings that give no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fairseq.errors import FairseqError
from fairseq.registry import LR_SCHEDULERS
from fairseq.utils.flags import flag

LrAt = Callable[[int, int], float]

WARMUP_HELP = "updates over which the rate rises linearly to --lr (4000 with inverse_sqrt, else 0)"
WARMUP_INIT_HELP = "first rate of the warm-up; negative: 0, with cosine its lowest"
SHRINK_HELP = "factor of the rate, with fixed for each epoch from --force-anneal on, with cosine for each period"
END_HELP = "rate at --total-num-update and after"
TOTAL_HELP = "update at which the rate reaches --end-learning-rate (default: --max-update)"


@dataclass
class InverseSqrtConfig:
    """Flags of inverse_sqrt."""

    warmup_updates: int = flag(4000, WARMUP_HELP)
    warmup_init_lr: float = flag(-1.0, WARMUP_INIT_HELP)


@dataclass
class LinearConfig:
    """Flags of linear."""

    warmup_updates: int = flag(0, WARMUP_HELP)
    warmup_init_lr: float = flag(-1.0, WARMUP_INIT_HELP)
    end_learning_rate: float = flag(0.0, END_HELP)
    total_num_update: int | None = flag(None, TOTAL_HELP)


@dataclass
class PolynomialDecayConfig:
    """Flags of polynomial_decay."""

    warmup_updates: int = flag(0, WARMUP_HELP)
    end_learning_rate: float = flag(0.0, END_HELP)
    power: float = flag(1.0, "exponent of the decay")
    total_num_update: int | None = flag(None, TOTAL_HELP)


@dataclass
class CosineConfig:
    """Flags of cosine. Its lowest rate is ``--min-lr``, or 0."""

    warmup_updates: int = flag(0, WARMUP_HELP)
    warmup_init_lr: float = flag(-1.0, WARMUP_INIT_HELP)
    t_mult: float = flag(1.0, "each period is this many times as long as the one before")
    lr_period_updates: float = flag(-1.0, "updates in the first period; negative: --max-update less the warm-up")
    lr_shrink: float = flag(0.1, SHRINK_HELP)
    min_lr: float | None = None


@dataclass
class FixedConfig:
    """Flags of fixed."""

    warmup_updates: int = flag(0, WARMUP_HELP)
    lr_shrink: float = flag(0.1, SHRINK_HELP)
    force_anneal: int | None = flag(None, "shrink the rate from this epoch on", "--fa")


def _single(name: str, lrs: list[float]) -> float:
    if len(lrs) != 1:
        given = ",".join(map(str, lrs))
        raise FairseqError(f"--lr {given}: --lr-scheduler {name} takes one rate; a list by epoch is for fixed")
    return lrs[0]


def _warmup(start: float, peak: float, updates: int, num_updates: int) -> float:
    return start + (peak - start) * num_updates / updates


def _total(name: str, config: LinearConfig | PolynomialDecayConfig, max_update: int) -> int:
    total = max_update if config.total_num_update is None else config.total_num_update
    if total <= 0:
        raise FairseqError(f"--lr-scheduler {name}: give --total-num-update or --max-update, the end of the decay")
    if total <= config.warmup_updates:
        raise FairseqError(f"--warmup-updates {config.warmup_updates}: the rate's decay ends at update {total} already")
    if config.end_learning_rate < 0:
        raise FairseqError(f"--end-learning-rate {config.end_learning_rate}: must not be negative")
    return total


@LR_SCHEDULERS.register("inverse_sqrt", config=InverseSqrtConfig)
def inverse_sqrt(config: InverseSqrtConfig, lrs: list[float], max_update: int) -> LrAt:
    """Linear warm-up to lr, then lr * sqrt(warmup_updates / num_updates) (Vaswani et al. 2017, section 5.3)."""
    peak, warmup = _single("inverse_sqrt", lrs), config.warmup_updates
    start = max(config.warmup_init_lr, 0.0)

    def lr_at(num_updates: int, epoch: int) -> float:
        if num_updates < warmup:
            return _warmup(start, peak, warmup, num_updates)
        return peak * math.sqrt(max(warmup, 1) / max(num_updates, 1))

    return lr_at


@LR_SCHEDULERS.register("linear", config=LinearConfig)
def linear(config: LinearConfig, lrs: list[float], max_update: int) -> LrAt:
    """Linear warm-up to lr, then a straight line to end_learning_rate at total_num_update; constant after."""
    peak, warmup, end = _single("linear", lrs), config.warmup_updates, config.end_learning_rate
    total = _total("linear", config, max_update)
    start = max(config.warmup_init_lr, 0.0)

    def lr_at(num_updates: int, epoch: int) -> float:
        if num_updates < warmup:
            return _warmup(start, peak, warmup, num_updates)
        left = max(total - num_updates, 0) / (total - warmup)
        return end + (peak - end) * left

    return lr_at


@LR_SCHEDULERS.register("polynomial_decay", config=PolynomialDecayConfig)
def polynomial_decay(config: PolynomialDecayConfig, lrs: list[float], max_update: int) -> LrAt:
    """Linear warm-up from 0 to lr, then end + (lr - end) * (share of the decay left) ** power."""
    peak, warmup, end = _single("polynomial_decay", lrs), config.warmup_updates, config.end_learning_rate
    total = _total("polynomial_decay", config, max_update)

    def lr_at(num_updates: int, epoch: int) -> float:
        if num_updates < warmup:
            return _warmup(0.0, peak, warmup, num_updates)
        left = max(total - num_updates, 0) / (total - warmup)
        return end + (peak - end) * left**config.power if left else end

    return lr_at


@LR_SCHEDULERS.register("cosine", config=CosineConfig)
def cosine(config: CosineConfig, lrs: list[float], max_update: int) -> LrAt:
    """Linear warm-up to lr, then periods of half a cosine from lr to the lowest rate, both shrunk period by period.

    Loshchilov and Hutter 2017, "SGDR". A period is ``t_mult`` times as long as the one before.
    """
    peak, warmup, lowest = _single("cosine", lrs), config.warmup_updates, max(config.min_lr or 0.0, 0.0)
    start = config.warmup_init_lr if config.warmup_init_lr >= 0 else lowest
    period = config.lr_period_updates if config.lr_period_updates > 0 else max_update - warmup
    if period <= 0:
        raise FairseqError("--lr-scheduler cosine: give --lr-period-updates, or a --max-update above --warmup-updates")
    if config.t_mult < 1:
        raise FairseqError(f"--t-mult {config.t_mult}: must be at least 1")
    if peak <= lowest:
        raise FairseqError(f"--lr {peak}: must be above --min-lr {lowest}")

    def lr_at(num_updates: int, epoch: int) -> float:
        if num_updates < warmup:
            return _warmup(start, peak, warmup, num_updates)
        position, length, shrink = float(num_updates - warmup), float(period), 1.0
        while position >= length:
            position, length, shrink = position - length, length * config.t_mult, shrink * config.lr_shrink
        return shrink * (lowest + (peak - lowest) * (1 + math.cos(math.pi * position / length)) / 2)

    return lr_at


@LR_SCHEDULERS.register("fixed", config=FixedConfig)
def fixed(config: FixedConfig, lrs: list[float], max_update: int) -> LrAt:
    """One rate an epoch: lrs in turn, the last one repeated; from force_anneal on it shrinks each epoch."""
    warmup, anneal = config.warmup_updates, config.force_anneal

    def lr_at(num_updates: int, epoch: int) -> float:
        lr = lrs[min(max(epoch, 1), len(lrs)) - 1]
        if anneal is not None and epoch >= anneal:
            lr = lrs[-1] * config.lr_shrink ** (epoch + 1 - anneal)
        return lr * min((num_updates + 1) / warmup, 1.0) if warmup else lr

    return lr_at
