"""What decoding keeps from step to step: keys and values of each attention.

Those of the encoder's output are kept once a sentence: its hypotheses attend to them as successive positions of one
query. Those of the tokens so far are kept a hypothesis, in room for more tokens than there are yet, so that most steps
only write their own; when hypotheses change places, the copy that moves them also makes room. Caches of different
lengths merge with their ends aligned: a sentence that is behind has unused slots before its first token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq.modules.attention import MultiheadAttention

BLOCK, SMALLEST_ROOM = 8, 16  # tokens; products with fewer than 16 keys leave the fast batched kernel of the CPU
_NOTHING = torch.empty(0)


class DecoderCache:
    """Keys and values of a decoding batch, the hypotheses of a sentence adjacent, as many for every sentence.

    ``length`` is the number of slots in use: of tokens so far, of the sentence that has most. The number of hypotheses
    a sentence is that of the tokens of a step, and ``select`` changes it.
    """

    def __init__(self, encoder_attns: Sequence[MultiheadAttention], encoder_x: Tensor, encoder_mask: Tensor) -> None:
        """encoder_attns: those of the layers. encoder_x: (sentences, src_len, dim); encoder_mask: bool (sentences, 1,
        1, src_len), True on real tokens.
        """
        self.length = 0
        bias = torch.zeros_like(encoder_mask, dtype=encoder_x.dtype).masked_fill_(~encoder_mask, -math.inf)
        self.encoder_mask, self.encoder_bias = encoder_mask, bias
        projected = [attn.project_kv(encoder_x) for attn in encoder_attns]
        self.encoder_kv = [(keys.contiguous(), values.contiguous()) for keys, values in projected]
        # (rows, heads, room, head_dim)
        self.self_kv: list[tuple[Tensor, Tensor] | None] = [None] * len(self.encoder_kv)
        self.unused: Tensor | None = None  # (sentences,): slots before the first token; None: none
        self._rows: Tensor | None = None  # what this step's rows were in the last; None: the same
        self._bias: Tensor | None = None  # (room,) or (rows, 1, 1, room), -inf where there is no token

    def self_attention(self, layer: int, attn: MultiheadAttention, x: Tensor) -> Tensor:
        """x: (rows, dim), what one step's tokens attend with -> same shape. Their keys and values are kept."""
        by_head = x.size(0), attn.num_heads, -1
        keys, values = self._keep(layer, attn.k_proj(x).view(by_head), attn.v_proj(x).view(by_head))
        if self._bias is None:
            self._bias = self._self_bias(keys)
        context = attend(attn.q_proj(x).view(by_head).unsqueeze(2), keys, values, self._bias)
        return attn.out_proj(attn.inner_norm(context.view_as(x)))

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with those of this step's tokens, (rows, heads, head_dim) each."""
        keys, values = self._move(layer, key)
        keys.select(2, self.length).copy_(key)
        values.select(2, self.length).copy_(value)
        self.self_kv[layer] = keys, values
        return keys, values

    def _self_bias(self, keys: Tensor) -> Tensor:
        bias = keys.new_full((keys.size(2),), -math.inf)
        bias[: self.length + 1] = 0
        if self.unused is None:
            return bias
        empty = torch.arange(keys.size(2), device=keys.device) < self.unused[:, None]
        by_sentence = bias.masked_fill(empty, -math.inf)
        return by_sentence.repeat_interleave(keys.size(0) // len(by_sentence), dim=0)[:, None, None]

    def positions(self, rows: int) -> int | Tensor:
        """How many tokens each of a step's rows has so far: where sentences differ, (rows,)."""
        if self.unused is None:
            return self.length
        return (self.length - self.unused).repeat_interleave(rows // len(self.unused))

    def _move(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, each row where it belongs now, with room for one more token.

        like: (rows, heads, head_dim), the size of a token's.
        """
        room = max(SMALLEST_ROOM, -(-(self.length + 1) // BLOCK) * BLOCK)
        old = self.self_kv[layer]
        if old is None:
            rows, heads, head_dim = like.shape
            # zeros: what is there weighs nothing in attention unless it is NaN
            return like.new_zeros(rows, heads, room, head_dim), like.new_zeros(rows, heads, room, head_dim)
        if room > old[0].size(2):
            old = F.pad(old[0], (0, 0, 0, room - old[0].size(2))), F.pad(old[1], (0, 0, 0, room - old[1].size(2)))
        if self._rows is None:
            return old
        return old[0].index_select(0, self._rows), old[1].index_select(0, self._rows)

    def encoder_attention(self, layer: int, attn: MultiheadAttention, x: Tensor) -> Tensor:
        """x: (rows, dim), what one step's tokens attend with -> same shape."""
        keys, values = self.encoder_kv[layer]
        query = attn.q_proj(x).view(keys.size(0), -1, attn.num_heads, keys.size(3)).transpose(1, 2)
        context = attend(query, keys, values, self.encoder_bias)
        return attn.out_proj(attn.inner_norm(context.transpose(1, 2).reshape(x.shape)))

    def encoder_attention_weights(self, layer: int, attn: MultiheadAttention, x: Tensor) -> Tensor:
        """What ``encoder_attention`` attends to, averaged over heads: x: (rows, dim) -> (rows, src_len), float32."""
        keys, _ = self.encoder_kv[layer]
        by_sentence = x.view(keys.size(0), -1, x.size(-1))
        return attn.attention_weights(by_sentence, keys, self.encoder_mask).flatten(0, 1)

    def end_step(self) -> None:
        """Call when all layers have attended."""
        self.length += 1
        self._rows = self._bias = None

    def select(self, rows: Tensor | None, sentences: Sequence[int] | None = None) -> None:
        """Make row i continue what row ``rows[i]`` was (None: all stay); rows of one sentence stay within it.

        rows: int64, a multiple of the sentences. sentences: where some are dropped, what each of the rest was; the
        cheaper, the more are what they were.
        """
        if rows is not None:
            self._rows = rows if self._rows is None else self._rows.index_select(0, rows)
        if sentences is None:
            return
        moved = [i for i, sentence in enumerate(sentences) if sentence != i]
        device = self.encoder_mask.device
        to, source = torch.tensor([moved, [sentences[i] for i in moved]]).to(device, non_blocking=True)

        def keep(x: Tensor) -> Tensor:
            if moved:
                x.index_copy_(0, to, x.index_select(0, source))
            return x[: len(sentences)]

        self.encoder_kv = [(keep(keys), keep(values)) for keys, values in self.encoder_kv]
        self.encoder_mask, self.encoder_bias = keep(self.encoder_mask), keep(self.encoder_bias)
        self.unused = None if self.unused is None else keep(self.unused)

    def clear(self) -> None:
        """Forget the tokens' keys and values, which are elsewhere now."""
        self.self_kv = [None] * len(self.self_kv)
        self._rows = None

    def settle(self) -> None:
        """Move now the rows that ``select`` has named, not in the next step."""
        self.self_kv = [self._move(i, keys) for i, (keys, _) in enumerate(self.encoder_kv)]
        self._rows = None

    @staticmethod
    def merge(caches: Sequence[DecoderCache]) -> DecoderCache:
        """Several caches, of the same layers and number of hypotheses a sentence, as one; sentences in their order.

        Each has attended at least once. They are emptied, lest memory be held twice.
        """
        merged = copy.copy(caches[0])
        merged.length = max(cache.length for cache in caches)
        src_len = max(cache.encoder_mask.size(3) for cache in caches)
        behind = [merged.length - cache.length for cache in caches]
        unused = [
            b + (c.encoder_mask.new_zeros(c.encoder_mask.size(0), dtype=torch.int64) if c.unused is None else c.unused)
            for b, c in zip(behind, caches, strict=True)
        ]
        merged.unused = torch.cat(unused)
        merged.encoder_mask = torch.cat([F.pad(c.encoder_mask, (0, src_len - c.encoder_mask.size(3))) for c in caches])
        merged.encoder_bias = torch.cat(
            [F.pad(c.encoder_bias, (0, src_len - c.encoder_bias.size(3)), value=-math.inf) for c in caches]
        )
        merged.encoder_kv, merged.self_kv = [], []
        for i in range(len(caches[0].encoder_kv)):
            sources = [[F.pad(x, (0, 0, 0, src_len - x.size(2))) for x in cache.encoder_kv[i]] for cache in caches]
            moved = [cache._move(i, cache.encoder_kv[i][0]) for cache in caches]
            tokens = [
                [F.pad(x[:, :, : cache.length], (0, 0, b, 0)) for x in pair]
                for cache, pair, b in zip(caches, moved, behind, strict=True)
            ]
            for cache in caches:
                cache.encoder_kv[i], cache.self_kv[i] = (_NOTHING, _NOTHING), None
            keys, values = zip(*sources, strict=True)
            merged.encoder_kv.append((torch.cat(keys), torch.cat(values)))
            keys, values = zip(*tokens, strict=True)
            merged.self_kv.append((torch.cat(keys), torch.cat(values)))
        merged._rows = merged._bias = None
        return merged


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention of few queries: (batch, heads, time, head_dim) -> same shape.

    key, value: (batch, heads, mem, head_dim). bias: added to the scores, broadcastable to (batch, heads, time, mem).
    """
    if query.device.type != "cpu" or query.dtype not in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(query, key, value, bias.expand(query.size(0), 1, 1, -1))
    batch, heads, time, _ = query.shape
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    # the bias is added apart: baddbmm copies it to every score first, which costs as much as the product
    scores = torch.bmm(query, key.transpose(1, 2)).view(batch, heads, time, -1)
    scores = torch.add(bias, scores, alpha=1 / math.sqrt(query.size(-1))).softmax(-1)
    return torch.bmm(scores.flatten(0, 1), value).view(batch, heads, time, -1)
