"""How much arithmetic training takes, and what devices could do: model FLOPs utilisation (Chowdhery et al. 2022, B).

Counted are the multiplications and additions of matrix products that the model needs, not what a recomputation or
padding adds to them. The backward pass needs twice the forward pass's.
"""

from __future__ import annotations

import re

import torch

from fairseq.models.config import TransformerConfig

# Dense float16 with float32 accumulation, and bfloat16 where there is that, in FLOP/s, from NVIDIA's data sheets
PEAK_FLOPS: tuple[tuple[str, float], ...] = (  # the first name that is a word of the device's
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("V100-SXM2", 125e12),
    ("V100-PCIE", 112e12),
    ("T4", 65e12),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU's dense 16-bit matrix products, None where it is not known: of a MIG slice, for one."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)


def forward_flops(cfg: TransformerConfig, vocab: int, sentences: int, src_tokens: int, tgt_tokens: int) -> float:
    """FLOPs of one forward pass over a batch.

    vocab: of the target. src_tokens, tgt_tokens: of all sentences together, which are taken to be of equal lengths.
    Causal attention is counted whole, as is usual.
    """
    assert cfg.decoder_embed_dim is not None and cfg.decoder_ffn_embed_dim is not None
    src, dim, ffn = cfg.encoder_embed_dim, cfg.decoder_embed_dim, cfg.decoder_ffn_embed_dim
    src_len, tgt_len = src_tokens / max(sentences, 1), tgt_tokens / max(sentences, 1)
    # multiply-adds; attention: queries times keys, weights times values
    encoder_layer = src_tokens * (4 * src * src + 2 * src * cfg.encoder_ffn_embed_dim + 2 * src_len * src)
    self_attn = tgt_tokens * (4 * dim * dim + 2 * tgt_len * dim)
    encoder_attn = tgt_tokens * (2 * dim * dim + 2 * src_len * dim) + src_tokens * 2 * src * dim
    decoder_layer = self_attn + encoder_attn + tgt_tokens * 2 * dim * ffn
    projection = tgt_tokens * dim * vocab
    return 2.0 * (cfg.encoder_layers * encoder_layer + cfg.decoder_layers * decoder_layer + projection)


def training_flops(cfg: TransformerConfig, vocab: int, sentences: int, src_tokens: int, tgt_tokens: int) -> float:
    """FLOPs of a forward and a backward pass; see `forward_flops`."""
    return 3 * forward_flops(cfg, vocab, sentences, src_tokens, tgt_tokens)


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_flops` of a device of this machine."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
