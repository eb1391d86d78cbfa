"""What only a GPU runs, on `tests.fake_cuda`: in a process of its own, since torch must find that device at its start.

`tests/test_cuda.py` itself runs there too, so that its first minute on a real GPU is not lost on its own mistakes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.fake_cuda import build
from tests.training_runs import ROOT

# of tests/test_cuda.py: what needs no compiler and few updates
REAL = "test_cuda and (rezero_postln or sentence-avg or (wait and graphs) or criterion_that or search)"


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has kernels for a real GPU")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_gpu_code_runs_without_a_gpu(tmp_path):
    try:
        library = build(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no device for torch {torch.__version__}: {error.stderr.splitlines()[0]}")
    command = [sys.executable, "-m", "pytest", "-p", "tests.fake_cuda", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-k", f"cases or ({REAL})", f"--basetemp={tmp_path / 'runs'}", "--tb=short"]
    run = subprocess.run(
        [*command, "tests/fake_cuda/cases.py", "tests/test_cuda.py"],
        cwd=ROOT,
        env=os.environ | {"FAKE_CUDA": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
