"""``fairseq-interactive``: translate raw text, line by line, at a prompt, from a pipe or a file, or on a web page."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fairseq.cli import command
from fairseq.cli.generate import check_generation_flags, text_format, text_pipeline
from fairseq.data.dictionary import post_process
from fairseq.data.translation import TranslationData
from fairseq.errors import FairseqError
from fairseq.generation.ctranslate2_backend import CTranslate2Model, make_search, open_ctranslate2
from fairseq.generation.output import TextFormat
from fairseq.generation.translate import Translation, encode_source, open_models_and_data, translate_sentences
from fairseq.hub import TransformerModel
from fairseq.interactive import prompt
from fairseq.models.transformer import Transformer
from fairseq.options import INTERACTIVE_SECTIONS, GenerationConfig, ServeConfig, parse_args, section
from fairseq.utils.devices import choose_device
from fairseq.utils.io import refuse_bom
from fairseq.utils.memory import keep_freed_memory

logger = logging.getLogger(__name__)


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, read, translate, print."""
    description = "Translate raw text, one sentence a line: a prompt on a terminal, else standard input or a file."
    args = parse_args("fairseq-interactive", description, INTERACTIVE_SECTIONS, argv, check_flags)
    cfg: GenerationConfig = section(GenerationConfig, args)
    keep_freed_memory()
    if args.serve is not None:
        _serve(args)
    elif args.input == "-" and sys.stdin.isatty() and sys.stdout.isatty():
        model, settings = _text_model(args, args.path), _settings(args)
        summed = cfg.unnormalized or cfg.lenpen != 1
        score_name = "log-probabilities, base 2" if summed else "mean log-probability of a token, base 2"
        prompt.run(model, lambda line: model.generate(line, **settings), bool(cfg.print_alignment), score_name)
    else:
        _translate_lines(args, cfg)


def check_flags(args: Namespace) -> None:
    """Raise FairseqError for flags that are out of range or contradict each other."""
    check_generation_flags(args)
    if args.serve is None:
        for given, name in (
            (args.model, "--model"),
            (args.serve_timeout != ServeConfig.serve_timeout, "--serve-timeout"),
        ):
            if given:
                raise FairseqError(f"{name} does nothing without --serve")
        return
    if args.input != "-" or args.buffer_size > 1:
        raise FairseqError("--serve reads no lines; leave --input and --buffer-size out")
    _named_models(args)


def _named_models(args: Namespace) -> dict[str, str]:
    """Paths by name, as ``--model`` and ``--path`` give them. Raises FairseqError for two of one name."""
    named = {"+".join(Path(part).name for part in args.path.split(":")): args.path} if args.path else {}
    for item in args.model:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise FairseqError(f"--model {item}: not NAME=FILE, such as Admin=checkpoints/checkpoint_best.pt")
        if name in named:
            raise FairseqError(f"--model {item}: there is a model of this name already")
        named[name] = path
    return named


def _serve(args: Namespace) -> None:
    try:
        from fairseq.interactive import server
    except ModuleNotFoundError as error:
        raise FairseqError(
            f"--serve needs {error.name}, which is not installed: pip install 'transformer-clinic[serve]'"
        ) from error
    with server.bind(args.serve) as sock:  # before models load, which takes time: the port may be taken
        models = {name: _text_model(args, path) for name, path in _named_models(args).items()}
        server.run(sock, models, _settings(args), args.serve_timeout)


def _open(args: Namespace, path: str) -> tuple[list[Transformer] | CTranslate2Model, TranslationData]:
    """The model or ensemble ``path`` for ``--backend``, and the data-bin."""
    args = Namespace(**(vars(args) | {"path": path}))
    if args.backend == "ctranslate2":
        return open_ctranslate2(args, threads=torch.get_num_threads())
    models, data, _ = open_models_and_data(args, choose_device(args.cpu))
    return models, data


def _text_model(args: Namespace, path: str) -> TransformerModel:
    """The model or ensemble ``path`` with the text flags' way from raw text and back."""
    models, data = _open(args, path)
    pipeline = text_pipeline(args, data)
    remove_bpe = pipeline.remove_bpe
    pipeline = replace(pipeline, remove_bpe=lambda tokens: remove_bpe(post_process(tokens, args.post_process)))
    languages = {"source_lang": data.source_lang, "target_lang": data.target_lang}
    return TransformerModel(models, data.src_dict, data.tgt_dict, pipeline, **languages)


def _settings(args: Namespace) -> dict[str, Any]:
    """What the flags say to ``TransformerModel.generate``."""
    names = ("max_tokens", "batch_size", "seed", "max_source_positions", "truncate_source")
    return asdict(section(GenerationConfig, args)) | {name: getattr(args, name) for name in names}


def _translate_lines(args: Namespace, cfg: GenerationConfig) -> None:
    """Standard input or a file to fairseq's output lines, a buffer at a time."""
    models, data = _open(args, args.path)
    search = make_search(models, cfg, args.seed)
    pipeline = text_pipeline(args, data)
    text = replace(text_format(args, data, pipeline), decode_source=str)  # S- lines have tokens here, as fairseq's do
    if args.input == "-" and sys.stdin.isatty():
        logger.info("type a sentence and press return; Ctrl-D ends")
    with _open_input(args.input) as lines:
        for buffer in _buffers(decode_lines(lines, args.input), max(args.buffer_size, 1)):
            start = time.perf_counter()
            words = {number: pipeline.encode(line).split() for number, line in buffer}
            ids = _encode(words, data, args)
            translations = translate_sentences(
                search,
                list(ids.values()),
                ids=list(ids),
                max_tokens=args.max_tokens,
                batch_size=args.batch_size,
                beam=args.beam,
                left_pad_source=args.left_pad_source,
            )
            seconds = time.perf_counter() - start
            for translation in translations:
                _print(translation, words[translation.id], text, seconds)
            sys.stdout.flush()


def _encode(words: dict[int, list[str]], data: TranslationData, args: Namespace) -> dict[int, Tensor]:
    """Token ids of numbered sentences. One that is too long is an error, or left out with a warning."""
    ids: dict[int, Tensor] = {}
    for number, line in words.items():
        try:
            where = f"{_name(args.input)}, line {number + 1}"
            ids[number] = encode_source(
                line, data.src_dict, data.config.max_source_positions, where, args.truncate_source
            )
        except FairseqError as error:
            if not args.skip_invalid_size_inputs_valid_test:
                raise
            logger.warning(f"left out: {error}")
    return ids


def _print(translation: Translation, src_words: list[str], text: TextFormat, seconds: float) -> None:
    print(f"S-{translation.id}\t{text.source(translation.src_tokens)}")
    print(f"W-{translation.id}\t{seconds:.3f}\tseconds")
    for hypothesis in translation.hypotheses:
        print(*text.hypothesis_lines(translation.id, hypothesis, src_words), sep="\n")


def _name(path: str) -> str:
    return "standard input" if path == "-" else path


@contextlib.contextmanager
def _open_input(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        handle = open(path, "rb")  # noqa: SIM115  (closed below; an error in the caller's block is not about this file)
    except OSError as error:
        raise FairseqError(f"--input {path}: cannot read: {error.strerror}") from error
    with handle:
        yield handle


def decode_lines(lines: Iterable[bytes], path: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if number == 1:
            refuse_bom(line, f"{_name(path)}, line 1")
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FairseqError(f"{_name(path)}, line {number}: not valid UTF-8 ({error.reason})") from None


def _buffers(lines: Iterator[str], size: int) -> Iterator[list[tuple[int, str]]]:
    """Numbered lines, ``size`` at a time. Those before a bad line are not lost with it."""
    buffer: list[tuple[int, str]] = []
    try:
        for numbered in enumerate(lines):
            buffer.append(numbered)
            if len(buffer) == size:
                yield buffer
                buffer = []
    except FairseqError:
        if buffer:
            yield buffer
        raise
    if buffer:
        yield buffer


if __name__ == "__main__":
    main(None)
