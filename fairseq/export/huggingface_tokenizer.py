"""Tokenizers that transformers loads: text to the dictionaries' ids, ``</s>`` at the end, and ids to text.

Text is split at blanks, segmented by the merges of subword-nmt (a BPE of the package tokenizers), or by a SentencePiece
model (a ``MarianTokenizer``). The BPE needs every piece that a merge makes to have an id, also those that the
dictionary lacks since they never end up in a text. They get the ids after the dictionary's, for which the model has
rows that read as ``<unk>`` and are never written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fairseq.data.dictionary import MERGING, Dictionary
from fairseq.data.encoders import SUBWORD_NMT_SEPARATOR, TextPipeline, load_merges, make_text_pipeline
from fairseq.errors import FairseqError
from fairseq.export.plain import Exportable
from fairseq.generation.translate import encode_source
from fairseq.options import ExportConfig
from fairseq.utils.symbols import SPECIAL_SYMBOLS

BOS, PAD, EOS, UNK = SPECIAL_SYMBOLS
END_OF_WORD = "</w>"  # in merges, of a word's last piece; the dictionary marks the others
OUTPUTS, OUTPUT_LENGTH = 100, 20  # random ones that the check decodes

Merges = list[tuple[str, str]]


class Tokenizers:
    """Those of a model's two sides, as ``--bpe`` says. Raises FairseqError for a file that is not what it should be."""

    def __init__(self, config: ExportConfig, exported: Exportable) -> None:
        _check_flags(config)
        self.exported = exported
        self.pipeline: TextPipeline = make_text_pipeline(
            bpe=config.bpe, bpe_codes=config.bpe_codes, sentencepiece_model=config.sentencepiece_model
        )
        self.merges = _read_merges(config.bpe_codes) if config.bpe in MERGING and config.bpe_codes else None
        self.sentencepiece_model = config.sentencepiece_model
        self.shared = exported.src_dict == exported.tgt_dict
        self.src_ids, self.tgt_ids = (_ids(side, self.merges) for side in (exported.src_dict, exported.tgt_dict))

    def write(self, directory: Path) -> list[str]:
        """Write their files; returns notes."""
        positions = self.exported.positions
        if self.sentencepiece_model is not None:
            self._write_marian(directory)
            return []
        _write_fast(self.src_ids, self.merges, positions, directory)
        notes = []
        if not self.shared:
            _write_fast(self.tgt_ids, self.merges, positions, directory / "target")
            notes.append("the tokenizer is the source language's; that of translations is in the subfolder target")
        more = len(self.src_ids) - len(self.exported.src_dict)
        if more:
            notes.append(f"{more:,} pieces that merges go through are not in the dictionary: rows that read as <unk>")
        return notes

    def _write_marian(self, directory: Path) -> None:
        assert self.sentencepiece_model is not None
        model = Path(self.sentencepiece_model).read_bytes()
        for name in ("source.spm", "target.spm"):
            (directory / name).write_bytes(model)
        _write_json(directory / "vocab.json", self.src_ids)
        if not self.shared:
            _write_json(directory / "target_vocab.json", self.tgt_ids)
        settings = _settings("MarianTokenizer", self.exported.positions) | {"separate_vocabs": not self.shared}
        languages = {name: getattr(self.exported, name) for name in ("source_lang", "target_lang")}
        _write_json(directory / "tokenizer_config.json", settings | languages)

    def check(self, directory: Path) -> str:
        """Compare what was written with the pipeline, and say how many agree.

        Raises FairseqError when a sentence becomes other ids, as it then would be translated otherwise.
        """
        from transformers import AutoTokenizer

        exported = self.exported
        texts = [self.pipeline.decode_source(_words(exported.src_dict, s)) for s in exported.sentences]
        expected = [self.encode(text) for text in texts]
        found = AutoTokenizer.from_pretrained(directory)(texts, verbose=False)["input_ids"]
        unknown = exported.src_dict.unk()
        for text, a, b in zip(texts, expected, found, strict=True):
            b = [index if index < len(exported.src_dict) else unknown for index in b]
            if a != b:
                raise FairseqError(f"the tokenizer reads other tokens than are read here: of {text!r} {b}, not {a}")
        generator = torch.Generator().manual_seed(1)
        size = (OUTPUTS, OUTPUT_LENGTH)
        outputs = torch.randint(len(SPECIAL_SYMBOLS), len(exported.tgt_dict), size, generator=generator)
        text_of = self.target_tokenizer(directory).decode
        same = sum(text_of(row.tolist()) == self.pipeline.decode(_words(exported.tgt_dict, row)) for row in outputs)
        line = f"tokenizer: {len(texts):,} of {len(texts):,} sentences have the same ids"
        if exported.split is not None:
            as_there = sum(a == sentence.tolist() for a, sentence in zip(expected, exported.sentences, strict=True))
            line += f", {as_there:,} those of the data-bin"
        return f"{line}; {same} of {OUTPUTS} random outputs have the same text"

    def encode(self, text: str) -> list[int]:
        """The ids that the model has been trained with."""
        words = self.pipeline.encode(text).split()
        return encode_source(words, self.exported.src_dict, len(words) + 1, "").tolist()

    def target_tokenizer(self, directory: Path) -> Any:
        """What decodes translations."""
        from transformers import AutoTokenizer

        below = directory / "target"
        return AutoTokenizer.from_pretrained(below if below.is_dir() else directory)


def _check_flags(config: ExportConfig) -> None:
    for name, kinds in (("bpe_codes", MERGING), ("sentencepiece_model", ("sentencepiece",))):
        if getattr(config, name) is not None and config.bpe not in kinds:
            raise FairseqError(f"--{name.replace('_', '-')} does nothing without --bpe {' or '.join(kinds)}")


def _read_merges(path: str) -> Merges:
    """First to last."""
    bpe = load_merges(path)
    if bpe.version != (0, 2):
        raise FairseqError(
            f"--bpe-codes {path}: merges of subword-nmt 0.1, without a line '#version: 0.2', which no tokenizer of "
            "transformers applies; leave --bpe out and give it segmented text"
        )
    return sorted(bpe.bpe_codes, key=bpe.bpe_codes.__getitem__)


def _ids(dictionary: Dictionary, merges: Merges | None) -> dict[str, int]:
    """What a tokenizer calls its tokens -> ids: the dictionary's, then the other pieces'."""
    if merges is None:
        return {symbol: index for index, symbol in enumerate(dictionary.symbols)}
    ids: dict[str, int] = {}
    for index, symbol in enumerate(dictionary.symbols):
        ids.setdefault(symbol if index < len(SPECIAL_SYMBOLS) else _piece(symbol), index)
    more = dict.fromkeys(piece for a, b in merges for piece in (a, b, a + b) if piece not in ids)
    return ids | {piece: len(dictionary) + number for number, piece in enumerate(more)}


def _piece(symbol: str) -> str:
    """An entry of the dictionary as merges call it."""
    begins_or_goes_on = symbol.endswith(SUBWORD_NMT_SEPARATOR) and symbol != SUBWORD_NMT_SEPARATOR
    return symbol.removesuffix(SUBWORD_NMT_SEPARATOR) if begins_or_goes_on else symbol + END_OF_WORD


def _write_fast(ids: dict[str, int], merges: Merges | None, positions: int, directory: Path) -> None:
    """tokenizer.json and its settings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    directory.mkdir(exist_ok=True)
    settings = _settings("PreTrainedTokenizerFast", positions)
    if merges is None:
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        settings["split_special_tokens"] = False  # <unk> may be among the segmented words
    else:
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=UNK, end_of_word_suffix=END_OF_WORD))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[ \r\n]"), "removed")  # where subword-nmt does
        tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    tokenizer.add_special_tokens([BOS, PAD, EOS, UNK])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", settings)


def _settings(tokenizer_class: str, positions: int) -> dict[str, Any]:
    return {
        "tokenizer_class": tokenizer_class,
        "bos_token": BOS,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "right",
        "model_max_length": positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # who writes </s> in a text means these characters
    }


def _words(dictionary: Dictionary, ids: torch.Tensor) -> str:
    return " ".join(dictionary[index] for index in ids.tolist() if index != dictionary.eos())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
