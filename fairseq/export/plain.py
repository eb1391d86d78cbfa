"""What every foreign format starts from: an ordinary Transformer, its dictionaries, and sentences to try it on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq import admin
from fairseq.admin.fold import PLAIN, fold_notes
from fairseq.checkpoint import build_from_checkpoint, check_dictionaries, load_checkpoint
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset, exists
from fairseq.data.translation import load_dictionaries
from fairseq.errors import FairseqError
from fairseq.export.self_check import random_batch
from fairseq.generation.translate import languages_of, without_padding
from fairseq.models.transformer import Transformer
from fairseq.options import ExportConfig

SENTENCES = 1000  # of the data-bin, for self-checks
SPLITS = ("valid", "test", "train")  # where they come from: the first that is there


@dataclass
class Exportable:
    """original: as the checkpoint has it. plain: Post-LN or Pre-LN of init type default, with the same outputs.

    sentences: to try it on, int64 (src_len,) each, ``</s>`` at the end. split: that they are of; None: they are random.
    """

    original: Transformer
    plain: Transformer
    source_lang: str
    target_lang: str
    src_dict: Dictionary
    tgt_dict: Dictionary
    sentences: list[Tensor]
    split: str | None
    notes: list[str]

    @property
    def positions(self) -> int:
        """The most tokens, ``</s>`` included, of a source and of a target."""
        return min(self.plain.cfg.max_source_positions, self.plain.cfg.max_target_positions)


def open_checkpoint(config: ExportConfig) -> Exportable:
    """Read ``config.checkpoint`` and its data-bin's dictionaries; fold what is not Post-LN or Pre-LN by itself.

    Raises FairseqError when anything is missing or does not fit, and for init types that have no ordinary equivalent.
    """
    state = load_checkpoint(config.checkpoint)
    original = build_from_checkpoint(state, config.checkpoint)
    plain, notes = original, []
    if config.fold or original.cfg.init_type not in PLAIN:
        try:
            plain = admin.fold(original)
        except FairseqError as error:
            raise FairseqError(f"--format {config.format} needs an ordinary Transformer: {error}") from error
        if original.cfg.init_type not in PLAIN:
            notes.append(f"init type {original.cfg.init_type} is folded into an ordinary Post-LN Transformer")
        notes += fold_notes(original.cfg, plain.cfg)
    data_dir, src, tgt = _find_dictionaries(config, state["args"])
    src_dict, tgt_dict = load_dictionaries(data_dir, src, tgt)
    check_dictionaries(original, config.checkpoint, data_dir, (src, src_dict), (tgt, tgt_dict))
    sentences, split = _sentences(data_dir, src, tgt, original)
    return Exportable(original, plain, src, tgt, src_dict, tgt_dict, sentences, split, notes)


def refuse_flags(config: ExportConfig, *names: str) -> None:
    """Raise FairseqError when a flag that ``config.format`` has no use for is given."""
    for name in names:
        if getattr(config, name) is not None:
            flag = name.replace("_", "-")
            raise FairseqError(f"--{flag} does nothing with --format {config.format}; leave it out")


def check_unique(exported: Exportable, whose: str) -> None:
    """Raise FairseqError for a dictionary with an entry that is there twice. whose: what has every token once."""
    for side, dictionary in (("source", exported.src_dict), ("target", exported.tgt_dict)):
        twice = len(dictionary) - len(set(dictionary.symbols))
        if twice:
            raise FairseqError(
                f"{twice} entries of the {side} dictionary replace others of the same name (#fairseq:overwrite), and "
                f"{whose} every token once"
            )


def describe(exported: Exportable, output: str, what: str) -> list[str]:
    """The first lines to print about an export. what: format and precision."""
    return [
        f"wrote {output}: {what}, {sum(p.numel() for p in exported.plain.parameters()):,} parameters",
        *(f"note: {note}" for note in exported.notes),
    ]


def _find_dictionaries(config: ExportConfig, args: dict[str, Any]) -> tuple[Path, str, str]:
    """The directory that has them, and the two languages. args: the checkpoint's settings."""
    if config.data:
        places = [Path(config.data)]
    else:
        trained_on = str(args.get("data") or "").split(":")[0]
        places = [Path(config.checkpoint).parent, *([Path(trained_on)] if trained_on else [])]
    for place in places:
        known = languages_of(args, place)
        if known is not None:
            return place, *known
    src, tgt = args.get("source_lang"), args.get("target_lang")
    raise FairseqError(
        f"no dict.{src}.txt and dict.{tgt}.txt in {' or '.join(map(str, places))}; name the data-bin that the model "
        "was trained on with --data DIR"
    )


def _sentences(data_dir: Path, src: str, tgt: str, model: Transformer) -> tuple[list[Tensor], str | None]:
    """The first sentences of a split that is there, and its name, else random ones."""
    for split, pair in itertools.product(SPLITS, (f"{src}-{tgt}", f"{tgt}-{src}")):
        prefix = data_dir / f"{split}.{pair}.{src}"
        if exists(prefix):
            corpus = IndexedDataset(prefix)
            found = [torch.from_numpy(corpus[i].astype("int64")) for i in range(min(SENTENCES, len(corpus)))]
            return [sentence for sentence in found if 1 < len(sentence) <= model.cfg.max_source_positions], split
    return [without_padding(row) for row in random_batch(model)[0]], None
