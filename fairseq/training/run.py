"""A training run: epochs of updates, validation and checkpoints between them, until a limit is reached."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq import admin
from fairseq.admin.residual import measures_omega
from fairseq.checkpoint import (
    check_languages,
    load_parameters,
    model_config,
    require_supported,
    starting_omega,
    stored_settings,
)
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.translation import Batch, TranslationData
from fairseq.errors import FairseqError, OutOfMemory
from fairseq.models.config import TransformerConfig, left_open
from fairseq.models.state_dict import from_fairseq, to_fairseq
from fairseq.models.transformer import Transformer
from fairseq.options import LAST, CheckpointConfig, section
from fairseq.registry import CRITERIONS
from fairseq.training.checkpoint_manager import CheckpointManager, how_to_continue
from fairseq.training.distributed import World
from fairseq.training.divergence import require_finite
from fairseq.training.fairseq_optimizer import from_fairseqs, stored_optimizer
from fairseq.training.flops import device_peak_flops, training_flops
from fairseq.training.logging import Averages, TrainLog
from fairseq.training.profiling import start_omega
from fairseq.training.sharding import whole_parameters
from fairseq.training.signals import StopSignals, exit_status
from fairseq.training.trainer import Trainer
from fairseq.training.validation import ValidationInterrupted, Validator
from fairseq.utils.flags import flag_names
from fairseq.utils.memory import peak_memory

logger = logging.getLogger("fairseq.train")


def _with_own_settings(args: Namespace, stored: dict[str, Any], model: Transformer, path: Path | None) -> Transformer:
    """``model``, made anew where a checkpoint's settings of the init type's own, in ``stored``, are to be taken over.

    Those that a flag gave are not. ``args`` is completed.
    """
    try:
        found = left_open(args, stored)
    except ValueError as error:
        raise FairseqError(f"checkpoint {path}: {error}") from None
    if not found:
        return model
    vars(args).update(found)
    logger.info(f"{', '.join(f'{name} {value}' for name, value in found.items())}: as in {path}")
    cfg = section(TransformerConfig, args)
    if cfg.own_settings() == model.cfg.own_settings():
        return model
    return Transformer(cfg, *(stack.embed_tokens.num_embeddings for stack in (model.encoder, model.decoder)))


class TrainingRun:
    """Where a training run is, what it has measured, and when it ends; one instance a process."""

    def __init__(
        self,
        args: Namespace,
        world: World,
        model: Transformer,
        itr: EpochBatchIterator,
        data: TranslationData,
        log: TrainLog,
    ) -> None:
        """Starts from the checkpoint that the flags name, else from ``model`` as it is, with ``--omega-file`` applied.

        Raises FairseqError when a checkpoint or omega file does not fit.
        """
        if not (args.max_epoch or args.max_update or args.stop_min_lr > 0 or args.patience > 0):
            raise FairseqError("training would never end: give --max-epoch or --max-update")
        self.args = args
        self.world = world
        self.itr = itr
        self.log = log
        self.started = time.monotonic()
        self.previous_time = 0.0  # seconds that earlier runs of this training took
        self.train_wall = 0.0  # seconds spent in updates, in earlier runs too
        self.bad_validations = 0  # in a row without a better metric
        self.signals = StopSignals(world)
        self.stopped_by = 0  # a signal
        self.unfinished: tuple[int, bool] | None = None  # of _after_update, where a signal stopped the run before
        self.interval_stats, self.epoch_stats = Averages(), Averages()
        self.peak_flops = device_peak_flops(world.device)  # None: not known, and FLOPs are not counted
        self.vocab = len(data.tgt_dict)
        self.checkpoints = CheckpointManager(section(CheckpointConfig, args))
        state, path, parameters_only = self.checkpoints.load()
        if state is not None:
            found = args.restore_file == LAST and not parameters_only  # rather than asked for
            otherwise = ", or start afresh with another --save-dir" if found else ""
            require_supported(state["args"], str(path))
            parameters = from_fairseq(state["model"])
            init_type = model_config(state["args"], parameters).init_type
            if init_type != args.init_type:
                raise FairseqError(
                    f"checkpoint {path} was trained with --init-type {init_type}, not {args.init_type}; "
                    f"give that{otherwise}"
                )
            model = _with_own_settings(args, state["args"], model, path)
            load_parameters(model, parameters, str(path), otherwise)
            require_finite(model.named_parameters(), f"checkpoint {path}")
        elif measures_omega(args.init_type):
            start_omega(args, model, itr, world)
        vars(args).update(model.cfg.own_settings())  # checkpoints keep the defaults too
        self.omega = admin.current_profile(model)  # at the start of training
        self.trainer = Trainer(args, model, world)
        self.trainer.dummy_batch = itr.first_batch
        if parameters_only:
            logger.info(f"starting from the parameters of {path}")
        elif state is not None:
            self._resume(state, path)
        subsets = [] if args.disable_validation else args.valid_subset.split(",")
        if subsets and (besides := data.validation_sets_besides(subsets)):  # which fairseq 0.12 refuses
            logger.warning(f"not validated on: {', '.join(besides)}; --valid-subset {','.join(subsets + besides)} does")
        self.validator = Validator(args, world, data, model, self.trainer.criterion, subsets)
        self.validator.interrupted = lambda: self.signals.received != 0

    def _resume(self, state: dict[str, Any], path: Path | None) -> None:
        """Take over what the ``--reset-*`` flags leave of a checkpoint besides its parameters."""
        args, trainer = self.args, self.trainer
        try:
            extra = state.get("extra_state") or {}
            self.omega = starting_omega(state)
            if not args.reset_optimizer:
                self._resume_optimizer(state, path)
            if not args.reset_dataloader and "train_iterator" in extra:
                check_languages(state["args"], args.source_lang, args.target_lang, str(path))
                self.itr.load_state_dict(extra["train_iterator"])
                if self.itr.end_of_epoch():
                    self.itr.next_epoch()
                for name in ("interval_stats", "epoch_stats"):
                    if name in extra:
                        getattr(self, name).load_state_dict(extra[name])
                if extra.get("unfinished") is not None:
                    self.unfinished = int(extra["unfinished"]["epoch"]), bool(extra["unfinished"]["end_of_epoch"])
            if not args.reset_meters:
                self.previous_time = float(extra.get("previous_training_time", 0.0))
                self.train_wall = float(extra.get("train_wall", 0.0))
            if not args.reset_meters and not args.reset_optimizer:
                self._resume_best(state["args"], extra)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise FairseqError(
                f"checkpoint {path}: what it holds besides parameters does not fit ({type(error).__name__}: {error}); "
                "leave that part out with --reset-optimizer, --reset-dataloader or --reset-meters, or take parameters "
                "alone with --finetune-from-model"
            ) from error
        logger.info(f"resumed from {path} (epoch {self.itr.epoch} @ {trainer.num_updates} updates)")

    def _resume_best(self, before: dict[str, Any], extra: dict[str, Any]) -> None:
        """Take over the best validation, where it is of the metric asked for. before: settings."""
        best = None if extra.get("best") is None else float(extra["best"])
        metric, new = before.get("best_checkpoint_metric") or "loss", self.args.best_checkpoint_metric
        names = ["criterion", *flag_names(CRITERIONS.config(self.args.criterion))] if new == "loss" else []
        now = {name: getattr(self.args, name) for name in names}  # what a loss is of
        changed = {name: value for name, value in now.items() if before.get(name, value) != value}
        if metric == new and not changed:
            self.checkpoints.best = best
            self.bad_validations = int(extra.get("bad_validations", 0))
        elif best is not None:
            new = " ".join([new, *(f"of --{name.replace('_', '-')} {value}" for name, value in changed.items())])
            logger.info(f"best {metric} so far, {best:g}, left aside: from now on {new} counts")

    def _resume_optimizer(self, state: dict[str, Any], path: Path | None) -> None:
        """Take over the optimiser's state and the count of updates."""
        history = (state.get("optimizer_history") or [{}])[-1]
        if state.get("last_optimizer_state") is None:
            raise FairseqError(f"checkpoint {path} has no optimiser state; continue with --reset-optimizer")
        optimizer_state = state["last_optimizer_state"]
        name, is_fairseqs = stored_optimizer(history.get("optimizer_name"), state["args"])
        if name != self.args.optimizer:
            raise FairseqError(
                f"checkpoint {path} holds the state of optimiser {name}, not of our {self.args.optimizer}; "
                "continue with --reset-optimizer"
            )
        if is_fairseqs:
            moments = from_fairseqs(optimizer_state, state["model"], self.trainer.model)
            scaler = {"loss_scaler": {"scale": scale}} if (scale := optimizer_state.get("loss_scale")) else {}
            optimizer_state = self.trainer.optimizer.state_dict() | {"state": moments} | scaler
        self.trainer.load_optimizer_state(optimizer_state)
        require_finite(self.trainer.named_optimizer_state(), f"checkpoint {path}")
        if not self.args.reset_lr_scheduler:
            self.trainer.num_updates = int(history["num_updates"])
            extra = state.get("extra_state") or {}
            self.trainer.skipped.count = int(extra.get("skipped_updates", 0))
            self.trainer.skipped.in_a_row = int(extra.get("nonfinite_in_a_row", 0))

    def train(self) -> None:
        """Epochs until a limit is reached. Raises FairseqError when training diverges or a file cannot be written.

        A signal stops it after the update: it saves ``checkpoint_last.pt`` and raises SystemExit with the status of
        ``signals.exit_status``.
        """
        self.trainer.epoch = self.itr.epoch
        alone = self.checkpoints.alone() if self.world.is_master else contextlib.nullcontext()
        with alone, self.signals, self.checkpoints.writer:
            unfinished, self.unfinished = self.unfinished, None
            stop = self._after_update(*unfinished) if unfinished is not None else ""
            stop = stop or self._limit_reached(between_epochs=self.itr.updates_done(1) == 0)
            if not self.interval_stats.stats():
                self.interval_stats.reset()  # the clock starts now
            while not stop:
                stop = self._train_epoch()
            self.checkpoints.writer.wait()
            self.world.barrier()
        if self.stopped_by:
            logger.info(f"stopped after {self.trainer.num_updates} updates: {stop}")
            raise SystemExit(exit_status(self.stopped_by))
        logger.info(f"done training in {time.monotonic() - self.started:.1f} seconds: {stop}")

    def _limit_reached(self, between_epochs: bool) -> str:
        """Why training ends before another update, or an empty string."""
        args, trainer = self.args, self.trainer
        if args.max_epoch and trainer.epoch > args.max_epoch:
            return f"--max-epoch {args.max_epoch} reached"
        if args.max_update and trainer.num_updates >= args.max_update:
            return f"--max-update {args.max_update} reached"
        # an epoch is finished, as in fairseq: cosine's later periods go below this and rise again
        if between_epochs and args.stop_min_lr >= 0 and trainer.lr_has_fallen_to(args.stop_min_lr):
            return f"learning rate {trainer.lr:g} has fallen to --stop-min-lr {args.stop_min_lr:g}"
        if 0 < args.patience <= self.bad_validations:
            return f"no better {args.best_checkpoint_metric} in --patience {args.patience} validations"
        return ""

    def _train_epoch(self) -> str:
        """The rest of the current epoch. Returns why training ends within or after it, or an empty string."""
        trainer, itr, epoch = self.trainer, self.itr, self.itr.epoch
        frequency = trainer.update_freq()
        if itr.updates_done(frequency) == 0:
            self.epoch_stats.reset()
        with self.log.progress(epoch, itr.updates_in_epoch(frequency), itr.updates_done(frequency)) as progress:
            for micro_batches in self.world.reading(itr.updates(frequency), lambda: trainer.num_updates):
                began = time.monotonic()
                updated = trainer.train_step(micro_batches)
                self.train_wall += time.monotonic() - began
                self._count_flops(micro_batches)
                progress.update()
                if updated and self.log.is_due(trainer.num_updates):
                    self._take_stats()
                    progress.log(self._train_stats(self.interval_stats), trainer.num_updates)
                    self.interval_stats.reset()
                if updated and not itr.end_of_epoch() and (stop := self._after_update(epoch)):
                    if not self.stopped_by:  # else the run that continues says it
                        self._log_epoch(epoch)
                    return stop
        self._log_epoch(epoch)
        itr.next_epoch()
        trainer.epoch = itr.epoch
        return self._after_update(epoch, end_of_epoch=True)

    def _log_epoch(self, epoch: int) -> None:
        self._take_stats()
        self.log.summary(
            "train", epoch, self._train_stats(self.epoch_stats), self.trainer.num_updates, validation=False
        )

    def _count_flops(self, micro_batches: list[Batch | None]) -> None:
        if self.peak_flops is None:
            return
        for batch in micro_batches:
            if batch is not None:
                src_tokens = int(batch["net_input"]["src_lengths"].sum())
                size = batch["nsentences"], src_tokens, batch["ntokens"]
                flops = {"flops": training_flops(self.trainer.model.cfg, self.vocab, *size)}
                self.interval_stats.add(flops)
                self.epoch_stats.add(flops)

    def _take_stats(self) -> None:
        """Fetch what the updates have added up to."""
        stats = self.trainer.take_stats()
        read = self.itr.take_stats()  # by this process alone, while the trainer's sums are all processes'
        total = self.world.sum(torch.tensor([*read.values()], dtype=torch.float64, device=self.world.device))
        stats |= dict(zip(read, (total / self.world.size).tolist(), strict=True))
        self.interval_stats.add(stats)
        self.epoch_stats.add(stats)

    def _wall(self) -> float:
        """Seconds that this training has taken, in earlier runs too."""
        return self.previous_time + time.monotonic() - self.started

    def _train_stats(self, averages: Averages) -> dict[str, float | int]:
        """What a log line says."""
        stats = averages.stats() | {"lr": self.trainer.lr}
        if self.trainer.scaler is not None:
            stats["loss_scale"] = self.trainer.scaler.scale
        if self.peak_flops and "tflops" in stats:
            stats["mfu"] = 100 * stats["tflops"] * 1e12 / self.peak_flops
        if self.args.log_memory or self.world.device.type == "cuda":
            stats["mem_gb"] = peak_memory(self.world.device)
        return stats | {"train_wall": self.train_wall, "wall": self._wall()}

    def _validate(self, epoch: int, updates: int) -> float:
        try:
            with whole_parameters(self.trainer.model):
                return self.validator.validate(epoch, updates, self.log, self.checkpoints)
        except OutOfMemory:
            if self.trainer.graphs is None or not self.trainer.graphs.release():
                raise
        return self._validate(epoch, updates)  # in the memory that the graphs held

    def _after_update(self, epoch: int, end_of_epoch: bool = False) -> str:
        """Validate and save as far as due; returns why training ends here, or an empty string."""
        args, updates = self.args, self.trainer.num_updates
        self.checkpoints.writer.check()
        if signum := self.signals.agreed():
            return self._stop(signum, epoch, end_of_epoch)
        stop = self._limit_reached(end_of_epoch)
        save = bool(stop) or _due(args.save_interval_updates, updates)
        check = save if not end_of_epoch else bool(stop) or _due(args.validate_interval, epoch)
        check = check or _due(args.validate_interval_updates, updates)
        if end_of_epoch:
            save = save or _due(args.save_interval, epoch)
        if save or check:
            self._take_stats()
            if self.trainer.num_updates < updates:  # the device has skipped it, which is known only now
                return ""
        value, is_best = None, False
        if check and not args.disable_validation:
            try:
                value = self._validate(epoch, updates)
            except ValidationInterrupted:
                return self._stop(self.signals.agreed_now(), epoch, end_of_epoch)
            self.bad_validations = 0 if self.checkpoints.is_better(value) else self.bad_validations + 1
            is_best = self.checkpoints.note(value)
            stop = stop or self._limit_reached(end_of_epoch)
            save = save or bool(stop)
        if (save or value is not None) and not args.no_save:
            state = self._gathered_state(value)
            if self.world.is_master:
                self.checkpoints.save(state, epoch, end_of_epoch, updates, value, is_best, every=save)
            self.world.barrier()
        return stop

    def _stop(self, signum: int, epoch: int, end_of_epoch: bool) -> str:
        """Save where training stands, what is due here left to the run that continues; returns why training ends."""
        self.stopped_by = signum
        updates = self.trainer.num_updates
        self._take_stats()
        self.unfinished = (epoch, end_of_epoch) if self.trainer.num_updates == updates else None
        state = self._gathered_state(None)
        if self.world.is_master:
            self.checkpoints.save_last(state, epoch, self.trainer.num_updates)
        self.world.barrier()
        what = how_to_continue(self.args) or "nothing was saved, as the flags say"
        return f"{signal.Signals(signum).name}; {what}"

    def _gathered_state(self, value: float | None) -> Callable[[], dict[str, Any]]:
        """What makes the checkpoint's dict. All processes call this: what is sharded is gathered here."""
        parameters = self.trainer.parameter_state()
        optimizer = None if self.args.no_save_optimizer_state else self.trainer.optimizer_state()
        return lambda: self._state(value, parameters, optimizer)

    def _state(
        self, value: float | None, parameters: dict[str, Tensor], optimizer: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The checkpoint: fairseq's keys, and all that a resumed run needs to go on as if never stopped."""
        args, trainer = self.args, self.trainer
        return {
            "args": stored_settings(vars(args)),
            "model": to_fairseq(parameters, positions=not args.no_token_positional_embeddings),
            "optimizer_history": [
                {
                    "criterion_name": args.criterion,
                    "optimizer_name": args.optimizer,
                    "lr_scheduler_state": {"best": self.checkpoints.best},
                    "num_updates": trainer.num_updates,
                }
            ],
            "extra_state": {
                "train_iterator": self.itr.state_dict(),
                "val_loss": value,
                "best": self.checkpoints.best,
                "bad_validations": self.bad_validations,
                "skipped_updates": trainer.skipped.count,
                "nonfinite_in_a_row": trainer.skipped.in_a_row,
                "interval_stats": self.interval_stats.state_dict(),
                "epoch_stats": self.epoch_stats.state_dict(),
                "train_wall": self.train_wall,
                "previous_training_time": self._wall(),
                "omega": self.omega and self.omega.to_dict(),
                "unfinished": self.unfinished and dict(zip(("epoch", "end_of_epoch"), self.unfinished, strict=True)),
            },
            "last_optimizer_state": optimizer,
        }


def _due(interval: int, count: int) -> bool:
    return interval > 0 and count > 0 and count % interval == 0
