"""From batches, or raw token ids, to translations: what the commands, validation and the Python interface share."""

from __future__ import annotations

import os
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fairseq.checkpoint import build_from_checkpoint, check_dictionaries, check_languages, load_checkpoint
from fairseq.data.dictionary import Dictionary
from fairseq.data.reading import batches_fit
from fairseq.data.translation import Batch, TranslationData
from fairseq.errors import FairseqError, out_of_memory_ends
from fairseq.generation.beam_search import Sources
from fairseq.generation.history import Hypothesis
from fairseq.generation.score_reference import score_reference
from fairseq.generation.search import MOST_ROWS, MOST_TOKENS, search_batches
from fairseq.models.config import setting_names
from fairseq.models.transformer import Transformer
from fairseq.options import DataConfig, GenerationConfig, ReferenceConfig, section
from fairseq.utils.devices import choose_dtype
from fairseq.utils.symbols import EOS, PAD

NO_REFERENCES = ReferenceConfig()
SMALLER_BATCHES = "lower --max-tokens, --batch-size or --beam"
DEFAULT_MAX_TOKENS = MOST_TOKENS  # source tokens in a batch when neither --max-tokens nor --batch-size is given
DEFAULT_MAX_ROWS = MOST_ROWS  # and hypotheses, so that a very wide beam does not fill the memory


@dataclass
class Translation:
    """One sentence. All tensors are on the CPU.

    id: its number in the data set. src_tokens: (src_len,) and target: (tgt_len,) or None, without padding. hypotheses:
    best first, at most ``--nbest``; with ``--score-reference`` the reference alone.
    """

    id: int
    src_tokens: Tensor
    target: Tensor | None
    hypotheses: list[Hypothesis]


def load_ensemble(
    paths: Sequence[str],
    overrides: dict[str, Any] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Transformer], dict[str, Any]]:
    """The models of one or more checkpoints, in eval mode, and what the first holds besides parameters and the
    optimiser's state.

    overrides: settings to change. One checkpoint is in memory at a time. Raises FairseqError when a setting does not
    exist, a checkpoint cannot be read, or dictionaries differ in size.
    """
    unknown = (overrides or {}).keys() - setting_names()
    if unknown:
        raise FairseqError(f"model overrides: '{min(unknown)}' is no setting of a Transformer")
    if "" in paths:
        raise FairseqError(f"--path {':'.join(paths)}: name a checkpoint, or several with a colon between them")
    models: list[Transformer] = []
    first: dict[str, Any] = {}
    for path in paths:
        state = load_checkpoint(path)
        model = build_from_checkpoint(state, path, overrides)
        with out_of_memory_ends(f"placing {path} on {device}", "take a smaller model, or give --cpu"):
            models.append(model.to(device=device, dtype=dtype))
        first = first or {k: v for k, v in state.items() if k not in ("model", "last_optimizer_state")}
        del state  # before the next is read
        sizes = [(m.encoder.embed_tokens.num_embeddings, m.decoder.embed_tokens.num_embeddings) for m in models]
        if sizes[-1] != sizes[0]:
            raise FairseqError(
                f"{path} has dictionaries of {sizes[-1][0]} and {sizes[-1][1]} entries, {paths[0]} of {sizes[0][0]} "
                f"and {sizes[0][1]}; an ensemble needs models of the same data"
            )
    return models, first


def without_padding(tokens: Tensor) -> Tensor:
    """The tokens of one row, (length,), that are no padding."""
    return tokens[tokens.ne(PAD)]


def pad_rows(rows: Sequence[Tensor], left: bool = False) -> Tensor:
    """One-dimensional tensors as a (rows, longest) batch."""
    width = max((len(row) for row in rows), default=0)
    batch = torch.full((len(rows), width), PAD)
    for i, row in enumerate(rows):
        batch[i, width - len(row) if left else 0 :][: len(row)] = row
    return batch


def batch_limits(max_tokens: int | None, batch_size: int | None, beam: int) -> tuple[int | None, int | None]:
    """The most source tokens and sentences of a batch, from flags of which both may be missing."""
    if max_tokens is None and batch_size is None:
        return DEFAULT_MAX_TOKENS, max(1, DEFAULT_MAX_ROWS // max(1, beam))
    return max_tokens, batch_size


def needs_attention(cfg: GenerationConfig) -> bool:
    """Whether the output needs to know which source token each target token attends to."""
    return bool(cfg.print_alignment) or cfg.replace_unk is not None


def translate_dataset(
    models: Sequence[Transformer],
    batches: Iterable[Batch],
    cfg: GenerationConfig,
    seed: int = 1,
    references: ReferenceConfig = NO_REFERENCES,
    check: Callable[[], None] | None = None,
    threads: int | None = None,
) -> Iterator[Translation]:
    """Translate batches of a ``LanguagePairDataset`` on the models' device; yields every sentence once, in the order of
    the batches. Several batches may be read before the first is yielded.

    references: how the batches' targets take part. check, threads: as ``search_batches``'. Raises FairseqError when
    targets take part and there are none, and as ``beam_search``.
    """
    device = next(models[0].parameters()).device
    waiting: deque[tuple[list[int], list[Tensor], list[Tensor] | None]] = deque()

    def read() -> Iterator[tuple[Sources, list[Tensor]]]:
        for batch in batches:
            src_tokens, ids = batch["net_input"]["src_tokens"], batch["id"].tolist()
            targets = None if batch["target"] is None else [without_padding(row) for row in batch["target"]]
            if targets is None and (references.score_reference or references.prefix_size):
                wanted = "--score-reference" if references.score_reference else "--prefix-size"
                raise FairseqError(f"{wanted} needs references, and there are none here")
            waiting.append((ids, [without_padding(row) for row in src_tokens], targets))
            prefix = None
            if references.prefix_size and targets is not None:
                prefix = pad_rows([target[: references.prefix_size] for target in targets]).to(device)
            yield Sources(src_tokens.to(device, non_blocking=True), ids, prefix), targets or []

    need_attn = needs_attention(cfg)
    found: Iterator[list[list[Hypothesis]]]
    if references.score_reference:
        found = (score_reference(models, part.src_tokens, targets, need_attn) for part, targets in read())
    else:
        parts = (part for part, _ in read())
        found = search_batches(models, parts, cfg, seed=seed, need_attn=need_attn, check=check, threads=threads)
    for hypotheses in found:
        ids, sources, targets = waiting.popleft()
        for i, number in enumerate(ids):
            target = None if targets is None else targets[i]
            yield Translation(number, sources[i], target, hypotheses[i][: cfg.nbest])


def translate_ids(
    models: Sequence[Transformer],
    sentences: Sequence[Tensor],
    cfg: GenerationConfig,
    *,
    ids: Sequence[int] | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 1,
    left_pad_source: bool = True,
) -> list[Translation]:
    """``translate_sentences`` with the native search."""
    search = partial(translate_dataset, models, cfg=cfg, seed=seed)
    return translate_sentences(
        search,
        sentences,
        ids=ids,
        max_tokens=max_tokens,
        batch_size=batch_size,
        beam=cfg.beam,
        left_pad_source=left_pad_source,
    )


def translate_sentences(
    search: Callable[[Iterable[Batch]], Iterable[Translation]],
    sentences: Sequence[Tensor],
    *,
    ids: Sequence[int] | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    beam: int = 5,
    left_pad_source: bool = True,
) -> list[Translation]:
    """Translate sentences of token ids, (src_len,) each with ``</s>`` at the end; results in the order given.

    search: translates batches, in their order, with ``beam`` hypotheses a sentence. ids: the sentences' numbers
    (default: 0, 1, ...). Batches hold sentences of like length, at most ``max_tokens`` source tokens (and always one
    sentence) and ``batch_size`` sentences. A sentence of ``</s>`` alone has itself as its translation, with score 0: no
    model knows what to do with it.
    """
    numbers = range(len(sentences)) if ids is None else ids
    empty = torch.tensor([EOS])
    results = {
        i: Translation(numbers[i], source, None, [Hypothesis(empty, 0.0, torch.zeros(1), torch.ones(1, 1))])
        for i, source in enumerate(sentences)
        if len(source) <= 1
    }
    order = sorted((i for i in range(len(sentences)) if i not in results), key=lambda i: len(sentences[i]))
    limits = batch_limits(max_tokens, batch_size, beam)
    batches = _batches(order, sentences, numbers, *limits, left_pad_source)
    with batches_fit(batches, "translating", SMALLER_BATCHES) as read:
        results |= dict(zip(order, search(read), strict=True))
    return [results[i] for i in range(len(sentences))]


def _batches(
    order: list[int],
    sentences: Sequence[Tensor],
    numbers: Sequence[int],
    max_tokens: int | None,
    batch_size: int | None,
    left_pad_source: bool,
) -> Iterator[Batch]:
    """Of ``sentences``, in this order, by ascending length; the rest as ``translate_sentences``'."""
    start = 0
    while start < len(order):
        left, size = len(order) - start, 1
        most = min(batch_size or left, left)
        while size < most and (max_tokens is None or len(sentences[order[start + size]]) * (size + 1) <= max_tokens):
            size += 1
        chosen = order[start : start + size]
        start += size
        src_tokens = pad_rows([sentences[i] for i in chosen], left_pad_source)
        yield {
            "id": torch.tensor([numbers[i] for i in chosen]),
            "nsentences": len(chosen),
            "ntokens": sum(len(sentences[i]) for i in chosen),
            "net_input": {
                "src_tokens": src_tokens,
                "src_lengths": src_tokens.ne(PAD).sum(1),
                "prev_output_tokens": torch.full((len(chosen), 1), EOS),
            },
            "target": None,
        }


def open_models_and_data(
    args: Namespace, device: torch.device
) -> tuple[list[Transformer], TranslationData, dict[str, Any]]:
    """The models of ``args.path``, the data-bin ``args.data``, checked against each other, and what else the first
    checkpoint holds, as ``load_ensemble`` returns it.

    Languages come from ``-s`` and ``-t``, else from the first checkpoint if the data-bin has dictionaries of that name,
    else from the data-bin's file names. Raises FairseqError when anything is missing or does not fit, and as
    ``choose_dtype``.
    """
    dtype = choose_dtype(device, args.fp16, args.bf16)
    models, state = load_ensemble(args.path.split(":"), args.model_overrides, device=device, dtype=dtype)
    return models, _open_data(args, models, state["args"]), state


def _open_data(args: Namespace, models: Sequence[Transformer], settings: dict[str, Any]) -> TranslationData:
    """settings: of the first checkpoint; for the rest ``open_models_and_data``."""
    config: DataConfig = section(DataConfig, args)
    data_dir = config.data.split(":")[0]
    config = replace(config, max_source_positions=longest_source(models, config.max_source_positions))
    config = with_languages_of(settings, config)
    data = TranslationData.open(config, getattr(args, "required_seq_len_multiple", 1))  # raw text has no such flag
    check_languages(settings, data.source_lang, data.target_lang, args.path.split(":")[0])
    for model, path in zip(models, args.path.split(":"), strict=True):
        check_dictionaries(model, path, data_dir, (data.source_lang, data.src_dict), (data.target_lang, data.tgt_dict))
    return data


def languages_of(settings: dict[str, Any], data_dir: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Source and target language in a checkpoint's settings, if ``data_dir`` has a dictionary of both."""
    src, tgt = settings.get("source_lang"), settings.get("target_lang")
    if not (isinstance(src, str) and isinstance(tgt, str) and src and tgt):
        return None
    if all(os.path.isfile(os.path.join(data_dir, f"dict.{lang}.txt")) for lang in (src, tgt)):
        return src, tgt
    return None


def with_languages_of(settings: dict[str, Any], config: DataConfig) -> DataConfig:
    """``config`` with the languages in a checkpoint's settings, if it names none and its data-bin has dictionaries of
    both.
    """
    known = languages_of(settings, config.data.split(":")[0])
    if known is None or config.source_lang or config.target_lang:
        return config
    return replace(config, source_lang=known[0], target_lang=known[1])


def longest_source(models: Sequence[Transformer], limit: int = 2**30) -> int:
    """The most source tokens, ``</s>`` included, that all models read, and at most ``limit``."""
    return min(limit, *(model.cfg.max_source_positions for model in models))


def longest_target(models: Sequence[Transformer], limit: int = 2**30) -> int:
    """The most target tokens, ``</s>`` included, that all models can have, and at most ``limit``."""
    return min(limit, *(model.cfg.max_target_positions for model in models))


def encode_source(
    words: Sequence[str], dictionary: Dictionary, longest: int, where: str, truncate: bool = False
) -> Tensor:
    """Ids of a raw sentence's tokens and ``</s>``: (src_len,).

    truncate: cut it to ``longest`` ids; otherwise one that is longer raises FairseqError, in which it is ``where``.
    """
    ids = [*(dictionary.index(word) for word in words), EOS]
    if len(ids) > longest:
        if not truncate:
            raise FairseqError(
                f"{where}: {len(ids):,} tokens, and the model reads at most {longest:,}; split the sentence"
            )
        ids[longest - 1 :] = [EOS]
    return torch.tensor(ids)
