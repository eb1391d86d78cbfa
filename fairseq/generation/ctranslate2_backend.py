"""Translating with a CTranslate2 directory: ids in, lists of ``Hypothesis`` out. Runs on the CPU.

CTranslate2 has the search; this converts settings, tokens and scores. Its search returns no log-probability of each
token, so where these are wanted a second pass scores the hypotheses.
"""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq.data.dictionary import Dictionary
from fairseq.data.translation import Batch, TranslationData
from fairseq.errors import FairseqError
from fairseq.generation.constraints import check_generation_config
from fairseq.generation.ctranslate2_file import check_model_file
from fairseq.generation.history import Hypothesis
from fairseq.generation.translate import (
    NO_REFERENCES,
    Translation,
    needs_attention,
    translate_dataset,
    with_languages_of,
    without_padding,
)
from fairseq.models.transformer import Transformer
from fairseq.options import DataConfig, GenerationConfig, ReferenceConfig, section
from fairseq.utils.extras import require
from fairseq.utils.symbols import EOS, PAD

# from CTranslate2's beam search
_MISSING = ("max_len_a", "unkpen", "match_source_len", "sampling", "temperature", "cuda_graphs")
_SIDES = ("source", "target")
_CONFIG: dict[str, tuple[str | bool | None, ...]] = {  # what config.json says, one of these
    "add_source_bos": (False,),
    "add_source_eos": (False, True),
    "bos_token": ("<s>",),
    "decoder_start_token": ("</s>",),
    "eos_token": ("</s>",),
    "layer_norm_epsilon": (None,),
    "multi_query_attention": (False,),
    "unk_token": ("<unk>",),
}


@dataclass
class _Job:
    """A batch on its way. pending: CTranslate2's results; None: the outputs are the references."""

    sources: list[Tensor]
    references: list[Tensor] | None
    pending: list[Any] | None
    cfg: GenerationConfig
    longest: int  # output, ``</s>`` not counted


def check_supported(cfg: GenerationConfig) -> None:
    """Raise FairseqError, naming the flag, for what CTranslate2's search does not have, and for values out of range."""
    check_generation_config(cfg)
    default = GenerationConfig()
    _refuse(name for name in _MISSING if getattr(cfg, name) != getattr(default, name))


def _refuse(names: Iterable[str]) -> None:
    for name in names:
        raise FairseqError(f"--backend ctranslate2 does not have --{name.replace('_', '-')}; leave one of them out")


class CTranslate2Model:
    """A directory that ``fairseq-export --format ctranslate2`` wrote, ready to translate.

    languages: source_lang and target_lang. compute_type: CTranslate2's name of what it computes in.
    max_source_positions, max_target_positions: its longest sentences in tokens, ``</s>`` included.
    """

    def __init__(self, path: str | Path, workers: int = 1, threads: int = 1) -> None:
        """workers: batches translated at a time; threads: of each.

        Raises FairseqError when CTranslate2 is not installed or cannot read the directory.
        """
        ctranslate2 = require("ctranslate2", "export", "translating with CTranslate2")
        self.path = Path(path)
        self.workers = workers
        config = _read_config(self.path / "config.json")
        shared = self.path / "shared_vocabulary.json"
        files = [shared, shared] if shared.is_file() else [self.path / f"{s}_vocabulary.json" for s in _SIDES]
        self.src_words, self.tgt_words = (_read_json(file, list) for file in files)
        self._tgt_ids = {word: index for index, word in enumerate(self.tgt_words)}
        self._adds_source_eos: bool = config["add_source_eos"]
        self.languages = {name: config.get(name) for name in ("source_lang", "target_lang")}
        self.max_source_positions, self.max_target_positions = (config[f"max_{side}_positions"] for side in _SIDES)
        check_model_file(
            self.path / "model.bin",
            (len(self.src_words), self.max_source_positions),
            (len(self.tgt_words), self.max_target_positions),
        )
        try:
            self._translator = ctranslate2.Translator(
                str(path), device="cpu", inter_threads=workers, intra_threads=threads, max_queued_batches=-1
            )
        except (RuntimeError, ValueError, LookupError) as error:
            raise FairseqError(f"{path}: CTranslate2 cannot load it: {error}") from error
        self.compute_type: str = self._translator.compute_type

    def check_dictionaries(self, src_dict: Dictionary, tgt_dict: Dictionary, data_dir: str | Path) -> None:
        """Raise FairseqError unless they are the model's vocabularies."""
        for side, dictionary, words in zip(_SIDES, (src_dict, tgt_dict), (self.src_words, self.tgt_words), strict=True):
            if dictionary.symbols != words:
                raise FairseqError(
                    f"{self.path} has another {side} vocabulary ({len(words):,} entries) than the dictionary in "
                    f"{data_dir} ({len(dictionary):,}); use the data-bin that the model was trained on"
                )

    def translate(
        self,
        sources: Sequence[Tensor],
        cfg: GenerationConfig,
        prefixes: Sequence[Tensor] | None = None,
        *,
        token_scores: bool = True,
    ) -> list[list[Hypothesis]]:
        """Translate one batch; of each sentence its ``cfg.nbest`` best hypotheses.

        sources: int64 (src_len,) each, ``</s>`` at the end; a sentence of ``</s>`` alone has itself as its translation.
        prefixes: (prefix_len,) each, begin the outputs. token_scores: False leaves positional_scores empty and saves
        their pass. Raises FairseqError for settings that CTranslate2 lacks, and for a prefix with ``</s>`` in it.
        """
        check_supported(cfg)
        return self._finish(self._start(sources, cfg, prefixes), token_scores)

    def score(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Log-probability of each token of each target: float32 (tgt_len,). Both have ``</s>`` at their end."""
        words = [self._source_words(source) for source in sources]
        with self._errors_named():
            results = self._translator.score_batch(
                words, [self._target_words(target[:-1]) for target in targets], max_input_length=0
            )
        return [torch.tensor(result.log_probs, dtype=torch.float32) for result in results]

    def translate_dataset(
        self,
        batches: Iterable[Batch],
        cfg: GenerationConfig,
        references: ReferenceConfig = NO_REFERENCES,
        *,
        token_scores: bool = True,
    ) -> Iterator[Translation]:
        """As ``fairseq.generation.translate.translate_dataset``; later batches are translated while one is read.

        token_scores: as ``translate``'s.
        """
        check_supported(cfg)
        waiting: deque[tuple[list[int], list[Tensor] | None, _Job]] = deque()

        def next_translations() -> Iterator[Translation]:
            ids, targets, job = waiting.popleft()
            hypotheses = self._finish(job, token_scores)
            for i, number in enumerate(ids):
                yield Translation(number, job.sources[i], None if targets is None else targets[i], hypotheses[i])

        for batch in batches:
            sources = [without_padding(row) for row in batch["net_input"]["src_tokens"]]
            targets = None if batch["target"] is None else [without_padding(row) for row in batch["target"]]
            if targets is None and (references.score_reference or references.prefix_size):
                wanted = "--score-reference" if references.score_reference else "--prefix-size"
                raise FairseqError(f"{wanted} needs references, and there are none here")
            if references.score_reference:
                job = _Job(sources, targets, None, GenerationConfig(), 0)
            else:
                size = references.prefix_size
                prefixes = [target[:size] for target in targets] if size and targets is not None else None
                job = self._start(sources, cfg, prefixes)
            waiting.append((batch["id"].tolist(), targets, job))
            if len(waiting) > 2 * self.workers:
                yield from next_translations()
        while waiting:
            yield from next_translations()

    def _start(self, sources: Sequence[Tensor], cfg: GenerationConfig, prefixes: Sequence[Tensor] | None) -> _Job:
        """Queue the search of one batch."""
        longest = min(cfg.max_len_b, self.max_target_positions - 1)
        if prefixes is not None and any(EOS in prefix.tolist() for prefix in prefixes):
            raise FairseqError(
                "--prefix-size: a reference ends within the prefix, which --backend ctranslate2 cannot force; give a "
                "smaller one"
            )
        pending = self._translator.translate_batch(
            [self._source_words(source) for source in sources],
            None if prefixes is None else [self._target_words(prefix) for prefix in prefixes],
            asynchronous=True,
            beam_size=cfg.beam,
            num_hypotheses=cfg.nbest,
            length_penalty=0 if cfg.unnormalized else cfg.lenpen,
            no_repeat_ngram_size=cfg.no_repeat_ngram_size,
            min_decoding_length=min(cfg.min_len, longest),
            max_decoding_length=longest + 1,
            max_input_length=0,
            # with several sentences and beams, the first token of each has the first sentence's attention (4.8)
            max_batch_size=1 if needs_attention(cfg) and cfg.beam > 1 else 0,
            suppress_sequences=[[self.tgt_words[PAD]]],
            return_scores=True,
            return_end_token=True,
            return_attention=needs_attention(cfg),
        )
        return _Job(list(sources), None, pending, cfg, longest)

    def _finish(self, job: _Job, token_scores: bool) -> list[list[Hypothesis]]:
        """Wait for a job. Its scores are recomputed from those of the tokens where there are any."""
        if job.references is not None:
            results = [[Hypothesis(target, 0.0, torch.zeros(0))] for target in job.references]
        else:
            with self._errors_named():
                results = [
                    self._hypotheses(pending.result(), source, job.longest)
                    for pending, source in zip(job.pending or [], job.sources, strict=True)
                ]
        if token_scores:
            # an empty sentence has no model's score
            pairs = [(s, h) for s, hs in zip(job.sources, results, strict=True) for h in hs if len(s) > 1]
            scores = self.score([source for source, _ in pairs], [h.tokens for _, h in pairs])
            for (_, hypothesis), positional in zip(pairs, scores, strict=True):
                hypothesis.positional_scores = positional
                total = positional.sum().item()
                hypothesis.score = total if job.cfg.unnormalized else total / len(positional) ** job.cfg.lenpen
        return results

    def _hypotheses(self, result: Any, source: Tensor, longest: int) -> list[Hypothesis]:
        found = []
        for i, words in enumerate(result.hypotheses):
            ids = [self._tgt_ids[word] for word in words]
            if not ids or ids[-1] != EOS:  # the longest output, or an empty sentence: it ends here
                ids = [*ids[:longest], EOS]
            attention = None
            if result.attention:
                attention = torch.zeros(len(source), len(ids))  # where the last column, </s>, may be missing
                weights = torch.tensor(result.attention[i][: len(ids)]).T
                attention[: weights.size(0), : weights.size(1)] = weights
                if weights.size(0) < len(source):  # an </s> that CTranslate2 has added itself, which has the rest
                    attention[-1, : weights.size(1)] = (1 - weights.sum(0)).clamp_(min=0)
            elif len(source) <= 1:
                attention = torch.ones(1, 1)
            found.append(Hypothesis(torch.tensor(ids), result.scores[i], torch.zeros(len(ids)), attention))
        return found

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """CTranslate2 finds out only when it translates that some parts of its files do not go together."""
        try:
            yield
        except (RuntimeError, ValueError, LookupError) as error:
            raise FairseqError(f"{self.path}: CTranslate2 cannot translate with it: {error}") from error

    def _source_words(self, source: Tensor) -> list[str]:
        return [self.src_words[index] for index in source.tolist()[: -1 if self._adds_source_eos else None]]

    def _target_words(self, target: Tensor) -> list[str]:
        return [self.tgt_words[index] for index in target.tolist()]


def make_search(
    models: Sequence[Transformer] | CTranslate2Model,
    cfg: GenerationConfig,
    seed: int = 1,
    check: Callable[[], None] | None = None,
) -> Callable[[Iterable[Batch]], Iterator[Translation]]:
    """``translate_dataset`` of the backend that the models are for. seed, check: the native one's."""
    if isinstance(models, CTranslate2Model):
        return partial(models.translate_dataset, cfg=cfg)
    return partial(translate_dataset, models, cfg=cfg, seed=seed, check=check)


def open_ctranslate2(args: Namespace, workers: int = 1, threads: int = 1) -> tuple[CTranslate2Model, TranslationData]:
    """The directory ``args.path`` and the data-bin ``args.data``, checked against each other.

    workers, threads: as ``CTranslate2Model``'s. Languages come from ``-s`` and ``-t``, else from the
    directory. Raises FairseqError when anything is missing or does not fit, and for flags that only the native backend
    has.
    """
    check_supported(section(GenerationConfig, args))
    _refuse(name for name in ("model_overrides", "fp16", "bf16") if getattr(args, name))
    model = CTranslate2Model(args.path, workers, threads)
    config: DataConfig = section(DataConfig, args)
    config = replace(config, max_source_positions=min(config.max_source_positions, model.max_source_positions))
    data = TranslationData.open(with_languages_of(model.languages, config))
    model.check_dictionaries(data.src_dict, data.tgt_dict, config.data.split(":")[0])
    return model, data


def _read_config(path: Path) -> dict[str, Any]:
    """Checked here because CTranslate2 sometimes crashes where it says that something in it is wrong."""
    config: dict[str, Any] = _read_json(path, dict)
    positions = [config.get(f"max_{side}_positions") for side in _SIDES]
    known = all(
        (type(config.get(name, ...)), config.get(name)) in [(type(value), value) for value in values]
        for name, values in _CONFIG.items()
    )
    if not known or not all(type(number) is int and number > 1 for number in positions):
        raise FairseqError(f"{path}: not what fairseq-export writes there; export it again")
    return config


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FairseqError(
            f"{path}: cannot read: {error.strerror or error}; is it a directory of fairseq-export --format ctranslate2?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FairseqError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, kind) or (isinstance(value, list) and not all(isinstance(word, str) for word in value)):
        raise FairseqError(f"{path}: not what fairseq-export writes there; export it again")
    return value
