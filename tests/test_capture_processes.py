"""``--cuda-graphs`` of several processes, without GPUs: each has its own tapes, and all end an update alike."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fairseq.criterions import cross_entropy
from fairseq.training.capture import UpdateGraphs
from tests.tape import TapeRecorder
from tests.training_runs import batches_of_shapes, endless_updates, trainer_and_batches

UPDATES = 16
FLAGS = ("--clip-norm", 2.0, "--weight-decay", 0.01)
RUNS: dict[str, tuple[tuple[Any, ...], bool, str]] = {  # flags, graphs, what goes wrong
    "wrapped": ((), False, ""),
    "graphs": (("--ddp-backend", "legacy_ddp"), True, ""),
    "memory": (("--ddp-backend", "legacy_ddp"), True, "memory"),
    "failing": (("--ddp-backend", "legacy_ddp"), True, "failing"),
    "wrapped, 2": (("--update-freq", 2), False, ""),
    "graphs, 2": (("--ddp-backend", "legacy_ddp", "--update-freq", 2), True, ""),
    "wrapped, fp16": (("--fp16-scale-window", 6), False, ""),
    "graphs, fp16": (("--ddp-backend", "legacy_ddp", "--fp16-scale-window", 6), True, ""),
    "wrapped, broken": ((), False, "broken"),
    "graphs, broken": (("--ddp-backend", "legacy_ddp"), True, "broken"),
}


def _run(databin: Path, rank: int, name: str) -> dict[str, Any]:
    """Losses and gradient norms of some updates, the parameters after them, and what recorders and log say."""
    flags, graphs, wrong = RUNS[name]
    itr = batches_of_shapes(databin, 3, 250, rank=rank, world_size=2)
    trainer, _ = trainer_and_batches(databin, *FLAGS, *flags, fp16="fp16" in name, rank=rank, world_size=2)
    trainer.dummy_batch = itr.first_batch
    trainer._check_every_update = trainer._check_every_update and not graphs  # as on a GPU, late
    recorder = TapeRecorder()
    if graphs:
        trainer.graphs = UpdateGraphs(trainer, recorder)
    if rank == 1 and wrong == "memory":
        recorder.failures = [torch.OutOfMemoryError("CUDA out of memory")]
    if rank == 0 and wrong == "failing":
        recorder.failures = [RuntimeError("operation not permitted when stream is capturing")]
    eager_ends: list[int] = []
    apply = trainer._apply
    trainer._apply = lambda *rest: eager_ends.append(1) or apply(*rest)
    bias = trainer.model.encoder.layers[0].self_attn.out_proj.bias
    lines = []
    for update, micro_batches in enumerate(islice(endless_updates(trainer, itr), UPDATES)):
        good = bias.detach().clone()
        if wrong == "broken" and update in (9, 12):
            bias.data.fill_(float("inf"))
        trainer.train_step(micro_batches)
        stats = trainer.take_stats()
        if wrong == "broken" and update in (9, 12):
            bias.data.copy_(good)
        lines.append([stats[key] for key in ("loss", "gnorm", "ntokens", "sample_size", "skipped")])
    parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])
    return {
        "lines": lines,
        "parameters": parameters,
        "repeated": recorder.repeated,
        "eager ends": len(eager_ends),
        "counts": (trainer.num_updates, trainer.skipped.count),
    }


def _in_each(rank: int, databin: Path, directory: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    cross_entropy.without_padding = lambda features, target, padding_idx: (features, target)  # as on a GPU
    dist.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=2)
    try:
        torch.save({name: _run(databin, rank, name) for name in RUNS}, directory / str(rank))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(toy_databin, tmp_path_factory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("runs")
    mp.spawn(_in_each, (toy_databin, directory), nprocs=2)
    return [torch.load(directory / str(rank)) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name.split(",")[0] != "wrapped"])
def test_updates_are_those_of_distributed_data_parallel(runs, name):
    """Also where one process has no memory for a graph, or no graphs at all."""
    _, comma, rest = name.partition(",")
    expected = runs[0]["wrapped" + comma + rest]
    for run in runs:
        assert run[name]["counts"] == expected["counts"]
        for line, other in zip(run[name]["lines"], expected["lines"], strict=True):
            assert line == pytest.approx(other, rel=1e-4)
        torch.testing.assert_close(run[name]["parameters"], expected["parameters"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_parameters_are_the_same_in_all_processes(runs, name):
    """On a GPU the two ways to end an update may round differently: processes take the same one."""
    one, other = (run[name]["parameters"] for run in runs)
    assert torch.equal(one, other)
    _, graphs, wrong = RUNS[name]
    ways = 2 if wrong == "broken" else 0  # that after one that was skipped looks at once
    assert [run[name]["eager ends"] for run in runs] == [ways if graphs else UPDATES] * 2


@pytest.mark.slow
def test_graphs_were_used(runs):
    repeated = {name: [run[name]["repeated"] for run in runs] for name, (_, graphs, _) in RUNS.items() if graphs}
    assert repeated["failing"] == [0, repeated["graphs"][1]]
    assert repeated["memory"][0] == repeated["graphs"][0] > UPDATES
    assert 0 < repeated["memory"][1] < repeated["graphs"][1]
    assert min(repeated["graphs, 2"] + repeated["graphs, broken"]) > UPDATES / 2
