"""Whether an exported model computes what the original does, before anyone relies on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.generation.score_reference import score_reference
from fairseq.generation.translate import translate_ids, without_padding
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig
from fairseq.utils.symbols import EOS, PAD, UNK

ROWS, LONGEST = 8, 24  # of the random batch
TRANSLATED = 16  # sentences
TOLERANCE = 1e-4  # of a logit, or of the largest one where that is above 1
SEARCH = GenerationConfig(max_len_b=100)  # of the sentences that both translate


@dataclass(frozen=True)
class Agreement:
    """difference: the largest of two logits; largest: the largest logit in magnitude; same: argmax tokens alike."""

    difference: float
    largest: float
    same: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g} (largest logit {self.largest:.3g}), "
            f"{self.same} of {self.tokens} argmax tokens agree"
        )


@torch.no_grad()
def check_agreement(
    original: Transformer, exported: Callable[[Tensor, Tensor], Tensor], tolerance: float = TOLERANCE
) -> Agreement:
    """Run both, in eval mode, on random sentences; padding is not compared.

    exported: src_tokens (batch, src_len), prev_output_tokens (batch, tgt_len) -> logits (batch, tgt_len, vocab).
    Raises FairseqError when logits differ by more than ``tolerance``, relative to the largest if that is above 1, or
    are not finite.
    """
    src, prev = random_batch(original)
    real = prev.ne(PAD)
    a, b = original(src, None, prev)[0][real], exported(src, prev)[real]  # each (tokens, vocab)
    agreement = Agreement(
        difference=(a - b).abs().max().item(),
        largest=a.abs().max().item(),
        same=int(a.argmax(-1).eq(b.argmax(-1)).sum()),
        tokens=len(a),
    )
    if not agreement.difference <= tolerance * max(1.0, agreement.largest):  # nan fails
        raise FairseqError(f"the exported model computes something else, nothing is written: {agreement}")
    return agreement


def check_scores(
    original: Transformer, score: Callable[[list[Tensor], list[Tensor]], list[Tensor]], tolerance: float
) -> str:
    """Compare log-probabilities of the tokens of random sentences, and say how they differ.

    score: sources and targets, (length,) each with ``</s>`` at the end -> log-probabilities (tgt_len,) each, of the
    exported model. Raises FairseqError when the mean difference is above ``tolerance``, relative to the mean
    log-probability where that is above 1, or is not finite.
    """
    src, prev = random_batch(original)
    sources = [without_padding(row) for row in src]
    targets = [torch.cat([without_padding(row)[1:], torch.tensor([EOS])]) for row in prev]
    expected = torch.cat([h.positional_scores for (h,) in score_reference([original], src, targets)])
    difference = (torch.cat(score(sources, targets)) - expected).abs()
    mean, scale = difference.mean().item(), expected.abs().mean().item()
    message = (
        f"log-probabilities of {len(expected)} random tokens, {-scale:.3g} on average, differ by {mean:.2g} on average "
        f"and {difference.max():.2g} at most"
    )
    if not mean <= tolerance * max(1.0, scale):  # nan fails
        raise FairseqError(f"the exported model computes something else, nothing is written: {message}")
    return message


def count_same_translations(
    original: Transformer,
    sentences: Sequence[Tensor],
    translate: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> str:
    """Translate the first of ``sentences`` with SEARCH and with the exported model, and say how many agree.

    sentences: (src_len,) each. translate: the same -> best hypotheses, (tgt_len,) each with ``</s>`` at the end.
    It is for the reader to judge: near ties, and outputs that reach the longest length, may end differently.
    """
    sentences = sentences[:TRANSLATED]
    expected = [translation.hypotheses[0].tokens for translation in translate_ids([original], sentences, SEARCH)]
    same = sum(a.tolist() == b.tolist() for a, b in zip(translate(sentences), expected, strict=True))
    return f"{same} of {len(expected)} translations agree (beam {SEARCH.beam})"


def random_batch(model: Transformer, seed: int = 1) -> tuple[Tensor, Tensor]:
    """src_tokens (ROWS, src_len), padded on the left, and prev_output_tokens (ROWS, tgt_len), padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def padded_right(vocab: int, limit: int) -> Tensor:
        time = min(LONGEST, limit)
        tokens = torch.randint(UNK, vocab, (ROWS, time), generator=generator)
        tokens[:, 0] = EOS
        lengths = torch.randint(1, time + 1, (ROWS, 1), generator=generator)
        lengths[0] = time
        return tokens.masked_fill(torch.arange(time) >= lengths, PAD)

    src = padded_right(model.encoder.embed_tokens.num_embeddings, model.cfg.max_source_positions).flip(1)
    prev = padded_right(model.decoder.embed_tokens.num_embeddings, model.cfg.max_target_positions)
    device = model.encoder.embed_tokens.weight.device
    return src.to(device), prev.to(device)
