"""The straightforward beam search that the package's must agree with: whole log-probabilities, whole copies.

Every step extends every cache and every hypothesis by concatenation, applies log_softmax, and sorts all continuations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq.generation.constraints import NEVER, constrain, output_lengths
from fairseq.generation.history import Hypothesis
from fairseq.generation.sampling import sample, sentence_noise
from fairseq.models.transformer import Transformer
from fairseq.options import GenerationConfig
from fairseq.utils.symbols import EOS, PAD


class _Decoder:
    """A model's decoding state. Rows are sentences x beam."""

    def __init__(self, model: Transformer, src_tokens: Tensor) -> None:
        self.model, self.length = model, 0
        encoder_out = model.encoder(src_tokens)
        self.mask = encoder_out.mask
        self.encoder_kv = [layer.encoder_attn.project_kv(encoder_out.x) for layer in model.decoder.layers]
        self.self_kv: list[list[Tensor]] = [[] for _ in self.encoder_kv]

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) -> logits (rows, vocab) and the last layer's attention (rows, src_len)."""
        decoder = self.model.decoder
        x = decoder.embed(tokens[:, None], decoder.embed_positions.at(self.length))
        for i, layer in enumerate(decoder.layers):

            def self_attn(q: Tensor, i: int = i, attn=layer.self_attn) -> Tensor:
                new = attn.project_kv(q)
                old = self.self_kv[i] or [x[:, :, :0] for x in new]
                self.self_kv[i] = [torch.cat(pair, dim=2) for pair in zip(old, new, strict=True)]
                return attn.attend(q, *self.self_kv[i])

            def encoder_attn(q: Tensor, i: int = i, attn=layer.encoder_attn) -> Tensor:
                keys, values = self.encoder_kv[i]
                q = q.view(keys.size(0), -1, q.size(-1))
                self.attention = attn.attention_weights(q, keys, self.mask).flatten(0, 1)
                return attn.attend(q, keys, values, self.mask).view(-1, 1, q.size(-1))

            x = layer.self_attn_residual(x, self_attn)
            x = layer.encoder_attn_residual(x, encoder_attn)
            x = layer.ffn_residual(x, layer.feed_forward)
        self.length += 1
        if decoder.layer_norm is not None:
            x = decoder.layer_norm(x)
        return decoder.output_projection(x).squeeze(1), self.attention

    def select(self, rows: Tensor, sentences: Tensor) -> None:
        self.self_kv = [[x[rows] for x in pair] for pair in self.self_kv]
        self.encoder_kv = [(k[sentences], v[sentences]) for k, v in self.encoder_kv]
        self.mask = self.mask[sentences]


@torch.inference_mode()
def reference_search(
    models: Sequence[Transformer],
    src_tokens: Tensor,
    cfg: GenerationConfig,
    *,
    ids: Sequence[int] | None = None,
    prefix_tokens: Tensor | None = None,
    seed: int = 1,
    need_attn: bool = False,
) -> list[list[Hypothesis]]:
    """As ``fairseq.generation.search.beam_search``."""
    beam, device = cfg.beam, src_tokens.device
    count, real = src_tokens.size(0), src_tokens.ne(PAD)
    limit = min(model.cfg.max_target_positions for model in models) - 1
    bounds = output_lengths(cfg, real.sum(1).tolist(), limit)
    shortest, longest = (torch.tensor(lengths, device=device) for lengths in bounds)
    steps = int(longest.max()) + 1
    noise = None
    if cfg.sampling:
        noise = sentence_noise(seed, range(count) if ids is None else ids, steps, beam).to(device)
    decoders = [_Decoder(model, src_tokens) for model in models]
    tokens = torch.full((count * beam, 1), EOS, device=device)
    scores = torch.zeros(count * beam, 1, device=device)
    if noise is None:
        scores.view(count, beam)[:, 1:] = NEVER
    attention = torch.zeros(count * beam, src_tokens.size(1), 0, device=device)
    results: list[list[Hypothesis]] = [[] for _ in range(count)]
    active = torch.arange(count, device=device)  # sentences
    for step in range(steps):
        found = [decoder.step(tokens[:, -1]) for decoder in decoders]
        lprobs = torch.stack([(x / cfg.temperature).log_softmax(-1, dtype=torch.float32) for x, _ in found])
        lprobs = (lprobs.logsumexp(0) - math.log(len(models))).view(len(active), beam, -1)
        attention = torch.cat([attention, torch.stack([attn for _, attn in found]).mean(0)[:, :, None].float()], dim=2)
        forced = torch.full_like(active, PAD)
        if prefix_tokens is not None and step < prefix_tokens.size(1):
            forced = prefix_tokens[active, step]
        forced = torch.where(longest[active] <= step, EOS, forced)
        constrain(lprobs, tokens, cfg, shortest[active] > step, forced)
        so_far = scores[:, -1].view(-1, beam)
        if noise is None:
            totals, order = (lprobs + so_far[:, :, None]).flatten(1).topk(min(2 * beam, beam * lprobs.size(2)))
            words, beams = order % lprobs.size(2), order // lprobs.size(2)
        else:
            words = sample(lprobs, noise[active, step], cfg.sampling_topk, cfg.sampling_topp)
            totals = so_far + lprobs.gather(2, words[:, :, None]).squeeze(2)
            beams = torch.arange(beam, device=device).expand_as(words)
        going_on: list[tuple[int, list[tuple[int, int, float]]]] = []  # sentence, (row, token, score) of each beam
        for i, sentence in enumerate(active.tolist()):
            others = []
            for rank, (total, word, at) in enumerate(
                zip(*(x[i].tolist() for x in (totals, words, beams)), strict=True)
            ):
                row = i * beam + at
                if not math.isfinite(total):
                    continue
                if word != EOS:
                    others.append((row, word, total))
                elif rank < beam and len(results[sentence]) < beam:
                    sums = torch.cat([scores[row], scores.new_tensor([total])])
                    length = len(sums) - 1
                    results[sentence].append(
                        Hypothesis(
                            torch.cat([tokens[row, 1:], tokens.new_tensor([EOS])]).cpu(),
                            total if cfg.unnormalized else total / length**cfg.lenpen,
                            sums.diff().cpu(),
                            attention[row][real[sentence]].cpu() if need_attn else None,
                        )
                    )
            if others and len(results[sentence]) < beam:
                nothing = (i * beam, PAD, NEVER)
                going_on.append((i, (others + [nothing] * beam)[:beam]))
        if not going_on:
            break
        kept = torch.tensor([i for i, _ in going_on], device=device)
        rows, new_tokens, new_scores = (
            torch.tensor(column, device=device)
            for column in zip(*(row for _, rows in going_on for row in rows), strict=True)
        )
        active = active[kept]
        tokens = torch.cat([tokens[rows], new_tokens[:, None]], dim=1)
        scores = torch.cat([scores[rows], new_scores[:, None]], dim=1)
        attention = attention[rows]
        for decoder in decoders:
            decoder.select(rows, kept)
    return [sorted(hypotheses, key=lambda h: h.score, reverse=True) for hypotheses in results]
