"""Statistics by hand computation; log lines character by character in fairseq's look."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fairseq.cli import score
from fairseq.errors import FairseqError
from fairseq.training.logging import Averages, TrainLog, choose_log_format, format_stats
from fairseq.utils.log_lines import LineHandler, log_to

STATS: dict[str, float | int] = {
    "wall": 33.4,
    "loss": 9.9004,
    "nll_loss": 9.6,
    "ppl": 789.2431,
    "wps": 12345.04,
    "ups": 3.2001,
    "wpb": 3800.0,
    "bsz": 250.0,
    "lr": 1e-05,
    "gnorm": 2.3,
    "clip": 0.0,
    "loss_scale": 128,
    "train_wall": 30.9,
}
LINE = (
    "loss=9.9, nll_loss=9.6, ppl=789.24, wps=12345, ups=3.2, wpb=3800, bsz=250, num_updates=100, lr=1e-05, gnorm=2.3, "
    "clip=0, loss_scale=128, train_wall=31, wall=33"
)
PIPES = " | ".join(part.replace("=", " ") for part in LINE.split(", "))


@pytest.fixture(autouse=True)
def _show_info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield


def test_averages_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    averages = Averages()
    assert averages.stats() == {}
    bits = math.log(2)
    counts = {"sample_size": 20, "ntokens": 20, "nsentences": 10, "updates": 1}
    averages.add(counts | {"loss": 80 * bits, "nll_loss": 60 * bits, "gnorm": 3.0, "clip": 1})
    averages.add(counts | {"loss": 80 * bits, "nll_loss": 20 * bits, "gnorm": 1.0, "clip": 0})
    now = 104.0
    assert averages.stats() == pytest.approx(
        {"loss": 4, "nll_loss": 2, "ppl": 4, "wps": 10, "ups": 0.5, "wpb": 20, "bsz": 10, "gnorm": 2, "clip": 50}
    )
    averages.add({"data_wait": 1.0, "tokens": 30, "positions": 40})
    assert (averages.stats()["padding"], averages.stats()["data_wait"]) == (25, 25)
    saved = averages.state_dict()
    averages.reset()
    assert averages.stats() == {}
    now = 1000.0
    averages.load_state_dict(json.loads(json.dumps(saved)))
    now = 1004.0
    assert averages.stats()["wps"] == pytest.approx(5) and averages.stats()["loss"] == pytest.approx(4)


def test_averages_of_validation_and_of_sentences() -> None:
    averages = Averages()
    averages.add({"loss": 6.0, "nll_loss": 5.0, "sample_size": 2, "ntokens": 10, "nsentences": 2})
    stats = averages.stats()
    assert stats["loss"] == pytest.approx(3 / math.log(2)) and stats["nll_loss"] == pytest.approx(0.5 / math.log(2))
    assert set(stats) == {"loss", "nll_loss", "ppl", "wps"}


def test_an_absurd_loss_has_an_infinite_perplexity() -> None:
    averages = Averages()
    averages.add({"loss": 1e6, "nll_loss": 1e6, "sample_size": 1, "ntokens": 1, "nsentences": 1})
    assert averages.stats()["ppl"] == math.inf
    assert format_stats(averages.stats())["ppl"] == "inf"


def test_numbers_as_text() -> None:
    shown = format_stats(
        {"num_updates": 1234567, "wps": 234567.8, "lr": 0.000123456789, "best_loss": 3.14159, "loss": 2}
    )
    assert shown == {"loss": "2", "wps": "234568", "num_updates": "1234567", "lr": "0.000123457", "best_loss": "3.142"}
    assert list(shown) == ["loss", "wps", "num_updates", "lr", "best_loss"]
    assert format_stats({"loss": math.nan, "ppl": math.inf, "wall": 2345678.9}) == {
        "loss": "nan",
        "ppl": "inf",
        "wall": "2345679",
    }


def test_simple_lines(caplog: pytest.LogCaptureFixture) -> None:
    with TrainLog("simple", 100) as log:
        with log.progress(1, 1131) as progress:
            for _ in range(100):
                progress.update()
            progress.log(STATS, 100)
        log.summary("train", 1, STATS, 100, validation=False)
        log.summary("valid", 1, {"loss": 8.6, "bleu": 20.123, "best_loss": 8.5}, 100, validation=True)
        log.summary("train", 1, {"loss": 8.6}, 100, validation=True)  # --valid-subset valid,train
    assert [(r.name, r.message) for r in caplog.records] == [
        ("train_inner", f"epoch 001:    100 / 1131 {LINE}"),
        ("train", f"epoch 001 | {PIPES}"),
        (
            "valid",
            "epoch 001 | valid on 'valid' subset | loss 8.6 | bleu 20.12 | num_updates 100 | best_loss 8.5",
        ),
        ("train", "epoch 001 | valid on 'train' subset | loss 8.6 | num_updates 100"),
    ]


def test_json_lines(caplog: pytest.LogCaptureFixture) -> None:
    with TrainLog("json", 100) as log:
        with log.progress(2, 400, start=96) as progress:
            for _ in range(4):
                progress.update()
            progress.log(STATS | {"ppl": math.inf}, 500)
        log.summary("train", 2, {"loss": 9.5}, 800, validation=False)
        log.summary("valid", 2, {"loss": 8.5}, 800, validation=True)
    inner, train, valid = (json.loads(record.message) for record in caplog.records)
    assert list(inner)[:3] == ["epoch", "update", "loss"]
    assert (inner["epoch"], inner["update"], inner["loss"], inner["lr"]) == (2, 1.25, 9.9, 1e-05)
    assert inner["num_updates"] == 500 and inner["ppl"] == "inf"
    assert train == {"epoch": 2, "train_loss": 9.5, "train_num_updates": 800}
    assert valid == {"epoch": 2, "valid_loss": 8.5, "valid_num_updates": 800}


def test_bar_and_log_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    path, handlers = tmp_path / "logs" / "train.log", list(logging.getLogger().handlers)
    with TrainLog(None, 2, log_file=str(path)) as log, log.progress(3, 8, start=2) as progress:
        for _ in range(4):
            progress.update()
        progress.log(STATS, 6)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 003:" in shown.err and "6/8" in shown.err
    assert "loss=9.9, ppl=789.24, wps=12345, ups=3.2, lr=1e-05, gnorm=2.3" in shown.err
    assert path.read_text().endswith(f"| INFO | train_inner | epoch 003:      6 / 8 {LINE.replace('=100', '=6')}\n")
    assert logging.getLogger().handlers == handlers


def test_log_file_gets_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    for log_format in ("simple", "none"):
        with TrainLog(log_format, log_file=str(path)) as log:
            log.summary("train", 1, {"loss": 9.5}, 8, validation=False)
    assert [line.split(" | ", 1)[1] for line in path.read_text().splitlines()] == [
        "INFO | train | epoch 001 | loss 9.5 | num_updates 8"
    ] * 2


class Full:
    """What TensorBoard's writer is, and a stream too, on a full disk; it notes what it was asked for."""

    def __init__(self, *_: object) -> None:
        self.asked = 0

    def write(self, *_: object) -> None:
        self.asked += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    add_scalar = flush = close = write


def test_lines_that_cannot_be_written_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    full: Any = Full()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda _: full))
    with TrainLog("simple", log_file=str(tmp_path / "log"), tensorboard_logdir=str(tmp_path / "tb")) as log:
        console = LineHandler(full, "standard output")
        logging.getLogger("train").addHandler(console)
        file = log._file
        assert file is not None
        stream, file.stream = file.stream, full
        for update in range(3):
            log.summary("train", 1, STATS, update, validation=False)
            if update == 1:
                file.stream = stream  # there is room again
    logging.getLogger("train").removeHandler(console)
    warned = capsys.readouterr().err.splitlines()
    assert warned == [
        f"warning: {name}: cannot write: No space left on device; going on without"
        for name in ("standard output", f"--log-file {tmp_path}/log", f"--tensorboard-logdir {tmp_path}/tb")
    ]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_output_is_utf_8_in_every_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    log_to(sys.stdout)
    print("Mädchen", "\udcff", flush=True)  # the latter as in a file name that is not UTF-8
    assert raw.getvalue() == "Mädchen \\udcff\n".encode()


def test_none_and_other_processes_are_silent(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    worker = TrainLog(
        "simple", 1, is_master=False, log_file=str(tmp_path / "log"), tensorboard_logdir=str(tmp_path / "tb")
    )
    for log in (TrainLog("none", 1), worker):
        with log, log.progress(1, 10) as progress:
            assert log.is_due(1)  # every process must come to the same decision
            progress.update()
            progress.log(STATS, 1)
            log.summary("train", 1, STATS, 1, validation=False)
    assert not caplog.records and not list(tmp_path.iterdir())


def test_choose_log_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert choose_log_format(None) == choose_log_format("tqdm", no_progress_bar=True) == "tqdm"
    assert choose_log_format(None, no_progress_bar=True) == "simple"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert choose_log_format(None) == choose_log_format("tqdm") == "simple"
    assert choose_log_format("json") == "json" and choose_log_format("none") == "none"


def test_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with TrainLog("none", 1, tensorboard_logdir=str(tmp_path)) as log:
        for update in (1, 2):
            log.summary("valid", 1, {"loss": 9.5 - update}, update, validation=True)
        events = event_accumulator.EventAccumulator(str(tmp_path / "valid"))
        events.Reload()  # while training goes on
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 8.5), (2, 7.5)]


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType("wandb")

    def init(**given: Any) -> Any:
        calls.append(given)
        return types.SimpleNamespace(
            log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("end")
        )

    vars(fake).update(init=init, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with TrainLog("none", 1, wandb_project="nmt", config={"lr": 1}) as log:
        log.summary("valid", 1, {"loss": 9.5}, 7, validation=True)
    assert calls == [
        {"project": "nmt", "config": {"lr": 1}},
        ({"valid/loss": 9.5, "valid/num_updates": 7}, 7),
        "end",
    ]

    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    vars(fake)["init"] = refuse
    with pytest.raises(FairseqError, match="--wandb-project nmt: no API key"):
        TrainLog("none", wandb_project="nmt")


def test_missing_packages_and_unwritable_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(FairseqError, match="pip install tensorboard"):
        TrainLog("none", tensorboard_logdir=str(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FairseqError, match="pip install wandb"):
        TrainLog("none", wandb_project="nmt")
    with pytest.raises(FairseqError, match="--log-file"):
        TrainLog("none", log_file=str(tmp_path))


def test_a_level_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOGLEVEL", "loud")
    with pytest.raises(SystemExit) as exit_info:
        score.main(["--ref", "none"])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith("error: LOGLEVEL=LOUD in the environment: choose from DEBUG, INFO")
