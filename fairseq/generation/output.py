"""Translations as text: the lines that fairseq prints, with scores in base 2.

``S-`` source, ``T-`` target, ``H-`` score and hypothesis, ``D-`` the same detokenised, ``P-`` score of each token,
``A-`` alignment; each starts with the sentence's number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fairseq.data.dictionary import Dictionary, post_process
from fairseq.errors import FairseqError
from fairseq.generation.history import Hypothesis
from fairseq.utils.symbols import EOS, UNK


def hard_alignment(hypothesis: Hypothesis) -> list[tuple[int, int]]:
    """(source, target) positions from 0: the source token that each target token attends to most, ``</s>`` left out.

    The hypothesis must have its attention.
    """
    assert hypothesis.attention is not None
    attention = hypothesis.attention[:-1]  # the source ends in </s>
    if attention.size(0) == 0:
        return []
    best = attention.argmax(dim=0).tolist()
    words = [i for i, token in enumerate(hypothesis.tokens.tolist()) if token != EOS]
    return [(best[i], i) for i in words]


def _alignment(hypothesis: Hypothesis, kind: str) -> list[str]:
    """The words of an A- line. soft: those of every output token, ``</s>`` included, for all the source's."""
    if kind == "soft":
        assert hypothesis.attention is not None
        return [",".join(f"{weight:.6f}" for weight in weights) for weights in hypothesis.attention.T.tolist()]
    return [f"{source}-{target}" for source, target in hard_alignment(hypothesis)]


def load_alignment_dictionary(path: str) -> dict[str, str]:
    """Lines ``source target`` of a file; nothing if ``path`` is empty, which is ``--replace-unk`` without a file.

    Raises FairseqError when it cannot be read or a line has not two words.
    """
    if not path:
        return {}
    pairs: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                words = line.split()
                if len(words) != 2:
                    raise FairseqError(f"--replace-unk {path}, line {number}: not 'source target'")
                pairs[words[0]] = words[1]
    except OSError as error:
        raise FairseqError(f"--replace-unk {path}: cannot read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FairseqError(f"--replace-unk {path}: not UTF-8 text") from error
    return pairs


@dataclass
class TextFormat:
    """How ids become text.

    post_process: subword segmentation to undo everywhere. decode, decode_source: detokenisers for D- and T- lines, and
    for S- lines.
    print_alignment: hard or soft, which A- lines are wanted.
    alignment_dictionary: with it (empty or not), ``<unk>`` becomes what stands there for the source word it attends to,
    or that word itself.
    """

    src_dict: Dictionary
    tgt_dict: Dictionary
    post_process: str | None = None
    decode: Callable[[str], str] = str
    decode_source: Callable[[str], str] = str
    print_alignment: str | None = None
    alignment_dictionary: dict[str, str] | None = None

    def source(self, tokens: Tensor) -> str:
        """The S- line's text."""
        return self.decode_source(self.src_dict.string(tokens, self.post_process))

    def target(self, tokens: Tensor) -> str:
        """The T- line's text; an unknown word is ``<<unk>>``, which no hypothesis has."""
        return self.decode(self.tgt_dict.string(tokens, self.post_process, escape_unk=True))

    def hypothesis(self, hypothesis: Hypothesis, src_words: Sequence[str]) -> str:
        """The H- line's text. src_words: the source's tokens as text, for unknown words."""
        tokens = hypothesis.tokens.tolist()
        if self.alignment_dictionary is None or UNK not in tokens or not src_words:
            return self.tgt_dict.string(tokens, self.post_process)
        words = []
        for source, position in hard_alignment(hypothesis):
            if tokens[position] == UNK:
                words.append(self.alignment_dictionary.get(src_words[source], src_words[source]))
            elif tokens[position] > UNK:
                words.append(self.tgt_dict[tokens[position]])
        return post_process(" ".join(words), self.post_process)

    def words(self, tokens: Tensor) -> list[str]:
        """The source's tokens as text."""
        return [self.src_dict[index] for index in tokens.tolist() if index != EOS]

    def hypothesis_lines(self, sentence: int, hypothesis: Hypothesis, src_words: Sequence[str]) -> list[str]:
        """The H-, D-, P- and, if wanted, A- lines."""
        score, text = in_base_2(hypothesis.score), self.hypothesis(hypothesis, src_words)
        positional = " ".join(f"{value / math.log(2):.4f}" for value in hypothesis.positional_scores.tolist())
        lines = [f"H-{sentence}\t{score}\t{text}", f"D-{sentence}\t{score}\t{self.decode(text)}"]
        lines.append(f"P-{sentence}\t{positional}")
        if self.print_alignment:
            lines.append(f"A-{sentence}\t{' '.join(_alignment(hypothesis, self.print_alignment))}")
        return lines


def in_base_2(score: float) -> float:
    """A natural-log score in base 2, rounded to float32 as fairseq's are."""
    return float(np.float32(score / math.log(2)))
