"""Which files are written, kept and deleted, decision by decision; whole runs are in `tests/test_checkpoint.py`."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.errors import FairseqError
from fairseq.options import CheckpointConfig
from fairseq.training import checkpoint_manager
from fairseq.training.checkpoint_manager import BEST, LAST, CheckpointManager


def make(directory: Path, **flags: Any) -> CheckpointManager:
    return CheckpointManager(CheckpointConfig(save_dir=str(directory), **flags))


def save(
    manager: CheckpointManager,
    epoch: int,
    updates: int,
    value: float | None = None,
    end_of_epoch: bool = False,
    every: bool = True,
) -> set[str]:
    """Save a state that knows its update; returns the names that hold it now."""
    is_best = value is not None and manager.note(value)
    manager.save(lambda: {"updates": updates}, epoch, end_of_epoch, updates, value, is_best, every)
    manager.writer.wait()
    return {name for name in names(manager) if torch.load(manager.directory / name)["updates"] == updates}


def names(manager: CheckpointManager) -> set[str]:
    return {path.name for path in manager.directory.iterdir()}


@pytest.mark.parametrize(
    ("maximize", "values", "better", "best"),
    [
        (False, [3.0, 4.0, 3.0, 2.0, 2.5], [1, 0, 0, 1, 0], [1, 0, 1, 1, 0]),
        (True, [3.0, 2.0, 3.0, 4.0, 3.5], [1, 0, 0, 1, 0], [1, 0, 1, 1, 0]),
        (False, [math.nan, -math.inf, 3.0, math.nan, -math.inf, 3.0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1]),
        (True, [math.inf, 0.0, math.inf, math.nan, 0.5], [0, 1, 0, 0, 1], [0, 1, 0, 0, 1]),
        (False, [3.0004, 3.0003, 3.0001, 2.9994, 2.9996], [1, 0, 0, 1, 0], [1, 1, 1, 1, 0]),
    ],
)
def test_better_and_best(tmp_path, maximize, values, better, best):
    """As in fairseq: as good as the best is saved as the best, and counts as no better for --patience.

    So does what is better by less than the log shows: with --lr 1e-7 and --patience 2 it ends after three validations.
    """
    manager = make(tmp_path, maximize_best_checkpoint_metric=maximize)
    found = [(manager.is_better(value), manager.note(value)) for value in values]
    assert found == [(bool(a), bool(b)) for a, b in zip(better, best, strict=True)]
    finite = [round(value, 3) for value in values if math.isfinite(value)]
    assert manager.best == (max(finite) if maximize else min(finite))


def named(value: object) -> str:
    """A test's id, the same in every process: sets of strings have no order of their own."""
    return str(sorted(value) if isinstance(value, set) else value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"checkpoint3.pt", LAST}),
        ({"save_interval": 3}, {"checkpoint3.pt", LAST}),
        ({"save_interval": 2}, {LAST}),
        ({"no_epoch_checkpoints": True}, {LAST}),
        ({"no_last_checkpoints": True}, {"checkpoint3.pt"}),
        ({"save_interval_updates": 5}, {"checkpoint3.pt", LAST}),
        ({"save_interval_updates": 5, "no_epoch_checkpoints": True}, {LAST}),
        ({"no_save": True}, set()),
    ],
    ids=named,
)
def test_names_at_the_end_of_an_epoch(tmp_path, flags, expected):
    assert save(make(tmp_path, **flags), 3, 20, end_of_epoch=True) == expected


@pytest.mark.parametrize(
    ("flags", "updates", "expected"),
    [
        ({}, 20, {LAST}),
        ({"save_interval_updates": 1}, 7, {"checkpoint_3_7.pt", LAST}),
        ({"save_interval_updates": 5}, 20, {"checkpoint_3_20.pt", LAST}),
        ({"save_interval_updates": 5}, 21, {LAST}),
        ({"save_interval_updates": 5, "no_epoch_checkpoints": True}, 20, {"checkpoint_3_20.pt", LAST}),
        ({"save_interval_updates": 5, "no_last_checkpoints": True}, 20, {"checkpoint_3_20.pt"}),
    ],
    ids=named,
)
def test_names_within_an_epoch(tmp_path, flags, updates, expected):
    assert save(make(tmp_path, **flags), 3, updates) == expected


def test_between_saves_only_the_best_is_written_and_then_the_last_too(tmp_path):
    manager = make(tmp_path, save_interval_updates=5)
    assert save(manager, 1, 5, 2.0, every=False) == {BEST, LAST}
    assert save(manager, 1, 6, 3.0, every=False) == set()
    assert save(manager, 1, 10, 3.0) == {"checkpoint_1_10.pt", LAST}
    assert save(manager, 1, 12, None, every=False) == set()
    assert torch.load(tmp_path / BEST)["updates"] == 5


@pytest.mark.parametrize("sign", [1, -1], ids=["smallest", "largest"])
def test_the_best_are_kept(tmp_path, sign):
    flags = {"best_checkpoint_metric": "bleu", "maximize_best_checkpoint_metric": sign < 0}
    manager = make(tmp_path, keep_best_checkpoints=2, no_last_checkpoints=True, **flags)
    kept = []
    save(manager, 1, 0, math.nan, every=False)
    save(manager, 1, 0)  # without a validation
    assert names(manager) == set()
    for number, value in enumerate((5.0, 7.0, 6.0, 6.00004, 6.00006, 5.5, math.nan, 5.0)):
        save(manager, 1, number, sign * value, every=False)
        kept.append(sorted(sign * float(name[21:-3]) for name in names(manager) - {BEST}))
    assert kept == [[5], [5, 7], [5, 6], [5, 6], [5, 6], [5, 5.5], [5, 5.5], [5, 5.5]]

    def updates_of(value: float) -> int:
        return torch.load(tmp_path / f"checkpoint.best_bleu_{sign * value:.4f}.pt")["updates"]

    assert (updates_of(5), updates_of(5.5)) == (7, 5)  # of equals the last
    assert torch.load(tmp_path / BEST)["updates"] == 7


@pytest.mark.parametrize(("maximize", "as_good", "worse"), [(False, 6.00004, 6.00006), (True, 5.99996, 5.99994)])
def test_as_good_as_the_worst_kept_to_four_digits_takes_its_place(tmp_path, maximize, as_good, worse):
    manager = make(tmp_path, keep_best_checkpoints=1, maximize_best_checkpoint_metric=maximize)
    kept = "checkpoint.best_loss_6.0000.pt"
    assert save(manager, 1, 1, 6.0) == {kept, BEST, LAST}
    assert save(manager, 1, 2, as_good) == {kept, BEST, LAST}
    assert save(manager, 1, 3, worse) == {BEST, LAST}  # as good to the three digits that are logged
    assert names(manager) == {kept, BEST, LAST}
    better = 7.0 if maximize else 5.0
    assert save(manager, 1, 4, better) == names(manager) == {f"checkpoint.best_loss_{better:.4f}.pt", BEST, LAST}
    save(make(tmp_path, keep_best_checkpoints=0), 1, 5, better)  # those of a run before stay
    assert names(manager) == {f"checkpoint.best_loss_{better:.4f}.pt", BEST, LAST}


@pytest.mark.parametrize(
    ("count", "left"), [(-1, [1, 2, 10]), (0, [1, 2, 10]), (1, [10]), (2, [2, 10]), (9, [1, 2, 10])]
)
def test_last_epochs_are_kept(tmp_path, count, left):
    manager = make(tmp_path, keep_last_epochs=count)
    for epoch in (1, 2, 10):
        save(manager, epoch, 7 * epoch, end_of_epoch=True)
    assert names(manager) == {f"checkpoint{epoch}.pt" for epoch in left} | {LAST}


@pytest.mark.parametrize(("count", "left"), [(-1, [5, 95, 100]), (0, [5, 95, 100]), (1, [100]), (2, [95, 100])])
def test_last_updates_are_kept(tmp_path, count, left):
    manager = make(tmp_path, save_interval_updates=5, keep_interval_updates=count, keep_best_checkpoints=0)
    for epoch, updates in ((2, 5), (1, 95), (1, 100)):  # the number of updates decides
        save(manager, epoch, updates, value=1.0)
    expected = {f"checkpoint_{2 if updates == 5 else 1}_{updates}.pt" for updates in left}
    assert names(manager) == expected | {LAST, BEST}


def test_the_end_of_an_epoch_deletes_none_of_its_updates(tmp_path):
    """As in fairseq: files of updates go when another is written."""
    for updates in (5, 10):
        save(make(tmp_path, save_interval_updates=5), 1, updates)
    manager = make(tmp_path, save_interval_updates=5, keep_interval_updates=1)
    save(manager, 1, 12, end_of_epoch=True)
    assert {"checkpoint_1_5.pt", "checkpoint_1_10.pt"} < names(manager)
    save(manager, 2, 15)
    assert names(manager) == {"checkpoint_2_15.pt", "checkpoint1.pt", LAST}


@pytest.mark.parametrize("in_background", [True, False])
def test_nothing_is_deleted_before_the_new_files_are_there(tmp_path, monkeypatch, in_background):
    flags = {"keep_last_epochs": 1, "write_checkpoints_asynchronously": in_background}
    save(make(tmp_path, **flags), 1, 7, end_of_epoch=True)
    manager = make(tmp_path, **flags)

    def full(*_: object) -> None:
        raise FairseqError("disk full")

    monkeypatch.setattr(checkpoint_manager, "atomic_copy", full)
    with pytest.raises(FairseqError, match="disk full"):
        save(manager, 2, 14, end_of_epoch=True)
    assert names(manager) == {"checkpoint1.pt", "checkpoint2.pt", LAST}
    assert torch.load(tmp_path / LAST)["updates"] == 7


def test_a_signal_saves_the_last_alone(tmp_path):
    manager = make(tmp_path / "yes", save_interval_updates=1, keep_interval_updates=1)
    for updates in (1, 2):
        save(manager, 1, updates)
    manager.save_last(lambda: {"updates": 3}, 1, 3)
    assert torch.load(manager.directory / LAST)["updates"] == 3  # it is there when the call returns
    assert names(manager) == {"checkpoint_1_2.pt", LAST}
    for flag in ("no_save", "no_last_checkpoints"):
        manager = make(tmp_path / flag, **{flag: True})
        manager.save_last(lambda: {"updates": 3}, 1, 3)
        assert not (tmp_path / flag).exists() or not names(manager)


def test_a_directory_is_made_for_what_is_saved(tmp_path):
    make(tmp_path / "a" / "b")
    make(tmp_path / "c", no_save=True, keep_best_checkpoints=1).save(dict, 1, True, 7, 1.0, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "b").is_dir()


@pytest.fixture
def may_write(monkeypatch) -> threading.Event:
    """Files are not written before it is set."""
    event, original = threading.Event(), checkpoint_manager.save_checkpoint

    def slow(state: dict[str, Any], path: Path) -> None:
        assert event.wait(30)
        original(state, path)

    monkeypatch.setattr(checkpoint_manager, "save_checkpoint", slow)
    return event


def test_training_goes_on_beside_the_writing(tmp_path, may_write):
    """The state may change when `save` returns; the next call waits, as what is kept depends on the files there."""
    manager = make(tmp_path, keep_best_checkpoints=1, no_last_checkpoints=True)
    weight = torch.ones(3)
    assert manager.note(2.0)
    manager.save(lambda: {"w": weight}, 1, False, 1, 2.0, True, every=False)
    weight.zero_()
    assert names(manager) == set()
    threading.Timer(0.05, may_write.set).start()
    manager.save(lambda: pytest.fail("3 is not among the one best"), 1, False, 2, 3.0, False, every=False)
    assert names(manager) == {BEST, "checkpoint.best_loss_2.0000.pt"}
    assert torch.load(tmp_path / BEST)["w"].tolist() == [1, 1, 1]


def test_there_is_one_copy_of_the_state_at_a_time(tmp_path, may_write):
    manager = make(tmp_path)

    def state() -> dict[str, Any]:
        assert names(manager) == {LAST}
        return {"updates": 2}

    manager.save(lambda: {"updates": 1}, 1, False, 1, None, False)
    threading.Timer(0.05, may_write.set).start()
    manager.save_last(state, 1, 2)
    assert torch.load(tmp_path / LAST)["updates"] == 2
