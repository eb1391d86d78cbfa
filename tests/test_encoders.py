"""Raw text to tokens and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq.data.encoders import LARGEST_MODEL, make_text_pipeline
from fairseq.errors import FairseqError

CODES = "#version: 0.2\nl o\nlo w</w>\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("spm") / "model"
    sentences = ["the dog sees the cat .", "a cat sees a dog .", "Höhe über dem Meer"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(prefix),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return f"{prefix}.model"


def test_nothing_asked_for_changes_nothing() -> None:
    pipeline = make_text_pipeline()
    assert pipeline.encode("a  b ") == "a  b " and pipeline.decode("a@@ b") == "a@@ b"


def test_moses() -> None:
    pipeline = make_text_pipeline("moses", source_lang="de", target_lang="en")
    assert pipeline.encode('Er sagte: "Ja & nein", z.B. E-Mail.') == (
        "Er sagte : &quot; Ja &amp; nein &quot; , z.B. E @-@ Mail ."
    )
    plain = make_text_pipeline("moses", moses_no_dash_splits=True, moses_no_escape=True)
    assert plain.encode("An e-mail & more.") == "An e-mail & more ."
    assert pipeline.decode("an e @-@ mail") == "an e-mail"
    assert pipeline.decode_source("Er sagte : &quot; Ja &quot; , z.B .") == 'Er sagte: "Ja", z.B.'
    assert pipeline.decode("It &apos;s &quot; fine &quot; , isn &apos;t it ?") == "It's \"fine\", isn't it?"


def test_space() -> None:
    assert make_text_pipeline("space").encode("  a \t b\n") == "a b"


def test_fastbpe(tmp_path: Path) -> None:
    """Its files count; the segmentation is what the program ``fast applybpe`` printed."""
    codes = tmp_path / "codes"
    codes.write_text("l o 9\nlo w</w> 7\n1 2 3\n")
    pipeline = make_text_pipeline(bpe="fastbpe", bpe_codes=str(codes))
    assert pipeline.encode("low lol 12 123") == "low lo@@ l 1@@ 2 12@@ 3"
    assert pipeline.decode("low lo@@ l lo@@") == "low lol lo"
    assert make_text_pipeline(bpe="subword_nmt", bpe_codes=str(codes)).encode("lol") == "lo@@ l"
    with pytest.raises(FairseqError, match="--bpe fastbpe needs --bpe-codes FILE"):
        make_text_pipeline(bpe="fastbpe")


def test_subword_nmt(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    codes.write_text(CODES)
    pipeline = make_text_pipeline(bpe="subword_nmt", bpe_codes=str(codes))
    assert pipeline.encode("low lol") == "low lo@@ l"
    assert pipeline.decode("low lo@@ l") == "low lol"
    assert pipeline.decode("lo@@ l lo@@") == "lol lo"  # a mark at the very end has nothing to join


def test_sentencepiece(sentencepiece_model: str) -> None:
    pipeline = make_text_pipeline(bpe="sentencepiece", sentencepiece_model=sentencepiece_model)
    tokens = pipeline.encode("the cat sees Höhe .")
    assert tokens.startswith("\u2581") and len(tokens.split(" ")) >= 5
    assert pipeline.decode(tokens) == "the cat sees Höhe ."


def test_tokeniser_and_subwords_together(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    codes.write_text(CODES)
    pipeline = make_text_pipeline("moses", "subword_nmt", bpe_codes=str(codes))
    assert pipeline.encode("Low, lol!") == "L@@ o@@ w , lo@@ l !"
    assert pipeline.decode(pipeline.encode("Low, lol!")) == "Low, lol!"


def test_reference_codes_undo_themselves(shared: Path) -> None:
    codes = shared / "reference" / "multi30k-databin" / "bpe.codes"
    pipeline = make_text_pipeline(bpe="subword_nmt", bpe_codes=str(codes))
    lines = (shared / "data" / "multi30k" / "val.lc.norm.tok.de").read_text(encoding="utf-8").splitlines()[:200]
    assert [pipeline.decode(pipeline.encode(line)) for line in lines] == lines
    assert any("@@" in pipeline.encode(line) for line in lines)


def test_bad_input_is_one_message(tmp_path: Path) -> None:
    bad, binary, empty, quoted, large = (tmp_path / name for name in ("bad", "binary", "empty", "quoted", "large"))
    bad.write_text("a b c\n")
    empty.touch()
    # two pieces of one name, which is not UTF-8 and which SentencePiece quotes in its error
    quoted.write_bytes((b"\n\x08\n\x01\xff\x15\0\0\0\0") * 2)
    with open(large, "wb") as handle:
        handle.truncate(LARGEST_MODEL + 1)
    binary.write_bytes(b"\xff\xfe\x00")
    for settings, message in [
        ({"bpe": "subword_nmt"}, "needs --bpe-codes"),
        ({"bpe": "subword_nmt", "bpe_codes": str(tmp_path / "none")}, "none: cannot read: No such file"),
        ({"bpe": "subword_nmt", "bpe_codes": str(bad)}, "not a file of merges: Error: invalid line 1"),
        ({"bpe": "subword_nmt", "bpe_codes": str(binary)}, "not UTF-8"),
        ({"bpe": "sentencepiece"}, "needs --sentencepiece-model"),
        ({"bpe": "sentencepiece", "sentencepiece_model": str(tmp_path)}, "cannot read"),
        ({"bpe": "sentencepiece", "sentencepiece_model": str(bad)}, "not a SentencePiece model"),
        ({"bpe": "sentencepiece", "sentencepiece_model": str(empty)}, "not a SentencePiece model"),
        ({"bpe": "sentencepiece", "sentencepiece_model": str(quoted)}, "not a SentencePiece model"),
        ({"bpe": "sentencepiece", "sentencepiece_model": str(large)}, "large: more than 268,435,456 bytes"),
        ({"bpe": "bytes"}, "--bpe bytes"),
        ({"tokenizer": "nltk"}, "--tokenizer nltk"),
    ]:
        with pytest.raises(FairseqError, match=message):
            make_text_pipeline(**settings)
