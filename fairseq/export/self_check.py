"""Whether an exported model computes what the original does, before anyone relies on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.generation.constraints import EOS, PAD
from fairseq.models.transformer import Transformer

ROWS, LONGEST = 8, 24  # of the random batch
TOLERANCE = 1e-4  # of a logit, or of the largest one where that is above 1


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
def check_agreement(original: Transformer, exported: Transformer) -> Agreement:
    """Run both, in eval mode and of one type, on random sentences; padding is not compared.

    Raises FairseqError when logits differ by more than TOLERANCE or are not finite.
    """
    src, prev = random_batch(original)
    real = prev.ne(PAD)
    a, b = (model(src, None, prev)[0][real] for model in (original, exported))  # each (tokens, vocab)
    agreement = Agreement(
        difference=(a - b).abs().max().item(),
        largest=a.abs().max().item(),
        same=int(a.argmax(-1).eq(b.argmax(-1)).sum()),
        tokens=len(a),
    )
    if not agreement.difference <= TOLERANCE * max(1.0, agreement.largest):  # nan fails
        raise FairseqError(f"the exported model computes something else, nothing is written: {agreement}")
    return agreement


def random_batch(model: Transformer, seed: int = 1) -> tuple[Tensor, Tensor]:
    """src_tokens (ROWS, src_len), padded on the left, and prev_output_tokens (ROWS, tgt_len), padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def padded_right(vocab: int, limit: int) -> Tensor:
        time = min(LONGEST, limit)
        tokens = torch.randint(EOS, vocab, (ROWS, time), generator=generator)
        tokens[:, 0] = EOS
        lengths = torch.randint(1, time + 1, (ROWS, 1), generator=generator)
        lengths[0] = time
        return tokens.masked_fill(torch.arange(time) >= lengths, PAD)

    src = padded_right(model.encoder.embed_tokens.num_embeddings, model.cfg.max_source_positions).flip(1)
    prev = padded_right(model.decoder.embed_tokens.num_embeddings, model.cfg.max_target_positions)
    device = model.encoder.embed_tokens.weight.device
    return src.to(device), prev.to(device)
