"""Packages of the optional extras, imported when something needs them."""

from __future__ import annotations

import importlib
from typing import Any

from fairseq.errors import FairseqError


def require(package: str, extra: str, what: str) -> Any:
    """Module ``package``. Raises FairseqError when it is missing. extra: that has it; what: the user wanted with it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise FairseqError(
            f"{what} needs the package {package}, which cannot be imported ({error}); "
            f"pip install 'transformer-clinic[{extra}]', or pip install -e '.[{extra}]' in a checkout"
        ) from error
