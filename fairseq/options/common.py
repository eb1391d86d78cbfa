"""Flags of every command that runs a model, and what several groups of flags share."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.utils.flags import flag

LOG_FORMATS = ("simple", "json", "tqdm", "none")
SEGMENTATIONS = ("subword_nmt", "fastbpe", "sentencepiece")
POST_PROCESSORS = ("subword_nmt", "@@ ", "sentencepiece")


@dataclass
class CommonConfig:
    """Devices and precision: every command that runs a model has these."""

    seed: int = flag(1, "seed of all random numbers", least=0, below=2**63)
    cpu: bool = flag(False, "run on the CPU even when a GPU is there")
    fp16: bool = flag(False, "compute in float16 (training: with dynamic loss scaling)")
    bf16: bool = flag(False, "compute in bfloat16")
    user_dir: str | None = flag(
        None,
        "run the Python package in this directory, which may register architectures and more; nothing else, and no "
        "file that is read, makes a command load code",
        metavar="DIR",
    )


@dataclass
class LogConfig:
    """Progress."""

    log_format: str | None = flag(
        None, "how to log progress (default: tqdm, a bar, on a terminal, else simple)", choices=LOG_FORMATS
    )
    log_interval: int = flag(100, "log every N updates, or batches of validation and generation", least=1)
    no_progress_bar: bool = flag(False, "text lines instead of a progress bar")
