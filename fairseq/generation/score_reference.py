"""The model's probability of a given translation: one forward pass, no search (``--score-reference``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fairseq.generation.candidates import average_probabilities
from fairseq.generation.history import Hypothesis
from fairseq.models.transformer import Transformer
from fairseq.modules.attention import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayer
from fairseq.utils.symbols import EOS, PAD


@torch.inference_mode()
def score_reference(
    models: Sequence[Transformer], src_tokens: Tensor, targets: Sequence[Tensor], need_attn: bool = False
) -> list[list[Hypothesis]]:
    """Each reference as its sentence's one hypothesis; its score is the mean log-probability of its tokens.

    src_tokens: (batch, src_len); targets: one (tgt_len,) tensor a sentence, ``</s>`` included. The search's rules
    (lengths, ``--unkpen``, ``--lenpen``, ``--temperature``) play no part.
    """
    width = max(len(target) for target in targets)
    target = torch.full((len(targets), width), PAD)
    for row, tokens in zip(target, targets, strict=True):
        row[: len(tokens)] = tokens
    target = target.to(src_tokens.device)
    prev_output_tokens = torch.cat([torch.full_like(target[:, :1], EOS), target[:, :-1]], dim=1)
    lprobs: list[Tensor] = []
    attention: list[Tensor] = []
    for model in models:
        with _recorded_attention(model, attention) if need_attn else contextlib.nullcontext():
            logits, _ = model(src_tokens, None, prev_output_tokens)
        lprobs.append(torch.stack([_token_lprobs(*row) for row in zip(logits, target, strict=True)]))
    positional = average_probabilities(lprobs).cpu()
    mean_attn = torch.stack(attention).mean(0).cpu() if attention else None
    real = src_tokens.ne(PAD).cpu()
    results = []
    for i, tokens in enumerate(targets):
        scores = positional[i, : len(tokens)].clone()
        attn = None if mean_attn is None else mean_attn[i, : len(tokens)].T[real[i]]
        results.append([Hypothesis(tokens, scores.mean().item(), scores, attn)])
    return results


@contextlib.contextmanager
def _recorded_attention(model: Transformer, attention: list[Tensor]) -> Iterator[None]:
    """Append the last layer's attention over the source, (batch, tgt_len, src_len), of each forward pass."""

    def record(module: nn.Module, args: tuple[Tensor, Tensor], kwargs: dict[str, Tensor | None]) -> None:
        assert isinstance(module, MultiheadAttention)
        query, memory = args
        attention.append(module.attention_weights(query, module.project_kv(memory)[0], kwargs["mask"]))

    encoder_attn = cast(TransformerDecoderLayer, model.decoder.layers[-1]).encoder_attn
    handle = encoder_attn.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _token_lprobs(logits: Tensor, target: Tensor) -> Tensor:
    """logits: (tgt_len, vocab) in any precision, target: (tgt_len,) -> float32 (tgt_len,).

    Of one sentence: float32 logits of a whole batch take too much memory.
    """
    logits = logits.float()
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(dim=1)
