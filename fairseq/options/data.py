"""Flags of data: how a data-bin is read, and how it is made from text."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.utils.flags import flag, same_flag


@dataclass
class DataConfig:
    """What to translate: a data-bin and its two languages."""

    data: str = flag(
        "", "data-bin made by fairseq-preprocess; of several, a:b:c, training reads one an epoch", positional=True
    )
    task: str = flag("translation", "the task", choices=("translation",))
    source_lang: str | None = flag(None, "source language", "-s", metavar="SRC")
    target_lang: str | None = flag(None, "target language", "-t", metavar="TGT")
    dataset_impl: str = flag("mmap", "format of data-bins", choices=("mmap",))
    left_pad_source: bool = flag(True, "pad the source on the left")
    max_source_positions: int = flag(1024, "longest source sentence, in tokens", least=1)
    truncate_source: bool = flag(False, "cut longer source sentences to --max-source-positions")
    skip_invalid_size_inputs_valid_test: bool = flag(
        False, "leave out too long sentences of validation and test sets, or of raw text, instead of stopping"
    )
    max_tokens: int | None = flag(None, "most tokens in a batch, padding included", least=1)
    batch_size: int | None = flag(None, "most sentences in a batch", "--max-sentences", least=1)


@dataclass
class SubsetConfig:
    """How the subsets of a data-bin are read."""

    max_target_positions: int = flag(1024, "longest target sentence, in tokens", least=1)
    num_workers: int = flag(1, "processes that read and collate batches ahead (0: none)", least=0)
    required_batch_size_multiple: int = flag(8, "batch sizes are multiples of this where possible", least=1)
    required_seq_len_multiple: int = flag(1, "pad both sides of a batch to a multiple of this many tokens", least=1)


@dataclass
class PreprocessConfig:
    """Text to data-bin."""

    source_lang: str | None = same_flag(DataConfig, "source_lang")
    target_lang: str | None = same_flag(DataConfig, "target_lang")
    trainpref: str | None = flag(None, "prefix of the training files", metavar="PREFIX")
    validpref: str | None = flag(None, "prefixes of validation files, comma-separated", metavar="PREFIX")
    testpref: str | None = flag(None, "prefixes of test files, comma-separated", metavar="PREFIX")
    destdir: str = flag("data-bin", "directory to write", metavar="DIR")
    joined_dictionary: bool = flag(False, "one dictionary for both languages")
    srcdict: str | None = flag(None, "use this source dictionary", metavar="FILE")
    tgtdict: str | None = flag(None, "use this target dictionary", metavar="FILE")
    thresholdsrc: int = flag(0, "source words seen fewer times become <unk>")
    thresholdtgt: int = flag(0, "target words seen fewer times become <unk>")
    nwordssrc: int = flag(-1, "keep the N most frequent source words (-1: all)")
    nwordstgt: int = flag(-1, "keep the N most frequent target words (-1: all)")
    only_source: bool = flag(
        False, "binarise the source side alone (the target's training text counts for --joined-dictionary)"
    )
    padding_factor: int = flag(8, "dictionary sizes are multiples of this", least=1)
    workers: int = flag(1, "processes", least=1)
    dict_only: bool = flag(False, "make the dictionaries alone")
    task: str = same_flag(DataConfig, "task")
    dataset_impl: str = same_flag(DataConfig, "dataset_impl")
