"""Which checkpoint files a training run writes, keeps and starts from. fairseq's names, each file written at once.

Files are written beside training unless that is turned off. Old ones go when the new ones are safely there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fairseq.checkpoint import load_checkpoint, save_checkpoint, updates_of
from fairseq.errors import FairseqError, OutOfMemory, out_of_memory_ends
from fairseq.options import LAST, CheckpointConfig
from fairseq.training.async_save import BackgroundWriter, to_host
from fairseq.training.heartbeat import LOST_STATUS
from fairseq.training.logging import as_shown
from fairseq.utils.io import atomic_copy, locked_directory, remove_unfinished

logger = logging.getLogger("fairseq.checkpoint")

BEST = "checkpoint_best.pt"
_RESETS = ("reset_dataloader", "reset_lr_scheduler", "reset_meters", "reset_optimizer")


def how_to_continue(args: Namespace) -> str:
    """In words: what continues from ``checkpoint_last.pt``, without the flags that would start from another place.

    Empty where that file is not saved.
    """
    if args.no_save or args.no_last_checkpoints:
        return ""
    resets = {f"--{name.replace('_', '-')}" for name in _RESETS if getattr(args, name)}
    needed = {"--reset-optimizer"} if args.no_save_optimizer_state else set()
    left_out = sorted(resets - needed) + ["--restore-file"] * (args.restore_file != LAST)
    changes = [f" without {', '.join(left_out)}"] * bool(left_out)
    changes += [" with --reset-optimizer"] * bool(needed - resets)
    return f"the same command{' and'.join(changes)} continues"


class DirectoryInUse(FairseqError):
    """Another training saves to the directory: one that was started twice, or a lost one that is not quite gone."""

    exit_status = LOST_STATUS


class CheckpointManager:
    """Saves, deletes and finds checkpoints in ``--save-dir``, and remembers the best validation metric."""

    def __init__(self, cfg: CheckpointConfig) -> None:
        """Raises FairseqError when the directory cannot be made. Removes checkpoints there that were never finished."""
        self.cfg = cfg
        self.directory = Path(cfg.save_dir)
        self.best: float | None = None
        self.writer = BackgroundWriter()  # to be waited for in the end
        if not cfg.no_save:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                remove_unfinished(self.directory, "checkpoint")
            except OSError as error:
                raise FairseqError(f"--save-dir {cfg.save_dir}: cannot make it: {error.strerror}") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A block in which no other training saves to the directory. Raises DirectoryInUse when one does."""
        with contextlib.ExitStack() as stack:
            if not self.cfg.no_save:
                try:
                    stack.enter_context(locked_directory(self.directory, wait=False))
                except BlockingIOError:
                    raise DirectoryInUse(
                        f"--save-dir {self.cfg.save_dir}: another training is running there; wait for it to end, stop "
                        "it, or take another directory"
                    ) from None
            yield

    def _shown(self, value: float) -> float:
        """The validation metric as log lines show it: as in fairseq, smaller differences do not count."""
        return as_shown(self.cfg.best_checkpoint_metric, value)

    def is_better(self, value: float) -> bool:
        """Whether validation metric ``value`` is better than the best so far; what is not finite never is."""
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        value, best = self._shown(value), self._shown(self.best)
        return value > best if self.cfg.maximize_best_checkpoint_metric else value < best

    def note(self, value: float) -> bool:
        """Take in a validation metric; True when none before it was better."""
        shown = self._shown(value)
        best = self.is_better(value) or (self.best is not None and shown == self._shown(self.best))
        if best:
            self.best = shown
        return best

    def save(
        self,
        state: Callable[[], dict[str, Any]],
        epoch: int,
        end_of_epoch: bool,
        updates: int,
        value: float | None,
        is_best: bool,
        every: bool = True,
    ) -> None:
        """Write what is due. state: makes the checkpoint's dict, called once if anything is. value: the validation
        metric just measured; is_best: what ``note`` said of it. every: also the regular files, not the best ones alone.

        Returns when ``state``'s tensors may change again. Raises FairseqError when the files cannot be written, or
        those of the call before could not.
        """
        self.writer.wait()  # what is kept depends on the files that are there
        names = self._regular_names(epoch, end_of_epoch, updates) if every else []
        names += [BEST] * is_best
        if value is not None and self._is_kept(value):
            names.append(f"checkpoint.best_{self.cfg.best_checkpoint_metric}_{value:.4f}.pt")
        if (every or names) and not self.cfg.no_last_checkpoints:
            names.append(LAST)
        if not self.cfg.no_save and names:
            self._write(state, names, f"epoch {epoch} @ {updates} updates", end_of_epoch)

    def save_last(self, state: Callable[[], dict[str, Any]], epoch: int, updates: int) -> None:
        """Write ``checkpoint_last.pt`` alone, for a training that stops here, unless the flags forbid it.

        Raises FairseqError when it cannot be written.
        """
        if self.cfg.no_save or self.cfg.no_last_checkpoints:
            return
        self._write(state, [LAST], f"epoch {epoch} @ {updates} updates", end_of_epoch=False)
        self.writer.wait()

    def _write(self, state: Callable[[], dict[str, Any]], names: list[str], where: str, end_of_epoch: bool) -> None:
        """Write one file and give it all ``names``, then delete what is no longer kept."""
        self.writer.wait()  # before the state is copied: there is one copy at a time
        in_background = self.cfg.write_checkpoints_asynchronously
        with out_of_memory_ends("copying the checkpoint", "give --write-checkpoints-asynchronously False"):
            content = to_host(state()) if in_background else state()

        def write() -> None:
            first = self.directory / names[0]
            save_checkpoint(content, first)
            for name in names[1:]:
                atomic_copy(first, self.directory / name)
            logger.info(f"saved {', '.join(names)} in {self.directory} ({where})")
            self._delete_old(end_of_epoch)

        if in_background:
            self.writer.start(write)
        else:
            write()

    def _regular_names(self, epoch: int, end_of_epoch: bool, updates: int) -> list[str]:
        cfg = self.cfg
        if end_of_epoch and not cfg.no_epoch_checkpoints and epoch % cfg.save_interval == 0:
            return [f"checkpoint{epoch}.pt"]
        if not end_of_epoch and cfg.save_interval_updates > 0 and updates % cfg.save_interval_updates == 0:
            return [f"checkpoint_{epoch}_{updates}.pt"]
        return []

    def _is_kept(self, value: float) -> bool:
        """Whether ``value`` is among the ``--keep-best-checkpoints`` best."""
        count, largest = self.cfg.keep_best_checkpoints, self.cfg.maximize_best_checkpoint_metric
        if count <= 0 or self.cfg.no_save or not math.isfinite(value):
            return False
        kept = self._found(self._best_pattern(), largest)
        if len(kept) < count:
            return True
        value, worst = round(value, 4), kept[count - 1][0]
        return value >= worst if largest else value <= worst

    def _best_pattern(self) -> str:
        return rf"checkpoint\.best_{re.escape(self.cfg.best_checkpoint_metric)}_(-?\d+\.\d+)\.pt"

    def _delete_old(self, end_of_epoch: bool) -> None:
        cfg = self.cfg
        if not end_of_epoch and cfg.keep_interval_updates > 0:
            self._keep(r"checkpoint_\d+_(\d+)\.pt", cfg.keep_interval_updates, largest=True)
        if cfg.keep_last_epochs > 0:
            self._keep(r"checkpoint(\d+)\.pt", cfg.keep_last_epochs, largest=True)
        if cfg.keep_best_checkpoints > 0:
            self._keep(self._best_pattern(), cfg.keep_best_checkpoints, largest=cfg.maximize_best_checkpoint_metric)

    def _keep(self, pattern: str, count: int, largest: bool) -> None:
        for _, path in self._found(pattern, largest)[count:]:
            path.unlink(missing_ok=True)

    def _found(self, pattern: str, largest: bool) -> list[tuple[float, Path]]:
        """The files of a name, with the number in it, best first."""
        found = [(float(m[1]), path) for path in self.directory.iterdir() if (m := re.fullmatch(pattern, path.name))]
        return sorted(found, key=lambda item: item[0], reverse=largest)

    def find(self) -> tuple[Path | None, bool]:
        """The checkpoint to start from, and whether only its parameters count (``--finetune-from-model``).

        As in fairseq, a ``--restore-file`` that is not there starts training from scratch: published commands say so.
        Raises FairseqError when that would overwrite a training, and when there is no ``--finetune-from-model``.
        """
        cfg = self.cfg
        path = self.directory / LAST if cfg.restore_file == LAST else Path(cfg.restore_file)
        if path.is_file():
            return path, False
        if cfg.restore_file != LAST:
            if (self.directory / LAST).exists():
                below = self.directory / cfg.restore_file  # the path is taken from the working directory, as in fairseq
                named = f"; is it --restore-file {below}?" if below.is_file() else ""
                raise FairseqError(
                    f"--restore-file {cfg.restore_file}: no such file, and training from scratch would overwrite "
                    f"{self.directory / LAST}; leave the flag out to continue from that, or take another --save-dir"
                    f"{named}"
                )
            logger.warning(f"--restore-file {cfg.restore_file}: no such file; training from scratch")
            return None, False
        if cfg.finetune_from_model is None:
            return None, False
        if not Path(cfg.finetune_from_model).is_file():
            raise FairseqError(f"--finetune-from-model {cfg.finetune_from_model}: no such file")
        return Path(cfg.finetune_from_model), True

    def load(self) -> tuple[dict[str, Any] | None, Path | None, bool]:
        """``find``'s file read, its path, and whether only its parameters count; Nones if there is none.

        When ``checkpoint_last.pt`` is damaged, the newest good file in its place with ``--restore-fallback``; else
        raises FairseqError that names it.
        """
        path, parameters_only = self.find()
        if path is None:
            return None, None, False
        try:
            return load_checkpoint(path), path, parameters_only
        except OutOfMemory:  # nothing is wrong with the file
            raise
        except FairseqError as error:
            state, good = self._newest_good() if path == self.directory / LAST else (None, None)
            if good is None:
                raise
            if not self.cfg.restore_fallback:
                raise FairseqError(
                    f"{error}; continue from {good}, the newest good one, with --restore-fallback"
                ) from None
            logger.warning(f"{error}; continuing from {good}, the newest good one")
            return state, good, False

    def _newest_good(self) -> tuple[dict[str, Any] | None, Path | None]:
        """The checkpoint of most updates that can be read and resumed from, ``checkpoint_last.pt`` aside, and its path.

        All are read: a directory that was copied has files of any age. The youngest of those with as many updates.
        """
        best: tuple[dict[str, Any] | None, Path | None] = None, None
        others = [path for path in self.directory.glob("checkpoint*.pt") if path.name != LAST]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                state = load_checkpoint(path)
            except OutOfMemory:
                raise
            except FairseqError:
                continue
            has_more = best[0] is None or updates_of(state) > updates_of(best[0])
            if has_more and state.get("last_optimizer_state") is not None:
                best = state, path
        return best
