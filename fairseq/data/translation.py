"""Sentence pairs: where a data-bin keeps them, and how some of them become one padded batch.

Collating gathers all tokens of a batch from the memory-mapped corpus by one vectorised look-up; nothing here loops over
sentences.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from fairseq.data import indexed_dataset
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import UNFINISHED, IndexedDataset, JoinedDataset, positions_in_row
from fairseq.errors import FairseqError

if TYPE_CHECKING:
    from fairseq.options import DataConfig


class NetInput(TypedDict):
    """The arguments of the model, by name; all int64."""

    src_tokens: Tensor  # (batch, src_len)
    src_lengths: Tensor  # (batch,); 0 for an empty row
    prev_output_tokens: Tensor  # (batch, tgt_len): </s>, then the target but for its last token; (batch, 1) without one


class BatchShape(NamedTuple):
    """Rows, and tokens of each side, padding included."""

    rows: int
    src_len: int
    tgt_len: int


class Batch(TypedDict):
    """Some sentence pairs, padded; (batch,) is (nsentences,) plus empty rows, which count nowhere, if there are any."""

    id: Tensor  # (nsentences,) int64, positions in the dataset
    nsentences: int
    ntokens: int  # target tokens without padding; source tokens where there is no target
    net_input: NetInput
    target: Tensor | None  # (batch, tgt_len) int64


def map_batch(batch: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """A batch, or a part of it, with ``function`` applied to all in it that is of a ``kind``."""
    if isinstance(batch, dict):
        return {key: map_batch(item, kind, function) for key, item in batch.items()}
    return function(batch) if isinstance(batch, kind) else batch


@dataclass
class LanguagePairDataset:
    """Source sentences with their translations (or without: ``tgt`` None).

    max_source_length: cut longer sources to this many tokens, ``</s>`` included. required_seq_len_multiple: pad both
    sides of a batch to a multiple of this.
    Raises FairseqError when the two sides differ in length, and from `collate` for an id that is in no dictionary.
    """

    src: IndexedDataset | JoinedDataset
    tgt: IndexedDataset | JoinedDataset | None
    src_dict: Dictionary
    tgt_dict: Dictionary
    left_pad_source: bool = True
    left_pad_target: bool = False
    max_source_length: int | None = None
    required_seq_len_multiple: int = 1

    def __post_init__(self) -> None:
        for src, tgt in [] if self.tgt is None else zip(self.src.parts, self.tgt.parts, strict=True):
            if len(src) != len(tgt):
                raise FairseqError(
                    f"{src.prefix} has {len(src)} sentences and {tgt.prefix} {len(tgt)}; "
                    "make the data-bin again from parallel files"
                )

    def __len__(self) -> int:
        return len(self.src)

    @property
    def src_sizes(self) -> np.ndarray:
        """Tokens of each source sentence, ``</s>`` included: (sentences,) int32."""
        sizes, longest = self.src.sizes, self.max_source_length
        return sizes if longest is None else np.minimum(sizes, longest)

    @property
    def tgt_sizes(self) -> np.ndarray | None:
        """Tokens of each target sentence, ``</s>`` included: (sentences,) int32."""
        return None if self.tgt is None else self.tgt.sizes

    def collate(self, indices: np.ndarray, shape: BatchShape | None = None) -> Batch:
        """The batch of sentences ``indices``, in that order; of ``shape``, if that is given, which they must fit into.

        An empty row is a lone ``</s>`` on both sides, so that attention has something to attend to, with no target.
        """
        indices = np.asarray(indices, dtype=np.int64)
        shape = shape or self._smallest_shape(indices)
        empty = shape.rows - len(indices)
        sizes = self._source_sizes(indices)
        tokens = self.src.take(indices, sizes, len(self.src_dict))
        if self.max_source_length is not None:
            tokens[np.cumsum(sizes) - 1] = self.src_dict.eos()
        source = _pad(tokens, sizes, shape.src_len, self.src_dict.pad(), self.left_pad_source)
        eos, pad = self.tgt_dict.eos(), self.tgt_dict.pad()
        target, ntokens = None, int(sizes.sum())
        prev_output_tokens = np.full((len(indices), 1), eos, np.int64)
        if self.tgt is not None:
            tgt_sizes = self.tgt.sizes[indices].astype(np.int64)
            tokens = self.tgt.take(indices, tgt_sizes, len(self.tgt_dict))
            target = _pad(tokens, tgt_sizes, shape.tgt_len, pad, self.left_pad_target)
            shifted = np.empty_like(tokens)
            shifted[1:] = tokens[:-1]
            shifted[np.cumsum(tgt_sizes) - tgt_sizes] = eos
            prev_output_tokens = _pad(shifted, tgt_sizes, shape.tgt_len, pad, self.left_pad_target)
            ntokens = int(tgt_sizes.sum())
        if empty:
            source = _add_rows(source, empty, self.src_dict.pad(), self.src_dict.eos(), self.left_pad_source)
            prev_output_tokens = _add_rows(prev_output_tokens, empty, pad, eos, self.left_pad_target)
            target = None if target is None else _add_rows(target, empty, pad, pad, self.left_pad_target)
            sizes = np.append(sizes, np.zeros(empty, np.int64))
        return {
            "id": torch.from_numpy(indices),
            "nsentences": len(indices),
            "ntokens": ntokens,
            "net_input": {
                "src_tokens": torch.from_numpy(source),
                "src_lengths": torch.from_numpy(sizes),
                "prev_output_tokens": torch.from_numpy(prev_output_tokens),
            },
            "target": None if target is None else torch.from_numpy(target),
        }

    def _source_sizes(self, indices: np.ndarray) -> np.ndarray:
        sizes = self.src.sizes[indices].astype(np.int64)
        return sizes if self.max_source_length is None else np.minimum(sizes, self.max_source_length)

    def _smallest_shape(self, indices: np.ndarray) -> BatchShape:
        sides = self._source_sizes(indices), indices[:0] if self.tgt is None else self.tgt.sizes[indices]
        multiple = self.required_seq_len_multiple
        return BatchShape(len(indices), *(-(-int(sizes.max(initial=0)) // multiple) * multiple for sizes in sides))


def _pad(tokens: np.ndarray, sizes: np.ndarray, width: int, pad: int, left: bool) -> np.ndarray:
    """Rows of ``sizes`` tokens as an array (rows, width)."""
    padded = np.full((len(sizes), width), pad, np.int64)
    first = np.arange(len(sizes)) * width + (width - sizes if left else 0)
    padded.reshape(-1)[np.repeat(first, sizes) + positions_in_row(sizes)] = tokens
    return padded


def _add_rows(padded: np.ndarray, count: int, pad: int, token: int, left: bool) -> np.ndarray:
    """``padded`` with ``count`` more rows of a single token."""
    rows = np.full((count, padded.shape[1]), pad, np.int64)
    rows[:, -1 if left else 0] = token
    return np.concatenate([padded, rows])


def _language_pairs(data_dir: str | os.PathLike[str]) -> set[tuple[str, str]]:
    """The (source, target) pairs that files ``SPLIT.SRC-TGT.LANG.idx`` of a data-bin are named after."""
    pairs = set()
    for path in Path(data_dir).glob("*.idx"):
        match = re.fullmatch(r".+\.([^.]+)\.([^.]+)\.idx", path.name)
        pair, language = match.groups() if match else ("", "")
        if pair.startswith(f"{language}-"):
            pairs.add((language, pair[len(language) + 1 :]))
        elif pair.endswith(f"-{language}"):
            pairs.add((pair[: -len(language) - 1], language))
    return {pair for pair in pairs if pair[0] and pair[1] and pair[1] != "None"}


def infer_languages(data_dir: str | os.PathLike[str]) -> tuple[str, str]:
    """Source and target language of a data-bin, from its file names.

    Raises FairseqError when the directory is missing or its files name no pair or more than one.
    """
    if not os.path.isdir(data_dir):
        raise FairseqError(f"{data_dir}: no such data-bin; make it with fairseq-preprocess")
    pairs = sorted(_language_pairs(data_dir))
    if len(pairs) != 1:
        found = (
            "several language pairs: " + ", ".join("-".join(p) for p in pairs) if pairs else "no SPLIT.SRC-TGT.LANG.idx"
        )
        raise FairseqError(f"{data_dir} has {found}; give --source-lang and --target-lang{_text_in(data_dir)}")
    return pairs[0]


def load_dictionaries(data_dir: str | os.PathLike[str], src: str, tgt: str) -> tuple[Dictionary, Dictionary]:
    """``dict.SRC.txt`` and ``dict.TGT.txt`` of a data-bin; one object when the two are equal.

    Raises FairseqError when either is not there, or the data-bin is new in part and old in part.
    """
    if os.path.isdir(os.path.join(data_dir, UNFINISHED)):
        raise FairseqError(
            f"{data_dir}: fairseq-preprocess did not get to put all files in place; give its command again"
        )
    src_dict, tgt_dict = (Dictionary.load(os.path.join(data_dir, f"dict.{language}.txt")) for language in (src, tgt))
    return src_dict, (src_dict if src_dict == tgt_dict else tgt_dict)


def load_langpair_dataset(
    data_dir: str | os.PathLike[str],
    split: str,
    src: str,
    tgt: str,
    src_dict: Dictionary,
    tgt_dict: Dictionary,
    *,
    left_pad_source: bool = True,
    left_pad_target: bool = False,
    truncate_source: bool = False,
    max_source_positions: int = 1024,
    required_seq_len_multiple: int = 1,
    upsample_primary: int | None = None,
) -> LanguagePairDataset:
    """Open ``SPLIT.SRC-TGT.*`` of a data-bin; files named ``SPLIT.TGT-SRC.*`` serve as well, with the sides swapped.

    upsample_primary: with SPLIT1, SPLIT2, ... behind it if they are there, and then SPLIT itself so many times (None:
    SPLIT alone). The dataset has no target when only the source was binarised. Raises FairseqError when there is no
    such split, or a part of it lacks a target.
    """
    first = _open_split(data_dir, split, src, tgt)
    if first is None:
        raise FairseqError(f"{data_dir}: no split '{split}' for {src}-{tgt}; {_what_is_there(data_dir, src, tgt)}")
    more: list[_Sides] = []
    while upsample_primary and (sides := _open_split(data_dir, f"{split}{len(more) + 1}", src, tgt)):
        more.append(sides)
    parts = [first] * (upsample_primary or 1) + more if more else [first]
    sources = [part[0] for part in parts]
    targets = [part[1] for part in parts if part[1] is not None]
    if 0 < len(targets) < len(parts):
        lacking = next(source.prefix for source, target in parts if target is None)
        raise FairseqError(f"{lacking} lacks its {tgt} side, which other training sets have; binarise both sides")
    return LanguagePairDataset(
        JoinedDataset(sources) if more else sources[0],
        None if not targets else JoinedDataset(targets) if more else targets[0],
        src_dict,
        tgt_dict,
        left_pad_source=left_pad_source,
        left_pad_target=left_pad_target,
        max_source_length=max_source_positions if truncate_source else None,
        required_seq_len_multiple=required_seq_len_multiple,
    )


_Sides: TypeAlias = tuple[IndexedDataset, IndexedDataset | None]


def _open_split(data_dir: str | os.PathLike[str], split: str, src: str, tgt: str) -> _Sides | None:
    """The two sides of a split; None if it is not there."""
    prefix = _find_split(data_dir, split, src, tgt)
    if prefix is None:
        return None
    target = f"{prefix}.{tgt}"
    return IndexedDataset(f"{prefix}.{src}"), IndexedDataset(target) if indexed_dataset.exists(target) else None


def _find_split(data_dir: str | os.PathLike[str], split: str, src: str, tgt: str) -> str | None:
    """What the names of a split's files begin with; None if it is not there."""
    pairs = (f"{src}-{tgt}", f"{tgt}-{src}", f"{src}-None")  # the last by --only-source without a target language
    prefixes = (os.path.join(data_dir, f"{split}.{pair}") for pair in pairs)
    return next((prefix for prefix in prefixes if indexed_dataset.exists(f"{prefix}.{src}")), None)


def _what_is_there(data_dir: str | os.PathLike[str], src: str, tgt: str) -> str:
    if not os.path.isdir(data_dir):
        return "there is no such directory"
    pairs = _language_pairs(data_dir)
    if not pairs & {(src, tgt), (tgt, src)}:
        return f"its language pairs: {', '.join(sorted('-'.join(p) for p in pairs)) or 'none'}{_text_in(data_dir)}"
    names = [path.name for path in Path(data_dir).glob("*.idx") if path.with_suffix(".bin").is_file()]
    ends = tuple(f".{pair}.{src}.idx" for pair in (f"{src}-{tgt}", f"{tgt}-{src}"))
    splits = sorted(name[: -len(ends[0])] for name in names if name.endswith(ends))
    return f"its splits: {', '.join(splits) or 'none'}{_text_in(data_dir)}"


def _text_in(data_dir: str | os.PathLike[str]) -> str:
    """What to do about a split that is text (``--dataset-impl raw`` of fairseq), if there is one."""
    for path in sorted(Path(data_dir).glob("*.*-*.*")):
        match = re.fullmatch(r"(.+\.([^.]+)-([^.]+))\.([^.]+)", path.name)
        if match and match[4] in match.groups()[1:3]:
            src, tgt = (path.with_name(f"dict.{language}.txt") for language in match.groups()[1:3])
            return (
                f"; {path.name} is text: fairseq-preprocess --trainpref {path.parent / match[1]} (or --validpref, "
                f"--testpref) --srcdict {src} --tgtdict {tgt} makes it binary"
            )
    return ""


@dataclass
class TranslationData:
    """Everything that the data flags of a command name: languages, dictionaries and the splits behind them."""

    config: DataConfig
    source_lang: str
    target_lang: str
    src_dict: Dictionary
    tgt_dict: Dictionary
    required_seq_len_multiple: int = 1

    @classmethod
    def open(cls, config: DataConfig, required_seq_len_multiple: int = 1) -> TranslationData:
        """Find languages and dictionaries in the first data-bin of ``config.data``.

        required_seq_len_multiple: of the datasets that are loaded. Raises FairseqError when either is not there.
        """
        data_dir = config.data.split(":")[0]
        src, tgt = config.source_lang, config.target_lang
        if not src or not tgt:
            found = infer_languages(data_dir)
            src, tgt = _complete(src, tgt, found)
        return cls(config, src, tgt, *load_dictionaries(data_dir, src, tgt), required_seq_len_multiple)

    def load(
        self, split: str, epoch: int = 1, *, need_target: bool = True, upsample_primary: int | None = None
    ) -> LanguagePairDataset:
        """The dataset of ``split``: of data-bin a in epoch 1, b in epoch 2 and so on for ``a:b:c``.

        upsample_primary: as in ``load_langpair_dataset``, for training. Raises FairseqError when the split is not
        there, or has no target while ``need_target``.
        """
        config = self.config
        data_dirs = config.data.split(":")
        dataset = load_langpair_dataset(
            data_dirs[(epoch - 1) % len(data_dirs)],
            split,
            self.source_lang,
            self.target_lang,
            self.src_dict,
            self.tgt_dict,
            left_pad_source=config.left_pad_source,
            truncate_source=config.truncate_source,
            max_source_positions=config.max_source_positions,
            required_seq_len_multiple=self.required_seq_len_multiple,
            upsample_primary=upsample_primary,
        )
        if need_target and dataset.tgt is None:
            raise FairseqError(
                f"{dataset.src.prefix}: there is no {self.target_lang} side beside it; binarise both sides"
            )
        return dataset

    def validation_sets_besides(self, listed: Sequence[str]) -> list[str]:
        """Those of valid1, valid2, ... in the first data-bin that are not ``listed``."""
        data_dir, found = self.config.data.split(":")[0], ["valid"]
        while _find_split(data_dir, f"valid{len(found)}", self.source_lang, self.target_lang):
            found.append(f"valid{len(found)}")
        return [name for name in found[1:] if name not in listed]


def _complete(src: str | None, tgt: str | None, found: tuple[str, str]) -> tuple[str, str]:
    """The language that was not given, from the pair that was found, in either order."""
    if not src and not tgt:
        return found
    given = src or tgt
    if given not in found:
        raise FairseqError(f"language '{given}' is not in this data-bin, which has {'-'.join(found)}")
    other = found[1] if given == found[0] else found[0]
    return (src, other) if src else (other, str(tgt))
