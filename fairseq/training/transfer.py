"""Copies between the host and a device that wait for nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq.data.translation import Batch, map_batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory do not wait."""
    if device.type == "cpu":
        return batch
    return map_batch(batch, Tensor, lambda tensor: tensor.to(device, non_blocking=True))


def on_its_way_to_host(tensor: Tensor) -> Callable[[], list[float]]:
    """Start to copy a vector to the host; returns what waits for it."""
    if tensor.device.type != "cuda":
        values = tensor.tolist()
        return lambda: values
    copy, arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return copy.tolist()

    return wait
