"""One update: forward and backward over micro-batches, gradients summed over processes, normalised, clipped, applied.

The trainer knows a model, a criterion, an optimiser and a schedule; it knows no residual rule. Statistics add up on the
device until ``take_stats`` asks for them, so that on a GPU an update waits for nothing.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fairseq import criterions, optim  # noqa: F401  (they register themselves)
from fairseq.data.translation import Batch
from fairseq.errors import FairseqError
from fairseq.models.transformer import PADDING_IDX, Transformer
from fairseq.options import MemoryConfig, OptimizationConfig, TrainLogConfig, section
from fairseq.registry import CRITERIONS, LR_SCHEDULERS, OPTIMIZERS
from fairseq.training.activations import apply_memory_flags
from fairseq.training.compile import compile_layers
from fairseq.training.distributed import World
from fairseq.training.precision import DynamicLossScaler, autocast
from fairseq.training.sharding import gather, local, scatter_optimizer_state
from fairseq.utils.flags import from_namespace

SUMS = ("loss", "nll_loss", "ntokens", "nsentences")  # what a batch adds up to; losses in nats
STATS = (*SUMS, "sample_size", "gnorm", "clip", "updates")  # what updates add up to


def component(registry: Any, name: str, args: Namespace, *rest: Any) -> Any:
    """Build registered part ``name`` with its own flags from ``args``: ``factory(config, *rest)``."""
    config = registry.config(name)
    return registry.get(name)(from_namespace(config, args) if config is not None else None, *rest)


class Trainer:
    """Trains ``model`` on ``world.device``; one instance a process."""

    def __init__(self, args: Namespace, model: Transformer, world: World) -> None:
        self.args = args
        self.world = world
        apply_memory_flags(model, section(MemoryConfig, args), world.device)
        self.model = model
        self.cfg: OptimizationConfig = section(OptimizationConfig, args)
        if args.compile:
            compile_layers([*model.encoder.layers, *model.decoder.layers])
        self._wrapped = world.average_gradients(self.model, args.ddp_backend, args.bucket_cap_mb)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._sharded = any(isinstance(p, DTensor) for p in self.parameters)
        self.criterion = component(CRITERIONS, args.criterion, args, PADDING_IDX)
        optimizer_config = OPTIMIZERS.config(args.optimizer)
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS.get(args.optimizer)(
            self.parameters, from_namespace(optimizer_config, args) if optimizer_config else None, self.cfg.lr[0]
        )
        self.lr_at = component(LR_SCHEDULERS, args.lr_scheduler, args, self.cfg.lr, self.cfg.max_update)
        self.scaler = self._make_scaler() if args.fp16 else None
        self.num_updates = 0
        self.epoch = 1
        self._stats = torch.zeros(len(STATS), dtype=torch.float64, device=world.device)
        # fp16 must know whether gradients overflowed; on the CPU looking costs nothing
        self._check_every_update = args.fp16 or world.device.type == "cpu"
        self.dummy_batch: Callable[[], Batch] | None = None  # for a process that has run out of batches

    def _make_scaler(self) -> DynamicLossScaler:
        cfg: TrainLogConfig = section(TrainLogConfig, self.args)
        window = cfg.fp16_scale_window or max(1, 2**14 // self.world.size // self.cfg.update_freq[0])
        return DynamicLossScaler(
            cfg.fp16_init_scale, window, cfg.fp16_scale_tolerance, cfg.min_loss_scale, cfg.threshold_loss_scale
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.lr_at(self.num_updates, self.epoch)

    def lr_has_fallen_to(self, limit: float) -> bool:
        """Whether the learning rate is at most ``limit`` and not about to rise, as in a warm-up."""
        return self.num_updates > 0 and self.lr <= min(limit, self.lr_at(self.num_updates - 1, self.epoch))

    def update_freq(self) -> int:
        """Micro-batches an update in the current epoch."""
        frequencies = self.cfg.update_freq
        return frequencies[min(self.epoch, len(frequencies)) - 1]

    def train_step(self, micro_batches: list[Batch | None]) -> bool:
        """Do one update. micro_batches: this process's; None where it has run out and others have not.

        Returns False when fp16 gradients overflowed and the update was skipped. Raises FairseqError when the loss scale
        has no way down; on the CPU also when the loss or the gradients are not finite.
        """
        self._wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            if isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and not is_last:
                with self._wrapped.no_sync():
                    sums += self._backward(batch, index)
            else:
                sums += self._backward(batch, index)
        return self._apply(self.world.sum(sums))

    def _backward(self, batch: Batch | None, index: int) -> Tensor:
        """Add one micro-batch's gradients to the parameters'; returns its summed statistics."""
        weight = 0.0 if batch is None else 1.0
        if batch is None:
            assert self.dummy_batch is not None
            batch = self.dummy_batch()
        self._seed(index)
        scale = self.scaler.scale if self.scaler else 1.0
        loss, nll = batch_losses(self._wrapped, self.criterion, batch, self.args, self.world.device, scale)
        (loss * (weight * scale)).backward()
        return weight * batch_sums(batch, loss.detach(), nll.detach())

    def _seed(self, micro_batch: int) -> None:
        """Seed dropout by update and by the micro-batch's place among all processes'.

        So a resumed run goes on as if never stopped, and two processes draw what one with twice --update-freq draws.
        """
        place = micro_batch * self.world.size + self.world.rank
        seed = np.random.SeedSequence([self.args.seed, self.num_updates, place]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def _apply(self, sums: Tensor) -> bool:
        """Normalise and clip the gradients and update the parameters. sums: of the whole update, as in SUMS."""
        sample_size = sums[3] if self.cfg.sentence_avg else sums[2]
        scale = self.scaler.scale if self.scaler else 1.0
        grads = [local(p.grad) for p in self.parameters if p.grad is not None]
        # DistributedDataParallel, or FSDP2, has divided the sum over processes by their number
        factor = (self.world.size / scale / sample_size).float()
        gnorm = torch.nn.utils.get_total_norm(grads)
        if self._sharded:
            gnorm = self.world.sum(gnorm.square()).sqrt()
        gnorm = gnorm * factor
        clipped = torch.zeros_like(sample_size)
        if self.cfg.clip_norm > 0:
            clipped = (gnorm > self.cfg.clip_norm).double()
            factor = factor * (self.cfg.clip_norm / (gnorm + 1e-6)).clamp(max=1.0)
        if self._check_every_update and not bool(torch.isfinite(gnorm) & torch.isfinite(sums[0])):
            if self.scaler is None:
                raise self._diverged()
            self.scaler.update(overflow=True)
            return False
        torch._foreach_mul_(grads, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        if self.scaler is not None:
            self.scaler.update(overflow=False)
        self.num_updates += 1
        rest = torch.stack([sample_size, gnorm.double(), clipped, torch.ones_like(sample_size)])
        self._stats += torch.cat([sums, rest])
        return True

    def take_stats(self) -> dict[str, float]:
        """Sums over the updates since the last call and over all processes, by the names in STATS; losses in nats.

        Raises FairseqError when the loss or the gradients were not finite.
        """
        stats = dict(zip(STATS, self._stats.tolist(), strict=True))
        self._stats.zero_()
        if not (math.isfinite(stats["loss"]) and math.isfinite(stats["gnorm"])):
            raise self._diverged()
        return stats

    def _diverged(self) -> FairseqError:
        return FairseqError(
            f"the loss or its gradients are not finite after {self.num_updates} updates: training diverges; lower "
            "--lr, warm up longer, clip with --clip-norm, or use --init-type adaptive for a deep Post-LN model"
        )

    def parameter_state(self) -> dict[str, Tensor]:
        """The model's ``state_dict()``, whole; sharded, it is gathered: all processes call this, the first gets it."""
        return gather(self.model.state_dict(keep_vars=True), self.world.is_master)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, with the loss scaler's under ``loss_scaler``; gathered as ``parameter_state`` is."""
        state = gather(self.optimizer.state_dict(), self.world.is_master)
        return state | {"loss_scaler": self.scaler.state_dict()} if self.scaler else state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continue from ``optimizer_state()``'s result, with the settings of our own flags.

        Raises whatever the optimiser raises when it does not fit the parameters.
        """
        settings = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        own_state = {key: value for key, value in state.items() if key != "loss_scaler"}
        self.optimizer.load_state_dict(scatter_optimizer_state(own_state, self.parameters))
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if self.scaler and "loss_scaler" in state:
            self.scaler.load_state_dict(state["loss_scaler"])


def batch_losses(
    model: nn.Module,
    criterion: Any,
    batch: Batch,
    args: Namespace,
    device: torch.device,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss, nll) of a batch in the precision that ``args`` ask for, summed over target tokens, in nats.

    grad_scale: what the loss will be multiplied by before its backward pass.
    """
    batch = to_device(batch, device)
    with autocast(device, args.fp16, args.bf16):
        if hasattr(criterion, "from_features"):
            head = partial(criterion.from_features, target=batch["target"], grad_scale=grad_scale)
            losses, _ = model(**batch["net_input"], head=head)
            return losses
        logits, _ = model(**batch["net_input"])
    return criterion(logits, batch["target"])


def batch_sums(batch: Batch, loss: Tensor, nll: Tensor) -> Tensor:
    """A batch's statistics in the order of SUMS, float64."""
    # filled on the device: copying a tensor there would wait for all work queued so far
    counts = [torch.full_like(loss, batch[key]) for key in ("ntokens", "nsentences")]
    return torch.stack([loss, nll, *counts]).double()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory do not wait."""
    if device.type == "cpu":
        return batch

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return {key: move(item) for key, item in value.items()} if isinstance(value, dict) else value

    return move(batch)
