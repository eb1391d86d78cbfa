"""Running out of memory on a batch: what counts as that, and how the batch is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fairseq.data.batching import shown_ids
from fairseq.data.translation import Batch
from fairseq.errors import FairseqError
from fairseq.models.transformer import PADDING_IDX

# What else says so: the CPU's allocator, the CUDA runtime without torch's allocator, cuBLAS
_SAID_BY_OTHERS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory, a GPU's or the host's, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID_BY_OTHERS)


def describe_batch(batch: Batch) -> str:
    """Sentences, their lengths in tokens with padding, and their numbers in the dataset, from 0."""
    inputs, ids = batch["net_input"], batch["id"].tolist()
    source, target = inputs["src_tokens"].size(1), inputs["prev_output_tokens"].size(1)
    lengths = f"up to {source} source and {target} target tokens"
    return f"a batch of {len(ids)} sentences of {lengths} (sentences {shown_ids(ids)})"


def smallest_batch(batch: Batch) -> Batch:
    """One source and one target token of ``batch``, neither of them padding."""
    inputs, target = batch["net_input"], batch["target"]
    assert target is not None

    def first_token(tokens: Tensor) -> Tensor:
        return tokens[0][tokens[0] != PADDING_IDX][None, :1]

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


@contextlib.contextmanager
def out_of_memory_ends(batches: Sequence[Batch], doing: str, advice: str) -> Iterator[None]:
    """Within, running out of memory becomes a FairseqError that names the last of ``batches``, as they are by then."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FairseqError(f"out of memory: {doing}, on {describe_batch(batches[-1])}; {advice}") from error
