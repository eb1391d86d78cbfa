"""Every flag of every command, once, in fairseq's spelling.

A command's flags are a list of dataclasses. ``fairseq-train`` adds those of the chosen architecture, optimiser,
schedule and criterion, which live beside their code. Long because it is a table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import __version__
from fairseq.registry import (
    ARCHITECTURES,
    CRITERIONS,
    LR_SCHEDULERS,
    OPTIMIZERS,
    RESIDUAL_RULES,
    Registry,
    import_user_dir,
)
from fairseq.utils.flags import add_flags, flag, from_namespace

LOG_FORMATS = ("simple", "json", "tqdm", "none")
LAST = "checkpoint_last.pt"
METRICS = ("loss", "nll_loss", "ppl", "bleu")
BACKENDS = ("native", "ctranslate2")
QUANTIZATIONS = (
    "float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16",
)  # fmt: skip
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
    log_interval: int = flag(100, "log every N batches", least=1)
    no_progress_bar: bool = flag(False, "text lines instead of a progress bar")


@dataclass
class TrainLogConfig:
    """Where training logs go besides the terminal, and loss scaling."""

    log_memory: bool = flag(False, "log the most memory used so far, mem_gb, on the CPU too; on a GPU it always is")
    log_file: str | None = flag(None, "append the log to this file too", metavar="FILE")
    tensorboard_logdir: str | None = flag(None, "write TensorBoard event files here", metavar="DIR")
    wandb_project: str | None = flag(None, "log to this Weights & Biases project", metavar="NAME")
    fp16_init_scale: int = flag(2**7, "first loss scale with --fp16", least=1)
    fp16_scale_window: int | None = flag(
        None, "updates without overflow before the loss scale doubles (default: 2^14 / GPUs / update-freq)", least=1
    )
    fp16_scale_tolerance: float = flag(0.0, "share of overflows tolerated before the scale halves", least=0, most=1)
    min_loss_scale: float = flag(1e-4, "stop training when the loss scale falls below this", least=0)
    threshold_loss_scale: float | None = flag(None, "never lower the loss scale below this", least=0)


@dataclass
class DataConfig:
    """What to translate: a data-bin and its two languages."""

    data: str = flag(
        "", "data-bin made by fairseq-preprocess; of several, a:b:c, training reads one an epoch", positional=True
    )
    task: str = flag("translation", "the task", choices=("translation",))
    source_lang: str | None = flag(None, "source language", "-s", metavar="SRC")
    target_lang: str | None = flag(None, "target language", "-t", metavar="TGT")
    left_pad_source: bool = flag(True, "pad the source on the left")
    max_source_positions: int = flag(1024, "longest source sentence, in tokens", least=1)
    truncate_source: bool = flag(False, "cut longer source sentences to --max-source-positions")
    skip_invalid_size_inputs_valid_test: bool = flag(
        False, "leave out too long sentences of validation and test sets, or of raw text, instead of stopping"
    )
    max_tokens: int | None = flag(None, "most tokens in a batch, padding included", least=1)
    batch_size: int | None = flag(None, "most sentences in a batch", "--max-sentences", least=1)


@dataclass
class SubsetConfig:
    """How the subsets of a data-bin are read."""

    max_target_positions: int = flag(1024, "longest target sentence, in tokens", least=1)
    num_workers: int = flag(1, "processes that read and collate batches ahead (0: none)", least=0)
    required_batch_size_multiple: int = flag(8, "batch sizes are multiples of this where possible", least=1)
    required_seq_len_multiple: int = flag(1, "pad both sides of a batch to a multiple of this many tokens", least=1)


@dataclass
class TrainDataConfig:
    """Which subset to train on, and when to validate."""

    train_subset: str = flag("train", "subset to train on", metavar="SPLIT")
    validate_interval: int = flag(1, "validate every N epochs", least=1)
    validate_interval_updates: int = flag(0, "validate every N updates too", least=0)
    disable_validation: bool = flag(False, "do not validate")


@dataclass
class ValidationConfig:
    """What to measure, and on which subsets."""

    valid_subset: str = flag("valid", "subsets to validate on, comma-separated", metavar="SPLIT")
    max_tokens_valid: int | None = flag(None, "most tokens in a validation batch (default: --max-tokens)", least=1)
    batch_size_valid: int | None = flag(
        None, "most sentences in a validation batch (default: --batch-size)", "--max-sentences-valid", least=1
    )
    eval_bleu: bool = flag(False, "translate the validation set and report BLEU")
    eval_bleu_args: dict[str, Any] | None = flag(None, 'search of --eval-bleu as JSON: \'{"beam": 4, "lenpen": 0.6}\'')
    eval_bleu_detok: str = flag("space", "detokeniser of --eval-bleu", choices=("space", "moses"))
    eval_bleu_remove_bpe: str | None = flag(None, "undo this subword segmentation before BLEU", choices=POST_PROCESSORS)
    eval_tokenized_bleu: bool = flag(False, "BLEU on tokens as they are, without sacrebleu's own tokeniser")
    eval_bleu_print_samples: bool = flag(False, "print one translation a validation batch")


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
class OptimizationConfig:
    """How long and how fast to train."""

    max_epoch: int = flag(0, "stop after this epoch (0: no limit)", least=0)
    max_update: int = flag(0, "stop after this many updates (0: no limit)", least=0)
    stop_min_lr: float = flag(-1.0, "stop when the learning rate falls to this", "--min-lr")
    clip_norm: float = flag(0.0, "clip the gradient norm to this (0: do not clip)", least=0)
    max_nonfinite_updates: int = flag(
        10, "give up after N updates in a row without a finite loss and gradients, which are skipped", least=1
    )
    sentence_avg: bool = flag(False, "normalise gradients by sentences instead of tokens")
    update_freq: list[int] = flag([1], "batches a process adds up before an update; a list is by epoch: 4,2,1", least=1)
    compile: bool = flag(False, "compile the layers with torch.compile: slower to start, then faster")
    lr: list[float] = flag([0.25], "learning rate; a list is by epoch (fixed)", "--learning-rate", least=0)


@dataclass
class CheckpointConfig:
    """What to save, what to keep and what to start from."""

    save_dir: str = flag("checkpoints", "directory of the checkpoints", metavar="DIR")
    restore_file: str = flag(LAST, "checkpoint to continue from", metavar="FILE")
    finetune_from_model: str | None = flag(
        None, "start from this checkpoint's parameters alone, all else fresh", metavar="FILE"
    )
    restore_fallback: bool = flag(False, "continue from the newest good checkpoint if checkpoint_last.pt is damaged")
    reset_dataloader: bool = flag(False, "start the data from the first epoch, whatever the checkpoint says")
    reset_lr_scheduler: bool = flag(False, "start the schedule, and the count of updates, from 0")
    reset_meters: bool = flag(False, "do not load the best metric and the training clock")
    reset_optimizer: bool = flag(False, "do not load the optimiser's state; start the schedule from 0")
    save_interval: int = flag(1, "save every N epochs", least=1)
    save_interval_updates: int = flag(0, "save (and validate) every N updates too", least=0)
    keep_interval_updates: int = flag(-1, "keep the last N of those (-1: all)", least=-1)
    keep_last_epochs: int = flag(-1, "keep the last N epoch checkpoints (-1: all)", least=-1)
    keep_best_checkpoints: int = flag(-1, "also keep the N best as checkpoint.best_METRIC_VALUE.pt", least=-1)
    no_save: bool = flag(False, "save nothing")
    no_epoch_checkpoints: bool = flag(False, "save only the last and the best")
    no_last_checkpoints: bool = flag(False, "do not save checkpoint_last.pt")
    no_save_optimizer_state: bool = flag(False, "leave the optimiser's state out (training cannot resume)")
    write_checkpoints_asynchronously: bool = flag(
        True, "train on while a copy of the state, in host memory, is written", "--save-async"
    )
    best_checkpoint_metric: str = flag("loss", "what the best checkpoint is best in", choices=METRICS)
    maximize_best_checkpoint_metric: bool = flag(False, "the largest value of that metric is the best")
    patience: int = flag(-1, "stop after N validations without a better metric (-1: never)", least=-1)


@dataclass
class DistributedConfig:
    """Several processes. Under torchrun its environment decides."""

    distributed_world_size: int | None = flag(
        None, "processes to train with on this machine (default: one a visible GPU, or 1 on the CPU)", least=1
    )
    distributed_port: int = flag(0, "port of the rendezvous (0: any free one)", least=0, below=2**16)
    ddp_backend: str = flag(
        "pytorch_ddp",
        "fully_sharded (FSDP2): parameters, gradients and optimiser state divided among the processes; all other names "
        "mean DistributedDataParallel",
        choices=("pytorch_ddp", "c10d", "no_c10d", "legacy_ddp", "fully_sharded"),
    )
    bucket_cap_mb: int = flag(25, "size of a gradient bucket, in MiB", least=1)
    heartbeat_timeout: float = flag(
        300.0, "end all processes, with status 75, when one has hung or been away for this many seconds (-1: never)"
    )


@dataclass
class MemoryConfig:
    """What to trade for memory."""

    checkpoint_activations: bool = flag(False, "keep only the layers' inputs, and run them again in the backward pass")
    checkpoint_activations_every: int = flag(1, "do so with every K-th layer and keep the others whole", least=1)
    offload_activations: bool = flag(False, "checkpoint activations, and keep these inputs in host memory (GPU only)")


@dataclass
class GenerationConfig:
    """Beam search and its relatives."""

    beam: int = flag(5, "beam size")
    nbest: int = flag(1, "hypotheses to print a sentence")
    max_len_a: float = flag(0.0, "longest output is a * source length + b: a")
    max_len_b: int = flag(200, "longest output is a * source length + b: b")
    min_len: int = flag(1, "shortest output, in tokens before </s>")
    lenpen: float = flag(1.0, "length penalty: below 1 favours shorter, above 1 longer outputs")
    unkpen: float = flag(0.0, "penalty of <unk>: above 0 gives fewer")
    unnormalized: bool = flag(False, "compare hypotheses by their summed score, not by length-normalised ones")
    match_source_len: bool = flag(False, "outputs exactly as long as the source")
    no_repeat_ngram_size: int = flag(0, "no n-gram of this size twice in an output")
    sampling: bool = flag(False, "sample instead of searching")
    sampling_topk: int = flag(-1, "sample among the K likeliest tokens")
    sampling_topp: float = flag(-1.0, "sample among the likeliest tokens that together have this probability")
    temperature: float = flag(1.0, "divide logits by this: above 1 flattens the distribution")
    print_alignment: bool = flag(False, "print A- lines: source position of each output token, by attention")
    replace_unk: str | None = flag(
        None, "replace <unk> by the source word it attends to, translated if in this file", metavar="FILE", const=""
    )


@dataclass
class ReferenceConfig:
    """What else the references serve for."""

    prefix_size: int = flag(0, "force the first N tokens to be the reference's", least=0)
    score_reference: bool = flag(False, "do not search: score the reference")


@dataclass
class TextConfig:
    """Text in and out of the model's tokens."""

    post_process: str | None = flag(
        None,
        "undo this subword segmentation in the output (alone: subword_nmt)",
        "--remove-bpe",
        choices=POST_PROCESSORS,
        const="subword_nmt",
    )
    tokenizer: str | None = flag(None, "tokenise raw input, and detokenise D- lines", choices=("moses", "space"))
    bpe: str | None = flag(
        None, "segment raw input, and undo that in D- lines", choices=("subword_nmt", "sentencepiece")
    )
    bpe_codes: str | None = flag(None, "merges of --bpe subword_nmt", metavar="FILE")
    sentencepiece_model: str | None = flag(None, "model of --bpe sentencepiece", metavar="FILE")


@dataclass
class ModelPathConfig:
    """Which checkpoints to load."""

    path: str = flag("", "checkpoint, or several for an ensemble: a.pt:b.pt", metavar="FILE[:FILE]")
    model_overrides: dict[str, Any] | None = flag(None, "model settings to change, as JSON")


@dataclass
class BackendConfig:
    """Which program translates."""

    backend: str = flag(
        "native", "what translates; ctranslate2: --path is a directory of fairseq-export", choices=BACKENDS
    )


@dataclass
class GenerateDataConfig:
    """Which part of the data-bin to translate, how to score it, and where results go."""

    gen_subset: str = flag("test", "subset to translate", metavar="SPLIT")
    num_shards: int = flag(1, "split the subset in N parts", least=1)
    shard_id: int = flag(0, "translate this part, from 0", least=0)
    results_path: str | None = flag(None, "write generate-SPLIT.txt here instead of printing", metavar="DIR")
    scoring: str = flag("bleu", "score: tokenised BLEU, sacrebleu, chrF", choices=("bleu", "sacrebleu", "chrf"))
    quiet: bool = flag(False, "print the score alone")


@dataclass
class InteractiveConfig:
    """Where ``fairseq-interactive`` reads from."""

    input: str = flag("-", "file of source sentences; - is standard input", metavar="FILE")
    buffer_size: int = flag(0, "read N lines before translating them together (0 or 1: one by one)", least=0)


@dataclass
class ServeConfig:
    """``fairseq-interactive`` as a web page."""

    serve: str | None = flag(
        None,
        "serve a web page and a JSON interface instead (alone: on 127.0.0.1:8000)",
        metavar="HOST:PORT",
        const="127.0.0.1:8000",
    )
    model: list[str] = flag(
        [], "a model to choose on the page; may be given several times", metavar="NAME=FILE[:FILE]", repeat=True
    )
    serve_timeout: float = flag(30.0, "longest a request may take, in seconds", least=0.1)


@dataclass
class ScoreConfig:
    """What ``fairseq-score`` compares, and how."""

    sys: str = flag("-", "translations, one a line; - is standard input", "-s", metavar="FILE")
    ref: str = flag("", "references, one a line", "-r", metavar="FILE")
    order: int = flag(4, "longest n-gram", "-o", least=1)
    ignore_case: bool = flag(False, "compare in lower case")
    sacrebleu: bool = flag(False, "score detokenised text with sacrebleu's tokeniser, and print its signature")
    sentence_bleu: bool = flag(False, "a score for each line, smoothed by counting one match more from bigrams on")


@dataclass
class AverageConfig:
    """What ``fairseq-average`` averages; ``--inputs``, which takes several values, is added to the parser by hand."""

    output: str = flag("", "checkpoint to write", metavar="FILE")
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
    data: str | None = flag(
        None,
        "directory with dict.LANG.txt (default: the checkpoint's, then the data-bin that it was trained on)",
        metavar="DIR",
    )
    user_dir: str | None = flag(None, "run the Python package in this directory first", metavar="DIR")


@dataclass
class ClinicDataConfig:
    """The sentences that the clinic runs models on."""

    data: str = flag("", "data-bin; the first training batch of each seed is what models are run on", positional=True)
    source_lang: str | None = flag(None, "source language", "-s", metavar="SRC")
    target_lang: str | None = flag(None, "target language", "-t", metavar="TGT")
    max_tokens: int = flag(512, "most tokens in that batch, padding included", least=1)


@dataclass
class ClinicConfig:
    """What the clinic measures and where it writes."""

    models: str | None = flag(
        None,
        "models at the start of training: post-ln, pre-ln and init types (default: post-ln,pre-ln,adaptive)",
        metavar="NAMES",
    )
    seeds: list[int] = flag([1, 2, 3], "seeds of the models, which results are averaged over", least=0, below=2**63)
    out_dir: str = flag("clinic", "directory of results: JSON and PNG", metavar="DIR")
    name: str | None = flag(None, "name of the result's files (default: the command's)", metavar="NAME")
    cpu: bool = flag(False, "run on the CPU even when a GPU is there")
    user_dir: str | None = flag(
        None, "run the Python package in this directory, which may register init types", metavar="DIR"
    )


@dataclass
class ClinicDepthConfig:
    """How deep."""

    depths: list[int] = flag([6, 12, 24, 50, 100, 200], "encoder sub-layers, two a layer", least=2)


@dataclass
class ClinicCheckpointConfig:
    """Trained models."""

    path: str | None = flag(
        None,
        "measure these checkpoints, as they started and as they are, instead of --models",
        metavar="[NAME=]FILE[:...]",
    )


@dataclass
class ArchConfig:
    """Which architecture."""

    arch: str = flag("transformer", "model architecture", "-a", choices=ARCHITECTURES.names)


@dataclass
class PreprocessConfig:
    """Text to data-bin."""

    source_lang: str | None = flag(None, "source language", "-s", metavar="SRC")
    target_lang: str | None = flag(None, "target language", "-t", metavar="TGT")
    trainpref: str | None = flag(None, "prefix of the training files", metavar="PREFIX")
    validpref: str | None = flag(None, "prefixes of validation files, comma-separated", metavar="PREFIX")
    testpref: str | None = flag(None, "prefixes of test files, comma-separated", metavar="PREFIX")
    destdir: str = flag("data-bin", "directory to write", metavar="DIR")
    joined_dictionary: bool = flag(False, "one dictionary for both languages")
    srcdict: str | None = flag(None, "use this source dictionary", metavar="FILE")
    tgtdict: str | None = flag(None, "use this target dictionary", metavar="FILE")
    thresholdsrc: int = flag(0, "source words seen fewer times become <unk>")
    thresholdtgt: int = flag(0, "target words seen fewer times become <unk>")
    nwordssrc: int = flag(-1, "keep the N most frequent source words (-1: all)")
    nwordstgt: int = flag(-1, "keep the N most frequent target words (-1: all)")
    only_source: bool = flag(False, "there is no target side")
    padding_factor: int = flag(8, "dictionary sizes are multiples of this")
    workers: int = flag(1, "processes")
    dataset_impl: str = flag("mmap", "format of the data", choices=("mmap",))


COMPONENTS: tuple[tuple[str, Registry[Any], str], ...] = (
    ("criterion", CRITERIONS, "criterion"),
    ("optimizer", OPTIMIZERS, "optimiser"),
    ("lr_scheduler", LR_SCHEDULERS, "learning-rate schedule"),
)

TRAIN_SECTIONS: tuple[tuple[type, str], ...] = (
    (DataConfig, "data and batches"),
    (SubsetConfig, "reading"),
    (TrainDataConfig, "training data"),
    (ValidationConfig, "validation"),
    (ComponentConfig, "model, criterion, optimiser"),
    (OptimizationConfig, "optimisation"),
    (CheckpointConfig, "checkpoints"),
    (DistributedConfig, "several processes"),
    (MemoryConfig, "memory"),
    (CommonConfig, "common"),
    (LogConfig, "progress"),
    (TrainLogConfig, "logs and loss scaling"),
)
GENERATE_SECTIONS: tuple[tuple[type, str], ...] = (
    (DataConfig, "data and batches"),
    (SubsetConfig, "reading"),
    (ModelPathConfig, "model"),
    (BackendConfig, "backend"),
    (GenerateDataConfig, "subset and score"),
    (GenerationConfig, "search"),
    (ReferenceConfig, "references"),
    (TextConfig, "text"),
    (CommonConfig, "common"),
    (LogConfig, "progress"),
)
INTERACTIVE_SECTIONS: tuple[tuple[type, str], ...] = (
    (DataConfig, "data and batches"),
    (ModelPathConfig, "model"),
    (InteractiveConfig, "input"),
    (ServeConfig, "web page"),
    (GenerationConfig, "search"),
    (TextConfig, "text"),
    (CommonConfig, "common"),
)
VALIDATE_SECTIONS: tuple[tuple[type, str], ...] = (
    (DataConfig, "data and batches"),
    (SubsetConfig, "reading"),
    (ModelPathConfig, "model"),
    (ValidationConfig, "validation"),
    (CommonConfig, "common"),
    (LogConfig, "progress"),
)


def make_parser(prog: str, description: str, sections: tuple[tuple[type, str], ...]) -> argparse.ArgumentParser:
    """A parser with the flags of ``sections``; unknown and abbreviated flags are usage errors (exit 2)."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for config, title in sections:
        add_flags(parser, config, title)
    return parser


def parse_args(
    prog: str, description: str, sections: tuple[tuple[type, str], ...], argv: list[str] | None
) -> argparse.Namespace:
    """Parse a command that has no interchangeable parts. Exits with status 2 on a usage error."""
    _load_user_dir(argv)
    return make_parser(prog, description, sections).parse_args(argv)


def _load_user_dir(argv: list[str] | None) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--user-dir")
    import_user_dir(first.parse_known_args(argv)[0].user_dir)


def check_result_name(parser: argparse.ArgumentParser, name: str) -> None:
    """A usage error when ``--name`` would put a result outside ``--out-dir``, where the report does not look."""
    if Path(name).name != name:
        parser.error(f"--name {name}: a name, not a path; directories are --out-dir's")


def parse_clinic_args(
    prog: str, description: str, sections: tuple[tuple[type, str], ...], argv: list[str] | None
) -> argparse.Namespace:
    """Parse a command that measures models of an architecture, or checkpoints; see ``parse_args``."""
    from fairseq.models.config import TransformerConfig, resolve_architecture

    _load_user_dir(argv)
    parser = make_parser(prog, description, sections)
    said_otherwise = {"encoder_normalize_before", "decoder_normalize_before"}  # by --models
    if (ClinicDepthConfig, "depth") in sections:
        said_otherwise |= {"encoder_layers", "decoder_layers"}
    shape = add_flags(parser, TransformerConfig, "architecture", suppress_defaults=True, skip=said_otherwise)
    args = parser.parse_args(argv)
    given = [name for name in ("models", *sorted(shape)) if getattr(args, name, None) is not None]
    if getattr(args, "path", None) and given:
        parser.error(f"--{given[0].replace('_', '-')} does nothing with --path: checkpoints say what they are")
    check_result_name(parser, args.name or "")
    args.models = args.models or "post-ln,pre-ln,adaptive"
    vars(args).update(resolve_architecture(args.arch, vars(args)))
    return args


def parse_train_args(
    argv: list[str] | None = None,
    prog: str = "fairseq-train",
    description: str = "Train a translation model, or profile one with --init-type adaptive-profiling.",
) -> argparse.Namespace:
    """Parse ``fairseq-train``'s flags; the chosen architecture fills in what the user left open.

    Only the flags of the chosen optimiser, schedule and criterion are accepted; ``--help`` lists all of them.
    Exits with status 2 on a usage error; raises FairseqError when ``--user-dir`` fails.
    """
    from fairseq import criterions, optim  # noqa: F401  (they register themselves)
    from fairseq.models.config import TransformerConfig, resolve_architecture

    argv = sys.argv[1:] if argv is None else argv
    _load_user_dir(argv)
    parser = make_parser(prog, description, TRAIN_SECTIONS)
    taken = set(vars(parser.parse_known_args(["-"])[0]))
    taken |= add_flags(parser, TransformerConfig, "architecture", suppress_defaults=True, skip=taken)
    wants_help = any(a in ("-h", "--help") for a in argv)
    # An error must not be reported before the parser is complete, so the choice is read by a bare parser.
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, _, _ in COMPONENTS:
        chooser.add_argument("--" + name.replace("_", "-"), nargs="?", default=getattr(ComponentConfig, name))
    chosen = chooser.parse_known_args(argv)[0]
    for name, registry, title in COMPONENTS:
        for entry in registry.names() if wants_help else [getattr(chosen, name)]:
            config = registry.config(entry) if entry in registry.names() else None
            if config is not None:
                taken |= add_flags(parser, config, f"{title} {entry}", skip=taken)
    args = parser.parse_args(argv)
    _check_init_type_flags(parser, args)
    vars(args).update(resolve_architecture(args.arch, vars(args)))
    _check_contradictions(parser, args)
    return args


def _check_init_type_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would do nothing. args: before the architecture has filled in what was not given."""
    from fairseq.admin.residual import MEASURED_TYPES  # imports torch, which fairseq-preprocess does without

    measures = args.init_type in MEASURED_TYPES
    for given, flag_name, works, init_type in (
        (args.profile_batches != 1, "--profile-batches", measures, "adaptive"),
        (args.profile_deterministic, "--profile-deterministic", measures, "adaptive"),
        ("output_change" in args, "--output-change", args.init_type == "adaptive-closed-form", "adaptive-closed-form"),
        ("omega" in args, "--omega", args.init_type == "adaptive-closed-form", "adaptive-closed-form"),
    ):
        if given and not works:
            parser.error(f"{flag_name} does nothing with --init-type {args.init_type}; it is for {init_type}")


def _check_contradictions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    bleu, largest = args.best_checkpoint_metric == "bleu", args.maximize_best_checkpoint_metric
    finetunes = args.finetune_from_model is not None
    checkpoints = args.checkpoint_activations or args.offload_activations
    for wrong, message in (
        (args.fp16 and args.bf16, "--fp16 and --bf16 contradict each other; give one"),
        (args.fp16 and args.cpu, "--fp16 needs a GPU; on the CPU use --bf16 or float32"),
        (args.max_tokens is None and args.batch_size is None, "give --max-tokens or --batch-size"),
        (bleu and not args.eval_bleu, "--best-checkpoint-metric bleu needs --eval-bleu"),
        (bleu != largest, "bleu as --best-checkpoint-metric, and only bleu, needs --maximize-best-checkpoint-metric"),
        (args.patience > 0 and args.disable_validation, "--patience needs validation; drop --disable-validation"),
        (finetunes and args.restore_file != LAST, "--finetune-from-model contradicts --restore-file; give one"),
        (
            args.ddp_backend == "fully_sharded" and args.optimizer == "adafactor",
            "--optimizer adafactor needs whole matrices, which --ddp-backend fully_sharded divides; use adam or radam",
        ),
        (
            args.checkpoint_activations_every > 1 and not checkpoints,
            "--checkpoint-activations-every does nothing without --checkpoint-activations",
        ),
    ):
        if wrong:
            parser.error(message)


def section(config: type, args: argparse.Namespace) -> Any:
    """The part of the flat namespace that belongs to dataclass ``config``, as an instance of it."""
    return from_namespace(config, args)
