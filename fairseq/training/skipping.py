"""Updates that changed nothing, since their loss or gradients were not finite: counted, answered, and told.

With fp16 the loss scale falls. Where that does not help, or does not apply, too many in a row end training, with a line
that says where it broke.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fairseq.data.translation import Batch
from fairseq.errors import FairseqError
from fairseq.training.divergence import advice, find_break

if TYPE_CHECKING:
    from fairseq.training.precision import DynamicLossScaler
    from fairseq.training.trainer import Trainer

logger = logging.getLogger("fairseq.train")


class SkippedUpdates:
    """Those of a trainer. count: since training started. in_a_row: of the last ones, overflows of fp16 aside."""

    def __init__(self, trainer: Trainer) -> None:
        self.count = 0
        self.in_a_row = 0
        self._trainer = trainer

    def add(self, outcome: list[float], micro_batches: Sequence[Batch | None]) -> None:
        """Count another one, whose gradients are still there or can be made again; raises FairseqError when it is one
        too many.

        outcome: 1; the loss; the gradient norm; the sample size. micro_batches: to find out where it broke.
        """
        _, loss, gnorm, sample_size = outcome
        bad = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {gnorm}"
        update, scaler = self._trainer.num_updates + 1, self._trainer.scaler
        if sample_size == 0:
            logger.warning(f"update {update} skipped: none of its batches fitted into memory")
        elif scaler is None or not self._lower(scaler, bad, micro_batches):
            self.in_a_row += 1
            most = self._trainer.cfg.max_nonfinite_updates
            if self.in_a_row == most:
                raise self._diverged(bad, f"--max-nonfinite-updates {most} reached", micro_batches)
            logger.warning(
                f"update {update} skipped: {bad} ({self.in_a_row} in a row; training ends at "
                f"--max-nonfinite-updates {most})"
            )
        self.count += 1

    def _lower(self, scaler: DynamicLossScaler, bad: str, micro_batches: Sequence[Batch | None]) -> bool:
        """Answer an overflow; returns False at ``--threshold-loss-scale``, where it may have no end. See `add`."""
        if scaler.scale == scaler.threshold:
            return False
        try:
            scaler.update(overflow=True)
        except FairseqError as error:
            raise self._diverged(bad, str(error), micro_batches) from None
        logger.info(f"gradients overflow: update skipped, loss scale now {scaler.scale:g}")
        return True

    def _diverged(self, bad: str, why: str, micro_batches: Sequence[Batch | None]) -> FairseqError:
        """The error that ends training; all processes call this. why: it ends now. For the rest see `add`."""
        trainer = self._trainer
        if all(parameter.grad is None for parameter in trainer.parameters):  # a CUDA graph has had them
            trainer.accumulate(micro_batches)
        where = find_break(trainer.model, trainer.world, micro_batches, trainer.loss_again)
        return FairseqError(
            f"training diverges at update {trainer.num_updates + 1}, learning rate {trainer.lr:g}: {bad} ({why}); "
            f"{where}; " + advice(trainer.model.cfg, trainer.cfg.clip_norm)
        )
