"""Sharded tensors, told from others without loading what makes them: that takes a third of a command's start."""

from __future__ import annotations

import sys
from typing import Any


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, as FSDP2 makes of parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # where it is not loaded there can be none
    return module is not None and isinstance(tensor, module.DTensor)
