"""Dropout that draws its random numbers fast on a CPU, where torch's own spends more time on them than on all else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 2**16  # of a random number


class Dropout(nn.Dropout):
    """``nn.Dropout``; on the CPU an element's fate is 16 bits of torch's generator.

    The probability is rounded to a multiple of 1/65536 there, and what is kept scaled by the rounded one, so that
    expected values stay exact. Where torch.compile draws, and on a GPU, it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape -> same shape."""
        if not self.training:
            return x  # at once: a decoding step passes here a dozen times
        if not self.p or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        noise = torch.empty(x.shape, dtype=x.dtype)
        torch.ge(bits, dropped - _LEVELS // 2, out=noise)  # a comparison can write the factor itself
        return x * noise.mul_(_LEVELS / (_LEVELS - dropped))
