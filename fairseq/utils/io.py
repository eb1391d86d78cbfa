"""Writing files so that a reader sees the old content or the new, never a half."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fairseq.errors import FairseqError


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Make a file's content, or the renames in a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refuse_bom(first: bytes, where: str) -> None:
    """Raise FairseqError when ``first``, the start of a text, is a byte order mark: it would stick to a token."""
    if first.startswith(codecs.BOM_UTF8):
        raise FairseqError(f"{where}: begins with a byte order mark; save the file as UTF-8 without it")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends without an exception.

    mode: ``"w"`` (UTF-8, ``\\n`` line ends) or ``"wb"``. Missing parent directories are made, and what a killed process
    left of the same file is deleted. Raises FairseqError when the file cannot be written; whatever stood at ``path`` is
    then untouched.
    """
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent, f"{path.name}.")
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with open(fd, mode, **text) as handle:  # type: ignore[call-overload]
            _lock(fd)
            yield handle
            handle.flush()
            os.fchmod(fd, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
            os.fsync(fd)
            os.replace(temporary, path)
            temporary = None
        fsync_path(path.parent)
    except OSError as error:
        raise FairseqError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside ``path``, renamed to ``path`` when the block ends without an exception.

    Raises FairseqError when it cannot be made, and when ``path`` is there already and no empty directory.
    """
    path = Path(path)
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FairseqError(f"{path}: is there already; name another directory, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_directory(path.parent, f"{path.name}.") as temporary:
            yield temporary
            for made in temporary.rglob("*"):  # some of which only their owner reads
                os.chmod(made, (0o777 if made.is_dir() else 0o666) & ~_umask())
                fsync_path(made)
            os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise FairseqError(f"{path}: cannot write: {error.strerror or error}") from error


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
            with open(source, "rb") as original, open(temporary, "xb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise FairseqError(f"{path}: cannot write: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # os.replace leaves it where path is the same file already
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_directory(parent: str | os.PathLike[str], prefix: str) -> Iterator[Path]:
    """A directory in ``parent`` that is deleted when the block ends, unless the block has renamed it.

    What killed processes left of such directories is deleted first. Raises OSError when it cannot be made.
    """
    remove_unfinished(parent, prefix)
    path = Path(tempfile.mkdtemp(dir=parent, prefix=f".{prefix}", suffix=".tmp"))
    fd = os.open(path, os.O_RDONLY)
    try:
        _lock(fd)
        os.chmod(path, 0o777 & ~_umask())
        yield path
    finally:
        os.close(fd)
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked_directory(path: str | os.PathLike[str], wait: bool = True) -> Iterator[None]:
    """A block that no two processes are in with ``path`` at a time; of no effect where directories have no locks.

    wait: until another one has left it; else raise BlockingIOError.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        _lock(fd, wait)
        yield
    finally:
        os.close(fd)


def remove_unfinished(directory: str | os.PathLike[str], prefix: str) -> None:
    """Delete what killed processes left of files and directories whose names start with ``prefix``.

    What a process is still writing stays.
    """
    for path in Path(directory).iterdir():
        if not (path.name.startswith(f".{prefix}") and path.name.endswith(".tmp")) or _is_in_use(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _lock(fd: int, wait: bool = True) -> None:
    """Hold an open file or directory. The system lets go of it when the process ends, however it does."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks
        pass


def _is_in_use(path: Path) -> bool:
    """Whether a living process holds ``path``, or it has just gone."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(fd)
    return False
