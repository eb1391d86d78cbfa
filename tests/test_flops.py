"""Model FLOPs against torch's own count of a forward pass, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.training import run
from fairseq.training.flops import forward_flops, peak_flops, training_flops
from tests.training_runs import train

SHAPE = {"encoder_layers": 3, "decoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24}
SHAPE |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "decoder_embed_dim": 32}
SHAPE |= {"decoder_ffn_embed_dim": 40}


def test_as_torch_counts_them():
    cfg = TransformerConfig(**SHAPE)
    model = Transformer(cfg, 30, 50).eval()
    src, tgt = torch.randint(4, 30, (5, 7)), torch.randint(4, 50, (5, 9))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(src, None, tgt)
    assert forward_flops(cfg, 50, 5, src.numel(), tgt.numel()) == counter.get_total_flops()


def test_by_hand():
    cfg = TransformerConfig(encoder_layers=1, decoder_layers=1, encoder_embed_dim=2, encoder_ffn_embed_dim=3)
    # one sentence, one token a side: projections 4 * 2 * 2, feed-forward 2 * 2 * 3, attention 2 * 2, vocabulary 2 * 10
    encoder, decoder = 16 + 12 + 4, 2 * (16 + 4) + 12
    assert forward_flops(cfg, 10, 1, 1, 1) == 2 * (encoder + decoder + 20)
    assert training_flops(cfg, 10, 1, 1, 1) == 6 * (encoder + decoder + 20)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_of_known_devices(name, peak):
    assert peak_flops(name) == peak


def test_log_lines_of_a_known_device(toy_databin, tmp_path, monkeypatch):
    plain = train(toy_databin, tmp_path / "unknown", "--max-update", 2, "--log-memory")
    assert all(0.05 < line["mem_gb"] < 100 and "mfu" not in line for line in plain if "update" in line)
    monkeypatch.setattr(run, "device_peak_flops", lambda device: 1e9)
    lines = train(toy_databin, tmp_path / "known", "--max-update", 2)
    shown = [line for line in lines if "update" in line]
    assert len(shown) == 2
    cfg = TransformerConfig(
        encoder_layers=1, decoder_layers=1, encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=2
    )
    for line in shown:
        flops = training_flops(cfg, 32, line["bsz"], line["wpb"], line["wpb"])  # source and target are of one length
        assert line["tflops"] * 1e12 / line["wps"] == pytest.approx(flops / line["wpb"], rel=1e-3)
        assert line["mfu"] == pytest.approx(100 * 1e12 * line["tflops"] / 1e9, rel=0.05)
        assert "mem_gb" not in line
