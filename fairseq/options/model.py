"""Flags of models: the parts of a new one, the checkpoints of a trained one, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.options.common import SEGMENTATIONS
from fairseq.registry import ARCHITECTURES, CRITERIONS, LR_SCHEDULERS, OPTIMIZERS, RESIDUAL_RULES
from fairseq.utils.flags import flag, same_flag

QUANTIZATIONS = (
    "float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16",
)  # fmt: skip


@dataclass
class ComponentConfig:
    """The interchangeable parts."""

    arch: str = flag("transformer", "model architecture", "-a", choices=ARCHITECTURES.names)
    init_type: str = flag(
        "default",
        "residual rule: default (Post-LN, or Pre-LN with --*-normalize-before), adaptive (Admin: starts from "
        "--omega-file, measuring it first if it is missing), adaptive-profiling (Admin: measure omega and stop), "
        "adaptive-closed-form (Admin without measuring), rezero, rezero_postln, looklinear, deepnet, subln, b2t",
        choices=RESIDUAL_RULES.names,
    )
    omega_file: str = flag(
        "profile.ratio.init", "omega profile: written by adaptive-profiling, read by adaptive", metavar="FILE"
    )
    profile_batches: int = flag(1, "training batches to measure omega on", least=1)
    profile_deterministic: bool = flag(False, "measure omega with dropout off")
    criterion: str = flag("cross_entropy", "training criterion", choices=CRITERIONS.names)
    optimizer: str = flag("adam", "optimiser", choices=OPTIMIZERS.names)
    lr_scheduler: str = flag("fixed", "learning-rate schedule", choices=LR_SCHEDULERS.names)


@dataclass
class ArchConfig:
    """The shape alone: a command that builds models and does not train them."""

    arch: str = same_flag(ComponentConfig, "arch")


@dataclass
class ModelPathConfig:
    """Which checkpoints to load."""

    path: str = flag("", "checkpoint, or several for an ensemble: a.pt:b.pt", metavar="FILE[:FILE]")
    model_overrides: dict[str, Any] | None = flag(None, "model settings to change, as JSON")


@dataclass
class AverageConfig:
    """What ``fairseq-average`` averages; ``--inputs``, which takes several values, is added to the parser by hand."""

    output: str = flag("", "checkpoint to write, without an optimiser's state", metavar="FILE")
    num_epoch_checkpoints: int | None = flag(
        None, "average the last N checkpointEPOCH.pt in the directory --inputs", least=1
    )
    num_update_checkpoints: int | None = flag(
        None, "average the last N checkpoint_EPOCH_UPDATES.pt in the directory --inputs", least=1
    )
    checkpoint_upper_bound: int | None = flag(None, "with --num-*-checkpoints: none after this epoch or update")


@dataclass
class ExportConfig:
    """What ``fairseq-export`` writes."""

    checkpoint: str = flag("", "checkpoint of a trained model, of any supported kind", positional=True)
    format: str = flag("fairseq", "whose format to write", choices=("fairseq", "ctranslate2", "huggingface"))
    fold: bool = flag(
        False, "fold omega or alpha into the weights: ordinary Post-LN, same outputs (always but for --format fairseq)"
    )
    output: str = flag(
        "", "directory to write, which must be new; fairseq: for model.pt, and a name in .pt is the file", metavar="DIR"
    )
    quantization: str | None = flag(
        None,
        "precision of the weights (default: float32); huggingface has the floats; CTranslate2 may compute in another",
        choices=QUANTIZATIONS,
    )
    bpe: str | None = flag(
        None,
        "huggingface: the tokenizer takes raw text, which it segments so (default: segmented text)",
        choices=SEGMENTATIONS,
    )
    bpe_codes: str | None = flag(None, "merges of --bpe subword_nmt or fastbpe", metavar="FILE")
    sentencepiece_model: str | None = flag(None, "model of --bpe sentencepiece", metavar="FILE")
    data: str | None = flag(
        None,
        "directory with dict.LANG.txt (default: the checkpoint's, then the data-bin that it was trained on)",
        metavar="DIR",
    )
    user_dir: str | None = flag(None, "run the Python package in this directory first", metavar="DIR")
