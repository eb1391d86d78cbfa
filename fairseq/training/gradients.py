"""All gradients in one tensor: summed over the processes by one call, after the backward passes of an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: kernels read 16 bytes at a time, and faster from where a cache line starts


class FlatGradients:
    """Gradients of ``parameters`` as parts of one tensor, ``all``.

    A CUDA graph finds them where they were when it was recorded, and no process waits for another in a backward pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """parameters: contiguous, of one dtype, on one device."""
        self._parameters = parameters
        starts = [0]
        for parameter in parameters:
            starts.append(starts[-1] + -(-parameter.numel() // ALIGNMENT) * ALIGNMENT)
        self.all = torch.zeros(starts[-1], dtype=parameters[0].dtype, device=parameters[0].device)
        self.parts: list[Tensor] = [
            self.all[start : start + parameter.numel()].view_as(parameter)
            for start, parameter in zip(starts[:-1], parameters, strict=True)
        ]

    def clear(self) -> None:
        """Make them zero, and the parameters' own, to which backward passes add."""
        self.all.zero_()
        for parameter, part in zip(self._parameters, self.parts, strict=True):
            parameter.grad = part

    def add_gradients(self) -> None:
        """Add the gradients that the parameters have: by few kernels, where a backward pass would need one for each."""
        added = [
            (part, parameter.grad)
            for part, parameter in zip(self.parts, self._parameters, strict=True)
            if parameter.grad is not None
        ]
        torch._foreach_add_(*map(list, zip(*added, strict=True)))
