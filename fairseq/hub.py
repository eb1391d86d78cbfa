"""Trained models as plain Python objects: text in, text out."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from fairseq.checkpoint import check_dictionaries
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders import TextPipeline, make_text_pipeline
from fairseq.data.translation import infer_languages, load_dictionaries
from fairseq.errors import FairseqError
from fairseq.generation.ctranslate2_backend import CTranslate2Model, make_search
from fairseq.generation.history import Hypothesis
from fairseq.generation.output import TextFormat, in_base_2, load_alignment_dictionary
from fairseq.generation.translate import encode_source, languages_of, load_ensemble, longest_source, translate_sentences
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig
from fairseq.utils.symbols import EOS, SPECIAL_SYMBOLS

Hypotheses: TypeAlias = list[dict[str, Any]]

_SEARCH_SETTINGS = {field.name for field in fields(GenerationConfig)}
_alignment_dictionary = functools.lru_cache(maxsize=4)(load_alignment_dictionary)


@dataclass
class TextHypothesis:
    """One translation of a sentence.

    text: detokenised. score: base 2, the mean log-probability of a token unless lenpen or unnormalized say otherwise.
    tokens: the model's, ``</s>`` included; token_scores: the log-probability of each, base 2. attention: (src_len,
    tgt_len), over the source's tokens, ``</s>`` included, averaged over heads and models; None unless asked for.
    """

    text: str
    score: float
    tokens: list[str]
    token_scores: list[float]
    attention: Tensor | None


@dataclass
class TextTranslation:
    """A sentence's translations, best first.

    source_tokens: what the model has read, ``</s>`` included. unknown: those of them that it does not know.
    """

    source_tokens: list[str]
    unknown: list[str]
    hypotheses: list[TextHypothesis]


def _place(root: Path, name: str | os.PathLike[str]) -> Path:
    """``name`` below ``root``, or, if there is nothing, where it is itself."""
    return Path(name) if not (root / name).exists() and Path(name).exists() else root / name


def _file(root: Path, name: str | os.PathLike[str] | None, *usual: str) -> str | None:
    """A file that is given, else one that has a ``usual`` name in ``root``."""
    if name is not None:
        return str(_place(root, name))
    return next((str(root / known) for known in usual if (root / known).is_file()), None)


class TransformerModel:
    """One or more trained models with their dictionaries and the way from raw text to tokens and back.

    models: in eval mode; what ``fairseq.checkpoint.load_model`` returns. Make one with ``from_pretrained``.
    ctranslate2: what translates in place of ``models``, which are then none; for the commands.
    """

    def __init__(
        self,
        models: Sequence[Transformer] | CTranslate2Model,
        src_dict: Dictionary,
        tgt_dict: Dictionary,
        pipeline: TextPipeline,
        *,
        source_lang: str | None = None,
        target_lang: str | None = None,
    ) -> None:
        self.ctranslate2 = models if isinstance(models, CTranslate2Model) else None
        self.models = [] if isinstance(models, CTranslate2Model) else list(models)
        self.src_dict = src_dict
        self.tgt_dict = tgt_dict
        self.pipeline = pipeline
        self.source_lang = source_lang
        self.target_lang = target_lang

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | os.PathLike[str],
        checkpoint_file: str = "model.pt",
        data_name_or_path: str | os.PathLike[str] = ".",
        *,
        bpe: str | None = None,
        bpe_codes: str | os.PathLike[str] | None = None,
        tokenizer: str | None = None,
        sentencepiece_model: str | os.PathLike[str] | None = None,
        moses_no_dash_splits: bool = False,
        moses_no_escape: bool = False,
        source_lang: str | None = None,
        target_lang: str | None = None,
        **overrides: Any,
    ) -> TransformerModel:
        """Load a checkpoint (several, colon-separated, make an ensemble) and its dictionaries, on the CPU.

        data_name_or_path: directory with ``dict.LANG.txt``. It, bpe_codes and sentencepiece_model are relative to
        model_dir, or to the working directory where they are not there; checkpoint_file to model_dir. bpe: subword_nmt,
        fastbpe, sentencepiece, whose file in model_dir may have fairseq's name for it (bpecodes, code,
        sentencepiece.bpe.model) and is then found; tokenizer: moses, space; moses_no_*: what moses leaves as it is.
        Languages are the checkpoint's if not given. overrides: model settings to change. Raises FairseqError when a
        file is missing or does not fit.
        """
        root = Path(model_dir)
        paths = [str(root / name) for name in checkpoint_file.split(":")]
        models, state = load_ensemble(paths, overrides)
        data_dir = _place(root, data_name_or_path)
        known = (source_lang, target_lang) if source_lang and target_lang else languages_of(state["args"], data_dir)
        src, tgt = known or infer_languages(data_dir)
        src_dict, tgt_dict = load_dictionaries(data_dir, src, tgt)
        for model, path in zip(models, paths, strict=True):
            check_dictionaries(model, path, data_dir, (src, src_dict), (tgt, tgt_dict))
        pipeline = make_text_pipeline(
            tokenizer,
            bpe,
            source_lang=src,
            target_lang=tgt,
            bpe_codes=_file(root, bpe_codes, "bpecodes", "code"),
            sentencepiece_model=_file(root, sentencepiece_model, "sentencepiece.bpe.model"),
            moses_no_dash_splits=moses_no_dash_splits,
            moses_no_escape=moses_no_escape,
        )
        return cls(models, src_dict, tgt_dict, pipeline, source_lang=src, target_lang=tgt)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        if self.ctranslate2 is not None:
            return torch.device("cpu")
        return next(self.models[0].parameters()).device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TransformerModel:
        """Move all models, as ``torch.nn.Module.to``."""
        for model in self.models:
            model.to(device=device, dtype=dtype)
        return self

    def eval(self) -> TransformerModel:
        """Itself: the models are in eval mode already."""
        return self

    def cuda(self) -> TransformerModel:
        """Move all models to the GPU."""
        return self.to("cuda")

    def cpu(self) -> TransformerModel:
        """Move all models to the CPU."""
        return self.to("cpu")

    def half(self) -> TransformerModel:
        """Compute in float16; for GPUs."""
        return self.to(dtype=torch.float16)

    def tokenize(self, sentence: str) -> str:
        """Raw source text -> words."""
        return self.pipeline.tokenize(sentence)

    def detokenize(self, words: str) -> str:
        """Target words -> plain text."""
        return self.pipeline.detokenize(words)

    def apply_bpe(self, words: str) -> str:
        """Words -> subwords."""
        return self.pipeline.apply_bpe(words)

    def remove_bpe(self, subwords: str) -> str:
        """Subwords -> words."""
        return self.pipeline.remove_bpe(subwords)

    def binarize(self, subwords: str) -> Tensor:
        """Source subwords -> their ids and ``</s>``: (src_len,) int64."""
        return torch.from_numpy(self.src_dict.encode_line(subwords))

    def string(self, tokens: Tensor) -> str:
        """Target ids, (tgt_len,), -> subwords, without ``</s>``."""
        return self.tgt_dict.string(tokens)

    def encode(self, sentence: str) -> Tensor:
        """Raw source text -> ids, as ``binarize`` returns them."""
        return self.binarize(self.pipeline.encode(sentence))

    def decode(self, tokens: Tensor) -> str:
        """Target ids, (tgt_len,), -> plain text."""
        return self.pipeline.decode(self.string(tokens))

    @overload
    def translate(self, sentences: str, beam: int = ..., **settings: Any) -> str: ...
    @overload
    def translate(self, sentences: Iterable[str], beam: int = ..., **settings: Any) -> list[str]: ...
    def translate(self, sentences: str | Iterable[str], beam: int = 5, **settings: Any) -> str | list[str]:
        """The best translation of raw text: of a string a string, of several a list. A blank sentence stays blank.

        settings: as ``generate``'s, but for nbest and print_alignment. Raises FairseqError as ``generate`` does.
        """
        for name in ("nbest", "print_alignment"):
            if name in settings:
                raise FairseqError(f"translate: '{name}' makes no difference to its result; use generate")
        lines = [sentences] if isinstance(sentences, str) else sentences
        results = [found.hypotheses[0].text for found in self.generate(lines, beam, nbest=1, **settings)]
        return results[0] if isinstance(sentences, str) else results

    @overload
    def generate(self, sentences: str, beam: int = ..., **settings: Any) -> TextTranslation: ...
    @overload
    def generate(self, sentences: Tensor, beam: int = ..., **settings: Any) -> Hypotheses: ...
    @overload
    def generate(self, sentences: Iterable[str], beam: int = ..., **settings: Any) -> list[TextTranslation]: ...
    @overload
    def generate(self, sentences: Iterable[Tensor], beam: int = ..., **settings: Any) -> list[Hypotheses]: ...
    def generate(
        self,
        sentences: str | Tensor | Iterable[str] | Iterable[Tensor],
        beam: int = 5,
        *,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        seed: int = 1,
        ids: Sequence[int] | None = None,
        max_source_positions: int = 2**30,
        truncate_source: bool = False,
        check: Callable[[], None] | None = None,
        **settings: Any,
    ) -> TextTranslation | Hypotheses | list[TextTranslation] | list[Hypotheses]:
        """The n best translations of raw text with scores and, with print_alignment=True, attention.

        Of ids, (src_len,) as ``encode`` returns them, it gives fairseq's dicts: of a sentence a list, best first, with
        the fields of ``fairseq.generation.history.Hypothesis`` (scores are natural logarithms there).

        settings: those of the search by ``fairseq-generate``'s names, such as lenpen=0.6, sampling=True; nbest is beam
        if not given. max_tokens, batch_size: source tokens and sentences in a batch. ids: their numbers, in errors and
        for sampling (default: 0, 1, ...). truncate_source: cut sentences of more tokens than the models read, or than
        max_source_positions. check: called every few steps of the search; what it raises ends it. Raises FairseqError
        for a setting that does not exist or is out of range, and for a sentence that is too long.
        """
        unknown = settings.keys() - _SEARCH_SETTINGS
        if unknown:
            raise FairseqError(f"'{min(unknown)}' is no setting of the search")
        cfg = GenerationConfig(beam=beam, **({"nbest": beam} | settings))
        replace_unk = None if cfg.replace_unk is None else _alignment_dictionary(cfg.replace_unk)
        text = TextFormat(self.src_dict, self.tgt_dict, alignment_dictionary=replace_unk)
        alone = isinstance(sentences, (str, Tensor))
        given = [sentences] if isinstance(sentences, (str, Tensor)) else list(sentences)
        words = [self._words(sentence) for sentence in given]
        positions = self.ctranslate2.max_source_positions if self.ctranslate2 else longest_source(self.models)
        longest = min(positions, max_source_positions)
        numbers = range(len(given)) if ids is None else ids
        names = ["the sentence"] if alone else [f"sentence {number}" for number in numbers]
        encoded = [
            encode_source(line, self.src_dict, longest, name, truncate_source)
            for line, name in zip(words, names, strict=True)
        ]
        search = make_search(self.ctranslate2 or self.models, cfg, seed, check)
        translations = translate_sentences(
            search, encoded, ids=numbers, max_tokens=max_tokens, batch_size=batch_size, beam=cfg.beam
        )
        results: list[Any] = []
        for translation, line, sentence in zip(translations, words, given, strict=True):
            if isinstance(sentence, Tensor):
                results.append([dict(vars(hypothesis)) for hypothesis in translation.hypotheses])
                continue
            read = line[: len(translation.src_tokens) - 1]
            hypotheses = [self._as_text(hypothesis, read, text, cfg) for hypothesis in translation.hypotheses]
            unknown_words = [word for word in dict.fromkeys(read) if word not in self.src_dict]
            results.append(TextTranslation([*read, SPECIAL_SYMBOLS[EOS]], unknown_words, hypotheses))
        return results[0] if alone else results

    def _words(self, sentence: str | Tensor) -> list[str]:
        if isinstance(sentence, str):
            return self.pipeline.encode(sentence).split()
        if sentence.dim() != 1 or sentence.is_floating_point():
            what = f"{sentence.dtype} of shape {tuple(sentence.shape)}"
            raise FairseqError(f"generate takes text, or ids of one dimension as encode returns them, not {what}")
        return [self.src_dict[index] for index in sentence.tolist() if index != EOS]

    def _as_text(
        self, hypothesis: Hypothesis, src_words: list[str], text: TextFormat, cfg: GenerationConfig
    ) -> TextHypothesis:
        return TextHypothesis(
            self.pipeline.decode(text.hypothesis(hypothesis, src_words)),
            in_base_2(hypothesis.score),
            [self.tgt_dict[index] for index in hypothesis.tokens.tolist()],
            [score / math.log(2) for score in hypothesis.positional_scores.tolist()],
            hypothesis.attention if cfg.print_alignment else None,
        )
