"""``fairseq-interactive`` on a real terminal: a pseudo-terminal, keys in, screen out."""

from __future__ import annotations

import os
import re
import select
import stat
import sys
import time
from subprocess import Popen

import pytest

from fairseq.interactive import prompt
from tests.toys import toy_model, write_toy_checkpoint, write_toy_databin

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"


# Opening the terminal that is its input makes it the controlling one of the new session: Ctrl-C is a signal then.
# Tests that run in a shell's background inherit that SIGINT is ignored.
IN_A_TERMINAL = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.argv[1], sys.argv[1:])"""


def start_in_terminal(arguments: list[str], stdout: int | None = None, **environment: str) -> tuple[Popen[bytes], int]:
    """The command with a pseudo-terminal, and our end of that. stdout: a file descriptor instead of the terminal.

    Not by pty.fork, whose child goes on in Python: this process has threads, whose locks would stay locked there.
    """
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fairseq.cli.interactive", *arguments]
    process = Popen(
        [sys.executable, "-c", IN_A_TERMINAL, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=theirs,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    return process, ours


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        settings = {"TERM": "xterm", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
        self.process, self.fd = start_in_terminal(arguments, **(settings | environment))

    def read(self, until: str | None) -> str:
        """What appears up to ``until``, a regular expression, or up to the end."""
        received, end = b"", time.monotonic() + 60
        while until is None or not re.search(until.encode(), received, re.DOTALL):
            assert time.monotonic() < end, received
            if not select.select([self.fd], [], [], 1)[0]:
                continue
            try:
                part = os.read(self.fd, 4096)
            except OSError:  # how Linux says that the other side has closed
                part = b""
            if not part:
                break
            received += part
        return received.decode(errors="replace").replace("\r\n", "\n")

    def say(self, keys: bytes, until: str | None = "xx> ") -> str:
        os.write(self.fd, keys)
        return self.read(until)

    def interrupt(self) -> str:
        """Ctrl-C, and what appears up to the end. Python misses one between the prompt and its wait for keys."""
        for _ in range(6):
            os.write(self.fd, CTRL_C)
            if select.select([self.fd], [], [], 10)[0]:
                break
        return self.read(None)

    def status(self) -> int:
        status = self.process.wait(timeout=60)
        os.close(self.fd)
        return status


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("prompt")
    databin, path = write_toy_databin(directory / "bin"), write_toy_checkpoint(toy_model(), directory / "model.pt")
    return [str(databin), "--path", str(path), "--max-len-b", "9", "--cpu"]


def test_a_session_with_history(arguments, tmp_path):
    terminal = Terminal([*arguments, "--nbest", "2"], XDG_STATE_HOME=str(tmp_path))
    assert "Type a sentence in 'xx'" in terminal.read("xx> ")
    answer = terminal.say(b"a b zebra\n")
    first, second, details = answer.splitlines()[1:4]
    assert re.fullmatch(r"yy   1  *-\d+\.\d{3}  .+", first) and re.fullmatch(r"     2  *-\d+\.\d{3}  .+", second)
    assert re.fullmatch(r"    \d+\.\d\d s, not in the dictionary: zebra", details)
    assert terminal.say(b"   \n").count("\n") == 1  # a blank line asks again
    # readline may show the prompt again before the answer
    answer = terminal.say(b"c " * 2000 + b"\n", "at most.*xx> ")
    assert "the sentence: 2,001 tokens, and the model reads at most 1,024" in answer
    assert "not valid UTF-8" in terminal.say(b"\xff\xfe\n")
    assert "\nyy   1" in terminal.say(UP * 4 + b"\x7f" * 5 + b"c\n", "yy   1.*xx> ")  # edits the first line
    assert terminal.say(CTRL_D, None).strip() == "" and terminal.status() == 0
    kept = tmp_path / "transformer-clinic" / "interactive_history"
    assert kept.read_text().splitlines() == ["a b zebra", ("c " * 2000), "a b c"]
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700

    terminal = Terminal(arguments, XDG_STATE_HOME=str(tmp_path))
    terminal.read("xx> ")
    assert re.search(r"\nyy  .+\n    score -\d+\.\d{3}, \d+\.\d\d s\n", terminal.say(UP + b"\n"))
    assert "interrupted" in terminal.interrupt() and terminal.status() == 130


def test_pasted_lines_alignment_and_a_history_that_cannot_be_written(arguments, tmp_path):
    (tmp_path / "file").touch()
    terminal = Terminal([*arguments, "--print-alignment"], XDG_STATE_HOME=str(tmp_path / "file"))
    terminal.read("xx> ")
    answer = terminal.say(b"\x1b[200~a b\nc d\x1b[201~\n")
    assert answer.count("\nyy  ") == 2 and "error" not in answer and answer.count("→") > 2
    assert terminal.say(CTRL_D, None).strip() == "" and terminal.status() == 0


def test_output_to_a_pipe_stays_fairseqs(arguments, tmp_path):
    read, write = os.pipe()
    process, fd = start_in_terminal(arguments, stdout=write)
    os.close(write)
    os.write(fd, b"a b\n" + CTRL_D)
    with os.fdopen(read) as printed:
        assert [line[:3] for line in printed] == ["S-0", "W-0", "H-0", "D-0", "P-0"]
    assert process.wait(timeout=60) == 0
    os.close(fd)


def test_history_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "HISTORY_LENGTH", 3)
    path = tmp_path / "state" / "history"
    for line in ["a", "b", "b", " ", "c", "d"]:
        prompt.remember(path, line)
    assert prompt.read_history(path) == ["b", "c", "d"]
    path.write_bytes(b"\xff")
    assert prompt.read_history(path) == [] == prompt.read_history(None)


def test_where_history_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the specification: ignore it
    assert prompt.history_file() == tmp_path / ".local/state/transformer-clinic/interactive_history"


def test_control_characters_do_not_reach_the_terminal():
    assert (
        prompt._printable("a\x1b[2J b\x9b\t👨‍👩‍👧")
        == "a\N{REPLACEMENT CHARACTER}[2J b" + 2 * "\N{REPLACEMENT CHARACTER}" + "👨‍👩‍👧"
    )
