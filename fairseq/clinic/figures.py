"""The clinic's pictures: legible at half a page, in colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, with a marker each so that nothing depends on colour alone
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#8C510A", "#5AB4AC")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
KIND_MARKERS = {"self_attn": "o", "encoder_attn": "s", "ffn": "^"}
KIND_NAMES = {"self_attn": "self-attention", "encoder_attn": "encoder attention", "ffn": "feed-forward"}
FONT_SIZE = 11
SHOWN_RANGE = (3e-3, 1.0)  # of beta^2 in heat maps


def _subplots(rows: int, columns: int, width: float, height: float, **settings: Any) -> tuple[Figure, np.ndarray]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not by way of pyplot, which would keep it

    with rc_context({"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **settings)
    return figure, axes


def _literally(label: str) -> str:
    """A user's label, in which a dollar does not begin a formula."""
    return label.replace("$", r"\$")


def dependency(entries: Sequence[dict[str, Any]], stack: str) -> Figure:
    """Heat maps of beta_{i,j}^2: a column a model, a row a stage (at the start, after training).

    entries: dicts with label, stage and, for ``stack``, beta2 (ragged rows).
    """
    from matplotlib.colors import LogNorm

    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    figure, axes = _subplots(len(stages), len(labels), 2.9 * len(labels) + 1.0, 2.75 * len(stages) + 0.3)
    image = None
    for ax in axes.flat:
        ax.set_visible(False)
    for entry in entries:
        ax = axes[stages.index(entry["stage"]), labels.index(entry["label"])]
        ax.set_visible(True)
        rows = entry[stack]["beta2"]
        size = len(rows)
        grid = np.full((size, size + 1), np.nan)
        for i, row in enumerate(rows):
            grid[i, : len(row)] = row
        low, high = SHOWN_RANGE
        image = ax.imshow(
            np.clip(grid, low, high),
            norm=LogNorm(low, high),
            cmap="viridis",
            extent=(-0.5, size + 0.5, size + 0.5, 0.5),
            interpolation="nearest",
        )
        ax.set_title(f"{_literally(entry['label'])}, {entry['stage']}")
        ax.set_xlabel("branch j (0: embedding)")
        ax.set_ylabel("sub-layer i")
    of = "share of branch j in the output of sub-layer i" if len(labels) > 1 else "share of branch j in sub-layer i"
    figure.suptitle(f"{stack}: {of}", fontsize=FONT_SIZE + 1)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, extend="min")
        bar.set_label(r"$\beta_{i,j}^2$")
    return figure


def stability(models: Sequence[dict[str, Any]]) -> Figure:
    """Output change against depth, for a random perturbation and for a gradient step; the fitted curves behind it.

    models: dicts with label and the result of ``stability.summarize``.
    """
    figure, axes = _subplots(1, 2, 10.0, 4.2)
    panels = (
        ("random", r"random perturbation: $|F(x,W)-F(x,W^*)|^2$"),
        ("step", r"gradient step: $|F(x,W)-F(x,W^*)|$"),
    )
    for ax, (kind, title) in zip(axes[0], panels, strict=True):
        for model, colour, marker in zip(models, cycle(COLOURS), cycle(MARKERS), strict=False):
            depths, means = np.array(model["depths"]), np.array(model[f"{kind}_mean"])
            if not (means > 0).all():
                continue  # ReZero starts as the identity: nothing moves, and 0 has no place on a logarithmic axis
            values = means if kind == "random" else np.sqrt(means)
            ax.plot(depths, values, marker, color=colour, markersize=6, zorder=3, label=_fitted(model, kind))
            for depth, seeds in zip(depths, model[kind], strict=True):
                shown = np.array(seeds) if kind == "random" else np.sqrt(seeds)
                ax.vlines(depth, shown.min(), shown.max(), color=colour, linewidth=1, alpha=0.6)
            n = np.linspace(depths.min(), depths.max(), 200)
            fit = model["fits"][kind]
            offset, slope = fit[fit["growth"]]
            curve = offset + slope * (n if fit["growth"] == "linear" else np.log(n))
            ax.plot(n, np.where(curve > 0, curve, np.nan), color=colour, linewidth=1.5, alpha=0.7)
        ax.set(title=title, xlabel="sub-layers N", yscale="log", ylabel="output change")
        ax.grid(alpha=0.25)
        ax.set_ylim(top=ax.get_ylim()[1] * 10)  # room for the legend
        if ax.lines:
            ax.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="upper left")
    return figure


def _fitted(model: dict[str, Any], kind: str) -> str:
    fit = model["fits"][kind]
    growth = "a + b N" if fit["growth"] == "linear" else "a + b log N"
    return f"{_literally(model['label'])}: {growth}, $R^2$ {max(fit['linear_r2'], fit['logarithmic_r2']):.2f}"


def gradients(models: Sequence[dict[str, Any]]) -> Figure:
    """Gradient norms of the sub-layers' parameters and streams; markers tell the kinds of sub-layers.

    models: dicts with label, encoder and decoder, those with kind, parameters and output.
    """
    figure, axes = _subplots(2, 2, 10.0, 6.4, sharey="row", sharex="col")
    for row, (what, title) in enumerate((("parameters", "parameters"), ("output", "output"))):
        for column, stack in enumerate(("encoder", "decoder")):
            ax = axes[row, column]
            for model, colour in zip(models, cycle(COLOURS), strict=False):
                norms, kinds = model[stack][what], model[stack]["kind"]
                places = np.arange(1, len(norms) + 1)
                ax.plot(places, norms, color=colour, linewidth=1, alpha=0.6)
                for kind, marker in KIND_MARKERS.items():
                    chosen = [i for i, k in enumerate(kinds) if k == kind]
                    ax.plot(places[chosen], np.array(norms)[chosen], marker, color=colour, markersize=3.5)
            ax.set(yscale="log", title=f"{stack}: gradient in the sub-layer's {title}")
            ax.grid(alpha=0.25)
        axes[row, 0].set_ylabel("norm")
    for ax in axes[-1]:
        ax.set_xlabel("sub-layer")
    _gradient_legend(figure, models)
    return figure


def _gradient_legend(figure: Figure, models: Sequence[dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, label=_literally(model["label"]))
        for model, colour in zip(models, cycle(COLOURS), strict=False)
    ]
    handles += [
        Line2D([], [], color="black", linestyle="", marker=marker, markersize=4, label=KIND_NAMES[kind])
        for kind, marker in KIND_MARKERS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=FONT_SIZE - 1)


def omega(models: Sequence[dict[str, Any]]) -> Figure:
    """omega by sub-layer, and below, where both are known, how far training has moved it: mean and spread.

    models: dicts with label, encoder and decoder, those as in ``omega.StackOmega``.
    """
    stacks = [model[stack] for model in models for stack in ("encoder", "decoder")]
    moved = any(stack["start"] and stack["mean"] for stack in stacks)
    figure, axes = _subplots(1 + moved, 2, 10.0, 3.4 * (1 + moved), sharey="row", sharex="col")
    for column, stack in enumerate(("encoder", "decoder")):
        for model, colour, marker in zip(models, cycle(COLOURS[1:]), cycle(MARKERS), strict=False):
            own, style = model[stack], {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.5}
            first = own["start"] if own["mean"] is None else own["mean"]
            places = np.arange(1, len(first) + 1)
            axes[0, column].plot(places, first, label=_literally(model["label"]), **style)
            if own["start"] and own["mean"]:
                change, std = np.array(own["mean"]) - own["start"], np.array(own["std"])
                axes[1, column].plot(places, change, **style)
                axes[1, column].fill_between(places, change - std, change + std, color=colour, alpha=0.25, linewidth=0)
        axes[0, column].set_title(stack)
        axes[-1, column].set_xlabel("sub-layer")
    for ax in axes.flat:
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel(r"$\omega$ (mean)")
    if moved:
        axes[1, 0].set_ylabel(r"$\omega$, trained $-$ start" + "\n(band: standard deviation)")
    axes[0, 0].legend(frameon=False, fontsize=FONT_SIZE - 1)
    return figure
