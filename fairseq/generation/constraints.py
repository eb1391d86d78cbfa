"""What an output may not be: too short, too long, other than its prefix, with an n-gram twice.

Each rule sets log-probabilities to -inf in place. Shapes: lprobs (sentences, beam, vocab), step counts from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.options import GenerationConfig
from fairseq.utils.symbols import EOS, PAD, UNK

NEVER = float("-inf")


def check_generation_config(cfg: GenerationConfig, vocab: int | None = None) -> None:
    """Raise FairseqError, naming the flag, for values that are out of range or contradict each other.

    vocab: the size of the target dictionary, where it is known.
    """
    wrong = [
        (cfg.beam < 1, f"--beam {cfg.beam}: must be at least 1"),
        (
            vocab is not None and cfg.beam > vocab and not cfg.sampling,
            f"--beam {cfg.beam}: the target dictionary has {vocab} entries; give at most as many, usually 4 to 10",
        ),
        (not 1 <= cfg.nbest <= cfg.beam, f"--nbest {cfg.nbest}: must be between 1 and --beam {cfg.beam}"),
        (cfg.min_len < 0, f"--min-len {cfg.min_len}: must not be negative"),
        (
            cfg.max_len_a == 0 and not cfg.match_source_len and cfg.max_len_b < max(cfg.min_len, 1),
            f"--max-len-b {cfg.max_len_b}: must be at least 1 and at least --min-len {cfg.min_len}",
        ),
        (cfg.max_len_a < 0, f"--max-len-a {cfg.max_len_a}: must not be negative"),
        (cfg.no_repeat_ngram_size < 0, f"--no-repeat-ngram-size {cfg.no_repeat_ngram_size}: must not be negative"),
        (not abs(cfg.lenpen) <= 50, f"--lenpen {cfg.lenpen}: must be between -50 and 50"),
        (not cfg.temperature > 0, f"--temperature {cfg.temperature}: must be above 0"),
        (cfg.sampling_topp > 1, f"--sampling-topp {cfg.sampling_topp}: is a probability, at most 1"),
        (cfg.sampling_topk > 0 and not cfg.sampling, "--sampling-topk needs --sampling"),
        (cfg.sampling_topp > 0 and not cfg.sampling, "--sampling-topp needs --sampling"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise FairseqError(message)


def output_lengths(cfg: GenerationConfig, src_lengths: list[int], limit: int) -> tuple[list[int], list[int]]:
    """The shortest and the longest output of each sentence in tokens, ``</s>`` not counted.

    src_lengths: real source tokens, ``</s>`` counted. limit: the most that the models can produce. A sentence's own
    length counts, not that of its padded batch, so that the result does not depend on the batch.
    """
    if cfg.match_source_len:
        longest = [min(length - 1, limit) for length in src_lengths]
        return longest, longest
    longest = [max(0, min(int(cfg.max_len_a * length + cfg.max_len_b), limit)) for length in src_lengths]
    return [min(cfg.min_len, most) for most in longest], longest


def block_repeated_ngrams(lprobs: Tensor, tokens: Tensor, n: int) -> None:
    """Forbid the tokens that would complete an n-gram which is there already.

    tokens: (sentences * beam, 1 + step), from the initial ``</s>`` on.
    """
    tokens = tokens[:, 1:]
    if tokens.size(1) < n:
        return
    windows = tokens.unfold(1, n, 1)  # (rows, step - n + 1, n)
    context = tokens[:, None, tokens.size(1) - n + 1 :]
    repeats = windows[:, :, :-1].eq(context).all(dim=2)
    penalty = torch.zeros_like(repeats, dtype=lprobs.dtype).masked_fill_(repeats, NEVER)
    lprobs.view(tokens.size(0), -1).scatter_add_(1, windows[:, :, -1], penalty)


def constrain(
    lprobs: Tensor,
    tokens: Tensor,
    cfg: GenerationConfig,
    too_short: Tensor | None,
    forced: Tensor | None,
    unit: float = 1.0,
) -> None:
    """Apply every rule to ``lprobs``, in place.

    tokens: (sentences * beam, 1 + step), so far. too_short: bool (sentences,), True where ``</s>`` may not come yet,
    None when it may everywhere. forced: int64 (sentences,), the only token allowed next, PAD for any; None when nothing
    is forced. A forced token wins over the other rules, as in fairseq. unit: what 1 of ``--unkpen`` is in ``lprobs``.
    """
    lprobs[:, :, PAD] = NEVER
    if cfg.unkpen:
        lprobs[:, :, UNK] -= cfg.unkpen * unit
    if forced is not None:
        index = forced[:, None, None].expand(-1, lprobs.size(1), 1)
        forced_lprobs = lprobs.gather(2, index)
    if cfg.no_repeat_ngram_size > 0:
        block_repeated_ngrams(lprobs, tokens, cfg.no_repeat_ngram_size)
    if too_short is not None:
        lprobs[:, :, EOS].masked_fill_(too_short[:, None], NEVER)
    if forced is not None:
        anything = forced.eq(PAD)[:, None, None]
        forced_lprobs = torch.where(anything, NEVER, forced_lprobs)  # for PAD itself
        lprobs.masked_fill_(~anything, NEVER).scatter_(2, index, forced_lprobs)
