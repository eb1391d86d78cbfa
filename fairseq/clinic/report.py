"""One self-contained HTML page of all that the clinic has measured: pictures, numbers and the commands behind them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fairseq.clinic.results import DPI
from fairseq.errors import FairseqError

TITLES = {
    "dependency": "Layer dependency",
    "stability": "Output change",
    "gradients": "Gradient norms",
    "omega": "Omega",
}
EXPLANATIONS = {
    "dependency": "Row i, column j: the share of residual branch j in the output of sub-layer i, beta squared. At the "
    "start, Post-LN gives a sub-layer's own branch (the diagonal) about the same large share at every depth; Pre-LN "
    "and Admin about 1/i.",
    "stability": "How far the encoder's output moves when its weights do, against the number of sub-layers. The faster "
    "it grows, the rougher the loss surface of a deep model: the amplification effect.",
    "gradients": "Norm of the loss's gradient for every sub-layer.",
    "omega": "The scale of each sub-layer's shortcut: mean over the vector, and how far training has moved it from the "
    "value that it started from.",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid #8886; }
img { max-width: 100%; background: white; border-radius: 4px; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
code { font-size: 0.85rem; overflow-wrap: anywhere; } .note { color: #888; font-size: 0.85rem; }
.wide { overflow-x: auto; }
"""


def render(results: dict[str, dict[str, Any]], directory: str | Path) -> str:
    """The page. results: of ``results.load_results``; the pictures beside them in ``directory`` are put into it."""
    sections = [_section(name, result, Path(directory) / f"{name}.png") for name, result in results.items()]
    links = "".join(f'<li><a href="#{escape(name)}">{_title(name, r)}</a></li>' for name, r in results.items())
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>Transformer clinic</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Transformer clinic</h1>\n<ul>{links}</ul>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a command may hold a file name that is no UTF-8


def _title(name: str, result: dict[str, Any]) -> str:
    title, usual = TITLES[result["kind"]], result["kind"]
    stack = result["data"].get("stack")
    if stack in ("encoder", "decoder"):
        title, usual, own = f"{title}, {stack}", f"{usual}-{stack}", name.removesuffix(f"-{stack}")
    else:
        own = name
    return title if name == usual else f"{title}: {escape(own)}"


def _width(png: bytes) -> int:
    """In CSS pixels, so that text has the same size in all pictures; the file's own are finer."""
    return int.from_bytes(png[16:20], "big") * 100 // DPI


def _section(name: str, result: dict[str, Any], picture: Path) -> str:
    kind = result["kind"]
    parts = [f'<section id="{escape(name)}">\n<h2>{_title(name, result)}</h2>\n<p>{EXPLANATIONS[kind]}</p>']
    if picture.is_file():
        png = picture.read_bytes()
        data = base64.b64encode(png).decode()
        parts.append(f'<img width="{_width(png)}" src="data:image/png;base64,{data}" alt="{_title(name, result)}">')
    try:
        parts.append(f'<div class="wide">{TABLES[kind](result["data"])}</div>')
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        raise FairseqError(f"{picture.with_suffix('.json')}: a damaged result; measure it again or remove it") from None
    made = f"PyTorch {escape(str(result.get('torch')))}, {escape(str(result.get('machine')))}"
    parts.append(f'<p class="note"><code>{escape(str(result.get("command")))}</code><br>{made}</p>\n</section>')
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{escape(_text(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return f"<table>\n<tr>{cells('th', head)}</tr>\n{body}</table>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _dependency_table(data: dict[str, Any]) -> str:
    rows = []
    for model in data["models"]:
        stack = model[data["stack"]]
        own = [row[-1] for row in stack["beta2"]]
        total = sum(own)
        rows.append(
            [
                f"{model['label']}, {model['stage']}",
                len(own),
                own[0],
                own[len(own) // 2],
                own[-1],
                total,
                max(stack["bias"]),
            ]
        )
    head = ["model", "sub-layers", "own share, first", "middle", "last", "sum of own shares", "largest bias share"]
    return _table(head, rows)


def _stability_table(data: dict[str, Any]) -> str:
    rows = []
    for model in data["models"]:
        for kind, name in (("random", "random perturbation"), ("step", "gradient step (root)")):
            fit = model["fits"][kind]
            power = fit["exponent"]
            rows.append(
                [f"{model['label']}, {name}", *model[f"{kind}_mean"], fit["linear_r2"], fit["logarithmic_r2"], power]
            )
    depths = data["models"][0]["depths"]
    return _table(["model", *(f"N = {n}" for n in depths), "R², a + b N", "R², a + b ln N", "power of N"], rows)


def _gradients_table(data: dict[str, Any]) -> str:
    rows = []
    for model in data["models"]:
        for stack in ("encoder", "decoder"):
            norms = model[stack]["parameters"]
            rows.append([f"{model['label']}, {stack}", norms[0], norms[-1], min(norms), max(norms)])
    return _table(["gradient norm of the parameters", "first sub-layer", "last", "least", "most"], rows)


def _omega_table(data: dict[str, Any]) -> str:
    rows = []
    for model in data["models"]:
        for stack in ("encoder", "decoder"):
            row: list[Any] = [f"{model['label']}, {stack}"]
            for key in ("start", "mean", "std"):
                column = model[stack][key]
                row += [column[0], column[-1]] if column else [None, None]
            rows.append(row)
    head = ["", "start, first", "start, last", "mean, first", "mean, last", "spread, first", "spread, last"]
    return _table(head, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "dependency": _dependency_table,
    "stability": _stability_table,
    "gradients": _gradients_table,
    "omega": _omega_table,
}
