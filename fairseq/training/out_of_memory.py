"""What a process goes on with whose batch did not fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.data.translation import Batch
from fairseq.utils.symbols import PAD


def smallest_batch(batch: Batch) -> Batch:
    """One source and one target token of ``batch``, neither of them padding."""
    inputs, target = batch["net_input"], batch["target"]
    assert target is not None

    def first_token(tokens: Tensor) -> Tensor:
        return tokens[0][tokens[0] != PAD][None, :1]

    return {
        "id": batch["id"][:1],
        "nsentences": 1,
        "ntokens": 1,
        "net_input": {
            "src_tokens": first_token(inputs["src_tokens"]),
            "src_lengths": torch.ones_like(inputs["src_lengths"][:1]),
            "prev_output_tokens": first_token(inputs["prev_output_tokens"]),
        },
        "target": first_token(target),
    }
