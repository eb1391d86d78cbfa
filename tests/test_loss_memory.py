"""Peak memory of a training step, counted on tensors without data: the size of a real one, none of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq.criterions import cross_entropy
from fairseq.criterions.cross_entropy import SmoothedCrossEntropy
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.utils.symbols import PAD
from tests.training_runs import load_script

SENTENCES, LENGTH, VOCAB = 512, 32, 32_000  # 16,384 tokens


def peak_gb(step: Callable[[Transformer, Tensor], Tensor]) -> float:
    """Most memory of parameters, gradients and activations in ``step``'s forward and backward pass, in GB."""
    with FakeTensorMode(), load_script("bench_memory").LiveBytes() as live:
        model = Transformer(TransformerConfig(share_all_embeddings=True), VOCAB, VOCAB)
        tokens = torch.zeros(SENTENCES, LENGTH, dtype=torch.int64)
        step(model, tokens).backward()
    return live.peak / 1e9


def plain(model: Transformer, tokens: Tensor) -> Tensor:
    logits = model(tokens, None, tokens)[0].float().flatten(0, 1)
    return F.cross_entropy(logits, tokens.flatten(), ignore_index=PAD, label_smoothing=0.1, reduction="sum")


def ours(model: Transformer, tokens: Tensor) -> Tensor:
    criterion = SmoothedCrossEntropy(0.1, PAD)
    losses, _ = model(tokens, None, tokens, head=lambda *head: criterion.from_features(*head, tokens))
    return losses[0]


@pytest.mark.slow
def test_peak_is_far_below_the_plain_loss(monkeypatch):
    monkeypatch.setattr(
        cross_entropy, "SLICE_ELEMENTS", 4 * cross_entropy.SLICE_ELEMENTS
    )  # fewer to count, and more memory
    expected, peak = peak_gb(plain), peak_gb(ours)
    print(f"{peak:.2f} of {expected:.2f} GB")
    assert expected > 2 * SENTENCES * LENGTH * VOCAB * 4 / 1e9  # logits and their logarithms, at least, were counted
    assert peak < 0.6 * expected
