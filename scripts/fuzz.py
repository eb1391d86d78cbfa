"""Feed damaged files, flags and lines to every reader: nothing but FairseqError, or exit status 2, may come.

    python scripts/fuzz.py --target checkpoint            # 100,000 cases
    python scripts/fuzz.py --engine atheris --target idx  # guided by coverage; needs the extra [fuzz]

A case starts from a valid file and is changed: bits, bytes, lengths and numbers, cut short, parts repeated, removed,
exchanged or taken from another file. Hypothesis draws what decides on the changes, from a seed, so that a run can be
repeated and, with ``--first``, continued; atheris looks for changes that reach new code. The memory that the process
may add, and the CPU time of a case, are bounded. A case that fails is written to ``--keep`` and named; the one that is
being run is there as TARGET-PROCESS.running, in case a library written in C++ takes the process with it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fuzzing.changes import WORDS, Changes, mutated
from fuzzing.targets import TARGETS, Target

from fairseq.errors import FairseqError

CASES = 100_000
SLICE = 10_000  # cases from one seed of Hypothesis, between which a run can be continued
DRAWN = 100  # cases from one draw of Hypothesis, which takes longer than most readers
MEMORY = 2**30  # bytes that a run may add to what the process has after its imports
SECONDS = 20  # of CPU time that a case may take
LONGEST_KEPT = 2**20  # bytes of the running case

Run = Callable[[bytes], bool]  # whether the case was accepted; raises what must not come


class TooSlow(BaseException):
    """A case that takes more than ``SECONDS``; no reader may catch it."""


def run_case(target: Target, folder: Path, data: bytes) -> bool:
    """Whether a case was accepted; a FairseqError, of one line, is what refuses it. Raises what else comes."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            target.check(folder, data)
    except FairseqError as error:
        assert len(str(error).splitlines()) == 1, error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
                raise AssertionError("refused only after it was given no memory") from error
            cause = cause.__cause__ or cause.__context__
        return False
    return True


class Findings:
    """What failed, and where; a file each in directory ``keep``."""

    def __init__(self, target: str, keep: Path) -> None:
        self.target, self.keep = target, keep
        self.places: dict[str, int] = {}

    def add(self, data: bytes) -> None:
        """Report the exception that is being handled, the first of its place."""
        error = sys.exc_info()[1]
        assert error is not None
        where = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        if key not in self.places:
            path = self.keep / f"{self.target}-{len(self.places)}"
            path.write_bytes(data)
            print(f"FAILED {self.target}: {key}: {str(error)[:200]}; the case is {path}", flush=True)
            traceback.print_exception(error, limit=-4)
        self.places[key] = self.places.get(key, 0) + 1


class Counter:
    """Runs cases and counts them. The summary is printed by ``summary``."""

    def __init__(self, name: str, target: Target, folder: Path, keep: Path) -> None:
        self.name, self.target, self.folder = name, target, folder
        self.findings = Findings(name, keep)
        self.done = self.accepted = 0
        self.started = time.monotonic(), time.process_time()
        self._path = keep / f"{name}-{os.getpid()}.running"
        with open(self._path, "w+b") as handle:
            handle.truncate(8 + LONGEST_KEPT)
            self._running = mmap.mmap(handle.fileno(), 0)

    def run(self, data: bytes) -> None:
        """Run one case."""
        kept = data[:LONGEST_KEPT]
        self._running[: 8 + len(kept)] = len(kept).to_bytes(8, "little") + kept
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self.accepted += run_case(self.target, self.folder, data)
        except KeyboardInterrupt:
            raise
        except BaseException:
            self.findings.add(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.done += 1

    def summary(self, engine: str, seed: int) -> int:
        """Print what came of it; returns how many cases failed."""
        self._path.unlink()
        seconds, used = time.monotonic() - self.started[0], time.process_time() - self.started[1]
        failed = sum(self.findings.places.values())
        print(
            f"{self.name}, {engine}, seed {seed}: {self.done:,} cases, {self.accepted:,} accepted, {failed:,} failed "
            f"in {len(self.findings.places)} places; {seconds:.0f} s, {1000 * used / max(self.done, 1):.2f} ms of CPU "
            f"time a case, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB",
            flush=True,
        )
        return failed


# --- engines -------------------------------------------------------------------------------------------------------


def fuzz_hypothesis(counter: Counter, seeds: list[bytes], first: int, cases: int, seed: int) -> None:
    """Cases ``first`` to ``first + cases`` of those that ``seed`` gives, by Hypothesis."""
    for start in range(first, first + cases, SLICE):
        end = min(start + SLICE, first + cases)
        _slice(counter, seeds, end - start, f"{seed}, {start}")
        print(f"  {counter.name}: {end:,} cases", flush=True)


def _slice(counter: Counter, seeds: list[bytes], cases: int, seed: str) -> None:
    import hypothesis
    from hypothesis import strategies as st

    words, end = WORDS + counter.target.words, counter.done + cases

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=-(-cases // DRAWN),
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.integers(0, 2**64 - 1))
    def cases_of(drawn: int) -> None:
        changes = Changes(random.Random(f"{seed}, {drawn}").randrange)
        for _ in range(min(DRAWN, end - counter.done)):
            counter.run(mutated(changes.of(seeds), seeds, words, changes))

    cases_of()


def fuzz_atheris(counter: Counter, seeds: list[bytes], cases: int, seed: int) -> None:
    """``cases`` cases by atheris, after which the process ends."""
    import atheris

    words = WORDS + counter.target.words

    def one(data: bytes) -> None:
        counter.run(data)
        if counter.done == cases:
            failed = counter.summary("atheris", seed)
            shutil.rmtree(counter.folder, ignore_errors=True)
            os._exit(1 if failed else 0)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        if seed % 2:
            return atheris.Mutate(data, max_size)
        return mutated(data, seeds, words, Changes(random.Random(seed).randrange))[:max_size]

    corpus = counter.folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    _instrument()
    flags = [f"-seed={seed}", f"-max_len={2 * max(map(len, seeds))}", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def _instrument() -> None:
    """Have atheris see the branches of the package's functions."""
    import atheris

    for name in [name for name in sys.modules if name.startswith("fairseq.") and name != "fairseq.errors"]:
        for value in list(vars(sys.modules[name]).values()):
            if getattr(value, "__module__", None) != name:
                continue
            for function in list(vars(value).values()) if isinstance(value, type) else [value]:
                if hasattr(function, "__code__"):
                    atheris.instrument_func(function)


@contextlib.contextmanager
def bounded_memory(extra: int) -> Iterator[None]:
    """The address space may grow by ``extra`` bytes."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(name: str, cases: int, seed: int, engine: str, keep: Path, first: int = 0) -> int:
    """Fuzz one target and print what came of it; returns how many cases failed."""

    def too_slow(number: int, frame: object) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    target = TARGETS[name]
    keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fuzz."))
    before = signal.signal(signal.SIGPROF, too_slow)
    try:
        seeds = target.seeds(folder)
        for data in seeds:
            assert run_case(target, folder, data) or name == "options", "a valid case is refused"
        counter = Counter(name, target, folder, keep)
        with bounded_memory(MEMORY):
            if engine == "atheris":
                fuzz_atheris(counter, seeds, cases, seed)
            fuzz_hypothesis(counter, seeds, first, cases, seed)
        return counter.summary(engine, seed)
    finally:
        signal.signal(signal.SIGPROF, before)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Parse, fuzz, exit with status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=sorted(TARGETS), help="what to fuzz (default: all)")
    parser.add_argument("--cases", type=int, default=CASES, help=f"cases a target (default: {CASES})")
    parser.add_argument("--first", type=int, default=0, help=f"leave out as many cases, a multiple of {SLICE}")
    parser.add_argument("--seed", type=int, default=1, help="seed of the changes (default: 1)")
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="directory of cases that failed")
    args = parser.parse_args()
    if args.engine == "atheris" and (args.target is None or args.first):
        parser.error("--engine atheris fuzzes one --target at a time, and knows no --first")
    if args.first % SLICE:
        parser.error(f"--first is a multiple of {SLICE}")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    targets = [args.target] if args.target else sorted(TARGETS)
    failed = sum(run(target, args.cases, args.seed, args.engine, args.keep, args.first) for target in targets)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "80")
    main()
