"""Freed memory is kept."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from fairseq.utils import memory

LOOP = """
import resource, torch
from fairseq.utils.memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(16):
    before = faults()
    tensors = [torch.ones(2**size) for size in (23, 20, 22)]  # 52 MiB
    del tensors
    print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_second_use_of_memory_costs_no_page_faults():
    result = subprocess.run([sys.executable, "-c", LOOP], check=True, capture_output=True, text=True)
    faults = [int(line) for line in result.stdout.split()]
    assert faults[0] > 10_000 and max(faults[-4:]) < 500  # malloc takes some steps to settle


def test_other_c_libraries_are_left_alone(monkeypatch):
    for error in (OSError, TypeError):  # Windows has no default library to open
        monkeypatch.setattr(ctypes, "CDLL", lambda name, error=error: (_ for _ in ()).throw(error()))
        memory.keep_freed_memory()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
