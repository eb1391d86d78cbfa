"""Validation: loss and perplexity of every ``--valid-subset``, and BLEU with ``--eval-bleu``."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fairseq.data.batching import make_batches
from fairseq.data.encoders import make_text_pipeline
from fairseq.data.reading import batches_fit, iterate_batches
from fairseq.data.translation import Batch, LanguagePairDataset, TranslationData
from fairseq.errors import FairseqError
from fairseq.generation.constraints import check_generation_config
from fairseq.generation.scoring import Scorer
from fairseq.generation.translate import translate_dataset
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig
from fairseq.training.checkpoint_manager import CheckpointManager
from fairseq.training.distributed import World
from fairseq.training.logging import Averages, TrainLog
from fairseq.training.losses import SUMS, batch_losses, batch_sums
from fairseq.training.precision import autocast
from fairseq.utils.flags import parse_value

logger = logging.getLogger("fairseq.train")

SMALLER_BATCHES = "lower --max-tokens-valid"
# fairseq's words for <unk>: different ones, and one token each to sacrebleu, which would cut <unk> into three
UNKNOWN_IN_REFERENCE, UNKNOWN_IN_HYPOTHESIS = "UNKNOWNTOKENINREF", "UNKNOWNTOKENINHYP"


class ValidationInterrupted(Exception):
    """A signal came to one process; raised in all of them."""


class Validator:
    """Opens the validation subsets once and measures a model on them as often as asked; one instance a process.

    The model is left in evaluation mode.
    """

    def __init__(
        self,
        args: Namespace,
        world: World,
        data: TranslationData,
        model: Transformer,
        criterion: Any,
        subsets: Sequence[str],
    ) -> None:
        """Raises FairseqError when a subset is missing or has sentences that are too long, or for bad BLEU flags."""
        self.args = args
        self.world = world
        self.model = model
        self.criterion = criterion
        self.interrupted: Callable[[], bool] = lambda: False  # whether this process is to stop
        self.sets: dict[str, LanguagePairDataset] = {}
        self.batches: dict[str, list[np.ndarray]] = {}
        for name in subsets:
            self.sets[name] = data.load(name)
            self.batches[name] = make_batches(
                self.sets[name],
                name=name,
                max_tokens=args.max_tokens_valid or args.max_tokens,
                max_sentences=args.batch_size_valid or args.batch_size,
                required_batch_size_multiple=args.required_batch_size_multiple,
                max_positions=(args.max_source_positions, args.max_target_positions),
                skip_invalid=args.skip_invalid_size_inputs_valid_test,
                num_shards=world.size,
                shard_id=world.rank,
            )
        if args.eval_bleu:
            self._generation = generation_config(args.eval_bleu_args or {}, len(data.tgt_dict))
            tokenizer = "moses" if args.eval_bleu_detok == "moses" else None
            pipeline = make_text_pipeline(tokenizer, None, source_lang=data.source_lang, target_lang=data.target_lang)
            self._dictionary, self._decode = data.tgt_dict, pipeline.decode

    def validate(self, epoch: int, num_updates: int, log: TrainLog, checkpoints: CheckpointManager) -> float:
        """Measure all subsets and log them; returns ``--best-checkpoint-metric`` of the first.

        checkpoints: knows the best value so far. Raises ValidationInterrupted when ``interrupted`` says so, and
        FairseqError when a batch does not fit into memory.
        """
        metric = self.args.best_checkpoint_metric
        values = []
        for name in self.sets:
            stats = self.measure(name)
            values.append(float(stats[metric]))
            if len(values) == 1:
                best = checkpoints.best
                stats[f"best_{metric}"] = values[0] if best is None or checkpoints.is_better(values[0]) else best
            log.summary(name, epoch, stats, num_updates, validation=True)
        return values[0]

    @torch.no_grad()
    def measure(
        self, name: str, watch: Callable[[Iterable[Batch], int], Iterable[Batch]] | None = None
    ) -> dict[str, float | int]:
        """loss, nll_loss (base 2), ppl, speed, batch sizes and, with ``--eval-bleu``, bleu of a subset, all processes'.

        watch: takes the batches and their number, and yields them again, to show progress.
        """
        self.model.eval()
        averages = Averages()
        sums = torch.zeros(len(SUMS) + 2, dtype=torch.float64, device=self.world.device)
        with batches_fit(self._read(name), f"validating on '{name}'", SMALLER_BATCHES) as batches:
            for batch in batches if watch is None else watch(batches, len(self.batches[name])):
                if self.interrupted():
                    sums[-1] = 1  # tells the other processes
                    break
                losses = batch_losses(self.model, self.criterion, batch, self.args, self.world.device)
                sums[: len(SUMS)] += batch_sums(batch, *losses)
                sums[-2] += 1
        *totals_, batches_done, interrupted = self.world.sum(sums).tolist()
        if interrupted:
            raise ValidationInterrupted
        totals = dict(zip(SUMS, totals_, strict=True))
        sample_size = totals["nsentences" if self.args.sentence_avg else "ntokens"]
        averages.add(totals | {"sample_size": sample_size})
        stats = averages.stats()
        if steps := batches_done / self.world.size:  # batches at a time
            stats |= {"wpb": totals["ntokens"] / steps, "bsz": totals["nsentences"] / steps}
        if self.args.eval_bleu:
            stats["bleu"] = self._bleu(name)
        return stats

    def _read(self, name: str) -> Iterable[Batch]:
        pinned = self.world.device.type == "cuda"
        return self.world.reading(iterate_batches(self.sets[name], self.batches[name], self.args.num_workers, pinned))

    def _as_text(self, tokens: Tensor, unknown: str) -> str:
        return self._decode(self._dictionary.string(tokens, self.args.eval_bleu_remove_bpe, unk_string=unknown))

    def _bleu(self, name: str) -> float:
        pairs: list[tuple[str, str]] = []
        with (
            autocast(self.world.device, self.args.fp16, self.args.bf16),
            batches_fit(self._read(name), f"--eval-bleu on '{name}'", SMALLER_BATCHES) as batches,
        ):
            # in this thread alone: layers may be compiled, or their parameters with other processes
            for translation in translate_dataset([self.model], batches, self._generation, self.args.seed, threads=1):
                if self.interrupted():
                    break
                assert translation.target is not None
                pairs.append(
                    (
                        self._as_text(translation.target, UNKNOWN_IN_REFERENCE),
                        self._as_text(translation.hypotheses[0].tokens, UNKNOWN_IN_HYPOTHESIS),
                    )
                )
        if self.args.eval_bleu_print_samples and pairs and self.world.is_master:
            logger.info(f"example hypothesis: {pairs[0][1]}")
            logger.info(f"example reference: {pairs[0][0]}")
        parts: list[Any] = [None if self.interrupted() else pairs]
        if self.world.size > 1:
            mine, parts = parts[0], [None] * self.world.size
            dist.all_gather_object(parts, mine)
        if None in parts:
            raise ValidationInterrupted
        pairs = [pair for part in parts for pair in part]
        scorer = Scorer("sacrebleu", tokenized=self.args.eval_tokenized_bleu)
        for reference, hypothesis in pairs:
            scorer.add(reference, hypothesis)
        return scorer.score()


def generation_config(settings: dict[str, Any], vocab: int) -> GenerationConfig:
    """The search of ``--eval-bleu-args``. Raises FairseqError for what is no setting, or not a value of one.

    vocab: the size of the target dictionary.
    """
    known = {field.name for field in fields(GenerationConfig)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise FairseqError(f"--eval-bleu-args: '{unknown[0]}' is no generation setting (some are: beam, lenpen)")
    try:
        cfg = GenerationConfig(**{name: parse_value(GenerationConfig, name, value) for name, value in settings.items()})
    except ValueError as error:
        raise FairseqError(f'--eval-bleu-args: {error}; values look like {{"beam": 4, "lenpen": 0.6}}') from None
    try:
        check_generation_config(cfg, vocab)  # now rather than at the first validation
    except FairseqError as error:
        raise FairseqError(f"--eval-bleu-args: {error}") from None
    return cfg
