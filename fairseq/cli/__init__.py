"""The commands. Each file parses its flags, calls the library and prints; the logic is elsewhere."""

from __future__ import annotations

import errno
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from fairseq.errors import MORE_MEMORY, FairseqError, out_of_memory_ends
from fairseq.utils.log_lines import log_to

EXIT_ERROR = 1  # bad input: a file, a value, an impossible request
EXIT_INTERRUPTED = 130  # Ctrl-C, as a shell reports it
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

Main = Callable[["list[str] | None"], None]

# A command's modules are next, for seconds. Ctrl-C ends it at once and without a word till then: as an exception it
# would be a traceback, or get lost in torch. Only where a command starts: "-m" is there while Python looks for what to
# run, and the processes of training, which multiprocessing starts, import all this too.
_PROGRAM = os.path.basename(sys.argv[0]) if sys.argv else ""
_STARTING = (_PROGRAM == "-m" or _PROGRAM.startswith("fairseq-")) and "multiprocessing.spawn" not in sys.modules
if _STARTING:
    gc.disable()  # modules stay: to look for garbage among them takes a sixth of the time
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(main: Main, logs: TextIO | None = None) -> Main:
    """Turn the errors a user can cause into one line on standard error and an exit status, without a traceback.

    logs: stream of the log lines; standard error if None.
    """
    if _STARTING:
        gc.enable()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        try:
            log_to(logs or sys.stderr)
            with out_of_memory_ends("the work goes no further", MORE_MEMORY):
                main(argv)  # where nothing within says it better
            if logs is None and sys.stdout is not None:
                sys.stdout.flush()
        except FairseqError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_status)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:  # the reader of our output has gone: nothing to tell anyone
            sys.exit(EXIT_ERROR)
        except OSError as error:
            if error.filename is not None or error.errno not in _UNWRITABLE:  # files are named where they are written
                raise
            print(f"error: standard output: cannot write: {error.strerror}", file=sys.stderr)
            sys.exit(EXIT_ERROR)
        finally:
            _let_go_of_output()

    return wrapper


def _let_go_of_output() -> None:
    """Where standard output cannot be written, have Python not try again at its end, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
