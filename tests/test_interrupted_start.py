"""Ctrl-C while a command's modules are imported: the process ends, and no traceback is printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import ROOT

TORCH = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(20)
"""  # in place of the real one: imports of it are interrupted


@pytest.fixture
def interrupted(tmp_path):
    """Run Python with arguments, interrupted where it imports torch."""
    (tmp_path / "torch.py").write_text(TORCH)

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )

    return run


def test_a_command_ends_without_a_word(interrupted, tmp_path):
    script = tmp_path / "fairseq-generate"
    script.write_text("from fairseq.cli.generate import main\nmain()\n")
    for arguments in (["-m", "fairseq.cli.train", "--help"], [script, "--help"]):
        process = interrupted(*arguments)
        assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")


def test_who_imports_a_command_is_not_ended(interrupted, tmp_path):
    code = "try:\n from fairseq.cli.train import main\nexcept KeyboardInterrupt:\n print('caught')\nelse:\n main()"
    assert interrupted("-c", code).stdout == "caught\n"


@pytest.mark.parametrize("imported", ["signal", "multiprocessing.spawn"])
def test_then_it_is_an_exception(interrupted, tmp_path, imported):
    """Once the command runs, and from the beginning in the processes that it starts; garbage is collected then, too."""
    code = f"""
import gc, signal, {imported}
import fairseq.cli
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, gc.isenabled())
fairseq.cli.command(print)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, gc.isenabled())
"""
    (tmp_path / "fairseq-train").write_text(code)
    found = interrupted(tmp_path / "fairseq-train").stdout.split()
    assert found == [str(imported != "signal")] * 2 + ["True"] * 2
