"""Where omega comes from when training starts: measured on the first training batches, or read from its file."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

import torch

from fairseq import admin
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.reading import describe_batch
from fairseq.errors import out_of_memory_ends
from fairseq.models.transformer import Transformer
from fairseq.training.distributed import World
from fairseq.training.transfer import to_device

logger = logging.getLogger("fairseq.train")

TABLE_ROWS = 9


def profile_to_file(args: Namespace, model: Transformer, itr: EpochBatchIterator, world: World) -> admin.OmegaProfile:
    """Measure omega on the first ``--profile-batches`` training batches of epoch 1 and write ``--omega-file``.

    Raises FairseqError when there are fewer batches or the file cannot be written; it is then as it was.
    """
    batches = itr.first_batches(args.profile_batches)
    largest = max(batches, key=lambda batch: batch["net_input"]["src_tokens"].numel())
    with out_of_memory_ends(f"profiling on {world.device}, on {describe_batch(largest)}", "lower --max-tokens"):
        inputs = [to_device(batch, world.device)["net_input"] for batch in batches]
        torch.manual_seed(args.seed)
        profile = admin.profile(model.to(world.device), inputs, args.profile_deterministic)
    sentences = sum(batch["nsentences"] for batch in batches)
    conditions = f"seed={args.seed} batches={len(batches)} sentences={sentences}"
    profile.comments = admin.describe(model.cfg, conditions, deterministic=args.profile_deterministic)
    profile.save(args.omega_file)
    logger.info(
        f"profiled {len(profile.encoder)} encoder and {len(profile.decoder)} decoder sub-layers on "
        f"{sentences} sentences{', dropout off' if args.profile_deterministic else ''}:\n{omega_table(profile)}"
    )
    logger.info(f"wrote {args.omega_file}")
    return profile


def omega_table(profile: admin.OmegaProfile) -> str:
    """omega of some sub-layers, the first and the last among them, as lines of text."""
    longest = max(len(profile.encoder), len(profile.decoder))
    last = {len(profile.encoder) - 1, len(profile.decoder) - 1}
    step = max(1, -(-longest // (TABLE_ROWS - len(last))))
    rows = [f"{'sub-layer':>9} {'encoder':>9} {'decoder':>9}"]
    for i in sorted({*range(0, longest, step), *last}):
        cells = [f"{stack[i]:9.4f}" if i < len(stack) else " " * 9 for stack in (profile.encoder, profile.decoder)]
        rows.append(" ".join([f"{i + 1:9}", *cells]).rstrip())
    return "\n".join(rows)


def start_omega(args: Namespace, model: Transformer, itr: EpochBatchIterator, world: World) -> None:
    """Fill omega of a fresh model from ``--omega-file``; measure it if there is no file.

    The first process does either and all others get its values. Raises FairseqError when the file does not fit.
    """
    profile = None
    if world.is_master:
        if Path(args.omega_file).exists():
            profile = admin.OmegaProfile.load(args.omega_file)
            admin.check_comments(profile, model.cfg, args.omega_file)
            logger.info(f"omega from {args.omega_file}")
        else:
            logger.info(f"no omega file {args.omega_file}: profiling first")
            profile = profile_to_file(args, model, itr, world)
    profile = world.from_master(profile)
    assert profile is not None
    admin.apply_profile(model, profile, args.omega_file)
