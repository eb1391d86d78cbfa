"""Training as fairseq 0.12.2 trains: its recorded runs, update by update, and one of its checkpoints continued."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.cli.train import main
from fairseq.training import logging as training_logging
from tests.fairseq_runs import (
    LOGGED,
    RECORDED,
    RESET,
    RESUMED,
    RESUMED_AT,
    RUNS,
    UPDATES,
    flags_of,
    our_smoothing,
    save,
    write_data,
    write_initial,
)
from tests.training_runs import last, logged

RECORD = json.loads(RECORDED.read_text(encoding="utf-8"))
ROUNDING = 2e-6  # relative, of losses; the worst seen is 3e-7
OPTIMIZERS = {"adam": "FairseqAdam", "sgd": "SGD", "adafactor": "FairseqAdafactor"}  # classes that it names


@pytest.fixture(scope="module")
def databin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("fairseq-runs") / "data")


@pytest.fixture(autouse=True)
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_logging, "_format", lambda value, digits: repr(float(value)))


def run(name: str, databin: Path, directory: Path, *flags: object) -> dict[str, list[float]]:
    """The run here: what it logged, an item an update."""
    smoothing = ["--label-smoothing", our_smoothing(0.1)] if "--label-smoothing" in flags_of(name) else []
    places = ["--save-dir", directory, "--log-file", directory / "log"]
    logging.getLogger().setLevel(logging.INFO)
    main([*map(str, [databin, *flags_of(name), *smoothing, *places, *flags])])
    lines = logged(directory)
    inner = [line for line in lines if "loss" in line]
    return {key: [line[key] for line in inner] for key in LOGGED} | {
        "valid_loss": [line["valid_loss"] for line in lines if "valid_loss" in line]
    }


def assert_as_recorded(name: str, ours: dict[str, list[float]], start: int = 0) -> None:
    recorded = RECORD["runs"][name]
    assert recorded["loss"][-1] < 0.95 * recorded["loss"][0]  # it has learned something
    for key, tolerance in (("lr", 1e-7), ("loss", ROUNDING), ("valid_loss", ROUNDING), ("gnorm", 10 * ROUNDING)):
        assert ours[key] == pytest.approx(recorded[key][start:], rel=tolerance, abs=1e-12), key


@pytest.mark.parametrize("name", RUNS)
def test_run_is_fairseqs(name: str, databin: Path, tmp_path: Path) -> None:
    write_initial(name, databin, tmp_path / "start.pt")
    limits = ("--restore-file", tmp_path / "start.pt", *RESET, "--max-update", UPDATES, "--no-save")
    assert_as_recorded(name, run(name, databin, tmp_path, *limits))


def flattened(numbers: dict[int, Any], parameters: list[torch.Tensor]) -> dict[str, Any]:
    """What the optimiser has of all ``parameters`` in one vector each, zeros where it has nothing."""
    [kinds] = {tuple(entries) for entries in numbers.values()}
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    flat = {}
    for kind in kinds:
        values = [numbers.get(number, {kind: zero})[kind] for number, zero in enumerate(zeros)]
        one = values[-1]  # the step is one for all
        flat[kind] = torch.cat([v.flatten() for v in values]) if isinstance(one, torch.Tensor) else one
    return flat


def as_fairseqs(name: str, optimizer_class: str, state: dict[str, Any], model: torch.nn.Module, path: Path) -> None:
    """Save a checkpoint of ours with the parameters' order and numbers of fairseq 0.12.2's.

    optimizer_class: the one in it, around the optimiser in mixed precision; nothing for the usual one.
    """
    own = [name for name, _ in model.named_parameters()]
    spelling = {".fc": ".feed_forward.fc", "final_layer_norm": "ffn_residual.norm"}
    spelling |= {f"{part}_attn_layer_norm": f"{part}_attn_residual.norm" for part in ("self", "encoder")}
    moments = state["last_optimizer_state"]["state"]
    numbers: dict[int, Any] = {}
    parameters: dict[str, torch.Tensor] = {}
    trained: list[torch.Tensor] = []
    for key in RECORD["order"][name]:
        is_copy = key.startswith("encoder.layers.") and len(key.split(".")) == 4  # trained nowhere
        parameters[key] = torch.full((3,), 9.0) if is_copy else state["model"].get(key)
        ours = key
        for theirs, here in spelling.items():
            ours = ours.replace(theirs, here)
        if key == "decoder.output_projection.weight" and ours not in own:  # shared
            parameters[key] = state["model"]["decoder.embed_tokens.weight"]
        elif key == "decoder.output_projection.weight":
            parameters[key] = state["model"]["decoder.embed_out"]
        if ours in own:
            numbers[len(trained)] = moments[own.index(ours)]
        if is_copy or ours in own:
            trained.append(parameters[key])
    assert sorted(numbers) == RECORD["numbers"][name]
    history = {"optimizer_name": optimizer_class or OPTIMIZERS[name.split()[0]], "num_updates": RESUMED_AT}
    optimizer = {"state": numbers, "param_groups": [{"lr": 9.0, "params": list(range(len(trained)))}]}
    if "FP16" in optimizer_class:
        optimizer["loss_scale"] = 128
    if optimizer_class == "FP16Optimizer":
        optimizer |= {"state": {0: flattened(numbers, trained)}, "param_groups": [{"lr": 9.0, "params": [0]}]}
    iterator = {"version": 2, "epoch": RESUMED_AT + 1, "iterations_in_epoch": 0, "shuffle": True}
    extra = {"train_iterator": iterator, "val_loss": None, "best": 99.0}
    save(path, parameters, history, name.split()[0], last_optimizer_state=optimizer, extra_state=extra)


@pytest.mark.parametrize(
    ("name", "optimizer_class"),
    [
        *((name, "") for name in RESUMED),
        ("adam", "FP16Optimizer"),  # --fp16: all parameters in one vector
        ("sgd", "FP16Optimizer"),
        ("adafactor with a first moment", "MemoryEfficientFP16Optimizer"),
    ],
)
def test_continuing_a_checkpoint_of_fairseq(name: str, optimizer_class: str, databin: Path, tmp_path: Path) -> None:
    model = write_initial(name, databin, tmp_path / "start.pt")
    run(name, databin, tmp_path / "first", "--restore-file", tmp_path / "start.pt", *RESET, "--max-update", RESUMED_AT)
    as_fairseqs(name, optimizer_class, last(tmp_path / "first"), model, tmp_path / "theirs.pt")
    rest = run(
        name, databin, tmp_path / "on", "--restore-file", tmp_path / "theirs.pt", "--max-update", UPDATES, "--no-save"
    )
    recorded = {key: values[RESUMED_AT:] for key, values in RECORD["runs"][name].items()}
    assert len(rest["loss"]) == len(recorded["loss"])
    assert_as_recorded(name, rest, start=RESUMED_AT)


def test_continuing_a_checkpoint_with_radam_of_the_admin_code(databin: Path, tmp_path: Path) -> None:
    model = write_initial("adam", databin, tmp_path / "start.pt")
    start = ("--optimizer", "radam", "--restore-file", tmp_path / "start.pt", *RESET)
    whole = run("adam", databin, tmp_path / "whole", *start, "--max-update", UPDATES, "--no-save")
    run("adam", databin, tmp_path / "first", *start, "--max-update", RESUMED_AT)
    as_fairseqs("adam", "FairseqRAdam", last(tmp_path / "first"), model, tmp_path / "theirs.pt")
    limits = ("--restore-file", tmp_path / "theirs.pt", "--max-update", UPDATES, "--no-save")
    rest = run("adam", databin, tmp_path / "on", "--optimizer", "radam", *limits)
    assert rest["loss"] == pytest.approx(whole["loss"][RESUMED_AT:], rel=1e-6)
    assert rest["lr"] == whole["lr"][RESUMED_AT:]
