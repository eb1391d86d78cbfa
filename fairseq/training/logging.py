"""What training says about itself: progress lines or a bar, epoch summaries, TensorBoard, Weights & Biases, a file.

Statistics are a plain ``dict[str, float | int]`` under fairseq's names; `Averages` makes them from sums, `format_stats`
turns them into text. Lines go through `logging`, to a logger named after their tag (``train_inner``, ``train``,
``valid``), so the command decides where they end up. Only the master process writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fairseq.errors import FairseqError
from fairseq.utils.log_lines import LineHandler, warn_unwritable

Stats = Mapping[str, float | int]

# Order in a line, and digits after the point (None: six significant ones). Other statistics follow, with three digits.
_DIGITS: dict[str, int | None] = {
    "loss": 3,
    "nll_loss": 3,
    "ppl": 2,
    "bleu": 2,
    "wps": 1,
    "ups": 2,
    "wpb": 1,
    "bsz": 1,
    "num_updates": 0,
    "lr": None,
    "gnorm": 3,
    "clip": 1,
    "padding": 1,
    "data_wait": 1,
    "loss_scale": 4,
    "skipped": 0,
    "ooms": 0,
    "mem_gb": 2,
    "tflops": None,
    "mfu": 1,
    "train_wall": 0,
    "wall": 0,
}
_BAR_STATS = ("loss", "ppl", "wps", "ups", "lr", "gnorm")  # what a terminal's width has room for


class Averages:
    """Sums over a stretch of training or validation, and fairseq's statistics of it.

    Keep one for the log interval, to be `reset` when it has been shown, and one for the epoch.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything and start the clock."""
        self._sums: dict[str, float] = {}
        self._start = time.perf_counter()

    def add(self, sums: Mapping[str, float]) -> None:
        """Add sums over some updates, or over a validation subset.

        loss, nll_loss: in nats; sample_size: what loss is divided by (target tokens, or sentences with
        ``--sentence-avg``); ntokens, nsentences. Training alone: updates; gnorm, the sum of their gradient norms before
        clipping; clip, how many were clipped; skipped, updates that changed nothing; ooms, batches left out for want of
        memory; flops, if known: this process's model FLOPs; and what `EpochBatchIterator.take_stats` counts, the mean
        over processes.
        """
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def stats(self) -> dict[str, float | int]:
        """Losses in base 2, the perplexity 2^nll_loss, and speed since `reset`; empty when nothing was added.

        skipped and ooms: where there were any. In percent: clip, of updates; padding, of source and target
        positions; data_wait, of the time.
        """
        sums = self._sums
        if not sums:
            return {}
        seconds = max(time.perf_counter() - self._start, 1e-9)
        nll = _ratio(sums["nll_loss"], sums["ntokens"]) / math.log(2)
        stats: dict[str, float | int] = {
            "loss": _ratio(sums["loss"], sums["sample_size"]) / math.log(2),
            "nll_loss": nll,
            "ppl": math.inf if nll > 1000 else 2**nll,
            "wps": sums["ntokens"] / seconds,
        }
        if updates := sums.get("updates"):
            stats |= {
                "ups": updates / seconds,
                "wpb": sums["ntokens"] / updates,
                "bsz": sums["nsentences"] / updates,
                "gnorm": sums["gnorm"] / updates,
                "clip": 100 * sums["clip"] / updates,
            }
        stats |= {name: int(sums[name]) for name in ("skipped", "ooms") if sums.get(name)}
        if "flops" in sums:
            stats["tflops"] = sums["flops"] / seconds / 1e12
        if positions := sums.get("positions"):
            stats["padding"] = 100 * (1 - sums["tokens"] / positions)
            stats["data_wait"] = 100 * sums["data_wait"] / seconds
        return stats

    def state_dict(self) -> dict[str, float]:
        """The sums and the seconds they took, for a resumed run to go on from."""
        return self._sums | {"seconds": time.perf_counter() - self._start}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from ``state``."""
        self._sums = {name: value for name, value in state.items() if name != "seconds"}
        self._start = time.perf_counter() - state["seconds"]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def format_stats(stats: Stats) -> dict[str, str]:
    """Statistics as text, in fairseq's order."""
    known = {name: position for position, name in enumerate(_DIGITS)}
    names = sorted(stats, key=lambda name: known.get(name, len(known)))
    return {name: _format(stats[name], _DIGITS.get(name.removeprefix("best_"), 3)) for name in names}


def as_shown(name: str, value: float) -> float:
    """The value of a statistic, rounded as lines show it."""
    return round(value, _DIGITS.get(name, 3))


def _format(value: float | int, digits: int | None) -> str:
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    value = value if digits is None else round(value, digits)
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:g}"


def _numbers(stats: Stats) -> dict[str, float | int | str]:
    """As `format_stats`, as JSON values; what JSON has no number for (inf, nan) is text."""
    numbers: dict[str, float | int | str] = {}
    for name, text in format_stats(stats).items():
        number = float(text)
        numbers[name] = text if not math.isfinite(number) else int(number) if number.is_integer() else number
    return numbers


def choose_log_format(log_format: str | None, no_progress_bar: bool = False) -> str:
    """``--log-format`` with its default filled in; a bar that no terminal would show becomes ``simple``."""
    if log_format is None:
        log_format = "simple" if no_progress_bar else "tqdm"
    return "simple" if log_format == "tqdm" and not sys.stderr.isatty() else log_format


class TrainLog:
    """Where a run's statistics go.

    log_format: simple, json, tqdm or none, see `choose_log_format`. log_interval: updates from one progress line to
    the next, as in fairseq also across epochs. log_file gets every line, whatever log_format shows on the terminal.
    config: the run's settings, for Weights & Biases. Raises FairseqError when a file cannot be opened or a package is
    missing.
    """

    def __init__(
        self,
        log_format: str | None = None,
        log_interval: int = 100,
        *,
        is_master: bool = True,
        log_file: str | None = None,
        tensorboard_logdir: str | None = None,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.log_format = choose_log_format(log_format)
        self.log_interval = log_interval
        self.is_master = is_master
        self._file: LineHandler | None = None
        self._tensorboard: _TensorBoard | None = None
        self._wandb: Any = None
        if not is_master:
            return
        if wandb_project is not None:
            self._wandb = _start_wandb(wandb_project, config or {})
        if tensorboard_logdir is not None:
            self._tensorboard = _TensorBoard(tensorboard_logdir)
        if log_file is not None:
            self._file = _open_log_file(log_file)

    def is_due(self, num_updates: int) -> bool:
        """Whether a log interval ends with this update, epochs aside: the time to call `Progress.log`."""
        return num_updates % self.log_interval == 0

    def progress(self, epoch: int, total: int, start: int = 0) -> Progress:
        """Progress through one epoch of ``total`` updates from ``start`` on."""
        return Progress(self, epoch, total, start)

    def summary(self, tag: str, epoch: int | None, stats: Stats, num_updates: int, *, validation: bool) -> None:
        """Log the statistics of a whole epoch. tag: ``train``, or with ``validation`` the name of the subset, which
        may be that of the training data. epoch: None when a trained model is measured.
        """
        stats = {**stats, "num_updates": num_updates}
        if self.log_format == "json":
            values = {f"{tag}_{name}": value for name, value in _numbers(stats).items()}
            line = json.dumps(values if epoch is None else {"epoch": epoch} | values)
        else:
            parts = [] if epoch is None else [f"epoch {epoch:03d}"]
            parts += [f"valid on '{tag}' subset"] * validation
            line = " | ".join(parts + [f"{name} {text}" for name, text in format_stats(stats).items()])
        self._emit(tag, line, console=self.log_format != "none")
        self._record(tag, stats, num_updates)

    def _emit(self, tag: str, line: str, console: bool) -> None:
        if not self.is_master:
            return
        logger = logging.getLogger(tag)
        if console:
            logger.info(line)
        elif self._file is not None:
            self._file.handle(logger.makeRecord(tag, logging.INFO, __file__, 0, line, (), None))

    def _record(self, tag: str, stats: Stats, num_updates: int) -> None:
        """Send the numbers to TensorBoard and Weights & Biases."""
        if self._tensorboard is not None:
            self._tensorboard.add(tag, stats, num_updates)
        if self._wandb is not None:
            self._wandb.log({f"{tag}/{name}": value for name, value in stats.items()}, step=num_updates)

    def close(self) -> None:
        """Flush and close everything that was opened."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            logging.getLogger().removeHandler(self._file)
            self._file.close()
            with contextlib.suppress(OSError):  # which its handler has told
                self._file.stream.close()
        self._tensorboard = self._wandb = self._file = None

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress:
    """Progress through an epoch: a bar on a terminal, or lines. A context manager."""

    def __init__(self, log: TrainLog, epoch: int, total: int, start: int) -> None:
        self._log = log
        self._epoch, self._total, self._done = epoch, total, start
        self._header = f"epoch {epoch:03d}"
        self._stack = contextlib.ExitStack()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if self._log.log_format == "tqdm" and self._log.is_master:
            self._stack.enter_context(logging_redirect_tqdm())  # lines are printed above the bar, not into it
            self._bar = self._stack.enter_context(
                tqdm(desc=self._header, total=self._total, initial=self._done, leave=False, dynamic_ncols=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()

    def log(self, stats: Stats, num_updates: int) -> None:
        """Show the statistics of the log interval that has just ended. Every process calls it."""
        log, epoch = self._log, self._epoch
        stats = {**stats, "num_updates": num_updates}
        if log.log_format == "json":
            position = round(epoch - 1 + self._done / max(self._total, 1), 3)
            line = json.dumps({"epoch": epoch, "update": position} | _numbers(stats))
        else:
            values = ", ".join(f"{name}={text}" for name, text in format_stats(stats).items())
            line = f"{self._header}:  {self._done:5d} / {self._total} {values}"
        if self._bar is not None:
            shown = format_stats({name: stats[name] for name in _BAR_STATS if name in stats})
            self._bar.set_postfix_str(", ".join(f"{name}={text}" for name, text in shown.items()))
        log._emit("train_inner", line, console=log.log_format in ("simple", "json"))
        log._record("train_inner", stats, num_updates)


def _open_log_file(path: str) -> LineHandler:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  (TrainLog closes it)
    except OSError as error:
        raise FairseqError(f"--log-file {path}: cannot write: {error.strerror}") from error
    handler = LineHandler(stream, f"--log-file {path}")
    logging.getLogger().addHandler(handler)
    return handler


class _TensorBoard:
    """Event files, one directory a tag, so that TensorBoard draws training and validation into one chart."""

    def __init__(self, directory: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise FairseqError("--tensorboard-logdir needs TensorBoard: pip install tensorboard") from None
        self._directory, self._make = Path(directory), SummaryWriter
        self._writers: dict[str, Any] = {}
        self._failed = False
        self._excepthook = threading.excepthook
        threading.excepthook = self._on_exception
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FairseqError(f"--tensorboard-logdir {directory}: cannot write: {error.strerror}") from error

    def add(self, tag: str, stats: Stats, step: int) -> None:
        if self._failed:
            return
        try:
            if tag not in self._writers:
                self._writers[tag] = self._make(str(self._directory / tag))
            for name, value in stats.items():
                self._writers[tag].add_scalar(name, value, step)
            self._writers[tag].flush()
        except OSError as error:
            self._failed = True
            warn_unwritable(f"--tensorboard-logdir {self._directory}", error)

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # told before
                writer.close()
        threading.excepthook = self._excepthook

    def _on_exception(self, found: threading.ExceptHookArgs) -> None:
        if type(found.thread).__name__ != "_AsyncWriterThread":  # TensorBoard's, whose errors ``add`` gets too
            self._excepthook(found)


def _start_wandb(project: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise FairseqError("--wandb-project needs Weights & Biases: pip install wandb") from None
    try:
        return wandb.init(project=project, config=dict(config))
    except wandb.Error as error:
        raise FairseqError(f"--wandb-project {project}: {error}") from error
