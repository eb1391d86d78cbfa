"""Layer dependency: how much of a sub-layer's output comes from each residual branch below it.

Unroll the stream after sub-layer i into what the embedding and every branch j <= i have contributed to it (Liu et al.
2020): ``x_i / std = sum_j beta_{i,j} * a_j / std(a_j)``. Everything on the way from branch j to x_i is
linear but for LayerNorm, ``LN(u) = gain * (u - mean(u)) / std(u) + bias``. We keep std(u) of every position as it was
in the forward pass and let the rest act: with that the contributions are linear in the branches and their sum is x_i to
the last digit; what would change if a branch changed std(u) itself is left out. LayerNorm's bias is a contribution of
its own, zero at the start.

The rules are not taken apart one by one. A residual rule is run again, once on all contributions with a branch that
returns zero, once on a zero stream with the branch's output, its LayerNorm fixed as above: so any rule that is affine
in stream and branch can be measured, one of your own too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.clinic.subjects import stream_of, sublayers
from fairseq.errors import FairseqError
from fairseq.models.transformer import Transformer
from fairseq.utils.symbols import PAD

Stream = Any  # a tensor, or a tuple of tensors between the sub-layers of a B2T layer


@dataclass
class StackDependency:
    """beta2: a row a sub-layer; row i has i + 1 shares, beta_{i,j}^2 of the embedding (j = 0) and of the branches up to
    its own (j = i). bias: the share of the LayerNorms' biases in each row. A row and its bias sum to 1.

    spread: for each row, sum_j |contribution j|^2 / |x_i|^2 before that normalisation: 1 if contributions are
    uncorrelated, as the theory assumes, below 1 if they reinforce each other.
    """

    beta2: list[list[float]]
    bias: list[float]
    spread: list[float]


@torch.no_grad()
def layer_dependency(model: Transformer, inputs: Mapping[str, Any]) -> dict[str, StackDependency]:
    """The dependency of ``encoder`` and ``decoder`` of a model in eval mode; float64 is advised.

    inputs: src_tokens (batch, src_len), prev_output_tokens (batch, tgt_len); padding does not count. beta_{i,j}^2 is
    the mean square over real positions of contribution j to x_i, centred and divided by std(x_i) of each position.
    Raises FairseqError for a residual rule that is not affine in stream and branch.
    """
    src_real, tgt_real = (inputs[name].ne(PAD) for name in ("src_tokens", "prev_output_tokens"))
    encoder, decoder = _Unrolling(model.encoder, src_real), _Unrolling(model.decoder, tgt_real)
    try:
        model.decoder(inputs["prev_output_tokens"], model.encoder(inputs["src_tokens"]))
    finally:
        encoder.remove()
        decoder.remove()
    return {"encoder": encoder.result, "decoder": decoder.result}


class _Unrolling:
    """Hooks on one stack that follow the contributions through a forward pass."""

    def __init__(self, stack: nn.Module, real: Tensor) -> None:
        """real: bool (batch, time), False on padding."""
        self.result = StackDependency([], [], [])
        self._real = real
        self._parts: Stream = None  # contributions: (parts, batch, time, dim): the bias, then j = 0, 1, ...
        self._branch: Tensor | None = None  # output of the running sub-layer
        self._std: dict[nn.Module, Tensor] = {}  # of every position of a LayerNorm's input
        self._mode = ""  # LayerNorms note that std, or are "linear" or "affine" (with their bias) with it fixed
        self._handles = []
        for _, _, residual in sublayers(stack):
            self._handles.append(residual.register_forward_pre_hook(self._before))
            self._handles.append(residual.register_forward_hook(self._after))
            for norm in residual.modules():
                if isinstance(norm, nn.LayerNorm):
                    self._handles.append(norm.register_forward_hook(self._normalize))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, residual: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, sublayer = args
        if self._parts is None:  # the first sub-layer: all of the stream is the embedding, nothing is bias
            self._parts = torch.stack([torch.zeros_like(x), x])

        def remembered(q: Tensor) -> Tensor:
            self._branch = sublayer(q)
            return self._branch

        return x, remembered

    def _normalize(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Note the std of a LayerNorm's input; where it is fixed, put the linear map in LayerNorm's place."""
        assert isinstance(norm, nn.LayerNorm)
        (u,) = args
        centred = u - u.mean(-1, keepdim=True)
        if not self._mode:
            self._std[norm] = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
            return output
        scaled = centred / self._std[norm]
        if norm.weight is not None:
            scaled = norm.weight * scaled
        return scaled + norm.bias if self._mode == "affine" and norm.bias is not None else scaled

    def _after(self, residual: nn.Module, args: tuple[Any, ...], output: Stream) -> None:
        branch, parts = self._branch, self._parts
        assert branch is not None
        try:
            self._mode = "affine"
            bias = residual.forward(_map(lambda t: t[:1], parts), torch.zeros_like)
            self._mode = "linear"
            old = residual.forward(_map(lambda t: t[1:], parts), torch.zeros_like)
            new = residual.forward(_map(lambda t: torch.zeros_like(t[:1]), parts), lambda q: branch[None])
        finally:
            self._mode = ""
        self._parts = _map(lambda *tensors: torch.cat(tensors), bias, old, new)
        self._record(stream_of(self._parts), stream_of(output), type(residual).__name__)

    def _record(self, parts: Tensor, x: Tensor, rule: str) -> None:
        error = float((parts.sum(0) - x)[self._real].abs().max() / x[self._real].abs().max())
        if not error < torch.finfo(x.dtype).eps ** 0.5:
            raise FairseqError(
                f"{rule}: the stream is not the sum of its contributions (off by {error:.1g}); the dependency is "
                "defined for residual rules that are affine in stream and branch"
            )
        parts, x = parts[:, self._real], x[self._real]  # (parts, positions, dim), (positions, dim)
        std = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
        shares = ((parts - parts.mean(-1, keepdim=True)) / std).square().mean((-2, -1))
        total = shares.sum()
        bias, *beta2 = (shares / total).tolist()
        self.result.bias.append(bias)
        self.result.beta2.append(beta2)
        self.result.spread.append(float(total))


def _map(function: Callable[..., Tensor], *streams: Stream) -> Stream:
    """Apply ``function`` to tensors, or to the tensors of tuples one by one."""
    if isinstance(streams[0], Tensor):
        return function(*streams)
    return tuple(function(*tensors) for tensors in zip(*streams, strict=True))


def mean(runs: Sequence[StackDependency]) -> StackDependency:
    """The mean over several models of one shape, or over several batches."""

    def of(lists: Iterable[Sequence[float]]) -> list[float]:
        return [sum(values) / len(runs) for values in zip(*lists, strict=True)]

    rows = zip(*(run.beta2 for run in runs), strict=True)
    return StackDependency([of(row) for row in rows], of(run.bias for run in runs), of(run.spread for run in runs))
