"""A prompt on a terminal: line editing, history, and translations laid out for a person."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fairseq.errors import FairseqError
from fairseq.hub import TextHypothesis, TextTranslation, TransformerModel
from fairseq.utils.io import atomic_write

try:
    import readline
except ImportError:  # Windows: no line editing, no history
    readline = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
HISTORY_LENGTH = 1000  # lines


def history_file() -> Path | None:
    """Where the lines typed are kept, in the XDG state directory; None where there is no home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "transformer-clinic" / "interactive_history"


def read_history(path: Path | None) -> list[str]:
    """The lines typed so far, oldest first; none if they cannot be read."""
    try:
        return [] if path is None else path.read_text(encoding="utf-8").splitlines()[-HISTORY_LENGTH:]
    except (OSError, UnicodeDecodeError):
        return []


def remember(path: Path | None, line: str) -> None:
    """Add a line to the history file, which keeps ``HISTORY_LENGTH``. Where it cannot be written, nothing happens."""
    lines = read_history(path)
    if path is None or not line.strip() or lines[-1:] == [line]:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # what one types is nobody else's
        with atomic_write(path) as handle:
            handle.writelines(f"{text}\n" for text in [*lines, line][-HISTORY_LENGTH:])
    except (OSError, FairseqError) as error:
        logger.debug(f"history not kept: {error}")


def run(
    model: TransformerModel, translate: Callable[[str], TextTranslation], print_alignment: bool, score_name: str
) -> None:
    """Ask for sentences until Ctrl-D. Ctrl-C stops a translation, and at the prompt raises KeyboardInterrupt.

    translate: one sentence; a FairseqError it raises is shown and the next sentence asked for.
    """
    path = history_file()
    if readline is not None:
        readline.set_history_length(HISTORY_LENGTH)
        for line in read_history(path):
            readline.add_history(line)
    source, target = model.source_lang or "source", model.target_lang or "target"
    width = max(len(source), len(target)) + 2
    print(f"Type a sentence in '{source}'; Ctrl-D ends. Scores: {score_name}.")
    for sentence in _sentences(f"{source + '>':<{width}}", path):
        start = time.perf_counter()
        try:
            translation = translate(sentence)
        except FairseqError as error:
            print(f"{'':<{width}}{error}")
        except KeyboardInterrupt:
            print(f"\n{'':<{width}}stopped")
        else:
            seconds = time.perf_counter() - start
            print("\n".join(_layout(translation, target, width, seconds, print_alignment)))


def _sentences(prompt: str, path: Path | None) -> Iterator[str]:
    """What is typed, a line at a time; blank ones are left out. A paste may have several lines at once."""
    while True:
        try:
            text = input(prompt)
            text.encode()  # undecodable bytes arrive as lone surrogates in some locales
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            raise
        except UnicodeError:
            print(f"{'':<{len(prompt)}}not valid UTF-8; type it again")
            continue
        for line in text.splitlines():
            remember(path, line)
            if line.strip():
                yield line


def _layout(
    translation: TextTranslation, target: str, width: int, seconds: float, print_alignment: bool
) -> Iterator[str]:
    """The lines to show: best first, each hypothesis with its score; details dimmed and indented."""
    best, indent = translation.hypotheses[0], " " * width
    details = [f"{seconds:.2f} s"]
    if len(translation.hypotheses) == 1:
        yield f"{target:<{width}}{_printable(best.text)}"
        details.insert(0, f"score {best.score:.3f}")
    else:
        for rank, hypothesis in enumerate(translation.hypotheses, start=1):
            head = f"{target:<{width}}" if rank == 1 else indent
            yield f"{head}{rank:>2} {_dim(f'{hypothesis.score:7.3f}')}  {_printable(hypothesis.text)}"
            if print_alignment:
                yield _dim(f"{indent}{'':12}{_alignment(translation, hypothesis)}")
    if translation.unknown:
        details.append("not in the dictionary: " + " ".join(map(_printable, translation.unknown)))
    yield _dim(indent + ", ".join(details))
    if print_alignment and len(translation.hypotheses) == 1:
        yield _dim(indent + _alignment(translation, best))


def _alignment(translation: TextTranslation, hypothesis: TextHypothesis) -> str:
    """Each target token with the source token it attends to most."""
    if hypothesis.attention is None or len(translation.source_tokens) < 2:
        return ""
    best = hypothesis.attention[:-1].argmax(0).tolist()  # the source ends in </s>
    pairs = zip(best, hypothesis.tokens[:-1], strict=False)
    return "  ".join(f"{_printable(translation.source_tokens[source])}→{_printable(token)}" for source, token in pairs)


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _dim(text: str) -> str:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\x1b[2m{text}\x1b[0m"
