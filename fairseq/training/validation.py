"""Validation: loss and perplexity of every ``--valid-subset``, and BLEU with ``--eval-bleu``."""

from __future__ import annotations

from argparse import Namespace

import numpy as np

from fairseq.data.batching import iterate_batches, plan_batches, select_by_size, sort_by_length
from fairseq.data.translation import LanguagePairDataset, TranslationData
from fairseq.errors import FairseqError
from fairseq.training.checkpoint_manager import CheckpointManager
from fairseq.training.logging import Averages, TrainLog
from fairseq.training.trainer import Trainer


class Validator:
    """Opens the validation subsets once and measures the model on them as often as asked."""

    def __init__(self, args: Namespace, trainer: Trainer, data: TranslationData) -> None:
        """Raises FairseqError when a subset is missing or has sentences that are too long."""
        self.args = args
        self.trainer = trainer
        self.sets: dict[str, LanguagePairDataset] = {}
        self.batches: dict[str, list[np.ndarray]] = {}
        if args.disable_validation:
            return
        for name in args.valid_subset.split(","):
            dataset = data.load(name)
            kept = select_by_size(
                dataset.src_sizes,
                dataset.tgt_sizes,
                (args.max_source_positions, args.max_target_positions),
                name=name,
                skip=args.skip_invalid_size_inputs_valid_test,
            )
            batches = plan_batches(
                dataset.src_sizes,
                dataset.tgt_sizes,
                sort_by_length(dataset.src_sizes, dataset.tgt_sizes, kept),
                max_tokens=args.max_tokens_valid or args.max_tokens,
                max_sentences=args.batch_size_valid or args.batch_size,
                required_batch_size_multiple=args.required_batch_size_multiple,
            )
            self.sets[name] = dataset
            self.batches[name] = batches[trainer.world.rank :: trainer.world.size]

    def validate(self, epoch: int, log: TrainLog, checkpoints: CheckpointManager) -> float:
        """Measure all subsets and log them; returns ``--best-checkpoint-metric`` of the first.

        checkpoints: knows the best value so far. Raises FairseqError when that metric was not measured.
        """
        metric = self.args.best_checkpoint_metric
        first: float | None = None
        for name in self.sets:
            stats = self.measure(name)
            if first is None:
                if metric not in stats:
                    raise FairseqError(
                        f"--best-checkpoint-metric {metric} is not measured; choose from {', '.join(sorted(stats))}"
                        + (" (bleu: with --eval-bleu)" if metric == "bleu" else "")
                    )
                first = float(stats[metric])
                best = first if checkpoints.is_better(first) else checkpoints.best
                stats[f"best_{metric}"] = first if best is None else best
            log.summary(name, epoch, stats, self.trainer.num_updates)
        assert first is not None
        return first

    def measure(self, name: str) -> dict[str, float | int]:
        """loss, nll_loss (base 2), ppl, speed and, with ``--eval-bleu``, bleu of one subset."""
        pinned = self.trainer.world.device.type == "cuda"
        averages = Averages()
        batches = iterate_batches(self.sets[name], self.batches[name], self.args.num_workers, pinned)
        averages.add(self.trainer.validate(batches))
        return averages.stats()
