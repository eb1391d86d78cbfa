"""Trained models as plain Python objects: text in, text out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, overload

import torch

from fairseq.checkpoint import check_dictionaries
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders import TextPipeline, make_text_pipeline
from fairseq.data.translation import infer_languages, load_dictionaries
from fairseq.errors import FairseqError
from fairseq.generation.output import TextFormat, load_alignment_dictionary
from fairseq.generation.translate import encode_source, languages_of, load_ensemble, longest_source, translate_ids
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig

# nbest and print_alignment make no difference to translate's result
_SEARCH_SETTINGS = {field.name for field in fields(GenerationConfig)} - {"nbest", "print_alignment"}


class TransformerModel:
    """One or more trained models with their dictionaries and the way from raw text to tokens and back.

    models: in eval mode; what ``fairseq.checkpoint.load_model`` returns. Make one with ``from_pretrained``.
    """

    def __init__(
        self, models: Sequence[Transformer], src_dict: Dictionary, tgt_dict: Dictionary, pipeline: TextPipeline
    ) -> None:
        self.models = list(models)
        self.src_dict = src_dict
        self.tgt_dict = tgt_dict
        self.pipeline = pipeline

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
        source_lang: str | None = None,
        target_lang: str | None = None,
        **overrides: Any,
    ) -> TransformerModel:
        """Load a checkpoint (several, colon-separated, make an ensemble) and its dictionaries, on the CPU.

        data_name_or_path: directory with ``dict.LANG.txt``. It, checkpoint_file, bpe_codes and sentencepiece_model are
        relative to model_dir. bpe: subword_nmt, sentencepiece; tokenizer: moses, space. Languages are the checkpoint's
        if not given. overrides: model settings to change. Raises FairseqError when a file is missing or does not fit.
        """
        root = Path(model_dir)
        paths = [str(root / name) for name in checkpoint_file.split(":")]
        models, state = load_ensemble(paths, overrides)
        data_dir = root / data_name_or_path
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
            bpe_codes=None if bpe_codes is None else str(root / bpe_codes),
            sentencepiece_model=None if sentencepiece_model is None else str(root / sentencepiece_model),
        )
        return cls(models, src_dict, tgt_dict, pipeline)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models[0].parameters()).device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TransformerModel:
        """Move all models, as ``torch.nn.Module.to``."""
        for model in self.models:
            model.to(device=device, dtype=dtype)
        return self

    def cuda(self) -> TransformerModel:
        """Move all models to the GPU."""
        return self.to("cuda")

    def half(self) -> TransformerModel:
        """Compute in float16; for GPUs."""
        return self.to(dtype=torch.float16)

    @overload
    def translate(self, sentences: str, beam: int = ..., **settings: Any) -> str: ...
    @overload
    def translate(self, sentences: list[str], beam: int = ..., **settings: Any) -> list[str]: ...
    def translate(
        self,
        sentences: str | list[str],
        beam: int = 5,
        *,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        seed: int = 1,
        **settings: Any,
    ) -> str | list[str]:
        """Translate raw text; a string gives a string, a list gives a list. A blank sentence stays blank.

        settings: those of the search by ``fairseq-generate``'s names, such as lenpen=0.6, sampling=True. max_tokens,
        batch_size: source tokens and sentences in a batch. Raises FairseqError for a setting that does not exist or is
        out of range, and for a sentence that is longer than the models read.
        """
        unknown = settings.keys() - _SEARCH_SETTINGS
        if unknown:
            raise FairseqError(f"translate: '{min(unknown)}' is no setting of the search")
        cfg = GenerationConfig(beam=beam, **settings)
        replace_unk = None if cfg.replace_unk is None else load_alignment_dictionary(cfg.replace_unk)
        text = TextFormat(self.src_dict, self.tgt_dict, alignment_dictionary=replace_unk)
        lines = [sentences] if isinstance(sentences, str) else sentences
        words = [self.pipeline.encode(line).split() for line in lines]
        longest = longest_source(self.models)
        ids = [encode_source(line, self.src_dict, longest, f"sentence {i}") for i, line in enumerate(words)]
        translations = translate_ids(self.models, ids, cfg, max_tokens=max_tokens, batch_size=batch_size, seed=seed)
        results = [
            self.pipeline.decode(text.hypothesis(translation.hypotheses[0], line))
            for translation, line in zip(translations, words, strict=True)
        ]
        return results[0] if isinstance(sentences, str) else results
