"""Losses against a float64 computation and against the original's saved values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fairseq.criterions import cross_entropy as module
from fairseq.criterions.cross_entropy import LabelSmoothedCrossEntropyConfig, smoothed_nll, smoothed_nll_of_features
from fairseq.errors import FairseqError
from fairseq.registry import CRITERIONS

PAD = 1


def _reference(logits: Tensor, target: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    loss = nll = logits.new_zeros(())
    for row, symbol in zip(logits.flatten(0, 1), target.flatten().tolist(), strict=True):
        if symbol != PAD:
            negative = torch.logsumexp(row, 0) - row
            nll = nll + negative[symbol]
            loss = loss + (1 - epsilon) * negative[symbol] + epsilon / len(row) * negative.sum()
    return loss, nll


def _batch(dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 6, 37, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(2, 37, (4, 6), generator=generator)
    target[1, 4:] = target[3, 1:] = PAD
    return logits.to(dtype), target


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)]


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 37 * 5)  # 24 tokens: four slices of five, one of four


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_matches_the_definition(epsilon: float, dtype: torch.dtype, tolerance: float, small_slices: None) -> None:
    logits, target = _batch(dtype)
    ours = logits.clone().requires_grad_()
    exact = logits.double().requires_grad_()  # the same rounded logits
    loss, nll = smoothed_nll(ours, target, epsilon, PAD)
    expected_loss, expected_nll = _reference(exact, target, epsilon)
    assert loss.dtype == nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    sums_tolerance = min(tolerance, 2e-6)  # the sums are never of lower precision than float32
    torch.testing.assert_close(loss.double(), expected_loss, rtol=sums_tolerance, atol=0)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=sums_tolerance, atol=0)

    (loss * 8).backward()
    (expected_loss * 8).backward()
    assert ours.grad is not None and exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
    assert not ours.grad[target == PAD].any()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_from_features_matches_the_definition(
    epsilon: float, dtype: torch.dtype, tolerance: float, small_slices: None
) -> None:
    """Gradients reach features and weight, under autocast too, whatever the backward pass multiplies them by."""
    _, target = _batch(torch.float32)
    generator = torch.Generator().manual_seed(6)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    features, weight = (torch.randn(*size, 8, generator=generator, dtype=own) for size in ((4, 6), (37,)))
    exact = [x.double().clone().requires_grad_() for x in (features, weight)]
    ours = [x.clone().requires_grad_() for x in (features, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, nll = smoothed_nll_of_features(ours[0], ours[1], target, epsilon, PAD, grad_scale=16.0)
    assert loss.dtype == nll.dtype == own and not nll.requires_grad
    expected_loss, expected_nll = _reference(exact[0] @ exact[1].T, target, epsilon)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=tolerance, atol=0)
    (loss * 8).backward()
    (expected_loss * 8).backward()
    for x, y in zip(ours, exact, strict=True):
        assert x.grad is not None and y.grad is not None and x.grad.dtype == own
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=tolerance, atol=tolerance * float(y.grad.abs().max()))
    assert ours[0].grad is not None and not ours[0].grad[target == PAD].any()


def test_float16_gradients_survive_their_loss_scale() -> None:
    """3e-8 is too small for float16 unless it is scaled before it is rounded."""
    features, weight = torch.full((1, 1, 8), 1e-3), torch.zeros(30_000, 8)
    target = torch.tensor([[5]])
    grads = []
    for scale in (1.0, 2.0**15):
        x = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            loss, _ = smoothed_nll_of_features(features.requires_grad_(), x, target, 0.1, PAD, scale)
        (loss * 2.0**15).backward()
        assert x.grad is not None
        grads.append(x.grad[7, 0].item() / 2.0**15)
    expected = 1e-3 * (1 - 0.1) / 30_000
    assert grads[0] != pytest.approx(expected, rel=0.5) and grads[1] == pytest.approx(expected, rel=1e-2)


def test_gradient_by_finite_differences(small_slices: None) -> None:
    logits, target = _batch(torch.float64)
    logits = logits[:2, :, :9].clone().requires_grad_()
    target = target[:2].clamp(max=8)
    assert torch.autograd.gradcheck(lambda x: smoothed_nll(x, target, 0.2, PAD)[0], (logits,))


def test_large_logits_and_unlikely_targets() -> None:
    logits = torch.tensor([[[1e4, 0.0, -1e4], [0.0, 200.0, 0.0]]], requires_grad=True)
    loss, nll = smoothed_nll(logits, torch.tensor([[2, 0]]), 0.0, PAD)
    assert nll.item() == pytest.approx(2e4 + 200)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]]))


def test_more_tokens_than_words_and_more_words_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token counts, in slices of one at least; features without a gradient give the same losses."""
    generator = torch.Generator().manual_seed(7)
    features, weight = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((9, 4, 3), (5, 3)))
    target = torch.randint(2, 5, (9, 4), generator=generator)
    expected = _reference(features @ weight.T, target, 0.1)
    for elements in (4, 5, 19, 10**6):
        monkeypatch.setattr(module, "SLICE_ELEMENTS", elements)
        for learn in (True, False):
            found = smoothed_nll_of_features(features.requires_grad_(learn), weight, target, 0.1, PAD)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            assert found[0].requires_grad == learn


def test_registered_criterions() -> None:
    logits, target = _batch(torch.float32)
    plain = CRITERIONS.get("cross_entropy")(None, PAD)(logits, target)
    assert plain[0] == plain[1]
    unsmoothed = CRITERIONS.get("label_smoothed_cross_entropy")(LabelSmoothedCrossEntropyConfig(), PAD)
    assert unsmoothed(logits, target) == plain
    smoothed = CRITERIONS.get("label_smoothed_cross_entropy")(LabelSmoothedCrossEntropyConfig(0.1), PAD)
    assert smoothed(logits, target)[0] != plain[0] and smoothed(logits, target)[1] == plain[1]
    with pytest.raises(FairseqError, match="--label-smoothing"):
        CRITERIONS.get("label_smoothed_cross_entropy")(LabelSmoothedCrossEntropyConfig(1.0), PAD)


def test_no_gradient_through_nll() -> None:
    logits, target = _batch(torch.float32)
    loss, nll = smoothed_nll(logits.requires_grad_(), target, 0.1, PAD)
    assert loss.requires_grad and not nll.requires_grad


def test_all_padding_is_zero() -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    loss, nll = smoothed_nll(logits, torch.full((2, 3), PAD), 0.1, PAD)
    loss.backward()
    assert loss == 0 and nll == 0
    assert logits.grad is not None and not logits.grad.any()


def test_saved_logits_of_the_original(shared: Path) -> None:
    """The whole batch's loss is a matter of the model; of its first two sentences the original saved the logits."""
    saved = np.load(shared / "reference" / "admin_3x2_init.npz")
    logits, target = torch.from_numpy(saved["logits_first2"]), torch.from_numpy(saved["batch/target"][:2])
    loss, nll = smoothed_nll(logits, target, 0.1, PAD)
    expected = _reference(logits.double(), target, 0.1)
    torch.testing.assert_close((loss.double(), nll.double()), expected, rtol=1e-6, atol=0)
    # an untrained model's loss is about the same for each token, smoothed a little dearer, as in the whole batch
    tokens = int((target != PAD).sum())
    whole = saved["nll_loss_sum_nats"].item() / saved["target_tokens"].item()
    assert nll.item() / tokens == pytest.approx(whole, rel=0.1)
