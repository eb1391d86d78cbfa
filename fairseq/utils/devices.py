"""The device and the precision that flags ask for."""

from __future__ import annotations

import torch

from fairseq.errors import FairseqError


def choose_device(cpu: bool, local_rank: int = 0) -> torch.device:
    """A visible GPU, or the CPU if there is none or ``cpu`` is set.

    local_rank: which process of this machine it is for. Raises FairseqError when there are fewer GPUs than that.
    """
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise FairseqError(
            f"process {local_rank} has no GPU: {torch.cuda.device_count()} visible; start fewer processes or use --cpu"
        )
    return torch.device("cuda", local_rank)


def choose_dtype(device: torch.device, fp16: bool, bf16: bool) -> torch.dtype:
    """What to compute in: float32 unless ``--fp16`` or ``--bf16`` says otherwise.

    Raises FairseqError for float16 on a CPU, which has it for few operators.
    """
    if fp16 and device.type == "cpu":
        raise FairseqError("--fp16 needs a GPU and none is visible; use --bf16 or float32 on the CPU")
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
