"""Training runs of a tiny model by the real command line, and what they leave behind."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fairseq.cli import Main
from fairseq.cli.train import main
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDatasetWriter
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.translation import Batch, TranslationData
from fairseq.options import DataConfig, parse_train_args, section
from fairseq.training.distributed import World
from fairseq.training.train import build_model
from fairseq.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    """
    --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2
    --decoder-layers 1 --decoder-attention-heads 2 --dropout 0.2 --attention-dropout 0.1
    --optimizer adam --lr 0.01 --lr-scheduler inverse_sqrt --warmup-updates 5
    --max-tokens 400 --num-workers 0 --cpu --log-format json --log-interval 1
    """
)
SMOOTHED = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
SGD = shlex.split("--optimizer sgd --lr 0.5 --lr-scheduler fixed --warmup-updates 0 --dropout 0 --attention-dropout 0")
RECIPE = ("--adam-betas", "(0.9, 0.98)", "--lr", "2e-3", "--warmup-updates", 100)  # rounding stays small here
RECIPE += ("--dropout", 0, "--attention-dropout", 0)
EPOCH = 7  # batches of the toy data-bin
CAN_SHARD = torch.__version__ >= "2.11"  # older ones may refuse on the CPU: tests/test_sharding.py
needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="before 2.11 torch may not average gradients on the CPU")


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look
    spec.loader.exec_module(module)
    return module


@cache
def flags_of(command: str) -> set[str]:
    """The flags that a command's help names."""
    main = importlib.import_module(f"fairseq.cli.{command.removeprefix('fairseq-')}").main
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", shown.getvalue()))


def command_line(databin: Path | str, directory: Path, *flags: object) -> list[str]:
    """Checkpoints and ``log`` go to ``directory``; the last of a repeated flag wins."""
    criterion = () if "--criterion" in flags else SMOOTHED
    places = ("--save-dir", directory, "--log-file", directory / "log")
    return [*map(str, (databin, *TINY, *criterion, *places, *flags))]


def train(databin: Path | str, directory: Path, *flags: object) -> list[dict[str, Any]]:
    """Run ``fairseq-train`` in this process; returns the statistics it logged, see `logged`."""
    logging.getLogger().setLevel(logging.INFO)
    skip = len(logged(directory))
    main(command_line(databin, directory, *flags))
    return logged(directory)[skip:]


def trainer_and_batches(
    databin: Path, *flags: object, fp16: bool = False, rank: int = 0, world_size: int = 1
) -> tuple[Trainer, EpochBatchIterator]:
    """What a training command would train, and on what. fp16: which the command line leaves to GPUs.

    rank, world_size: of this process in a group that is there already.
    """
    args = parse_train_args(command_line(databin, Path("unused"), *flags))
    args.fp16 = fp16
    data = TranslationData.open(section(DataConfig, args))
    itr = EpochBatchIterator(
        lambda epoch: data.load("train", epoch),
        max_tokens=400,
        max_sentences=None,
        max_positions=(1024, 1024),
        seed=1,
        rank=rank,
        world_size=world_size,
    )
    world = World(rank, world_size, torch.device("cpu"))
    trainer = Trainer(args, build_model(args, len(data.src_dict), len(data.tgt_dict)), world)
    trainer.dummy_batch = itr.first_batch
    return trainer, itr


def batches_of_shapes(databin: Path, count: int, max_tokens: int, **more: Any) -> EpochBatchIterator:
    """Training batches of at most ``count`` shapes. more: of EpochBatchIterator."""
    dataset = TranslationData.open(DataConfig(str(databin))).load("train")
    return EpochBatchIterator(
        lambda epoch: dataset,
        max_tokens=max_tokens,
        max_sentences=None,
        max_positions=(1024, 1024),
        seed=1,
        required_batch_size_multiple=8,
        batch_shapes=count,
        **more,
    )


def endless_updates(trainer: Trainer, itr: EpochBatchIterator) -> Iterator[list[Batch | None]]:
    """The micro-batches of each update, epoch after epoch."""
    while True:
        yield from itr.updates(trainer.update_freq())
        itr.next_epoch()


def train_updates(trainer: Trainer, batches: EpochBatchIterator, count: int) -> list[float]:
    """``count`` updates, epoch after epoch; returns their losses, each a token."""
    losses: list[float] = []
    for micro_batches in islice(endless_updates(trainer, batches), count):
        assert trainer.train_step(micro_batches)
        stats = trainer.take_stats()
        losses.append(stats["loss"] / stats["ntokens"])
    return losses


def run_updates(trainer: Trainer, batches: list[Any]) -> list[bool]:
    """One of each batch; whether they were done."""
    return [trainer.train_step([batch]) for batch in batches]


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that an update may change."""
    trainer._read_outcome()
    return {
        "parameters": [p.detach().clone() for p in trainer.parameters],
        "optimizer": trainer.optimizer.state_dict()["state"],  # each update sets the groups' lr
        "num_updates": trainer.num_updates,
        "lr": trainer.lr,
    }


def epoch_of_batches(itr: EpochBatchIterator) -> list[Any]:
    """What ``itr`` has left of its epoch."""
    return [micro_batches[0] for micro_batches in itr.updates(1)]


def start(
    databin: Path | str, directory: Path, *flags: object, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    """Start ``fairseq-train`` as a process of its own; its output is in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "fairseq.cli.train", *command_line(databin, directory, *flags)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def logged(directory: Path) -> list[dict[str, Any]]:
    """The statistics in the log file: those of updates have ``loss``, of epochs ``train_loss`` and ``valid_loss``."""
    log = directory / "log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [json.loads(line.split(" | ", 3)[3]) for line in lines if " | {" in line]


def updates(lines: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Number of update -> its statistics, those that a clock has a part in aside."""
    timed = ("wps", "ups", "wall", "train_wall", "data_wait")
    return {
        line["num_updates"]: {key: value for key, value in line.items() if key not in timed}
        for line in lines
        if "update" in line
    }


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, as plain torch reads it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def last(directory: Path) -> dict[str, Any]:
    """What ``checkpoint_last.pt`` holds."""
    return load(directory / "checkpoint_last.pt")


def assert_same(a: Any, b: Any, atol: float = 0.0) -> None:
    """Nested dicts and lists of tensors and numbers are equal, to ``atol``."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], atol)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, atol)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    else:
        assert a == b


def assert_same_to_rounding(one: Path, other: Path) -> None:
    """Two runs ended with the same parameters."""
    before, after = last(one)["model"], last(other)["model"]
    assert before.keys() == after.keys()
    for name in before:
        # the softmax takes no notice of k_proj's bias: its gradient is rounding, which Adam magnifies
        assert_same(before[name], after[name], atol=1e-3 if name.endswith("k_proj.bias") else 1e-5)


def files(directory: Path) -> set[str]:
    """Names of the checkpoints in a directory, and of all that should not be there; the log aside."""
    return {path.name for path in directory.iterdir()} - {"log"}


def write_databin(
    directory: Path,
    count: int,
    seed: int,
    words: int = 28,
    held_out: Mapping[str, int] = MappingProxyType({"valid": 20}),
) -> Path:
    """A data-bin xx-yy of ``count`` training pairs and the splits ``held_out``; a target is its source in reverse."""
    directory.mkdir(parents=True, exist_ok=True)
    dictionary = Dictionary.build({f"w{i:02d}": 100 - i for i in range(words)})
    rng = np.random.default_rng(seed)
    for language in ("xx", "yy"):
        dictionary.save(directory / f"dict.{language}.txt")
    for split, size in {"train": count, **held_out}.items():
        sentences = [rng.integers(4, len(dictionary), rng.integers(3, 12)) for _ in range(size)]
        for language, step in (("xx", 1), ("yy", -1)):
            with IndexedDatasetWriter(directory / f"{split}.xx-yy.{language}", np.uint16) as writer:
                for sentence in sentences:
                    writer.add(np.append(sentence[::step], dictionary.eos()))
    return directory


def assert_fails(
    capsys: pytest.CaptureFixture[str], status: int, message: str, *argv: object, main: Main = main
) -> None:
    """A command ends with a status and an error, of one line unless it is about usage, that contains ``message``."""
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, argv)])
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == status
    assert message in lines[-1]
    assert "error: " in lines[-1]
    if status == 1:
        assert len(lines) == 1
