"""Optimisers: torch's own, held to fairseq's formulas.

Adam and RAdam are one class: torch's fused AdamW, whose learning rate and decay are set anew for each step so that the
update comes out as fairseq computes it. One fused kernel does the work, on the CPU and on a GPU alike, and both keep
AdamW's state (``step``, ``exp_avg``, ``exp_avg_sq``).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.registry import OPTIMIZERS
from fairseq.utils.flags import flag
from fairseq.utils.sharded import is_sharded

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Factory = Callable[[Params, Any, float], torch.optim.Optimizer]
SETTLED = 2.0**30  # updates after which AdamW's own bias corrections are 1
WEIGHT_DECAY_HELP = "weight decay (decoupled from the gradient, except with sgd)"


@dataclass
class AdamConfig:
    """Flags of adam and radam."""

    adam_betas: tuple[float, float] = flag((0.9, 0.999), "decay rates of the gradient's first and second moment")
    adam_eps: float = flag(1e-8, "added to the square root of the second moment")
    weight_decay: float = flag(0.0, WEIGHT_DECAY_HELP, "--wd")


@dataclass
class SGDConfig:
    """Flags of sgd."""

    momentum: float = flag(0.0, "momentum")
    weight_decay: float = flag(0.0, WEIGHT_DECAY_HELP, "--wd")


@dataclass
class AdafactorConfig:
    """Flags of adafactor."""

    adafactor_eps: tuple[float, float] = flag(
        (1e-30, 1e-3), "smallest squared gradient, and smallest parameter scale that a step is relative to"
    )
    clip_threshold: float = flag(1.0, "largest root mean square of an update, before the learning rate")
    decay_rate: float = flag(-0.8, "the squared gradient's decay rate at update t is 1 - t^X")
    beta1: float | None = flag(None, "decay rate of a first moment of the updates (default: none is kept)")
    scale_parameter: bool = flag(
        False, "multiply the learning rate by each parameter's own root mean square (fairseq also by those before it)"
    )
    weight_decay: float = flag(0.0, WEIGHT_DECAY_HELP, "--wd")


class Adam(torch.optim.AdamW):
    """fairseq's Adam, or with ``rectify`` its RAdam (Liu et al. 2020, "On the Variance of the Adaptive Learning Rate").

    With lr, eps and decay d, at update t = 1, 2, ...::

        p <- (1 - lr d) p - lr r_t sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)

    r_t is 1 for Adam. For RAdam it is the rectification of `rectification`; while that is undefined nothing moves, the
    decay included. Unlike torch's, eps is not bias-corrected: torch's kernel is told that ``SETTLED`` updates are done,
    and the corrections are in the learning rate that it is given. Every parameter must take part in every step.
    """

    # Under torch's decorators, each of which loads the compiler on its first call: a third of a CPU training's start
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    _state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    _load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    _step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(
        self,
        params: Params,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rectify: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._rectify = rectify
        self._updates = 0
        self._next = torch.zeros(2, 2, device=self.param_groups[0]["params"][0].device)  # see set_next

    def state_dict(self) -> dict[str, Any]:
        """As torch's, but ``step`` is a number, which all parameters share: a deep model's has 10,000 tensors less."""
        state = self._state_dict()
        steps = {index: entries | {"step": self._updates} for index, entries in state["state"].items()}
        return state | {"state": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the number of updates done comes from the state."""
        self._load_state_dict(state_dict)
        self._updates = max((int(entries["step"]) for entries in state_dict["state"].values()), default=0)
        for entries in self.state.values():
            entries["step"].fill_(SETTLED)

    def complete_state(self) -> None:
        """Make the state of parameters that have none yet, which the first step would do."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if len(self.state) == len(parameters):
            return
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = {
                    "step": torch.full((), SETTLED, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    def _move(self, group: dict[str, Any], lr: float, update: int) -> tuple[float, float]:
        """(step size, decay) of ``update``, from 1: ``p <- (1 - decay) p - step size * m / (sqrt(v) + eps)``."""
        beta1, beta2 = group["betas"]
        factor = rectification(update, beta2) if self._rectify else 1.0
        size = lr * factor * math.sqrt(1 - beta2**update) / (1 - beta1**update)
        return size, lr * group["weight_decay"] if factor else 0.0

    def step(self, closure: Any = None) -> Any:
        """One update. closure: as torch's."""
        self.complete_state()
        given = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                size, decay = self._move(group, group["lr"], self._updates + 1)
                group.update(lr=size, weight_decay=decay / size if size else 0.0)  # AdamW multiplies the two
            result = self._step(closure)
        finally:
            for group, (lr, weight_decay) in zip(self.param_groups, given, strict=True):
                group.update(lr=lr, weight_decay=weight_decay)
        self._updates += 1
        return result

    def step_unless(self, skip: Tensor) -> None:
        """One update, unless ``skip``, a scalar on the device, is true: then nothing changes, the state included.

        Does not wait for the device. Call `forget_step` when it is known that ``skip`` was true.
        """
        self.found_inf = skip.float()  # as torch.amp.GradScaler tells fused optimisers
        try:
            self.step()
        finally:
            del self.found_inf

    def forget_step(self) -> None:
        """Do not count the last step, which the device has skipped."""
        self._updates -= 1

    def set_next(self, lr: float, lr_after_skip: float | None = None) -> None:
        """Count the next update and put on the device what `captured_step` does in it; does not wait for the device.

        lr: the learning rate. lr_after_skip: what that is if the device has skipped the update before, which is not
        known yet; None: it has not.
        """
        [group] = self.param_groups
        self._updates += 1
        move = self._move(group, lr, self._updates)
        after_skip = move if lr_after_skip is None else self._move(group, lr_after_skip, self._updates - 1)
        for cell, value in zip(self._next.view(-1), (*move, *after_skip), strict=True):
            cell.fill_(value)  # one by one: a copy of all from the host's memory would wait

    @torch.no_grad()
    def captured_step(self, skip: Tensor, skipped_before: Tensor) -> None:
        """The update of `set_next`, from the device's memory alone, so that a CUDA graph can repeat it.

        skip: as in `step_unless`. skipped_before: whether the update before was skipped. Both are scalars. The state
        must be complete.
        """
        [group] = self.param_groups
        given = {name: group[name] for name in ("lr", "weight_decay", "capturable")}
        size, decay = torch.where(skipped_before, self._next[1], self._next[0])
        if given["weight_decay"]:
            torch._foreach_mul_(group["params"], 1 - decay.masked_fill(skip, 0.0))
        self.found_inf = skip.float()
        group.update(lr=size, weight_decay=0.0, capturable=True)
        try:
            self._step()
        finally:
            del self.found_inf
            group.update(given)


class Adafactor(torch.optim.Optimizer):
    """Shazeer and Stern 2018, "Adafactor", algorithms 4 to 6; of matrices, second moments by row and by column alone.

    torch's is always relative to the parameter's size and has no first moment. Names of the state are fairseq's.
    """

    def __init__(self, params: Params, lr: float, config: AdafactorConfig) -> None:
        """Raises ValueError for settings that give no update."""
        if config.clip_threshold < 1:
            raise ValueError(f"--clip-threshold {config.clip_threshold}: must be at least 1")
        if config.decay_rate >= 0:
            raise ValueError(f"--decay-rate {config.decay_rate}: must be below 0")
        if config.beta1 is not None and not 0 <= config.beta1 < 1:
            raise ValueError(f"--beta1 {config.beta1}: must be at least 0 and below 1")
        super().__init__(params, {"lr": lr})
        self._cfg = config

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group["lr"])

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        cfg = self._cfg
        smallest, smallest_scale = cfg.adafactor_eps
        factored = grad.dim() >= 2
        if not state:
            state["step"] = 0
            if factored:
                state["exp_avg_sq_row"] = grad.new_zeros(grad.shape[:-1])
                state["exp_avg_sq_col"] = grad.new_zeros(grad.shape[:-2] + grad.shape[-1:])
            else:
                state["exp_avg_sq"] = torch.zeros_like(grad)
            if cfg.beta1 is not None:
                state["exp_avg"] = torch.zeros_like(grad)
        state["step"] += 1
        weight = state["step"] ** cfg.decay_rate  # of the new squared gradient
        square = grad.square() + smallest
        if factored:
            row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            row.lerp_(square.mean(-1), weight)
            column.lerp_(square.mean(-2), weight)
            update = grad * (row / row.mean(-1, keepdim=True)).rsqrt()[..., None] * column.rsqrt()[..., None, :]
        else:
            update = grad * state["exp_avg_sq"].lerp_(square, weight).rsqrt()
        update /= (_root_mean_square(update) / cfg.clip_threshold).clamp(min=1)
        size: Tensor | float = lr
        if cfg.scale_parameter:
            size = lr * _root_mean_square(parameter).clamp(min=smallest_scale)
        update *= size
        if cfg.beta1 is not None:
            update = state["exp_avg"].lerp_(update, 1 - cfg.beta1)
        parameter -= cfg.weight_decay * size * parameter
        parameter -= update


def _root_mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def rectification(update: int, beta2: float) -> float:
    """RAdam's factor r_t at ``update`` (from 1); 0 while it is undefined (rho_t <= 5)."""
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * update * beta2**update / (1 - beta2**update)
    if rho <= 5:
        return 0.0
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def _optimizer(name: str, config: type) -> Callable[[Factory], Factory]:
    """Register a factory ``(params, config, lr) -> optimizer``; what torch rejects becomes a FairseqError."""

    def decorate(build: Factory) -> Factory:
        @OPTIMIZERS.register(name, config=config)
        @functools.wraps(build)
        def checked(params: Params, settings: Any, lr: float) -> torch.optim.Optimizer:
            try:
                return build(params, settings, lr)
            except ValueError as error:
                raise FairseqError(f"--optimizer {name}: {error}") from error

        return checked

    return decorate


def _pair(name: str, values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) != 2 or None in values:
        raise FairseqError(f"--{name} {values}: two numbers are needed, such as '(0.9, 0.98)'")
    return values[0], values[1]


@_optimizer("adam", AdamConfig)
def adam(params: Params, config: AdamConfig, lr: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, fairseq's formula."""
    return Adam(params, lr, _pair("adam-betas", config.adam_betas), config.adam_eps, config.weight_decay)


@_optimizer("radam", AdamConfig)
def radam(params: Params, config: AdamConfig, lr: float) -> torch.optim.Optimizer:
    """Rectified Adam with decoupled weight decay and no update while the rectification is undefined."""
    betas = _pair("adam-betas", config.adam_betas)
    if rectification(10**6, betas[1]) == 0:
        raise FairseqError(f"--adam-betas {betas}: radam never updates with a second value of 2/3 or less")
    return Adam(params, lr, betas, config.adam_eps, config.weight_decay, rectify=True)


@_optimizer("sgd", SGDConfig)
def sgd(params: Params, config: SGDConfig, lr: float) -> torch.optim.Optimizer:
    """Stochastic gradient descent; weight decay is added to the gradient."""
    optimizer = torch.optim.SGD(params, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
    for group in optimizer.param_groups:
        # torch has no fused SGD for the tensors of --ddp-backend fully_sharded
        group["fused"] = not any(map(is_sharded, group["params"]))
    return optimizer


@_optimizer("adafactor", AdafactorConfig)
def adafactor(params: Params, config: AdafactorConfig, lr: float) -> torch.optim.Optimizer:
    """Adafactor, fairseq's formula and defaults: steps of lr itself, no first moment."""
    _pair("adafactor-eps", config.adafactor_eps)
    return Adafactor(params, lr, config)
