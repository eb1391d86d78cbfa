"""What a batch adds to an update or to a validation: its losses and its counts."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.data.translation import Batch
from fairseq.training.precision import ConvertedWeights, autocast
from fairseq.training.transfer import to_device

SUMS = ("loss", "nll_loss", "ntokens", "nsentences")  # what a batch adds up to; losses in nats


def batch_losses(
    model: nn.Module | ConvertedWeights,
    criterion: Any,
    batch: Batch,
    args: Namespace,
    device: torch.device,
    grad_scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss, nll) of a batch in the precision that ``args`` ask for, summed over target tokens, in nats.

    grad_scale: what the loss will be multiplied by before its backward pass.
    """
    batch = to_device(batch, device)
    with autocast(device, args.fp16, args.bf16):
        if hasattr(criterion, "from_features"):
            head = partial(criterion.from_features, target=batch["target"], grad_scale=grad_scale)
            losses, _ = model(**batch["net_input"], head=head)
            return losses
        logits, _ = model(**batch["net_input"])
    return criterion(logits, batch["target"])


def batch_sums(batch: Batch, loss: Tensor, nll: Tensor) -> Tensor:
    """A batch's statistics in the order of SUMS, float64."""
    # filled on the device: copying a tensor there would wait for all work queued so far
    counts = [torch.zeros_like(loss, dtype=torch.float64) + batch[key] for key in ("ntokens", "nsentences")]
    return torch.stack([loss.double(), nll.double(), *counts])
