"""``fairseq-train``: data, model, epochs, validation, checkpoints; or one profiling pass that writes omega."""

from __future__ import annotations

import logging
from argparse import Namespace

import torch

from fairseq.admin.residual import ADMIN, PROFILING
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.translation import TranslationData
from fairseq.errors import out_of_memory_ends
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.options import DataConfig, section
from fairseq.training.capture import uses_graphs
from fairseq.training.distributed import World
from fairseq.training.logging import TrainLog, choose_log_format
from fairseq.training.profiling import profile_to_file
from fairseq.training.run import TrainingRun
from fairseq.utils.memory import keep_freed_memory

logger = logging.getLogger("fairseq.train")

GRAPH_SHAPES = 48  # batch shapes with --cuda-graphs


def train(args: Namespace, world: World) -> None:
    """Train as ``args`` (from ``options.parse_train_args``) say, in one process of ``world``.

    Raises FairseqError for bad data, checkpoints, omega files or settings, and when training diverges.
    """
    if not world.is_master:
        logging.getLogger().setLevel(logging.ERROR)
    if world.device.type == "cpu":
        keep_freed_memory()
    data = TranslationData.open(section(DataConfig, args), args.required_seq_len_multiple)
    args.source_lang, args.target_lang = data.source_lang, data.target_lang
    with _open_log(args, world) as log:
        model = build_model(args, len(data.src_dict), len(data.tgt_dict))
        shapes = args.batch_shapes
        if shapes is None:
            shapes = GRAPH_SHAPES if uses_graphs(args, world) else 0
        itr = EpochBatchIterator(
            lambda epoch: data.load(args.train_subset, epoch, upsample_primary=args.upsample_primary),
            max_tokens=args.max_tokens,
            max_sentences=args.batch_size,
            required_batch_size_multiple=args.required_batch_size_multiple,
            max_positions=(args.max_source_positions, args.max_target_positions),
            seed=args.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=args.num_workers,
            pin_memory=world.device.type == "cuda",
            batch_shapes=shapes,
        )
        if args.init_type == PROFILING and world.is_master:
            profile_to_file(args, model, itr, world)
            logger.info(f"now train with --init-type {ADMIN} --omega-file {args.omega_file}")
        elif args.init_type != PROFILING:
            TrainingRun(args, world, model, itr, data, log).train()


def _open_log(args: Namespace, world: World) -> TrainLog:
    return TrainLog(
        choose_log_format(args.log_format, args.no_progress_bar),
        args.log_interval,
        is_master=world.is_master,
        log_file=args.log_file,
        tensorboard_logdir=args.tensorboard_logdir,
        wandb_project=None if args.init_type == PROFILING else args.wandb_project,
        config=vars(args),
    )


def build_model(args: Namespace, src_vocab: int, tgt_vocab: int) -> Transformer:
    """A freshly initialised model: the same weights for the same ``--seed``, whatever the init type's omega."""
    torch.manual_seed(args.seed)
    cfg: TransformerConfig = section(TransformerConfig, args)
    with out_of_memory_ends(f"making a model of architecture {args.arch}", "take a smaller one"):
        model = Transformer(cfg, src_vocab, tgt_vocab)
    logger.debug(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(f"architecture {args.arch}, init type {args.init_type}, {trained:,} parameters")
    return model
