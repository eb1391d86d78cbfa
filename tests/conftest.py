"""What the tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDatasetWriter

SHARED = Path(__file__).resolve().parents[2] / "shared"
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real corpora and files made by the original implementations, beside the repository."""
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def toy_databin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data-bin xx-yy of 300 training and 30 validation and test pairs; a target is its source in reverse."""
    directory = tmp_path_factory.mktemp("toy-data-bin")
    dictionary = Dictionary.build({f"w{i:02d}": 100 - i for i in range(28)})
    rng = np.random.default_rng(0)
    for language in ("xx", "yy"):
        dictionary.save(directory / f"dict.{language}.txt")
    for split, count in (("train", 300), ("valid", 30), ("test", 30)):
        sentences = [rng.integers(4, len(dictionary), rng.integers(3, 12)) for _ in range(count)]
        for language, step in (("xx", 1), ("yy", -1)):
            with IndexedDatasetWriter(directory / f"{split}.xx-yy.{language}", np.uint16) as writer:
                for sentence in sentences:
                    writer.add(np.append(sentence[::step], dictionary.eos()))
    return directory
