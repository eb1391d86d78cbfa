"""A training run: epochs of updates, validation and checkpoints between them, until a limit is reached."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from fairseq import admin
from fairseq.checkpoint import load_parameters
from fairseq.data.batching import EpochBatchIterator
from fairseq.data.translation import TranslationData
from fairseq.errors import FairseqError
from fairseq.models.state_dict import from_fairseq, to_fairseq
from fairseq.models.transformer import Transformer
from fairseq.options import CheckpointConfig, section
from fairseq.training.checkpoint_manager import CheckpointManager
from fairseq.training.distributed import World
from fairseq.training.logging import Averages, TrainLog, choose_log_format
from fairseq.training.trainer import Trainer
from fairseq.training.validation import Validator

logger = logging.getLogger("fairseq.train")


class TrainingRun:
    """Where a training run is, what it has measured, and when it ends; one instance a process."""

    def __init__(
        self,
        args: Namespace,
        world: World,
        model: Transformer,
        itr: EpochBatchIterator,
        data: TranslationData,
    ) -> None:
        """Starts from the checkpoint that the flags name, else from ``model`` as it is, with ``--omega-file`` applied.

        Raises FairseqError when a checkpoint or omega file does not fit.
        """
        if not (args.max_epoch or args.max_update or args.stop_min_lr > 0 or args.patience > 0):
            raise FairseqError("training would never end: give --max-epoch or --max-update")
        self.args = args
        self.world = world
        self.itr = itr
        self.started = time.monotonic()
        self.previous_time = 0.0  # seconds that earlier runs of this training took
        self.train_wall = 0.0  # seconds spent in updates
        self.bad_validations = 0  # in a row without a better metric
        self.epoch_stats = Averages()
        self.checkpoints = CheckpointManager(section(CheckpointConfig, args))
        state, path, parameters_only = self.checkpoints.load()
        if state is not None:
            load_parameters(model, from_fairseq(state["model"]), str(path))
        elif args.init_type == "adaptive":
            profile = admin.OmegaProfile.load(args.omega_file)
            admin.check_comments(profile, model.cfg, args.omega_file)
            admin.apply_profile(model, profile)
            logger.info(f"omega from {args.omega_file}")
        self.trainer = Trainer(args, model, world)
        self.trainer.dummy_batch = itr.first_batch
        if state is not None:
            self._resume(state, path, parameters_only)
        self.validator = Validator(args, world, data, model, self.trainer.criterion)
        self.log = TrainLog(
            choose_log_format(args.log_format, args.no_progress_bar),
            args.log_interval,
            is_master=world.is_master,
            log_file=args.log_file,
            tensorboard_logdir=args.tensorboard_logdir,
            wandb_project=args.wandb_project,
            config=vars(args),
        )

    def _resume(self, state: dict[str, Any], path: Path | None, parameters_only: bool) -> None:
        """Take over what the ``--reset-*`` flags leave of a checkpoint besides its parameters."""
        args, trainer = self.args, self.trainer
        if parameters_only:
            logger.info(f"starting from the parameters of {path}")
            return
        history = (state.get("optimizer_history") or [{}])[-1]
        if not args.reset_optimizer:
            if state.get("last_optimizer_state") is None:
                raise FairseqError(f"checkpoint {path} has no optimiser state; continue with --reset-optimizer")
            if history.get("optimizer_name") != args.optimizer:
                raise FairseqError(
                    f"checkpoint {path} holds the state of optimiser {history.get('optimizer_name')}, not of "
                    f"{args.optimizer}; continue with --reset-optimizer"
                )
            trainer.load_optimizer_state(state["last_optimizer_state"])
            if not args.reset_lr_scheduler:
                trainer.num_updates = int(history["num_updates"])
        extra = state.get("extra_state") or {}
        if not args.reset_dataloader and "train_iterator" in extra:
            self.itr.load_state_dict(extra["train_iterator"])
            if "epoch_stats" in extra:
                self.epoch_stats.load_state_dict(extra["epoch_stats"])
        if not args.reset_meters:
            self.checkpoints.best = extra.get("best")
            self.previous_time = float(extra.get("previous_training_time", 0.0))
            self.bad_validations = int(extra.get("bad_validations", 0))
        logger.info(f"resumed from {path} (epoch {self.itr.epoch} @ {trainer.num_updates} updates)")

    def train(self) -> None:
        """Epochs until a limit is reached. Raises FairseqError when training diverges."""
        stop = self._limit_reached()
        while not stop:
            stop = self._train_epoch() or self._limit_reached()
        logger.info(f"done training in {time.monotonic() - self.started:.1f} seconds: {stop}")

    def _limit_reached(self) -> str:
        """Why training ends before another update, or an empty string."""
        args, trainer = self.args, self.trainer
        trainer.epoch = self.itr.epoch
        if args.max_epoch and self.itr.epoch > args.max_epoch:
            return f"--max-epoch {args.max_epoch} reached"
        if args.max_update and trainer.num_updates >= args.max_update:
            return f"--max-update {args.max_update} reached"
        if args.stop_min_lr > 0 and trainer.num_updates > 0 and trainer.lr <= args.stop_min_lr:
            return f"learning rate {trainer.lr:g} has fallen to --stop-min-lr {args.stop_min_lr:g}"
        if 0 < args.patience <= self.bad_validations:
            return f"no better {args.best_checkpoint_metric} in --patience {args.patience} validations"
        return ""

    def _train_epoch(self) -> str:
        """The rest of the current epoch. Returns why training ends within it, or an empty string."""
        trainer, itr, epoch = self.trainer, self.itr, self.itr.epoch
        frequency = trainer.update_freq()
        interval = Averages()
        if itr.updates_done(frequency) == 0:
            self.epoch_stats.reset()
        with self.log.progress(epoch, itr.updates_in_epoch(frequency), itr.updates_done(frequency)) as progress:
            for micro_batches in itr.updates(frequency):
                began = time.monotonic()
                updated = trainer.train_step(micro_batches)
                self.train_wall += time.monotonic() - began
                if not updated:
                    scale = trainer.scaler.scale if trainer.scaler else 1.0
                    logger.info(f"gradients overflow: update skipped, loss scale now {scale:g}")
                if progress.update():
                    self._take_stats(interval)
                    progress.log(self._train_stats(interval), trainer.num_updates)
                    interval.reset()
                if updated and not itr.end_of_epoch():
                    stop = self._limit_reached()
                    self._validate_and_save(epoch, interval, end_of_epoch=False, stopping=bool(stop))
                    if stop:
                        return stop
        self._take_stats(interval)
        self.log.summary("train", epoch, self._train_stats(self.epoch_stats), trainer.num_updates)
        itr.next_epoch()
        stop = self._limit_reached()
        self._validate_and_save(epoch, interval, end_of_epoch=True, stopping=bool(stop))
        return stop

    def _take_stats(self, interval: Averages) -> None:
        """Fetch what the updates have added up to. Raises FairseqError when the loss was not finite."""
        stats = self.trainer.take_stats()
        interval.add(stats)
        self.epoch_stats.add(stats)

    def _train_stats(self, averages: Averages) -> dict[str, float | int]:
        """What a log line says."""
        stats = averages.stats() | {"lr": self.trainer.lr}
        if self.trainer.scaler is not None:
            stats["loss_scale"] = self.trainer.scaler.scale
        return stats | {"train_wall": self.train_wall, "wall": time.monotonic() - self.started}

    def _validate_and_save(self, epoch: int, interval: Averages, end_of_epoch: bool, stopping: bool) -> None:
        """Do what is due after this update."""
        args, updates = self.args, self.trainer.num_updates
        save = stopping or _due(args.save_interval_updates, updates)
        if end_of_epoch:
            save = save or _due(args.save_interval, epoch)
        check = (save and not end_of_epoch) or stopping or _due(args.validate_interval_updates, updates)
        if end_of_epoch:
            check = check or _due(args.validate_interval, epoch)
        if save or check:
            self._take_stats(interval)  # nothing is saved of a model that has diverged
        value = None
        if check and not args.disable_validation:
            value = self.validator.validate(epoch, updates, self.log, self.checkpoints)
            self.bad_validations = 0 if self.checkpoints.is_better(value) else self.bad_validations + 1
        if save or value is not None:
            if self.world.is_master:
                self.checkpoints.save(lambda: self._state(value), epoch, end_of_epoch, updates, value, every=save)
            elif value is not None:
                self.checkpoints.note(value)
            self.world.barrier()

    def _state(self, value: float | None) -> dict[str, Any]:
        """The checkpoint: fairseq's keys, and all that a resumed run needs to go on as if never stopped."""
        args, trainer = self.args, self.trainer
        return {
            "args": Namespace(**vars(args)),
            "model": to_fairseq(trainer.model.state_dict()),
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
                "epoch_stats": self.epoch_stats.state_dict(),
                "previous_training_time": self.previous_time + time.monotonic() - self.started,
            },
            "last_optimizer_state": None if args.no_save_optimizer_state else trainer.optimizer_state(),
        }


def _due(interval: int, count: int) -> bool:
    return interval > 0 and count > 0 and count % interval == 0
