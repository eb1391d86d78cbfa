"""Output change: how far a model's output moves when its parameters move a little, and how that grows with depth.

Liu et al. 2020: |F(x, W) - F(x, W*)|^2 is about ``sum_i beta_{i,i}^2 * C`` for N sub-layers: O(N) for
Post-LN, O(log N) for Pre-LN and Admin. That is for a random W* - W, in which the sub-layers' changes are independent
and their squares add up. A gradient step moves all sub-layers in concert, so that the changes themselves add up and it
is |F(x, W) - F(x, W*)|, not its square, that grows so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.data.translation import Batch
from fairseq.models.transformer import Transformer
from fairseq.utils.symbols import PAD

NOISE = 0.01  # standard deviation of a random perturbation, as a share of the Xavier initialisation's
STEP = 1e-4  # learning rate of the gradient step (SGD, loss in nats a target token)
LABEL_SMOOTHING = 0.1


def matrices(*stacks: nn.Module) -> list[nn.Parameter]:
    """The weight matrices of the stacks' layers: what is perturbed. Embeddings, biases, gains and omega are not."""
    return [p for stack in stacks for p in stack.layers.parameters() if p.dim() > 1]  # type: ignore[union-attr]


def normalized(x: Tensor, real: Tensor) -> Tensor:
    """x: (batch, time, dim) -> its real positions, each with mean 0 and variance 1: (positions, dim).

    A stack that ends with a LayerNorm gives that already; one without, such as ReZero's, becomes comparable.
    """
    x = x[real]
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)


def encoder_output(model: Transformer, inputs: Mapping[str, Any]) -> Tensor:
    """Normalised encoder output: (positions, dim)."""
    src_tokens = inputs["src_tokens"]
    return normalized(model.encoder(src_tokens).x, src_tokens.ne(PAD))


def all_outputs(model: Transformer, inputs: Mapping[str, Any]) -> Tensor:
    """Normalised outputs of encoder and decoder, one after the other: (source + target positions, dim)."""
    encoder_out = model.encoder(inputs["src_tokens"])
    features = model.decoder(inputs["prev_output_tokens"], encoder_out)
    real = [inputs[name].ne(PAD) for name in ("src_tokens", "prev_output_tokens")]
    return torch.cat([normalized(encoder_out.x, real[0]), normalized(features, real[1])])


@contextmanager
def moved(parameters: Sequence[Tensor], by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add ``by(p)`` to every parameter, and put all back at the end, to the bit."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p += by(p)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def change(output: Callable[[], Tensor], parameters: Sequence[Tensor], by: Callable[[Tensor], Tensor]) -> float:
    """Mean squared change of the elements of ``output()`` when the parameters move: a share of its variance, 1."""
    with torch.no_grad():
        before = output()
        with moved(parameters, by):
            return float((output() - before).square().mean())


def random_change(output: Callable[[], Tensor], parameters: Sequence[Tensor], seed: int, noise: float = NOISE) -> float:
    """Output change for Gaussian noise; divided by ``noise``^2.

    Its standard deviation in a matrix is ``noise`` times that of Xavier's initialisation, sqrt(2 / (rows + columns)),
    whatever the matrix holds: as with Adam, a weight moves by an amount that does not depend on its size.
    """
    generator = torch.Generator().manual_seed(seed)

    def by(p: Tensor) -> Tensor:
        draw = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        return draw * (noise * math.sqrt(2 / sum(p.shape)))

    return change(output, parameters, by) / noise**2


def mean_loss(model: Transformer, batch: Batch) -> Tensor:
    """The label-smoothed loss of a batch that has a target, in nats a target token: a scalar."""
    logits, _ = model(**batch["net_input"])
    assert batch["target"] is not None
    loss, _ = smoothed_nll(logits, batch["target"], LABEL_SMOOTHING, PAD)
    return loss / batch["ntokens"]


def gradient_change(
    model: Transformer, batch: Batch, output: Callable[[], Tensor], parameters: Sequence[Tensor], step: float = STEP
) -> float:
    """Output change for one SGD step on the batch's label-smoothed loss; divided by ``step``^2."""
    gradients = torch.autograd.grad(mean_loss(model, batch), list(parameters))
    by_parameter = dict(zip(map(id, parameters), gradients, strict=True))
    return change(output, parameters, lambda p: -step * by_parameter[id(p)]) / step**2


@dataclass
class Fit:
    """Least squares of ``a + b * g(N)`` with g(N) = N ("linear") and ln N ("logarithmic"): (a, b) and R^2 of each.

    exponent: b of ``value = a * N^b``; None if a value is 0.
    """

    linear: tuple[float, float]
    linear_r2: float
    logarithmic: tuple[float, float]
    logarithmic_r2: float
    exponent: float | None

    @property
    def growth(self) -> str:
        """Which of the two explains more of the variance."""
        return "linear" if self.linear_r2 > self.logarithmic_r2 else "logarithmic"


def fit_growth(depths: Sequence[int], values: Sequence[float]) -> Fit:
    """Fit how ``values`` grow with ``depths`` (sub-layers)."""
    n, y = np.asarray(depths, dtype=float), np.asarray(values, dtype=float)

    def line(x: np.ndarray, y: np.ndarray) -> tuple[tuple[float, float], float]:
        slope, offset = np.polyfit(x, y, 1)
        rest = np.square(y - offset - slope * x).sum()
        spread = np.square(y - y.mean()).sum()
        return (float(offset), float(slope)), float(1 - rest / spread) if spread > 0 else 1.0

    (linear, linear_r2), (logarithmic, logarithmic_r2) = line(n, y), line(np.log(n), y)
    exponent = float(np.polyfit(np.log(n), np.log(y), 1)[0]) if (y > 0).all() else None
    return Fit(linear, linear_r2, logarithmic, logarithmic_r2, exponent)


def geometric_mean(values: Sequence[float]) -> float:
    """Of seeds whose results differ by factors, not by amounts; 0 if one is 0."""
    return math.exp(sum(map(math.log, values)) / len(values)) if all(v > 0 for v in values) else 0.0


def summarize(
    depths: Sequence[int], random: Sequence[Sequence[float]], step: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """The result of one model: depths, the seeds' output changes for both kinds of perturbation, means and fits.

    random, step: a list of the seeds' values for each depth. The gradient step's fit is of the root, see above.
    """
    random_means, step_means = ([geometric_mean(seeds) for seeds in kind] for kind in (random, step))
    fits = {"random": fit_growth(depths, random_means), "step": fit_growth(depths, [math.sqrt(v) for v in step_means])}
    return {
        "depths": list(depths),
        "random": [list(seeds) for seeds in random],
        "random_mean": random_means,
        "step": [list(seeds) for seeds in step],
        "step_mean": step_means,
        "fits": {name: asdict(fit) | {"growth": fit.growth} for name, fit in fits.items()},
    }


def fits_as_text(model: dict[str, Any]) -> str:
    """Both fits in two lines. model: a label and ``summarize``'s result."""
    lines = []
    for kind, name, power in (("random", "random perturbation", "^2"), ("step", "gradient step", "")):
        if not all(value > 0 for value in model[f"{kind}_mean"]):
            lines.append(f"{model['label']}, {name}: the output does not change at some depth")
            continue
        fit = model["fits"][kind]
        (a, b), (c, d) = fit["linear"], fit["logarithmic"]
        linear = f"{a:.3g} + {b:.3g} N (R^2 {fit['linear_r2']:.3f})"
        logarithmic = f"{c:.3g} + {d:.3g} ln N (R^2 {fit['logarithmic_r2']:.3f})"
        lines.append(
            f"{model['label']}, {name}: |dF|{power} = {linear} or {logarithmic}: {fit['growth']}; "
            f"as a power N^{fit['exponent']:.2f}"
        )
    return "\n".join(lines)
