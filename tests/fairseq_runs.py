"""Training runs of fairseq itself, recorded: loss, gradient norm and learning rate of every update.

Data and initial parameters are formulas, so both sides can start from the same. An epoch is one batch, or one update of
equal batches: how batches are planned makes no difference. Recorded in ``fairseq_runs.json`` with fairseq 0.12.2, torch
1.12.1, numpy 1.23.5 on a CPU (Python 3.9, pip below 24.1) by::

    python -m tests.fairseq_runs PYTHON_OF_THAT_ENVIRONMENT
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zlib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDatasetWriter
from fairseq.models.state_dict import to_fairseq
from fairseq.models.transformer import Transformer
from fairseq.options import parse_train_args
from fairseq.training.train import build_model

RECORDED = Path(__file__).with_name("fairseq_runs.json")
UPDATES, RESUMED_AT = 20, 8
WORDS = 28
VOCAB = 4 + WORDS
ALWAYS = shlex.split(
    """
    --arch transformer --encoder-layers 1 --encoder-embed-dim 16 --encoder-ffn-embed-dim 24 --encoder-attention-heads 2
    --decoder-layers 1 --decoder-attention-heads 2 --dropout 0 --max-tokens 100000 --num-workers 0 --cpu
    --log-format json --log-interval 1 --no-epoch-checkpoints
    """
)
RESET = ("--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler")
ADAM = "--optimizer adam --adam-betas '(0.9, 0.98)' --lr 2e-3"
SMOOTHED = "--criterion label_smoothed_cross_entropy --label-smoothing 0.1"
RUNS = {
    "adam": f"""{ADAM} --weight-decay 0.1 {SMOOTHED} --lr-scheduler inverse_sqrt --warmup-updates 5
        --warmup-init-lr 1e-4""",
    "clipped": f"{ADAM} --lr-scheduler inverse_sqrt --warmup-updates 5 --clip-norm 0.6 --share-all-embeddings",
    "pre-ln": f"""{ADAM} {SMOOTHED} --lr-scheduler polynomial_decay --warmup-updates 3 --total-num-update 15 --power 2
        --end-learning-rate 1e-5 --encoder-normalize-before --decoder-normalize-before --activation-fn gelu""",
    "sentences": f"""{ADAM} --lr-scheduler cosine --warmup-updates 4 --lr-period-updates 6 --lr-shrink 0.5
        --sentence-avg --encoder-learned-pos --decoder-learned-pos
        --max-source-positions 16 --max-target-positions 16""",
    "four batches": f"""{ADAM} --lr-scheduler fixed --force-anneal 4 --lr-shrink 0.8 --warmup-updates 6 --batch-size 8
        --update-freq 4 --decoder-embed-dim 24 --layernorm-embedding --no-scale-embedding""",
    "sgd": """--optimizer sgd --lr 0.05,0.1,0.02 --momentum 0.9 --weight-decay 0.01 --lr-scheduler fixed
        --share-decoder-input-output-embed""",
    "adafactor": "--optimizer adafactor --lr 5e-3 --weight-decay 0.1 --lr-scheduler inverse_sqrt --warmup-updates 5",
    "adafactor with a first moment": "--optimizer adafactor --lr 5e-3 --beta1 0.9 --lr-scheduler fixed",
}  # fmt: skip
RESUMED = ("adam", "sgd", "adafactor with a first moment")  # by fairseq from its own checkpoint of update RESUMED_AT
LOGGED = ("loss", "gnorm", "lr")

# Runs fairseq-train with numbers logged as they are, not rounded to three digits
UNROUNDED = """
import torch, fairseq.logging.meters as meters, fairseq.logging.progress_bar as bar
torch.set_num_threads(1)
meters.safe_round = lambda number, digits: number
bar.format_stat = lambda stat: repr(float(stat))
from fairseq_cli.train import cli_main
cli_main()
"""


def flags_of(name: str) -> list[str]:
    """The run's flags, for either side."""
    return [*ALWAYS, *shlex.split(RUNS[name])]


def our_smoothing(epsilon: float) -> float:
    """fairseq 0.12 leaves the target out of the uniform distribution: its epsilon in ours, of all words."""
    return epsilon * VOCAB / (VOCAB - 1)


def _number(*parts: object) -> int:
    return zlib.crc32(" ".join(map(str, parts)).encode())


def write_data(directory: Path) -> Path:
    """32 training and 8 validation pairs of 3 to 11 words; a target is its source in reverse."""
    directory.mkdir(parents=True)
    dictionary = Dictionary.build({f"w{i:02d}": 100 - i for i in range(WORDS)})
    assert len(dictionary) == VOCAB
    for language, step in (("xx", 1), ("yy", -1)):
        dictionary.save(directory / f"dict.{language}.txt")
        for split, count in (("train", 32), ("valid", 8)):
            with IndexedDatasetWriter(directory / f"{split}.xx-yy.{language}", np.uint16) as writer:
                for i in range(count):
                    words = [4 + _number(split, i, j) % WORDS for j in range(3 + _number(split, i) % 9)]
                    writer.add(np.array([*words[::step], dictionary.eos()]))
    return directory


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of the parameter that fairseq calls ``name``."""
    wave = np.sin(_number(name) % 1000 + 1.7 * np.arange(math.prod(shape)) ** 1.5).reshape(shape)
    if "norm" in name:
        values = 0.1 * wave + name.endswith("weight")
    elif len(shape) == 1:
        values = 0.1 * wave
    else:
        values = wave * math.sqrt((1 if "embed" in name else 2) / shape[-1])
    if "embed_tokens" in name or "embed_positions" in name:
        values[1] = 0  # padding
    return torch.tensor(values, dtype=torch.float32)


def write_initial(name: str, databin: Path, path: Path) -> Transformer:
    """A checkpoint of the run's model before its first update, without settings of ours; returns the model."""
    model = build_model(parse_train_args([str(databin), *flags_of(name)]), VOCAB, VOCAB)
    parameters: dict[str, Tensor] = {}
    values: dict[int, Tensor] = {}  # shared parameters have one, of the first name
    for key, tensor in to_fairseq(model.state_dict()).items():
        is_buffer = key.endswith((".version", "._float_tensor"))
        parameters[key] = (
            tensor if is_buffer else values.setdefault(tensor.data_ptr(), formula(key, tuple(tensor.shape)))
        )
    save(path, parameters, {"optimizer_name": "none", "num_updates": 0})
    return model


def save(
    path: Path, parameters: Mapping[str, Tensor], history: dict[str, Any], optimizer: str = "adam", **more: Any
) -> None:
    """A checkpoint as fairseq writes it, as far as either side looks at it."""
    args = Namespace(
        arch="transformer", task="translation", criterion="cross_entropy", optimizer=optimizer, lr_scheduler="fixed"
    )
    args.source_lang, args.target_lang, args.data = "xx", "yy", "data"
    iterator = {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True}
    state = {
        "args": args,
        "model": dict(parameters),
        "optimizer_history": [{"criterion_name": "", "lr_scheduler_state": {"best": None}} | history],
        "extra_state": {"train_iterator": iterator, "val_loss": None, "best": None},
        "last_optimizer_state": None,
    }
    torch.save(state | more, path)


def _record(python: str) -> dict[str, Any]:
    recorded: dict[str, Any] = {"runs": {}, "order": {}, "numbers": {}}
    with tempfile.TemporaryDirectory() as temporary:
        databin = write_data(Path(temporary) / "data")
        for name in RUNS:
            start, out = Path(temporary) / "start.pt", Path(temporary) / name
            write_initial(name, databin, start)
            # neither PYTHONPATH nor the working directory may lead to the fairseq that this is
            elsewhere = {"cwd": temporary, "env": {**os.environ, "PYTHONPATH": ""}}
            argv = [python, "-c", UNROUNDED, str(databin), *flags_of(name), "--save-dir", str(out)]
            lines: list[dict[str, str]] = []
            for limit in (RESUMED_AT, UPDATES) if name in RESUMED else (UPDATES,):
                restore = () if lines else ("--restore-file", str(start), *RESET)
                done = subprocess.run(
                    [*argv, *restore, "--max-update", str(limit)], capture_output=True, text=True, **elsewhere
                )
                assert done.returncode == 0, done.stderr[-2000:]
                found = re.findall(r"\| (?:train_inner|valid) \| (\{.*\})", done.stdout + done.stderr)
                lines += map(json.loads, found)
                if limit == RESUMED_AT:  # how a checkpoint of fairseq numbers what its optimiser has
                    state = torch.load(out / "checkpoint_last.pt", weights_only=False)
                    recorded["order"][name] = list(state["model"])
                    recorded["numbers"][name] = sorted(state["last_optimizer_state"]["state"])
            inner, valid = ([line for line in lines if key in line] for key in ("loss", "valid_loss"))
            assert len(inner) == len(valid) == UPDATES
            run = {key: [float(f"{float(line[key]):.8g}") for line in inner] for key in LOGGED}
            run["valid_loss"] = [float(f"{float(line['valid_loss']):.8g}") for line in valid]
            recorded["runs"][name] = run
    return recorded


if __name__ == "__main__":
    text = json.dumps(_record(sys.argv[1]), indent=0)
    RECORDED.write_text(re.sub(r",\n(?=[\d\"])", ", ", text) + "\n", encoding="utf-8")
