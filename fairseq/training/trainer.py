"""One update: forward and backward over micro-batches, gradients summed over processes, normalised, clipped, applied.

The trainer knows a model, a criterion, an optimiser and a schedule; it knows no residual rule. Statistics add up on the
device until ``take_stats`` asks for them, so that on a GPU an update waits for nothing.

An update whose loss or gradients are not finite changes nothing and is skipped. With a fused optimiser on a GPU the
device itself does so, and this process learns of it when the next update is about to be applied.

`losses`, `backpropagate`, `normalise` and `update_parameters` run on the device alone: they read nothing back, and what
differs from update to update comes to them in tensors. So a CUDA graph can repeat them.
"""

from __future__ import annotations

import contextlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq import criterions, optim  # noqa: F401  (they register themselves)
from fairseq.data.reading import describe_batch
from fairseq.data.translation import Batch
from fairseq.errors import FairseqError, is_out_of_memory, out_of_memory_ends
from fairseq.models.transformer import Transformer
from fairseq.optim.optimizers import Adam
from fairseq.options import MemoryConfig, OptimizationConfig, TrainLogConfig, section
from fairseq.registry import CRITERIONS, LR_SCHEDULERS, OPTIMIZERS
from fairseq.training.activations import apply_memory_flags
from fairseq.training.capture import uses_graphs, with_graphs
from fairseq.training.compile import compile_layers
from fairseq.training.distributed import AFTERWARDS, World
from fairseq.training.gradients import FlatGradients
from fairseq.training.losses import SUMS, batch_losses, batch_sums
from fairseq.training.out_of_memory import smallest_batch
from fairseq.training.precision import ConvertedWeights, make_loss_scaler
from fairseq.training.sharding import gather, local, scatter_optimizer_state
from fairseq.training.skipping import SkippedUpdates
from fairseq.training.transfer import on_its_way_to_host
from fairseq.utils.flags import from_namespace
from fairseq.utils.sharded import is_sharded
from fairseq.utils.symbols import PAD

logger = logging.getLogger("fairseq.train")

STATS = (*SUMS, "sample_size", "gnorm", "clip", "updates", "skipped", "ooms")  # what updates add up to
MAX_OOMS_IN_A_ROW = 10  # batches of a process
TOO_LARGE = "take a smaller model, or divide it among GPUs with --ddp-backend fully_sharded"


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
        self._size = f"{sum(p.numel() for p in model.parameters()):,} parameters on {world.device}"
        backend = AFTERWARDS if uses_graphs(args, world) else args.ddp_backend  # graphs wait for no other process
        with out_of_memory_ends(f"{self._process}placing {self._size}", TOO_LARGE):
            self._wrapped = world.average_gradients(self.model, backend, args.bucket_cap_mb)
            self.parameters = [p for p in model.parameters() if p.requires_grad]
            self._sharded = any(map(is_sharded, self.parameters))
            plain = self._wrapped is model and not self._sharded  # its backward passes wait for no other process
            self.flat = FlatGradients(self.parameters) if plain and world.size > 1 else None  # summed after them
        self._called: nn.Module | ConvertedWeights = self._wrapped
        if plain and world.device.type == "cuda" and not (args.checkpoint_activations or args.offload_activations):
            self._called = ConvertedWeights(model, model.decoder.output_projection)
        self.criterion = component(CRITERIONS, args.criterion, args, PAD)
        optimizer_config = OPTIMIZERS.config(args.optimizer)
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS.get(args.optimizer)(
            self.parameters, from_namespace(optimizer_config, args) if optimizer_config else None, self.cfg.lr[0]
        )
        self.lr_at = component(LR_SCHEDULERS, args.lr_scheduler, args, self.cfg.lr, self.cfg.max_update)
        micro_batches = world.size * self.cfg.update_freq[0]
        self.scaler = make_loss_scaler(section(TrainLogConfig, args), micro_batches) if args.fp16 else None
        self.num_updates = 0
        self.skipped = SkippedUpdates(self)
        self.epoch = 1
        self._ooms_in_a_row = 0
        self._stats = torch.zeros(len(STATS), dtype=torch.float64, device=world.device)
        self.outcome = torch.zeros(4, dtype=torch.float64, device=world.device)  # of the last update, see normalise
        self._scale = torch.ones((), device=world.device)  # of the loss; the scaler's, where there is one
        # The device skips by itself where the optimiser can; fp16's scale must know; on the CPU looking costs nothing
        device_skips = isinstance(self.optimizer, Adam) and not self._sharded and self.cfg.max_nonfinite_updates > 1
        self._check_every_update = args.fp16 or world.device.type == "cpu" or not device_skips
        self._unread: Callable[[], list[float]] | None = None  # the last update's outcome, on its way from the device
        self.dummy_batch: Callable[[], Batch] | None = None  # for a process that has run out of batches
        self.graphs = with_graphs(self)

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

    def train_step(self, micro_batches: Sequence[Batch | None]) -> bool:
        """Do one update. micro_batches: this process's; None where it has run out and others have not.

        Returns False when the update was skipped: its loss or gradients were not finite, or no batch fitted into
        memory. (Where the device skips, the next call or ``take_stats`` corrects ``num_updates``.) Raises FairseqError
        when too many are skipped, the loss scale has no way down, or processes cannot go on without the batch.
        """
        self._wrapped.train()
        if self.scaler is not None:
            self._scale.fill_(self.scaler.scale)
        return (self.eager_step if self.graphs is None else self.graphs.step)(micro_batches)

    def eager_step(self, micro_batches: Sequence[Batch | None]) -> bool:
        """One update, kernel by kernel; see `train_step`, which everybody else calls."""
        sums = self.accumulate(micro_batches)
        with self.updating():
            return self._apply(self.sum_over_processes(sums), micro_batches)

    def accumulate(self, micro_batches: Sequence[Batch | None]) -> Tensor:
        """Forward and backward passes of an update, kernel by kernel; returns this process's sums, of `new_sums`."""
        self.clear_gradients()
        sums = self.new_sums()
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            if isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and not is_last:
                with self._wrapped.no_sync():
                    self._backward(batch, index, sums)
            elif self.flat is None:
                self._backward(batch, index, sums, averages=self.world.size > 1)
            elif batch is not None:
                self._backward(batch, index, sums)
        return sums

    def sum_over_processes(self, sums: Tensor) -> Tensor:
        """``sums``, and the gradients where no backward pass has done so, summed over all processes, in place."""
        if self.flat is not None:
            self.world.sum(self.flat.all)
        return self.world.sum(sums)

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """What the end of an update runs in: without memory for it training ends, since some may be updated."""
        what = f"{self._process}the update of {self._size}, for which {self.args.optimizer} keeps a state"
        return out_of_memory_ends(what, f"lower --max-tokens, {TOO_LARGE}")

    def clear_gradients(self) -> None:
        """Have none, or zeros."""
        if self.flat is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.flat.clear()

    def _backward(self, batch: Batch | None, index: int, sums: Tensor, averages: bool = False) -> None:
        """Add one micro-batch's gradients to the parameters', and its statistics to ``sums``.

        averages: whether the backward pass averages gradients over the processes.
        """
        weight = 0.0 if batch is None else 1.0
        if batch is None:
            assert self.dummy_batch is not None
            batch = self.dummy_batch()
        self.seed(index)
        during, loss, nll = "forward", None, None
        try:
            loss, nll = self.losses(batch)
            during = "backward"
            self.backpropagate(batch, loss, nll, sums, weight)
            self._ooms_in_a_row = 0
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        del loss, nll  # with these and the error, all activations are gone
        if self.graphs is not None and self.graphs.release() and (during == "forward" or index == 0):
            if index == 0:
                self.clear_gradients()
            self._backward(batch, index, sums, averages)  # in the memory that the graphs held
        else:
            self._drop(batch, during, sums, averages)

    def seed(self, micro_batch: int) -> None:
        """Seed dropout by update, skipped ones counted, and by the micro-batch's place among all processes'.

        So a resumed run goes on as if never stopped, and two processes draw what one with twice --update-freq draws.
        """
        place = micro_batch * self.world.size + self.world.rank
        update = self.num_updates + self.skipped.count
        seed = np.random.SeedSequence([self.args.seed, update, place]).generate_state(1)[0]
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed formats its caller's stack for GPUs
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(int(seed))

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward pass: (loss, nll) of a micro-batch, scalars."""
        return batch_losses(self._called, self.criterion, batch, self.args, self.world.device, self.loss_scale)

    @property
    def loss_scale(self) -> Tensor | float:
        """What the loss is multiplied by before its backward pass; where that changes, a scalar on the device."""
        return 1.0 if self.scaler is None else self._scale

    def backpropagate(self, batch: Batch, loss: Tensor, nll: Tensor, sums: Tensor, weight: float = 1.0) -> None:
        """Backward pass: add ``weight`` times a micro-batch's gradients to the parameters', and its statistics to
        ``sums``, of `new_sums`.
        """
        (loss * (weight * self.loss_scale)).backward()
        sums[: len(SUMS)] += weight * batch_sums(batch, loss.detach(), nll.detach())

    def new_sums(self) -> Tensor:
        """Zeros, float64: what an update adds up, as in SUMS, and the batches that ran out of memory."""
        return torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self.world.device)

    def _drop(self, batch: Batch, during: str, sums: Tensor, averages: bool) -> None:
        """Go on without a micro-batch that ran out of memory. during: forward or backward; for the rest `_backward`."""
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self._ooms_in_a_row += 1
        what = f"{self._process}out of memory in the {during} pass on {describe_batch(batch)}"
        if self._sharded or (averages and during == "backward"):
            raise FairseqError(f"{what}, and the other processes cannot go on without it; lower --max-tokens")
        if self._ooms_in_a_row == MAX_OOMS_IN_A_ROW:
            raise FairseqError(
                f"{what}, the {MAX_OOMS_IN_A_ROW}th batch in a row; lower --max-tokens, or take a smaller model"
            )
        logger.error(f"{what}: left out; if this comes often, lower --max-tokens")
        if during == "backward":  # the sum of gradients has a part of this batch's in it
            self.clear_gradients()
            sums[: len(SUMS)] = 0
        sums[-1] += 1
        if averages:
            with out_of_memory_ends(f"{self._process}even one token", TOO_LARGE):
                one = smallest_batch(batch)
                loss, _ = batch_losses(self._wrapped, self.criterion, one, self.args, self.world.device)
                (loss * 0.0).backward()

    @property
    def _process(self) -> str:
        """Which of several this is, for messages."""
        return f"process {self.world.rank} of {self.world.size}: " if self.world.size > 1 else ""

    def _apply(self, sums: Tensor, micro_batches: Sequence[Batch | None]) -> bool:
        """Normalise and clip the gradients and update the parameters; returns as ``train_step``."""
        factor = self.normalise(sums)
        self._read_outcome()
        gradients = self._gradients()  # none where no batch fitted into memory
        look = self._check_every_update or self.skipped.in_a_row > 0 or not gradients
        if look and self.outcome[0]:
            self.skipped.add(self.outcome.tolist(), micro_batches)
            return False
        torch._foreach_mul_(gradients, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if look:
            self.optimizer.step()
            self.skipped.in_a_row = 0
        else:
            assert isinstance(self.optimizer, Adam)
            self.optimizer.step_unless(self.outcome[0])
            self._unread = on_its_way_to_host(self.outcome)
        if self.scaler is not None:
            self.scaler.update(overflow=False)
        self.num_updates += 1
        return True

    def normalise(self, sums: Tensor) -> Tensor:
        """By what the gradients are to be multiplied, clipping included: a scalar, float32.

        sums: of the whole update. Adds to the statistics, and fills ``outcome``: whether to skip the update; its loss,
        gradient norm and sample size.
        """
        sample_size = sums[3] if self.cfg.sentence_avg else sums[2]
        factor, gnorm = self._norm(sample_size)
        clipped = torch.zeros_like(sample_size)
        if self.cfg.clip_norm > 0:
            clipped = (gnorm > self.cfg.clip_norm).double()
            factor = factor * (self.cfg.clip_norm / (gnorm + 1e-6)).clamp(max=1.0)
        skip = ~(torch.isfinite(gnorm) & torch.isfinite(sums[0]))  # also when no batch fitted: sample_size is 0
        rest = torch.stack([sample_size, gnorm.double(), clipped, torch.ones_like(sample_size)])
        done = torch.cat([sums[: len(SUMS)], rest])
        self._stats += torch.cat([done.masked_fill(skip, 0.0), skip.double()[None], sums[-1:]])
        self.outcome.copy_(torch.stack([skip.double(), sums[0], gnorm.double(), sample_size]))
        return factor

    def _norm(self, sample_size: Tensor) -> tuple[Tensor, Tensor]:
        """What makes a mean of the gradients, by multiplication, and that mean's norm, before clipping: scalars."""
        # DistributedDataParallel, or FSDP2, has divided the sum over processes by their number
        divided_by = self.world.size if self.flat is None else 1
        factor = (divided_by / self.loss_scale / sample_size).float()
        gnorm = torch.nn.utils.get_total_norm(self._gradients())
        if self._sharded:
            gnorm = self.world.sum(gnorm.square()).sqrt()
        return factor, gnorm * factor

    def measure(self, batches: Sequence[Batch]) -> list[float]:
        """Loss and gradient norm that an update of these batches alone would have; nothing is updated."""
        self.clear_gradients()
        sums = self.new_sums()
        for index, batch in enumerate(batches):
            self.seed(index)
            self.backpropagate(batch, *self.losses(batch), sums)
        result = self.loss_and_norm(sums)
        self.clear_gradients()
        return result

    def loss_again(self, batch: Batch | None, index: int) -> Tensor:
        """The loss that micro-batch number ``index`` of an update had, a scalar."""
        if batch is None:
            assert self.dummy_batch is not None
            batch = self.dummy_batch()
        self.seed(index)
        return batch_losses(self.model, self.criterion, batch, self.args, self.world.device)[0]

    def loss_and_norm(self, sums: Tensor) -> list[float]:
        """Loss and gradient norm of ``sums`` and of the gradients that are there; waits for the device."""
        _, gnorm = self._norm(sums[3] if self.cfg.sentence_avg else sums[2])
        return torch.stack([sums[0], gnorm.double()]).tolist()

    def _gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def _read_outcome(self, micro_batches: Sequence[Batch | None] = ()) -> bool:
        """Correct the counts if the device has skipped the last update; returns whether it has.

        micro_batches: that update's, where they are still at hand.
        """
        if self._unread is None:
            return False
        outcome, self._unread = self._unread(), None
        if not outcome[0]:
            self.skipped.in_a_row = 0
            return False
        assert isinstance(self.optimizer, Adam)
        self.optimizer.forget_step()
        self.num_updates -= 1
        self.skipped.add(outcome, micro_batches)
        return True

    def step_on_device(self, run: Callable[[], None], micro_batches: Sequence[Batch | None]) -> bool:
        """One update by ``run``, which seeds, sends what differs, and repeats recorded work that ends with
        `update_parameters`; returns as ``train_step``. Waits for nothing, but with fp16, whose scale must know.
        """
        assert isinstance(self.optimizer, Adam)
        lr_after_skip = self.lr_at(self.num_updates - 1, self.epoch) if self._unread else None
        self.optimizer.set_next(self.lr, lr_after_skip)
        run()
        self._read_outcome()  # of the update before
        self._unread = on_its_way_to_host(self.outcome)
        self.num_updates += 1
        if self._check_every_update and self._read_outcome(micro_batches):
            return False
        if self.scaler is not None:
            self.scaler.update(overflow=False)
        return True

    def update_parameters(self, sums: Tensor) -> None:
        """End an update on the device, which skips it if need be; part of `step_on_device`. sums: as in `normalise`."""
        assert isinstance(self.optimizer, Adam)
        skipped_before = self.outcome[0] != 0
        torch._foreach_mul_(self._gradients(), self.normalise(sums))
        self.optimizer.captured_step(self.outcome[0] != 0, skipped_before)

    def take_stats(self) -> dict[str, float]:
        """Sums over the updates since the last call and over all processes, by the names in STATS; losses in nats."""
        self._read_outcome()
        stats = dict(zip(STATS, self._stats.tolist(), strict=True))
        self._stats.zero_()
        return stats

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

    def named_optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """The optimiser's tensors, each with what it is of which parameter."""
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"the optimiser's {key} of {name}", value
