"""``fairseq-generate``: translate a subset of a data-bin, and score the result."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from fairseq.cli import command
from fairseq.data.batching import make_batches
from fairseq.data.encoders import TextPipeline, make_text_pipeline
from fairseq.data.reading import batches_fit, iterate_batches
from fairseq.data.translation import Batch, TranslationData
from fairseq.errors import FairseqError
from fairseq.generation.constraints import check_generation_config
from fairseq.generation.ctranslate2_backend import open_ctranslate2
from fairseq.generation.output import TextFormat, load_alignment_dictionary
from fairseq.generation.scoring import Scorer
from fairseq.generation.translate import (
    SMALLER_BATCHES,
    Translation,
    batch_limits,
    longest_target,
    open_models_and_data,
    translate_dataset,
)
from fairseq.options import (
    GENERATE_SECTIONS,
    GenerationConfig,
    ReferenceConfig,
    parse_args,
    section,
)
from fairseq.training.logging import choose_log_format
from fairseq.utils.devices import choose_device
from fairseq.utils.io import atomic_write
from fairseq.utils.memory import keep_freed_memory
from fairseq.utils.progress import batch_progress

logger = logging.getLogger(__name__)


def check_generation_flags(args: Namespace) -> None:
    """Raise FairseqError for flags of a command that translates which are out of range or contradict each other."""
    check_generation_config(section(GenerationConfig, args))
    if not args.path and not getattr(args, "model", None):
        raise FairseqError("--path FILE is missing: the checkpoint to translate with")
    if getattr(args, "sacrebleu", False) and args.scoring == "chrf":
        raise FairseqError("--sacrebleu and --scoring chrf contradict each other; give one")


def text_pipeline(args: Namespace, data: TranslationData) -> TextPipeline:
    """The raw-text encoder and decoder that ``--tokenizer`` and ``--bpe`` name."""
    return make_text_pipeline(
        args.tokenizer,
        args.bpe,
        source_lang=data.source_lang,
        target_lang=data.target_lang,
        bpe_codes=args.bpe_codes,
        sentencepiece_model=args.sentencepiece_model,
        moses_no_dash_splits=args.moses_no_dash_splits,
        moses_no_escape=args.moses_no_escape,
    )


def text_format(args: Namespace, data: TranslationData, pipeline: TextPipeline) -> TextFormat:
    """How the flags want ids printed."""
    return TextFormat(
        data.src_dict,
        data.tgt_dict,
        post_process=args.post_process,
        decode=pipeline.decode,
        decode_source=pipeline.decode_source,
        print_alignment=args.print_alignment,
        alignment_dictionary=None if args.replace_unk is None else load_alignment_dictionary(args.replace_unk),
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, translate, print."""
    description = "Translate a subset of a data-bin with beam search or sampling, and score the result."
    args = parse_args("fairseq-generate", description, GENERATE_SECTIONS, argv, check_generation_flags)
    keep_freed_memory()
    with _open_results(args) as out:
        result = _generate(args, out)
        if result is not None:
            print(result, file=out)
    if result is not None and args.results_path is not None:
        print(result)


@contextlib.contextmanager
def _open_results(args: Namespace) -> Iterator[IO[Any]]:
    """Standard output, or the file in ``--results-path``, which appears when all is done."""
    if args.results_path is None:
        yield sys.stdout
        return
    shard = f".shard{args.shard_id}" if args.num_shards > 1 else ""
    path = Path(args.results_path) / f"generate-{args.gen_subset}{shard}.txt"
    with atomic_write(path) as out:
        yield out
    logger.info(f"wrote {path}")


def _generate(args: Namespace, out: IO[Any]) -> str | None:
    """Print all translations to ``out``; returns the line with the score, None where there is nothing to score."""
    cfg: GenerationConfig = section(GenerationConfig, args)
    references: ReferenceConfig = section(ReferenceConfig, args)
    translate, data, most_target = _open_backend(args, cfg, references)
    text = text_format(args, data, text_pipeline(args, data))
    scorer = Scorer("sacrebleu" if args.sacrebleu else args.scoring)
    dataset = data.load(args.gen_subset, need_target=False)
    max_tokens, max_sentences = batch_limits(args.max_tokens, args.batch_size, cfg.beam)
    batches = make_batches(
        dataset,
        name=args.gen_subset,
        max_tokens=max_tokens,
        max_sentences=max_sentences,
        required_batch_size_multiple=args.required_batch_size_multiple,
        max_positions=(data.config.max_source_positions, min(most_target, args.max_target_positions)),
        skip_invalid=args.skip_invalid_size_inputs_valid_test,
        num_shards=args.num_shards,
        shard_id=args.shard_id,
    )
    start, sentences, tokens = time.perf_counter(), 0, 0
    on_gpu = args.backend == "native" and choose_device(args.cpu).type == "cuda"
    read = iterate_batches(dataset, batches, args.num_workers, pin_memory=on_gpu)
    progress = batch_progress(
        read,
        len(batches),
        args.gen_subset,
        verb="generate",
        log_format=choose_log_format(args.log_format, args.no_progress_bar),
        log_interval=args.log_interval,
        log=logger,
    )
    with batches_fit(progress, f"translating '{args.gen_subset}'", SMALLER_BATCHES) as fitting:
        for translation in translate(fitting):
            sentences += 1
            tokens += len(translation.hypotheses[0].tokens)
            src_words = text.words(translation.src_tokens)
            if not args.quiet:
                print(f"S-{translation.id}\t{text.source(translation.src_tokens)}", file=out)
                if translation.target is not None:
                    print(f"T-{translation.id}\t{text.target(translation.target)}", file=out)
                for hypothesis in translation.hypotheses:
                    print(*text.hypothesis_lines(translation.id, hypothesis, src_words), sep="\n", file=out)
            if translation.target is not None:
                best = text.decode(text.hypothesis(translation.hypotheses[0], src_words))
                scorer.add(text.target(translation.target), best)
    seconds = time.perf_counter() - start
    logger.info("hypothesis and token scores are in base 2")
    logger.info(
        f"translated {sentences:,} sentences ({tokens:,} tokens) in {seconds:.1f}s "
        f"({sentences / seconds:.2f} sentences/s, {tokens / seconds:.2f} tokens/s)"
    )
    if dataset.tgt is None or references.score_reference or sentences == 0:
        return None
    return f"Generate {args.gen_subset} with beam={cfg.beam}: {scorer.result_string()}"


def _open_backend(
    args: Namespace, cfg: GenerationConfig, references: ReferenceConfig
) -> tuple[Callable[[Iterable[Batch]], Iterator[Translation]], TranslationData, int]:
    """What translates batches, the data-bin, and the most target tokens that the models can have."""
    if args.backend == "ctranslate2":
        model, data = open_ctranslate2(args, workers=torch.get_num_threads())
        token_scores = not args.quiet or references.score_reference
        translate = partial(model.translate_dataset, cfg=cfg, references=references, token_scores=token_scores)
        return translate, data, model.max_target_positions
    models, data, _ = open_models_and_data(args, choose_device(args.cpu))
    search = partial(translate_dataset, models, cfg=cfg, seed=args.seed, references=references)
    return search, data, longest_target(models)


if __name__ == "__main__":
    main(None)
