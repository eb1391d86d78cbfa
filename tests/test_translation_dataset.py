"""Sentence pairs: collating, and finding a split in a data-bin."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.cli.preprocess import main as preprocess
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fairseq.data.translation import LanguagePairDataset, TranslationData, infer_languages
from fairseq.errors import FairseqError
from fairseq.options import DataConfig

SRC = [[4, 5, 6, 2], [7, 2], [2], [5, 5, 2]]
TGT = [[4, 2], [5, 6, 7, 2], [8, 2], [2]]


def _write(prefix: Path, sentences: list[list[int]]) -> None:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for sentence in sentences:
            writer.add(sentence)


@pytest.fixture
def data_bin(tmp_path: Path) -> Path:
    """en-de with splits train and valid, and the source alone of test."""
    for split in ("train", "valid"):
        _write(tmp_path / f"{split}.en-de.en", SRC)
        _write(tmp_path / f"{split}.en-de.de", TGT)
    _write(tmp_path / "test.en-de.en", SRC)
    for language in ("en", "de"):
        Dictionary.build({f"{language}{n}": 1 for n in range(8)}).save(tmp_path / f"dict.{language}.txt")
    return tmp_path


def _dataset(data_bin: Path, **settings_: Any) -> LanguagePairDataset:
    dictionary = Dictionary.load(data_bin / "dict.en.txt")
    src, tgt = (IndexedDataset(data_bin / f"train.en-de.{language}") for language in ("en", "de"))
    return LanguagePairDataset(src, tgt, dictionary, dictionary, **settings_)


def test_collate(data_bin: Path) -> None:
    batch = _dataset(data_bin).collate(np.array([1, 0]))
    assert batch["id"].tolist() == [1, 0]
    assert (batch["nsentences"], batch["ntokens"]) == (2, 6)
    assert batch["net_input"]["src_tokens"].tolist() == [[1, 1, 7, 2], [4, 5, 6, 2]]
    assert batch["net_input"]["src_lengths"].tolist() == [2, 4]
    assert batch["net_input"]["prev_output_tokens"].tolist() == [[2, 5, 6, 7], [2, 4, 1, 1]]
    assert batch["target"] is not None
    assert batch["target"].tolist() == [[5, 6, 7, 2], [4, 2, 1, 1]]
    tensors = [batch["id"], batch["target"], *batch["net_input"].values()]
    assert all(isinstance(t, torch.Tensor) and t.dtype == torch.int64 for t in tensors)


def test_collate_padded_on_the_other_sides(data_bin: Path) -> None:
    batch = _dataset(data_bin, left_pad_source=False, left_pad_target=True).collate(np.array([1, 0]))
    assert batch["net_input"]["src_tokens"].tolist() == [[7, 2, 1, 1], [4, 5, 6, 2]]
    assert batch["net_input"]["prev_output_tokens"].tolist() == [[2, 5, 6, 7], [1, 1, 2, 4]]
    assert batch["target"] is not None
    assert batch["target"].tolist() == [[5, 6, 7, 2], [1, 1, 4, 2]]


def test_collate_pads_to_a_multiple(data_bin: Path) -> None:
    batch = _dataset(data_bin, required_seq_len_multiple=3).collate(np.array([1, 0]))
    assert batch["net_input"]["src_tokens"].tolist() == [[1, 1, 1, 1, 7, 2], [1, 1, 4, 5, 6, 2]]
    assert batch["net_input"]["prev_output_tokens"].tolist() == [[2, 5, 6, 7, 1, 1], [2, 4, 1, 1, 1, 1]]
    assert batch["target"] is not None
    assert batch["target"].tolist() == [[5, 6, 7, 2, 1, 1], [4, 2, 1, 1, 1, 1]]
    assert (batch["ntokens"], batch["net_input"]["src_lengths"].tolist()) == (6, [2, 4])


def test_collate_truncates_the_source(data_bin: Path) -> None:
    dataset = _dataset(data_bin, max_source_length=3)
    assert dataset.src_sizes.tolist() == [3, 2, 1, 3]
    assert dataset.collate(np.array([0, 1]))["net_input"]["src_tokens"].tolist() == [[4, 5, 2], [1, 7, 2]]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_collate_equals_a_loop_over_sentences(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ids = st.lists(st.integers(3, 11), max_size=6).map(lambda tokens: [*tokens, 2])
    pairs = data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))
    path = tmp_path_factory.mktemp("pairs")
    _write(path / "train.en-de.en", [src for src, _ in pairs])
    _write(path / "train.en-de.de", [tgt for _, tgt in pairs])
    Dictionary.build({f"{n}": 1 for n in range(8)}).save(path / "dict.en.txt")
    left = data.draw(st.booleans())
    indices = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=8))
    batch = _dataset(path, left_pad_source=left).collate(np.array(indices))
    for row, index in enumerate(indices):
        source, target = pairs[index]
        width = batch["net_input"]["src_tokens"].shape[1]
        padding = [1] * (width - len(source))
        assert batch["net_input"]["src_tokens"][row].tolist() == (padding + source if left else source + padding)
        assert batch["target"] is not None
        padding = [1] * (batch["target"].shape[1] - len(target))
        assert batch["target"][row].tolist() == target + padding
        assert batch["net_input"]["prev_output_tokens"][row].tolist() == [2, *target[:-1], *padding]
    assert batch["ntokens"] == sum(len(pairs[i][1]) for i in indices)


def test_pickled_dataset_opens_its_files_again(data_bin: Path) -> None:
    dataset = pickle.loads(pickle.dumps(_dataset(data_bin)))
    assert dataset.collate(np.array([0]))["ntokens"] == 2


def test_load_both_ways(data_bin: Path) -> None:
    for source, target in ((None, None), ("en", "de"), ("en", None), (None, "de")):
        data = TranslationData.open(DataConfig(data=str(data_bin), source_lang=source, target_lang=target))
        assert (data.source_lang, data.target_lang) == ("en", "de")
        assert data.src_dict[4] == "en0"
        assert data.load("train").src[0].tolist() == SRC[0]
    data = TranslationData.open(DataConfig(data=str(data_bin), source_lang="de"))
    assert (data.source_lang, data.target_lang, data.src_dict[4]) == ("de", "en", "de0")
    dataset = data.load("valid")
    assert dataset.tgt is not None
    assert (dataset.src[0].tolist(), dataset.tgt[0].tolist()) == (TGT[0], SRC[0])


def test_without_a_target(data_bin: Path) -> None:
    data = TranslationData.open(DataConfig(data=str(data_bin)))
    dataset = data.load("test", need_target=False)
    assert dataset.tgt is None
    assert dataset.tgt_sizes is None
    batch = dataset.collate(np.array([0, 1]))
    assert batch["target"] is None
    assert batch["net_input"]["prev_output_tokens"].tolist() == [[2], [2]]
    assert batch["ntokens"] == 6
    with pytest.raises(FairseqError, match=r"test\.en-de\.en: there is no de side"):
        data.load("test")


def test_source_binarised_without_a_target_language(data_bin: Path) -> None:
    _write(data_bin / "mono.en-None.en", SRC)
    data = TranslationData.open(DataConfig(data=str(data_bin)))
    assert len(data.load("mono", need_target=False)) == 4


def test_several_data_bins_rotate(data_bin: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        _write(tmp_path / f"{number}" / "train.en-de.en", SRC[:number])
        _write(tmp_path / f"{number}" / "train.en-de.de", TGT[:number])
    data = TranslationData.open(DataConfig(data=f"{data_bin}:{tmp_path}/1:{tmp_path}/2"))
    assert [len(data.load("train", epoch)) for epoch in (1, 2, 3, 4, 5)] == [4, 1, 2, 4, 1]


def test_languages_with_a_hyphen(tmp_path: Path) -> None:
    for language in ("zh-CN", "en"):
        _write(tmp_path / f"train.zh-CN-en.{language}", SRC)
    assert infer_languages(tmp_path) == ("zh-CN", "en")


def test_what_is_missing_is_said(data_bin: Path, tmp_path: Path) -> None:
    def message(split: str = "train", **config: str) -> str:
        with pytest.raises(FairseqError) as error:
            TranslationData.open(DataConfig(**({"data": str(data_bin)} | config))).load(split)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message("tset") == f"{data_bin}: no split 'tset' for en-de; its splits: test, train, valid"
    assert message(source_lang="fr") == "language 'fr' is not in this data-bin, which has en-de"
    assert "dict.fr.txt: cannot read the dictionary" in message(source_lang="fr", target_lang="de")
    assert message(data=str(tmp_path / "none")).endswith("none: no such data-bin; make it with fairseq-preprocess")
    (data_bin / "dict.fr.txt").write_text("a 1\n")
    assert message(source_lang="fr", target_lang="de").endswith("its language pairs: en-de")
    _write(data_bin / "train.fr-de.fr", SRC[:3])
    assert "several language pairs: en-de, fr-de; give --source-lang and --target-lang" in message()
    _write(data_bin / "train.fr-de.de", SRC)
    assert "has 3 sentences and" in message(source_lang="fr", target_lang="de")


MORE = [[9, 9, 9, 9, 2], [2], [10, 2]]


def _tokens(dataset: LanguagePairDataset, shuffled: bool = False) -> list[tuple[list[int], list[int]]]:
    """Each pair, from one batch of them all."""
    order = np.random.default_rng(3).permutation(len(dataset)) if shuffled else np.arange(len(dataset))
    batch = dataset.collate(order)
    assert batch["target"] is not None
    sides = [batch["net_input"]["src_tokens"][np.argsort(order)], batch["target"][np.argsort(order)]]
    src, tgt = ([[token for token in row if token != 1] for row in side.tolist()] for side in sides)
    assert [len(row) for row in src] == dataset.src_sizes.tolist()
    assert dataset.tgt_sizes is not None and [len(row) for row in tgt] == dataset.tgt_sizes.tolist()
    return list(zip(src, tgt, strict=True))


def test_further_training_sets(data_bin: Path) -> None:
    pairs = list(zip(SRC, TGT, strict=True))
    for number, (src, tgt) in ((1, (MORE, MORE[::-1])), (2, (TGT, SRC)), (4, (SRC, TGT))):
        _write(data_bin / f"train{number}.en-de.en", src)
        _write(data_bin / f"train{number}.en-de.de", tgt)
    further = [*zip(MORE, MORE[::-1], strict=True), *zip(TGT, SRC, strict=True)]  # train3 is not there, which ends it
    data = TranslationData.open(DataConfig(str(data_bin)))
    assert _tokens(data.load("train")) == pairs
    assert _tokens(data.load("valid", upsample_primary=3)) == pairs  # on its own
    joined = data.load("train", upsample_primary=1)
    assert _tokens(joined) == _tokens(joined, shuffled=True) == pairs + further
    thrice = data.load("train", upsample_primary=3)
    assert _tokens(pickle.loads(pickle.dumps(thrice)), shuffled=True) == 3 * pairs + further
    assert len(pickle.dumps(thrice.src)) < 1000 and [thrice.src[i].tolist() for i in (0, 11, 14)] == [
        SRC[0], SRC[3], MORE[2]
    ]  # fmt: skip
    assert thrice.src.prefix.startswith(f"3 x {data_bin / 'train.en-de.en'} + {data_bin / 'train1.en-de.en'} + ")


def test_further_training_sets_that_do_not_fit(data_bin: Path) -> None:
    data = TranslationData.open(DataConfig(str(data_bin)))
    _write(data_bin / "train1.en-de.en", MORE)
    with pytest.raises(FairseqError, match=r"train1\.en-de\.en lacks its de side"):
        data.load("train", upsample_primary=1)
    _write(data_bin / "train1.en-de.de", MORE[1:])
    _write(data_bin / "train2.en-de.en", MORE[1:])
    _write(data_bin / "train2.en-de.de", MORE)  # the two sides are of one length in all
    with pytest.raises(FairseqError, match=r"train1\.en-de\.en has 3 sentences and .*train1\.en-de\.de 2"):
        data.load("train", upsample_primary=1)
    _write(data_bin / "train1.en-de.de", [[2], [99, 2], [2]])
    _write(data_bin / "train2.en-de.en", MORE)
    with pytest.raises(FairseqError, match=r"train1\.en-de\.de\.bin: token id 99"):
        data.load("train", upsample_primary=1).collate(np.array([0, 5, 8]))


def test_splits_of_text(tmp_path: Path) -> None:
    """fairseq's ``--dataset-impl raw``: the command that is named makes them binary."""
    for language, text in (("en", "a b\n"), ("de", "b c c\n")):
        Dictionary.build(dict.fromkeys("abc", 1)).save(tmp_path / f"dict.{language}.txt")
        (tmp_path / f"train.en-de.{language}").write_text(text)
    for config in (DataConfig(str(tmp_path)), DataConfig(str(tmp_path), source_lang="en", target_lang="de")):
        with pytest.raises(FairseqError) as error:
            TranslationData.open(config).load("train")
        assert "is text: fairseq-preprocess --trainpref" in str(error.value)
    flags = str(error.value).partition("fairseq-preprocess ")[2].replace("(or --validpref, --testpref) ", "")
    preprocess(
        [*flags.removesuffix(" makes it binary").split(), "-s", "en", "-t", "de", "--destdir", f"{tmp_path}/bin"]
    )
    assert _tokens(TranslationData.open(DataConfig(f"{tmp_path}/bin")).load("train")) == [([4, 5, 2], [5, 6, 6, 2])]


def test_wrong_dictionary_is_noticed(data_bin: Path) -> None:
    (data_bin / "dict.de.txt").write_text("a 1\n")
    dataset = TranslationData.open(DataConfig(data=str(data_bin))).load("train")
    with pytest.raises(FairseqError, match=r"train\.en-de\.de\.bin: token id 7 is not in the dictionary \(5 entries\)"):
        dataset.collate(np.array([1]))
