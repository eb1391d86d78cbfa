"""Flags of training: its data, validation, optimisation, checkpoints, processes, memory and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.options.common import POST_PROCESSORS
from fairseq.utils.flags import flag

LAST = "checkpoint_last.pt"
METRICS = ("loss", "nll_loss", "ppl", "bleu")


@dataclass
class TrainDataConfig:
    """Which subset to train on, and when to validate."""

    train_subset: str = flag(
        "train", "subset to train on, with SPLIT1, SPLIT2, ... if the data-bin has them", metavar="SPLIT"
    )
    upsample_primary: int = flag(1, "SPLIT itself counts N times where SPLIT1 is there too", least=1)
    batch_shapes: int | None = flag(
        None,
        "pad training batches to at most N shapes, chosen for the least padding (0: each batch as small as it can be; "
        "default: 48 with CUDA graphs, otherwise 0)",
        least=0,
    )
    validate_interval: int = flag(1, "validate every N epochs, and at the end", least=1)
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
    eval_bleu_remove_bpe: str | None = flag(
        None,
        "undo this subword segmentation before BLEU (alone: subword_nmt)",
        choices=POST_PROCESSORS,
        const="subword_nmt",
    )
    eval_tokenized_bleu: bool = flag(False, "BLEU on tokens as they are, without sacrebleu's own tokeniser")
    eval_bleu_print_samples: bool = flag(False, "print one translation of each validation")


@dataclass
class OptimizationConfig:
    """How long and how fast to train."""

    max_epoch: int = flag(0, "stop after this epoch (0: no limit)", "--me", least=0)
    max_update: int = flag(0, "stop after this many updates (0: no limit)", "--mu", least=0)
    stop_min_lr: float = flag(
        -1.0, "stop after an epoch at whose end the learning rate has fallen to this (negative: never)"
    )
    min_lr: float | None = flag(
        None, "with --lr-scheduler cosine its lowest rate (default: 0); with others the same as --stop-min-lr"
    )
    clip_norm: float = flag(0.0, "clip the gradient norm to this (0: do not clip)", least=0)
    max_nonfinite_updates: int = flag(
        10, "give up after N updates in a row without a finite loss and gradients, which are skipped", least=1
    )
    sentence_avg: bool = flag(False, "normalise gradients by sentences instead of tokens")
    update_freq: list[int] = flag([1], "batches a process adds up before an update; a list is by epoch: 4,2,1", least=1)
    compile: bool = flag(False, "compile the layers with torch.compile: slower to start, then faster", switch=True)
    cuda_graphs: bool | None = flag(
        None,
        "record each batch shape's update as a CUDA graph and repeat that: on GPUs, with adam or radam, without "
        "checkpointed activations and fully_sharded (default: where that is so)",
        switch=True,
    )
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
    reset_optimizer: bool = flag(
        False, "do not load the optimiser's state and the best metric; start the schedule from 0"
    )
    save_interval: int = flag(1, "save every N epochs, and at the end; the best also between", least=1)
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
        "pytorch_ddp, c10d: gradients are summed during the backward pass (DistributedDataParallel); legacy_ddp, "
        "no_c10d: after it, as with CUDA graphs whatever this says; fully_sharded (FSDP2): parameters, gradients and "
        "optimiser state are divided among the processes",
        choices=("pytorch_ddp", "c10d", "no_c10d", "legacy_ddp", "fully_sharded"),
    )
    bucket_cap_mb: int = flag(25, "size of a gradient bucket of DistributedDataParallel, in MiB", least=1)
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
