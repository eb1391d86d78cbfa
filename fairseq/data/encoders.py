"""Raw text to the tokens a model was trained on, and back: a tokeniser, then a subword segmentation."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq.data.dictionary import MERGING, post_process
from fairseq.errors import FairseqError
from fairseq.utils.io import refuse_bom

SUBWORD_NMT_SEPARATOR = "@@"
LARGEST_MODEL = 2**28  # bytes of a SentencePiece model; those of 256,000 pieces have a few million


@dataclass(frozen=True)
class TextPipeline:
    """Text to tokens and back, and the steps of that, each from text to text.

    tokenize, apply_bpe: of the source. remove_bpe: of either side. detokenize, detokenize_source: of the target's and
    the source's words.
    """

    tokenize: Callable[[str], str]
    apply_bpe: Callable[[str], str]
    remove_bpe: Callable[[str], str]
    detokenize: Callable[[str], str]
    detokenize_source: Callable[[str], str]

    def encode(self, text: str) -> str:
        """Raw source text -> space-separated tokens, as the training data has them."""
        return self.apply_bpe(self.tokenize(text))

    def decode(self, tokens: str) -> str:
        """Target tokens -> plain text."""
        return self.detokenize(self.remove_bpe(tokens))

    def decode_source(self, tokens: str) -> str:
        """Source tokens -> plain text."""
        return self.detokenize_source(self.remove_bpe(tokens))


def make_text_pipeline(
    tokenizer: str | None = None,
    bpe: str | None = None,
    *,
    source_lang: str = "en",
    target_lang: str = "en",
    bpe_codes: str | None = None,
    sentencepiece_model: str | None = None,
    moses_no_dash_splits: bool = False,
    moses_no_escape: bool = False,
) -> TextPipeline:
    """The pipeline of ``--tokenizer`` (moses, space) and ``--bpe`` (subword_nmt, fastbpe, sentencepiece).

    None leaves one out.

    moses_no_dash_splits: leave ``well-known`` whole, which becomes ``well @-@ known`` otherwise, as in fairseq.
    moses_no_escape: leave ``&``, quotes and brackets as they are. Raises FairseqError for an unknown name and for a
    file that is missing, not given, or not what it should be.
    """
    moses = {"aggressive_dash_splits": not moses_no_dash_splits, "escape": not moses_no_escape}
    (tokenize, detokenize_source), (_, detokenize) = (
        _tokenizer(tokenizer, lang, moses) for lang in (source_lang, target_lang)
    )
    return TextPipeline(
        tokenize,
        _segmentation(bpe, bpe_codes, sentencepiece_model),
        lambda tokens: post_process(tokens, bpe),
        detokenize,
        detokenize_source,
    )


def _tokenizer(
    name: str | None, language: str, how: dict[str, bool]
) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Text to words, and back. how: settings of moses."""
    if name is None:
        return str, str
    if name == "space":
        return lambda text: " ".join(text.split()), str
    if name == "moses":
        from sacremoses import MosesDetokenizer, MosesTokenizer

        moses, back = MosesTokenizer(lang=language), MosesDetokenizer(lang=language)
        return (
            lambda text: moses.tokenize(text, return_str=True, **how),
            lambda text: back.detokenize(text.split()),
        )
    raise FairseqError(f"--tokenizer {name}: choose from moses, space")


def _segmentation(name: str | None, bpe_codes: str | None, sentencepiece_model: str | None) -> Callable[[str], str]:
    """Words to subwords."""
    if name is None:
        return str
    if name in MERGING:
        return _merging(name, bpe_codes)
    if name == "sentencepiece":
        return _sentencepiece(sentencepiece_model)
    raise FairseqError(f"--bpe {name}: choose from subword_nmt, fastbpe, sentencepiece")


def _merging(name: str, path: str | None) -> Callable[[str], str]:
    if path is None:
        raise FairseqError(f"--bpe {name} needs --bpe-codes FILE, the merges the training data was segmented with")
    return load_merges(path).process_line


def load_merges(path: str) -> Any:
    """The ``subword_nmt.apply_bpe.BPE`` of a file of merges that subword-nmt or fastBPE learned.

    Raises FairseqError when it is missing or no such file.
    """
    from subword_nmt.apply_bpe import BPE

    complaint = io.StringIO()
    try:
        # subword-nmt prints what it dislikes and exits
        with open(path, encoding="utf-8") as codes, contextlib.redirect_stderr(complaint):
            text = codes.read()
            refuse_bom(text[:1].encode(), f"--bpe-codes {path}")
            if re.match(r"\S+ \S+ \d+\n", text):  # fastBPE's, which ends every line with a count
                text = "#version: 0.2\n" + re.sub(r"^(\S+ \S+) \d+$", r"\1", text, flags=re.MULTILINE)
            bpe = BPE(io.StringIO(text), separator=SUBWORD_NMT_SEPARATOR)
            bpe.process_line("ab")  # a version that it does not know is found out only here
            return bpe
    except OSError as error:
        raise FairseqError(f"--bpe-codes {path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FairseqError(f"--bpe-codes {path}: not UTF-8 text; give the merges that were learned") from error
    except (SystemExit, ValueError, IndexError, NotImplementedError) as error:
        detail = complaint.getvalue().partition("\n")[0] or str(error) or "unknown version"
        raise FairseqError(f"--bpe-codes {path}: not a file of merges: {detail}") from error


def _sentencepiece(path: str | None) -> Callable[[str], str]:
    if path is None:
        raise FairseqError("--bpe sentencepiece needs --sentencepiece-model FILE")
    from sentencepiece import SentencePieceProcessor

    try:
        with open(path, "rb") as model:
            content = model.read(LARGEST_MODEL + 1)
        if len(content) > LARGEST_MODEL:
            raise FairseqError(
                f"--sentencepiece-model {path}: more than {LARGEST_MODEL:,} bytes; is it a SentencePiece model?"
            )
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(content)  # its constructor takes an empty file for none
    except OSError as error:
        raise FairseqError(f"--sentencepiece-model {path}: cannot read: {error.strerror}") from error
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter when it quotes what it dislikes
        raise FairseqError(f"--sentencepiece-model {path}: not a SentencePiece model") from error
    return lambda text: " ".join(processor.encode(text, out_type=str))
