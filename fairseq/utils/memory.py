"""Memory: the most that was used, and freed memory kept for the next step.

glibc's malloc gives large blocks back to the system when they are freed. A loop whose tensors are the same in every
step then has each of them mapped, zeroed page by page and unmapped again: a quarter of the time of beam search with a
small model on a CPU.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 2**30  # bytes; larger blocks are worth their mapping
_MOST_BEFORE_2_35 = 2**25  # older versions refuse a larger M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have this process's malloc keep up to 1 GiB of freed memory; does nothing where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if mallopt(_M_MMAP_THRESHOLD, _KEPT) or mallopt(_M_MMAP_THRESHOLD, _MOST_BEFORE_2_35):
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GB (1e9 bytes): a GPU's, or this process's resident set; nan where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
