"""Peak memory of a training step, counted on tensors without data: the size of a real one, none of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq.criterions import cross_entropy
from fairseq.criterions.cross_entropy import SmoothedCrossEntropy
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import PADDING_IDX, Transformer

SENTENCES, LENGTH, VOCAB = 512, 32, 32_000  # 16,384 tokens


class _NoPadding(TorchDispatchMode):
    """Tensors without data cannot say which tokens are padding; all are taken to be real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:
            return torch.arange(args[0].numel(), device=args[0].device)[:, None]
        return func(*args, **(kwargs or {}))


def peak_gb(step: Callable[[Transformer, Tensor], Tensor]) -> float:
    """Most memory of parameters, gradients and activations in ``step``'s forward and backward pass, in GB."""
    with FakeTensorMode():
        model = Transformer(TransformerConfig(share_all_embeddings=True), VOCAB, VOCAB)
        tokens = torch.zeros(SENTENCES, LENGTH, dtype=torch.int64)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker, _NoPadding():
            step(model, tokens).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9


def plain(model: Transformer, tokens: Tensor) -> Tensor:
    logits = model(tokens, None, tokens)[0].float().flatten(0, 1)
    return F.cross_entropy(logits, tokens.flatten(), ignore_index=PADDING_IDX, label_smoothing=0.1, reduction="sum")


def ours(model: Transformer, tokens: Tensor) -> Tensor:
    criterion = SmoothedCrossEntropy(0.1, PADDING_IDX)
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
