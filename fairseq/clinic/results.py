"""What the clinic has measured: a JSON file and a picture each, side by side in one directory."""

from __future__ import annotations

import io
import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("dependency", "stability", "gradients", "omega")
DPI = 200


def check_out_dir(directory: str | Path) -> None:
    """Raise FairseqError when results cannot be written, before anything is measured. Leaves nothing behind."""
    try:
        place = Path(directory).absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise FairseqError(f"--out-dir {directory}: cannot write: {error.strerror or error}") from error


def save_result(directory: str | Path, name: str, kind: str, command: str, data: Any, figure: Figure | None) -> None:
    """Write ``NAME.json`` and, with a figure, ``NAME.png``. Raises FairseqError when they cannot be written."""
    content = {"kind": kind, "command": command, "torch": torch.__version__, "machine": _machine(), "data": data}
    directory = Path(directory)
    if figure is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        with atomic_write(directory / f"{name}.png", "wb") as handle:
            handle.write(buffer.getvalue())
    with atomic_write(directory / f"{name}.json") as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def load_results(directory: str | Path) -> dict[str, dict[str, Any]]:
    """name -> content of every result in a directory, by kind and name, an encoder's before the decoder's.

    Raises FairseqError when there is none, or a file of that name is not ours.
    """
    found = {}
    for path in sorted(Path(directory).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["kind"] not in KINDS or not isinstance(content["data"], dict):
                raise KeyError
            found[path.stem] = content
        except OSError as error:
            raise FairseqError(f"{path}: cannot read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FairseqError(f"{path}: not a result of fairseq-clinic; move it out of {directory}") from None
    if not found:
        raise FairseqError(f"{directory}: no results of fairseq-clinic there; measure something first")

    def order(item: tuple[str, dict[str, Any]]) -> tuple[int, str, bool]:
        name, content = item
        own = name.removesuffix("-encoder").removesuffix("-decoder")
        return KINDS.index(content["kind"]), own, content["data"].get("stack") == "decoder"

    return dict(sorted(found.items(), key=order))
