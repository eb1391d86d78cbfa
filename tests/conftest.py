"""What the tests share."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

from tests.training_runs import write_databin

SHARED = Path(__file__).resolve().parents[2] / "shared"
# how long examples take says only how busy the machine is
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
# The files that take longest, roughly in order: first, so that no process is left alone with one at the end. Those with
# short timeouts are not next to the compiler.
LONGEST = ("compile", "fake_cuda", "same_training", "recipes", "heartbeat", "distributed", "out_of_memory", "faults")
LONGEST += ("capture", "bench_generate", "residual_rules", "sbatch", "training", "corpus_cleaning", "generate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--no-loadscope-reorder`` pytest-xdist hands files out in this order, else those of many tests first."""
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


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
    return write_databin(directory, 300, seed=0, held_out={"valid": 30, "test": 30})
