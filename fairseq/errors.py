"""The one error class of the package: everything a user can cause, said in one line; running out of memory too."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

# What else says so: the CPU's allocator, the CUDA runtime without torch's allocator, cuBLAS
_SAID_BY_OTHERS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
MORE_MEMORY = "close other programs, or take a machine with more memory"


class FairseqError(Exception):
    """Bad input, a bad file or an impossible request.

    The message is one line that names the file, line or flag, what is wrong and what to do about it. Command-line
    programs print it and exit with ``exit_status``, without a traceback. What would break the line, or steer a
    terminal, is shown as an escape sequence: file names and contents are part of messages.
    """

    exit_status = 1

    def __init__(self, message: object) -> None:
        super().__init__("".join(map(_shown, str(message))))


def _shown(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


class OutOfMemory(FairseqError):
    """Memory, a GPU's or the host's, does not suffice for what the message names."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory, a GPU's or the host's, did not suffice."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # a fork, or a file mapped
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID_BY_OTHERS)


def first_line(error: BaseException) -> str:
    """What ``error`` says first, for a message of one line."""
    return (str(error).strip() or "no reason given").splitlines()[0]


@contextlib.contextmanager
def out_of_memory_ends(doing: str | Callable[[], str], advice: str) -> Iterator[None]:
    """Within, running out of memory becomes an OutOfMemory that says what was being done and what to do.

    doing: a function is called only then.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        what = doing if isinstance(doing, str) else doing()
        raise OutOfMemory(f"out of memory{_asked_for(error)}: {what}; {advice}") from error


def _asked_for(error: BaseException) -> str:
    """How much was asked for in vain, where the error says it: in torch's and numpy's words."""
    found = re.search(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)", str(error))
    if found is None:
        return ""
    size, unit = float(found[1]), found[2]
    return f" ({size / 2**20:,.1f} MiB more)" if unit == "bytes" else f" ({size:,.1f} {unit} more)"
