"""What decoding keeps from step to step, in buffers that stay in place: for steps recorded once, then repeated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fairseq.modules.decoder_cache import DecoderCache

Allocate = Callable[[str, Sequence[int], Tensor], Tensor]  # a name, a shape, a tensor with dtype and device
NOTHING = -math.inf  # what attention adds to the score of what is not there


class BufferedCache(DecoderCache):
    """`DecoderCache` with room for some sentences, source tokens and tokens, of which another one takes some.

    How many tokens there are is a number on the device. A sentence's place that is not taken attends to zeros.
    """

    def __init__(
        self, like: DecoderCache, shape: tuple[int, int, int], beam: int, step: Tensor, allocate: Allocate
    ) -> None:
        """like: any of the model. shape: sentences, source tokens, tokens. step: int64 (1,), tokens so far, of the
        sentence that has most; not ours to change. allocate: returns memory with anything finite in it.
        """
        places, src_len, room = shape
        keys = like.encoder_kv[0][0]
        heads, head_dim, layers = keys.size(1), keys.size(3), len(like.encoder_kv)
        self._step, self._rows_of_layer, self._beam = step, places * beam, beam
        self._slots = torch.arange(room, device=keys.device)
        self._first_rows = torch.arange(0, 2 * layers * self._rows_of_layer, self._rows_of_layer, device=keys.device)
        # keys and values of all layers together, which one operation moves
        of_tokens = 2 * layers, self._rows_of_layer, heads, room, head_dim
        self._tokens = self._spare = allocate("tokens", of_tokens, keys)
        if beam > 1:
            self._spare = allocate("spare", of_tokens, keys)
        self._source = allocate("source", (2 * layers, places, heads, src_len, head_dim), keys)
        self.encoder_kv = _pairs(self._source)
        self.encoder_bias = like.encoder_bias.new_zeros(places, 1, 1, src_len)
        self.unused: Tensor = step.new_zeros(places)
        self._bias = None

    def move(self, rows: Tensor) -> None:
        """First of each step: row i becomes what row ``rows[i]`` was. With a beam of 1 all stay."""
        if self._beam > 1:
            index = (self._first_rows[:, None] + rows).flatten()
            torch.index_select(self._tokens.flatten(0, 1), 0, index, out=self._spare.flatten(0, 1))
            self._tokens, self._spare = self._spare, self._tokens

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._tokens[2 * layer], self._tokens[2 * layer + 1]
        keys.index_copy_(2, self._step, key.unsqueeze(2))
        values.index_copy_(2, self._step, value.unsqueeze(2))
        return keys, values

    def _self_bias(self, keys: Tensor) -> Tensor:
        empty = (self._slots > self._step) | (self._slots < self.unused[:, None])
        bias = torch.zeros_like(empty, dtype=keys.dtype).masked_fill_(empty, NOTHING)
        return bias.repeat_interleave(self._beam, dim=0)[:, None, None]

    def positions(self, rows: int) -> Tensor:
        return (self._step - self.unused).repeat_interleave(self._beam)

    def end_step(self) -> None:
        self._bias = None

    def load(self, other: DecoderCache) -> None:
        """Become ``other``."""
        # zeros: what is left of another search may be NaN
        for buffer in (self._tokens, self._source, self.encoder_bias, self.unused):
            buffer.zero_()
        size, _, _, src_len = other.encoder_mask.shape
        self.encoder_bias[:size] = NOTHING
        self.encoder_bias[:size, ..., :src_len] = other.encoder_bias
        if other.unused is not None:
            self.unused[:size] = other.unused
        for i, source in enumerate(other.encoder_kv):
            for j, tokens in enumerate(other._move(i, source[0])):
                self._source[2 * i + j, :size, :, :src_len] = source[j]
                self._tokens[2 * i + j, : len(tokens), :, : other.length] = tokens[:, :, : other.length]

    def unload(self, other: DecoderCache, rows: int, length: int) -> None:
        """Give ``other`` the first ``rows``. With a beam above 1 they are in the buffers until it has moved them."""
        kept = self._tokens[:, :rows]
        other.self_kv, other.length = [*_pairs(kept if self._beam > 1 else kept.clone())], length


def _pairs(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values by layer of what alternates between them."""
    return list(zip(x[::2].unbind(), x[1::2].unbind(), strict=True))
