"""Dropout on the CPU: what is dropped, how often, and by whose random numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fairseq.modules.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
def test_each_element_is_dropped_with_probability_p_or_scaled(p):
    torch.manual_seed(1)
    x = torch.full((1001, 999), 2.0, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    scale = 65536 / (65536 - round(p * 65536))
    assert torch.equal(y.unique(), torch.tensor([0.0, 2 * scale]))
    assert torch.equal(x.grad, y / 2)
    n = x.numel()
    within = 5 * math.sqrt(p * (1 - p) / n)  # five standard deviations
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=within + 2**-17)
    dropped = (y == 0).double() - p
    for i in range(1, 9):  # four elements share one random number of 64 bits
        together = (dropped.view(-1)[i:] * dropped.view(-1)[:-i]).mean().item()
        assert abs(together) < 5 * p * (1 - p) / math.sqrt(n)


def test_extremes():
    x = torch.ones(3, 5, 7)
    assert Dropout(0.1).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(Dropout(1e-6)(x), x)  # rounds to 0
    assert not Dropout(1 - 1e-9)(x).count_nonzero() and Dropout(0.5)(x[:0]).shape == (0, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_seeded_by_torch_in_every_precision(dtype):
    x = torch.ones(7, 9, dtype=dtype)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(Dropout(0.5)(x))
    assert outputs[0].dtype == dtype
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
