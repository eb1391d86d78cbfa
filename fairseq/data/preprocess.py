"""Parallel text to a data-bin: dictionaries and binarised splits.

All input is checked and all output written in a temporary directory before the first file of the data-bin changes.
A new data-bin appears at once, with all its files. One that grows does so file by file; if that is cut short, readers
refuse it until ``fairseq-preprocess`` has put the other files in place.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq.data.binarizer import NumberedText, binarize, count_lines
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import UNFINISHED
from fairseq.errors import FairseqError
from fairseq.utils.io import fsync_path, locked_directory, refuse_bom, temporary_directory

if TYPE_CHECKING:
    from fairseq.options import PreprocessConfig

logger = logging.getLogger(__name__)


def preprocess(config: PreprocessConfig) -> None:
    """Make or extend the data-bin ``config.destdir``. Raises FairseqError and leaves it as it was on any bad input."""
    _check_flags(config)
    languages = [str(config.source_lang)] + ([] if config.only_source else [str(config.target_lang)])
    counted, splits = _to_count(config, languages), _splits(config)
    for split, prefix in splits.items():
        read = [*languages, *counted] if split == "train" else languages
        _check_parallel([f"{prefix}.{language}" for language in dict.fromkeys(read)])
    destdir = Path(config.destdir)
    _finish(destdir)
    made = [path for path in destdir.parents if not path.exists()]  # innermost first
    try:
        destdir.parent.mkdir(parents=True, exist_ok=True)
        place = (destdir, "preprocess.") if destdir.exists() else (destdir.parent, f"{destdir.name}.")
        with temporary_directory(*place) as temporary, contextlib.ExitStack() as stack:
            texts = {
                language: stack.enter_context(NumberedText(f"{config.trainpref}.{language}", temporary, config.workers))
                for language in counted
            }
            dictionaries = _dictionaries(config, languages, texts)
            for language, dictionary in dictionaries.items():
                _check_dictionary_fits(destdir / f"dict.{language}.txt", dictionary)
                logger.info(f"[{language}] dictionary: {len(dictionary):,} types")
            _write(config, {} if config.dict_only else splits, dictionaries, texts, temporary)
            _publish(temporary, destdir)
    except OSError as error:
        raise FairseqError(f"{destdir}: cannot write: {error.strerror or error}") from error
    finally:
        if not destdir.exists():
            for path in made:
                with contextlib.suppress(OSError):  # not there, or another's files are in it by now
                    path.rmdir()
    logger.info(f"wrote the data-bin {destdir}")


def _check_flags(config: PreprocessConfig) -> None:
    if not config.source_lang:
        raise FairseqError("give the source language: --source-lang")
    if not config.target_lang and not config.only_source:
        raise FairseqError("give the target language, --target-lang, or --only-source")
    if config.source_lang == config.target_lang:
        raise FairseqError(f"--source-lang and --target-lang are both {config.source_lang}; name the sides differently")
    if config.joined_dictionary and config.srcdict and config.tgtdict:
        raise FairseqError("--joined-dictionary means one dictionary: give --srcdict or --tgtdict, not both")
    if not (config.trainpref or config.validpref or config.testpref):
        raise FairseqError("nothing to do: give --trainpref, --validpref or --testpref")
    target_limits = (config.thresholdtgt, config.nwordstgt)
    if config.joined_dictionary and target_limits not in ((0, -1), (config.thresholdsrc, config.nwordssrc)):
        logger.warning(
            "with --joined-dictionary, --thresholdsrc and --nwordssrc count, --thresholdtgt and --nwordstgt do not"
        )


def _splits(config: PreprocessConfig) -> dict[str, str]:
    """Name of each split -> prefix of its text files: train, valid, valid1, ..., test, test1, ..."""
    splits = {"train": config.trainpref} if config.trainpref else {}
    for name, prefixes in (("valid", config.validpref), ("test", config.testpref)):
        for number, prefix in enumerate(prefixes.split(",") if prefixes else []):
            splits[f"{name}{number or ''}"] = prefix
    return splits


def _check_parallel(paths: list[str]) -> None:
    counts = [count_lines(path) for path in paths]
    for path, count in zip(paths, counts, strict=True):
        if count == 0:
            raise FairseqError(f"{path}: the file is empty")
        with open(path, "rb") as handle:
            refuse_bom(handle.read(3), path)
    if len(set(counts)) > 1:
        numbers = " and ".join(f"{path} has {count:,} lines" for path, count in zip(paths, counts, strict=True))
        raise FairseqError(f"{numbers}; parallel files must have the same number")


def _given_dictionaries(config: PreprocessConfig, languages: list[str]) -> dict[str, str | None]:
    """Language -> file of the dictionary that the flags give it."""
    if config.joined_dictionary:
        return dict.fromkeys(languages, config.srcdict or config.tgtdict)
    return dict(zip(languages, (config.srcdict, config.tgtdict), strict=False))


def _to_count(config: PreprocessConfig, languages: list[str]) -> list[str]:
    """The languages whose training text dictionaries are built from: as in fairseq, a joined one has both sides' tokens
    with ``--only-source`` too.
    """
    missing = [language for language, path in _given_dictionaries(config, languages).items() if not path]
    if missing and not config.trainpref:
        raise FairseqError(
            f"no dictionary for {' and '.join(missing)}: give --trainpref to build it, or --srcdict and --tgtdict"
        )
    if missing and config.joined_dictionary and config.only_source and config.target_lang:
        return [*missing, config.target_lang]
    return missing


def _dictionaries(
    config: PreprocessConfig, languages: list[str], texts: dict[str, NumberedText]
) -> dict[str, Dictionary]:
    """The dictionary of each language, loaded or built from the training text."""

    def build(languages: list[str], threshold: int, nwords: int) -> Dictionary:
        counts: Counter[str] = Counter()
        for language in languages:
            counts.update(texts[language].counts())
        return Dictionary.build(counts, threshold=threshold, nwords=nwords, padding_factor=config.padding_factor)

    given = _given_dictionaries(config, languages)
    if config.joined_dictionary:
        path = given[languages[0]]
        joined = Dictionary.load(path) if path else build(list(texts), config.thresholdsrc, config.nwordssrc)
        return dict.fromkeys(languages, joined)
    limits = ((config.thresholdsrc, config.nwordssrc), (config.thresholdtgt, config.nwordstgt))
    return {
        language: Dictionary.load(path) if path else build([language], *limit)
        for (language, path), limit in zip(given.items(), limits, strict=False)
    }


def _check_dictionary_fits(path: Path, dictionary: Dictionary) -> None:
    """Splits binarised earlier stay readable only while their dictionary stays the same."""
    if path.exists() and Dictionary.load(path) != dictionary:
        raise FairseqError(
            f"{path}: another dictionary is there already; use it (--srcdict, --tgtdict) or choose another --destdir"
        )


def _write(
    config: PreprocessConfig,
    splits: dict[str, str],
    dictionaries: dict[str, Dictionary],
    texts: dict[str, NumberedText],
    directory: Path,
) -> None:
    """Write dictionaries and splits. texts: the training text of the languages for which it has been counted."""
    for language, dictionary in dictionaries.items():
        dictionary.save(directory / f"dict.{language}.txt")
    for split, prefix in splits.items():
        for language, dictionary in dictionaries.items():
            path = f"{prefix}.{language}"
            output = directory / f"{split}.{config.source_lang}-{config.target_lang}.{language}"
            if split == "train" and language in texts:
                summary = texts[language].binarize(dictionary, output)
            else:
                summary = binarize(path, dictionary, output, config.workers)
            logger.info(
                f"[{language}] {path}: {summary.sentences:,} sentences, {summary.tokens:,} tokens, "
                f"{summary.replaced / summary.tokens:.3%} replaced by <unk>"
            )


def _publish(source: Path, destdir: Path) -> None:
    """Put finished files into place: all at once if there is no data-bin yet."""
    if not destdir.exists():
        os.rename(source, destdir)
        fsync_path(destdir.parent)
        return
    with locked_directory(destdir):
        os.rename(source, destdir / UNFINISHED)
        _move_files(destdir)


def _finish(destdir: Path) -> None:
    """Put into place what a killed process had ready for the data-bin and did not move. Raises FairseqError."""
    if (destdir / UNFINISHED).is_dir():
        try:
            with locked_directory(destdir):
                _move_files(destdir)
        except OSError as error:
            raise FairseqError(f"{destdir}: cannot write: {error.strerror or error}") from error


def _move_files(destdir: Path) -> None:
    """Move the files in ``UNFINISHED`` up, indices last: without its index a dataset is not there."""
    unfinished = destdir / UNFINISHED
    if not unfinished.is_dir():  # another process was faster
        return
    for path in sorted(unfinished.iterdir(), key=lambda path: (path.suffix == ".idx", path.name)):
        os.replace(path, destdir / path.name)
    fsync_path(destdir)
    unfinished.rmdir()
