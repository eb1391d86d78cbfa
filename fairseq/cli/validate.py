"""``fairseq-validate``: loss and perplexity of a checkpoint on subsets of a data-bin, and BLEU with ``--eval-bleu``."""

from __future__ import annotations

import functools
import logging
import sys
from argparse import Namespace
from typing import Any

from fairseq.checkpoint import updates_of
from fairseq.cli import command
from fairseq.errors import FairseqError
from fairseq.generation.translate import DEFAULT_MAX_TOKENS, longest_source, longest_target, open_models_and_data
from fairseq.options import VALIDATE_SECTIONS, parse_args
from fairseq.registry import CRITERIONS
from fairseq.training.distributed import World
from fairseq.training.logging import TrainLog, choose_log_format
from fairseq.training.trainer import component
from fairseq.training.validation import Validator
from fairseq.utils.devices import choose_device
from fairseq.utils.progress import batch_progress
from fairseq.utils.symbols import PAD

logger = logging.getLogger(__name__)


def _main(argv: list[str] | None = None) -> None:
    description = "Measure the loss of a checkpoint on subsets of a data-bin."
    args = parse_args("fairseq-validate", description, VALIDATE_SECTIONS, argv, _check)
    world = World(0, 1, choose_device(args.cpu))
    models, data, state = open_models_and_data(args, world.device)
    trained: dict[str, Any] = state["args"]
    args.max_source_positions = longest_source(models, args.max_source_positions)
    args.max_target_positions = longest_target(models, args.max_target_positions)
    name = trained.get("criterion", "cross_entropy")
    criterion = component(CRITERIONS, name, Namespace(**trained), PAD)
    args.sentence_avg = bool(trained.get("sentence_avg", False))
    if args.max_tokens is None and args.batch_size is None:
        args.max_tokens = DEFAULT_MAX_TOKENS
    validator = Validator(args, world, data, models[0], criterion, args.valid_subset.split(","))
    log_format = choose_log_format(args.log_format, args.no_progress_bar)
    log = TrainLog(log_format, args.log_interval)
    for subset in validator.sets:
        watch = functools.partial(
            batch_progress,
            subset=subset,
            verb="validate",
            log_format=log_format,
            log_interval=args.log_interval,
            log=logger,
        )
        log.summary(subset, None, validator.measure(subset, watch), updates_of(state), validation=True)


def _check(args: Namespace) -> None:
    if not args.path:
        raise FairseqError("--path FILE is missing: the checkpoint to validate")
    if ":" in args.path:
        raise FairseqError("--path: fairseq-validate takes one checkpoint, not an ensemble")


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main, logs=sys.stdout)(argv)


if __name__ == "__main__":
    main()
