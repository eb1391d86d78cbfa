"""Raw text to the tokens a model was trained on, and back: a tokeniser, then a subword segmentation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

from fairseq.data.dictionary import post_process
from fairseq.errors import FairseqError

SUBWORD_NMT_SEPARATOR = "@@"


@dataclass(frozen=True)
class TextPipeline:
    """Text to tokens and back.

    encode: raw text -> space-separated tokens, as the training data has them. decode: tokens -> plain text.
    """

    encode: Callable[[str], str]
    decode: Callable[[str], str]


def make_text_pipeline(
    tokenizer: str | None = None,
    bpe: str | None = None,
    *,
    source_lang: str = "en",
    target_lang: str = "en",
    bpe_codes: str | None = None,
    sentencepiece_model: str | None = None,
) -> TextPipeline:
    """The pipeline of ``--tokenizer`` (moses, space) and ``--bpe`` (subword_nmt, sentencepiece); None leaves one out.

    source_lang: the language that is encoded; target_lang: the one that is decoded. Raises FairseqError for an unknown
    name and for a file that is missing, not given, or not what it should be.
    """
    words = _tokenizer(tokenizer, source_lang, target_lang)
    subwords = _segmentation(bpe, bpe_codes, sentencepiece_model)
    return TextPipeline(
        encode=lambda text: subwords.encode(words.encode(text)),
        decode=lambda tokens: words.decode(subwords.decode(tokens)),
    )


def _tokenizer(name: str | None, source_lang: str, target_lang: str) -> TextPipeline:
    if name is None:
        return TextPipeline(encode=lambda text: text, decode=lambda text: text)
    if name == "space":
        return TextPipeline(encode=lambda text: " ".join(text.split()), decode=lambda text: text)
    if name == "moses":
        from sacremoses import MosesDetokenizer, MosesTokenizer

        moses, back = MosesTokenizer(lang=source_lang), MosesDetokenizer(lang=target_lang)
        return TextPipeline(
            encode=lambda text: moses.tokenize(text, aggressive_dash_splits=False, return_str=True, escape=True),
            decode=lambda text: back.detokenize(text.split()),
        )
    raise FairseqError(f"--tokenizer {name}: choose from moses, space")


def _segmentation(name: str | None, bpe_codes: str | None, sentencepiece_model: str | None) -> TextPipeline:
    if name is None:
        return TextPipeline(encode=lambda text: text, decode=lambda text: text)
    if name == "subword_nmt":
        encode = _subword_nmt(bpe_codes)
    elif name == "sentencepiece":
        encode = _sentencepiece(sentencepiece_model)
    else:
        raise FairseqError(f"--bpe {name}: choose from subword_nmt, sentencepiece")
    return TextPipeline(encode=encode, decode=lambda tokens: post_process(tokens, name))


def _subword_nmt(path: str | None) -> Callable[[str], str]:
    if path is None:
        raise FairseqError("--bpe subword_nmt needs --bpe-codes FILE, the merges the training data was segmented with")
    from subword_nmt.apply_bpe import BPE

    complaint = io.StringIO()
    try:
        # subword-nmt prints what it dislikes and exits
        with open(path, encoding="utf-8") as codes, contextlib.redirect_stderr(complaint):
            return BPE(codes, separator=SUBWORD_NMT_SEPARATOR).process_line
    except OSError as error:
        raise FairseqError(f"--bpe-codes {path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FairseqError(f"--bpe-codes {path}: not UTF-8 text; give the merges that subword-nmt learned") from error
    except (SystemExit, ValueError, IndexError) as error:
        detail = complaint.getvalue().partition("\n")[0] or str(error)
        raise FairseqError(f"--bpe-codes {path}: not a file of subword-nmt merges: {detail}") from error


def _sentencepiece(path: str | None) -> Callable[[str], str]:
    if path is None:
        raise FairseqError("--bpe sentencepiece needs --sentencepiece-model FILE")
    from sentencepiece import SentencePieceProcessor

    try:
        with open(path, "rb") as model:
            processor = SentencePieceProcessor(model_proto=model.read())
    except OSError as error:
        raise FairseqError(f"--sentencepiece-model {path}: cannot read: {error.strerror}") from error
    except RuntimeError as error:
        raise FairseqError(f"--sentencepiece-model {path}: not a SentencePiece model") from error
    return lambda text: " ".join(processor.encode(text, out_type=str))
