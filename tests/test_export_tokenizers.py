"""Hugging Face directories that take raw text: ids, translations and text as with ``--bpe`` here."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq.cli.export import main
from fairseq.data.dictionary import Dictionary
from fairseq.data.encoders import make_text_pipeline
from fairseq.data.indexed_dataset import IndexedDataset
from fairseq.models import TransformerModel
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from tests import training_runs
from tests.toys import write_toy_checkpoint

transformers = pytest.importorskip("transformers", reason="pip install -e .[export]")

CODES = "#version: 0.2\nl o\nlo w</w>\nlo s\nlos s\n"
SOURCE = ["low loss lol", "a slow sum", "</s> <unk> >>low< sol"]
TARGET = ["niedrig los so", "wollte los", "soll so"]


def export(
    directory: Path, flags: dict[str, str], *, joined: bool, source: list[str], target: list[str], pre_ln: bool = False
) -> Path:
    """A random model whose dictionaries have every second piece of the text, and ``directory/out``, its export."""
    pipeline = make_text_pipeline(**flags)
    counts = [Counter(" ".join(map(pipeline.encode, text)).split()) for text in (source, target)]
    sides = [sum(counts, Counter())] * 2 if joined else counts
    dictionaries = [Dictionary.build(dict(sorted(side.items())[::2])) for side in sides]
    for name, dictionary in zip(("xx", "yy"), dictionaries, strict=True):
        dictionary.save(directory / f"dict.{name}.txt")
    torch.manual_seed(2)
    shape = {"embed_dim": 16, "ffn_embed_dim": 24, "attention_heads": 2, "layers": 1}
    settings: dict[str, Any] = {
        f"{stack}_{name}": size for stack in ("encoder", "decoder") for name, size in shape.items()
    }
    settings |= {"init_type": "default" if pre_ln else "adaptive", "share_all_embeddings": joined}
    settings |= {f"{stack}_normalize_before": pre_ln for stack in ("encoder", "decoder")}
    cfg = TransformerConfig(**settings, max_target_positions=30)
    model = Transformer(cfg, *map(len, dictionaries)).eval()
    write_toy_checkpoint(model, directory / "model.pt")
    argv = ["model.pt", "--format", "huggingface", "--output", "out"]
    argv = [str(directory / word) if word in ("model.pt", "out") else word for word in argv]
    main(argv + [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)])
    return directory / "out"


def assert_translates(directory: Path, flags: dict[str, str], sentences: list[str]) -> None:
    """The directory alone, as the native model."""
    native = TransformerModel.from_pretrained(directory, data_name_or_path=".", **flags)
    expected = native.translate(sentences, beam=1)  # toys go on to the longest output, which beams reach differently
    out = directory / "out"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    target = transformers.AutoTokenizer.from_pretrained(out / "target") if (out / "target").exists() else tokenizer
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    outputs = model.generate(**batch, num_beams=1, early_stopping=False)
    known = [not row.eq(3).any() for row in outputs]  # transformers leaves <unk> out of the text
    found = target.batch_decode(outputs, skip_special_tokens=True)
    assert any(known)
    assert [text for text, ok in zip(found, known, strict=True) if ok] == [
        text for text, ok in zip(expected, known, strict=True) if ok
    ]


def test_reference_translates_raw_text(shared, tmp_path, capsys):
    """All test sentences have the ids of fairseq's own data-bin, and are translated as here."""
    reference, databin = shared / "reference" / "fairseq012_tiny.pt", shared / "reference" / "multi30k-databin"
    flags = {"bpe": "subword_nmt", "bpe_codes": str(databin / "bpe.codes")}
    argv = [str(reference), "--data", str(databin), "--format", "huggingface", "--output", str(tmp_path / "out")]
    main([*argv, "--bpe", "subword_nmt", "--bpe-codes", str(databin / "bpe.codes")])
    out = capsys.readouterr().out
    assert "1,000 of 1,000 sentences have the same ids, 99" in out  # a few have an <unk>
    assert "100 of 100 random outputs have the same text" in out
    assert "16 of 16 translations agree" in out and "rows that read as <unk>" in out
    raw = (shared / "data" / "multi30k" / "test_2016_flickr.lc.norm.tok.en").read_text(encoding="utf-8").splitlines()
    corpus = IndexedDataset(databin / "test.en-de.en")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    size = len(Dictionary.load(databin / "dict.en.txt"))
    found = [[index if index < size else 3 for index in ids] for ids in tokenizer(raw)["input_ids"]]
    assert found == [corpus[i].tolist() for i in range(len(raw))]
    assert tokenizer.batch_decode(found[:50], skip_special_tokens=True) == raw[:50]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    outputs = model.generate(**tokenizer(raw[:8], return_tensors="pt", padding=True))
    native = TransformerModel.from_pretrained(reference.parent, reference.name, databin.name, **flags)
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    assert [a == b for a, b in zip(texts, native.translate(raw[:8]), strict=True)].count(True) >= 7


def test_segments_as_subword_nmt(shared, tmp_path):
    """Words that nobody has seen, put together from parts of others."""
    from subword_nmt.apply_bpe import BPE

    from fairseq.export import huggingface_tokenizer

    codes, databin = shared / "reference" / "multi30k-databin" / "bpe.codes", shared / "reference" / "multi30k-databin"
    dictionary = Dictionary.load(databin / "dict.de.txt")
    merges = huggingface_tokenizer._read_merges(str(codes))
    huggingface_tokenizer._write_fast(huggingface_tokenizer._ids(dictionary, merges), merges, 100, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with codes.open(encoding="utf-8") as handle:
        segment = BPE(handle).process_line
    rng = random.Random(1)
    pieces = [symbol.removesuffix("@@") for symbol in dictionary.symbols[4:]]
    lines = [" ".join(rng.choice(pieces) + rng.choice(pieces) for _ in range(rng.randint(1, 9))) for _ in range(2000)]
    lines += [
        "",
        "  a  b ",
        "a\tb",
        "10\N{NO-BREAK SPACE}km",
        "</s> <unk>",
        "x<pad>y",
        "東京 \N{GRINNING FACE}",
        "a@@ b\n",
    ]
    for line, ids in zip(lines, tokenizer(lines)["input_ids"], strict=True):
        expected = [*(dictionary.index(word) for word in segment(line).split()), 2]
        assert [index if index < len(dictionary) else 3 for index in ids] == expected, line


@pytest.mark.parametrize(("joined", "pre_ln"), [(True, False), (True, True), (False, False)])
def test_subword_nmt(joined, pre_ln, tmp_path, capsys):
    codes = tmp_path / "codes"
    codes.write_text(CODES)
    flags = {"bpe": "subword_nmt", "bpe_codes": str(codes)}
    out = export(tmp_path, flags, joined=joined, source=SOURCE, target=TARGET, pre_ln=pre_ln)
    assert (out / "target").is_dir() == (not joined)
    assert "not in the dictionary: rows that read as <unk>" in capsys.readouterr().out
    assert_translates(tmp_path, flags, SOURCE)


@pytest.mark.parametrize("joined", [True, False])
def test_sentencepiece(joined, tmp_path, capsys):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((SOURCE + TARGET) * 20),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    flags = {"bpe": "sentencepiece", "sentencepiece_model": str(tmp_path / "spm.model")}
    out = export(tmp_path, flags, joined=joined, source=SOURCE, target=TARGET)
    names = {path.name for path in out.iterdir()}
    assert {"source.spm", "target.spm", "vocab.json"} <= names
    assert ("target_vocab.json" in names) == (not joined)
    assert type(transformers.AutoTokenizer.from_pretrained(out)).__name__ == "MarianTokenizer"
    assert_translates(tmp_path, flags, SOURCE)


def test_refused(tmp_path, capsys):
    def refused(message: str, *flags: object) -> None:
        argv = (tmp_path / "model.pt", "--output", tmp_path / "new", *flags)
        training_runs.assert_fails(capsys, 1, message, *argv, main=main)
        assert not (tmp_path / "new").exists()

    codes = tmp_path / "codes"
    codes.write_text(CODES)
    export(tmp_path, {"bpe": "subword_nmt", "bpe_codes": str(codes)}, joined=True, source=SOURCE, target=TARGET)
    huggingface = ("--format", "huggingface")
    refused("--bpe-codes does nothing without --bpe subword_nmt", *huggingface, "--bpe-codes", codes)
    refused("--sentencepiece-model does nothing without --bpe", *huggingface, "--sentencepiece-model", codes)
    refused("--bpe does nothing with --format ctranslate2", "--format", "ctranslate2", "--bpe", "sentencepiece")
    codes.write_text("l o\n")
    refused("merges of subword-nmt 0.1", *huggingface, "--bpe", "subword_nmt", "--bpe-codes", codes)


def test_other_tokens_leave_nothing(tmp_path, capsys, monkeypatch):
    """Merges in another order than the file's."""
    from fairseq.export import huggingface_tokenizer

    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\nl o\no w</w>\n")
    read = huggingface_tokenizer._read_merges
    monkeypatch.setattr(huggingface_tokenizer, "_read_merges", lambda path: read(path)[::-1])
    flags = {"bpe": "subword_nmt", "bpe_codes": str(codes)}
    with pytest.raises(SystemExit):
        export(tmp_path, flags, joined=True, source=["low o"], target=["low o"])
    assert "reads other tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
