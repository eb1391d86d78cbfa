"""What the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real corpora and files made by the original implementations, beside the repository."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED
