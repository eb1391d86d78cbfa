"""Writing files so that a reader sees the old content or the new, never a half."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fairseq.errors import FairseqError


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make renames in directory ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends without an exception.

    mode: ``"w"`` (UTF-8, ``\\n`` line ends) or ``"wb"``. Missing parent directories are made.
    Raises FairseqError when the file cannot be written; whatever stood at ``path`` is then untouched.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with open(fd, mode, **text) as handle:  # type: ignore[call-overload]
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
        temporary = None
        fsync_directory(path.parent)
    except OSError as error:
        raise FairseqError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def atomic_copy(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Make ``path`` the same content as ``source``, at once; a hard link where the file system has them.

    Only for files that are replaced and never changed in place, such as checkpoints.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise FairseqError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)  # os.replace leaves it where path is the same file already


def remove_unfinished(directory: str | os.PathLike[str], prefix: str) -> None:
    """Delete what a killed process left of files whose names start with ``prefix``."""
    for path in Path(directory).glob(f".{prefix}*.tmp"):
        path.unlink(missing_ok=True)
