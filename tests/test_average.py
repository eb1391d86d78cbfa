"""Averaging checkpoints: the numbers, which files, and that the result is a checkpoint like any other."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fairseq.checkpoint import load_checkpoint, load_model
from fairseq.cli.average import main
from fairseq.errors import FairseqError
from fairseq.training.averaging import average_checkpoints, last_checkpoints
from tests.toys import toy_model, write_toy_checkpoint

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "average_checkpoints.py"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """Epochs 1 to 4 (also 11), updates 100, 200 and 1000, best and last, each of another seed."""
    names = ["checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4", "checkpoint11"]
    names += ["checkpoint_1_100", "checkpoint_2_200", "checkpoint_11_1000", "checkpoint_best", "checkpoint_last"]
    for seed, name in enumerate(names):
        write_toy_checkpoint(toy_model(seed), tmp_path / f"{name}.pt")
    return tmp_path


def mean_of(paths: list[Path]) -> dict[str, torch.Tensor]:
    states = [torch.load(path, weights_only=False)["model"] for path in paths]
    return {name: torch.stack([s[name].double() for s in states]).mean(0) for name in states[0]}


def assert_is_mean(output: Path, paths: list[Path]) -> None:
    found = torch.load(output, weights_only=False)["model"]
    expected = mean_of(paths)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].float())


def test_files(run_dir, capsys):
    paths = [run_dir / "checkpoint1.pt", run_dir / "checkpoint3.pt", run_dir / "checkpoint_best.pt"]
    output = run_dir / "new" / "average.pt"
    main(["--inputs", *map(str, paths), "--output", str(output)])
    assert "mean of 3 checkpoints" in capsys.readouterr().out
    assert_is_mean(output, paths)
    state = torch.load(output, weights_only=False)
    assert isinstance(state["args"], Namespace)
    assert (state["args"].source_lang, state["args"].arch) == ("xx", "transformer")
    expected = mean_of(paths)["decoder.embed_tokens.weight"]
    assert torch.allclose(load_model(output).decoder.embed_tokens.weight.double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--num-epoch-checkpoints", "3"], ["checkpoint11", "checkpoint4", "checkpoint3"]),
        (["--num-epoch-checkpoints", "2", "--checkpoint-upper-bound", "4"], ["checkpoint4", "checkpoint3"]),
        (["--num-update-checkpoints", "2"], ["checkpoint_11_1000", "checkpoint_2_200"]),
        (
            ["--num-update-checkpoints", "2", "--checkpoint-upper-bound", "999"],
            ["checkpoint_2_200", "checkpoint_1_100"],
        ),
    ],
)
def test_last_of_a_run(run_dir, flags, names):
    main(["--inputs", str(run_dir), "--output", str(run_dir / "average.pt"), *flags])
    assert_is_mean(run_dir / "average.pt", [run_dir / f"{name}.pt" for name in names])


def test_fairseqs_script_name(run_dir):
    command = [sys.executable, str(SCRIPT), "--inputs", str(run_dir), "--num-epoch-checkpoints", "2"]
    subprocess.run([*command, "--output", str(run_dir / "average.pt")], check=True, cwd=SCRIPT.parents[1])
    assert_is_mean(run_dir / "average.pt", [run_dir / "checkpoint11.pt", run_dir / "checkpoint4.pt"])


def test_latest_first(run_dir):
    assert [path.name for path in last_checkpoints(run_dir, 2)] == ["checkpoint11.pt", "checkpoint4.pt"]
    assert [path.name for path in last_checkpoints(run_dir, 4, upper_bound=4)] == [
        f"checkpoint{n}.pt" for n in (4, 3, 2, 1)
    ]
    assert [path.name for path in last_checkpoints(run_dir, 1)] == ["checkpoint11.pt"]
    updates = last_checkpoints(run_dir, 2, by_updates=True, upper_bound=200)
    assert [path.name for path in updates] == ["checkpoint_2_200.pt", "checkpoint_1_100.pt"]
    with pytest.raises(FairseqError, match="0 checkpoints to average: must be at least 1"):
        last_checkpoints(run_dir, 0)
    with pytest.raises(FairseqError, match="no checkpoints to average"):
        average_checkpoints([])


def test_float16_becomes_float32_and_sums_are_exact(tmp_path):
    for i, value in enumerate((2048.0, 1.0, 1.0)):  # 2048 + 1 is 2048 in float16
        model = {"w": torch.tensor([value], dtype=torch.float16), "steps": torch.tensor([7 + i])}
        torch.save({"args": Namespace(arch="x"), "model": model}, tmp_path / f"{i}.pt")
    averaged = average_checkpoints([tmp_path / f"{i}.pt" for i in range(3)])
    assert averaged["extra_state"] == {"train_iterator": {"epoch": 1}}  # fairseq looks for it
    found = averaged["model"]
    assert found["w"].dtype == torch.float32  # as fairseq's script makes it
    assert found["w"].item() == torch.tensor(2050 / 3).item()
    assert found["steps"].tolist() == [7]


@pytest.mark.parametrize("name", ["fairseq08_postln_3x3", "fairseq012_tiny", "fairseq08_admin_1x1_full"])
def test_originals_average_with_themselves(shared, tmp_path, name):
    """The mean of a checkpoint and itself is the same model; omega and settings survive, foreign objects do not."""
    path, output = shared / "reference" / f"{name}.pt", tmp_path / "average.pt"
    main(["--inputs", str(path), str(path), "--output", str(output)])
    before, after = load_checkpoint(path), load_checkpoint(output)
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(before["model"][key], after["model"][key]) for key in before["model"])
    keys = ("encoder_layers", "encoder_embed_dim", "share_all_embeddings", "source_lang", "target_lang", "arch")
    assert all(before["args"].get(key) == after["args"].get(key) for key in keys)
    assert after["extra_state"]["train_iterator"]["epoch"] == before["extra_state"]["train_iterator"]["epoch"]
    assert after["optimizer_history"][-1]["num_updates"] == before["optimizer_history"][-1]["num_updates"]
    assert after["last_optimizer_state"] is None
    assert [p.shape for p in load_model(output).parameters()] == [p.shape for p in load_model(path).parameters()]
    torch.load(output, weights_only=False)  # needs no class but Namespace


# -- errors


def assert_fails(capsys: pytest.CaptureFixture[str], status: int, message: str, *argv: object) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in argv])
    assert exit_info.value.code == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_usage_errors(run_dir, capsys):
    out = ("--output", run_dir / "a.pt")
    one = run_dir / "checkpoint1.pt"
    assert_fails(capsys, 2, "--inputs", *out)
    assert_fails(capsys, 2, "--output FILE is missing", "--inputs", one)
    assert_fails(
        capsys,
        2,
        "contradict",
        "--inputs",
        run_dir,
        *out,
        *("--num-epoch-checkpoints", 2, "--num-update-checkpoints", 2),
    )
    assert_fails(capsys, 2, "at least 1", "--inputs", run_dir, *out, "--num-epoch-checkpoints", 0)
    assert_fails(capsys, 2, "take one directory", "--inputs", one, *out, "--num-epoch-checkpoints", 1)
    assert_fails(capsys, 2, "take one directory", "--inputs", run_dir, one, *out, "--num-epoch-checkpoints", 1)
    assert_fails(capsys, 2, "is a directory", "--inputs", run_dir, *out)
    assert_fails(capsys, 2, "--checkpoint-upper-bound needs", "--inputs", one, *out, "--checkpoint-upper-bound", 3)
    assert not (run_dir / "a.pt").exists()


def test_files_that_do_not_fit(run_dir, capsys, tmp_path):
    out = ("--output", tmp_path / "a.pt")
    assert_fails(
        capsys, 1, "5 files checkpointEPOCH.pt, and 6", "--inputs", run_dir, *out, "--num-epoch-checkpoints", 6
    )
    bound = ("--num-update-checkpoints", 2, "--checkpoint-upper-bound", 150)
    assert_fails(capsys, 1, "1 files checkpoint_EPOCH_UPDATES.pt up to 150", "--inputs", run_dir, *out, *bound)
    assert_fails(capsys, 1, "no such directory", "--inputs", run_dir / "no", *out, "--num-epoch-checkpoints", 2)
    assert_fails(capsys, 1, "no such file", "--inputs", run_dir / "no.pt", *out)
    deep = write_toy_checkpoint(toy_model(decoder_layers=3), tmp_path / "deep.pt")
    one = run_dir / "checkpoint1.pt"
    for inputs in ((one, deep), (deep, one), (one, one, deep)):
        assert_fails(capsys, 1, f"{deep} has parameter decoder.layers.2.", "--inputs", *inputs, *out)
    wide = write_toy_checkpoint(toy_model(encoder_ffn_embed_dim=32), tmp_path / "wide.pt")
    message = (
        f"{wide}: encoder.layers.0.fc1.weight is (32, 16), and (24, 16) in {one}; average checkpoints of one model"
    )
    assert_fails(capsys, 1, message, "--inputs", one, one, wide, *out)
    assert not (tmp_path / "a.pt").exists()
