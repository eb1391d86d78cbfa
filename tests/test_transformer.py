"""The model against a float64 reference, its own properties, and the original implementation's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.modules.attention import MultiheadAttention
from fairseq.modules.positional_embedding import make_positions, sinusoidal_table
from fairseq.utils.symbols import PAD


def tiny(**settings) -> Transformer:
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 4, "encoder_layers": 2}
    shape |= {"decoder_layers": 2, "decoder_attention_heads": 4, "dropout": 0.0}
    torch.manual_seed(settings.pop("seed", 1))
    return Transformer(TransformerConfig(**(shape | settings)), 20, 20).eval()


def some_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(4, 20, (3, 7), generator=generator)
    src[1, :3] = PAD
    prev = torch.randint(4, 20, (3, 5), generator=generator)
    prev[:, 0] = 2
    return src, src.ne(PAD).sum(1), prev


def reference_attention(attention: MultiheadAttention, query: Tensor, memory: Tensor, allowed: Tensor) -> Tensor:
    """Loops over batch, head and position in float64."""
    weights = {name: parameter.double() for name, parameter in attention.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    q, k, v = linear("q_proj", query.double()), linear("k_proj", memory.double()), linear("v_proj", memory.double())
    size = q.size(-1) // attention.num_heads
    out = torch.zeros_like(q)
    for b in range(q.size(0)):
        for h in range(attention.num_heads):
            part = slice(h * size, (h + 1) * size)
            for t in range(q.size(1)):
                seen = [m for m in range(k.size(1)) if allowed[b, t, m]]
                scores = torch.stack([q[b, t, part] @ k[b, m, part] / math.sqrt(size) for m in seen])
                out[b, t, part] = sum(p * v[b, m, part] for p, m in zip(scores.softmax(0), seen, strict=True))
    return linear("out_proj", out)


def test_attention_equals_float64_loops():
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 4, kdim=12).eval()
    query, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 12)
    allowed = torch.rand(2, 3, 5) > 0.4
    allowed[..., 0] = True
    expected = reference_attention(attention, query, memory, allowed)
    torch.testing.assert_close(attention(query, memory, mask=allowed[:, None]).double(), expected, atol=1e-6, rtol=1e-5)


def test_positions_ignore_left_padding():
    tokens = torch.tensor([[1, 1, 7, 8, 2], [5, 6, 7, 8, 2], [5, 6, 2, 1, 1]])
    assert make_positions(tokens, 1).tolist() == [[1, 1, 2, 3, 4], [2, 3, 4, 5, 6], [2, 3, 4, 1, 1]]


def test_sinusoidal_table_by_hand():
    table = sinusoidal_table(10, 6, padding_idx=1)
    assert table[1].abs().max() == 0
    expected = [
        math.sin(5),
        math.sin(5 / 100),
        math.sin(5 / 10000),
        math.cos(5),
        math.cos(5 / 100),
        math.cos(5 / 10000),
    ]
    np.testing.assert_allclose(table[5].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
        {"init_type": "adaptive"},
        {"share_all_embeddings": True, "encoder_learned_pos": True, "decoder_learned_pos": True},
        {"share_decoder_input_output_embed": True, "layernorm_embedding": True, "no_scale_embedding": True},
        {"no_token_positional_embeddings": True, "activation_fn": "gelu"},
        {"decoder_embed_dim": 8, "decoder_ffn_embed_dim": 12, "activation_fn": "swish"},
    ],
)
def test_step_by_step_equals_whole(settings):
    """Incremental decoding with a cache gives the logits of one forward pass, for every architecture flag."""
    model = tiny(**settings)
    src, lengths, prev = some_batch()
    beam = 2
    prev = prev.repeat_interleave(beam, 0)
    with torch.no_grad():
        whole, _ = model(src.repeat_interleave(beam, 0), lengths, prev)
        cache = model.decoder.new_cache(model.encoder(src))
        for t in range(prev.size(1)):
            features, attn = model.decoder.step(prev[:, t], cache, need_attn=True)
            logits = model.decoder.output_projection(features)
            torch.testing.assert_close(logits, whole[:, t], atol=1e-5, rtol=1e-5)
            assert attn is not None
            torch.testing.assert_close(attn.sum(-1), torch.ones(len(prev)))
            assert attn[2:4, :3].abs().max() == 0  # padding of the second sentence


def test_cache_follows_reordered_and_dropped_rows():
    """Rows that change places, in number and in sentence, over more steps than a block of the cache."""
    model = tiny()
    src, _, _ = some_batch()
    generator = torch.Generator().manual_seed(0)
    decoder = model.decoder
    with torch.no_grad():
        cache = decoder.new_cache(model.encoder(src))
        sentences = torch.arange(len(src))
        told = torch.full((len(src), 1), 2)  # the tokens of each row
        for step in range(40):
            features, _ = decoder.step(told[:, -1], cache)
            whole, _ = model(src[sentences.repeat_interleave(len(told) // len(sentences))], None, told)
            torch.testing.assert_close(decoder.output_projection(features), whole[:, -1], atol=1e-5, rtol=1e-5)
            beam, new_beam = len(told) // len(sentences), (1, 3, 2)[step % 3]
            keep = None
            if step in (3, 20):
                keep = [len(sentences) - 1, *range(1, len(sentences) - 1)]  # the first goes, the last takes its place
            kept = torch.arange(len(sentences)) if keep is None else torch.tensor(keep)
            rows = (kept * beam)[:, None] + torch.randint(beam, (len(kept), new_beam), generator=generator)
            sentences, rows = sentences[kept], rows.flatten()
            cache.select(rows, keep)
            told = torch.cat([told[rows], torch.randint(4, 20, (len(rows), 1), generator=generator)], dim=1)


def test_padding_changes_nothing():
    """Neither more padding nor other sentences in the batch change a sentence's logits."""
    model = tiny()
    src, lengths, prev = some_batch()
    with torch.no_grad():
        batch, _ = model(src, lengths, prev)
        alone, _ = model(src[1:2, 3:], lengths[1:2], prev[1:2])
    torch.testing.assert_close(batch[1:2], alone, atol=1e-5, rtol=1e-5)


def test_initialisation_follows_fairseq():
    torch.manual_seed(0)
    cfg = TransformerConfig(encoder_embed_dim=64, encoder_ffn_embed_dim=256, encoder_layers=1, decoder_layers=1)
    model = Transformer(cfg, 1000, 900)
    layer = model.encoder.layers[0]
    bounds = {
        layer.self_attn.q_proj.weight: math.sqrt(6 / 128) / math.sqrt(2),  # Xavier-uniform, gain 1/sqrt(2)
        layer.self_attn.out_proj.weight: math.sqrt(6 / 128),
        layer.feed_forward.fc1.weight: math.sqrt(6 / 320),
    }
    for weight, bound in bounds.items():
        assert 0.98 * bound < weight.abs().max() <= bound
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
    assert model.encoder.embed_tokens.weight[PAD].abs().max() == 0
    assert abs(model.encoder.embed_tokens.weight.std().item() * 8 - 1) < 0.02
    assert abs(model.decoder.output_projection.weight.std().item() * 8 - 1) < 0.02


def test_one_seed_gives_the_same_weights_whatever_the_init_type():
    states = [tiny(init_type=kind).state_dict() for kind in ("default", "adaptive-profiling", "adaptive")]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]) and torch.equal(tensor, states[2][name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_embed_dim": 18}, "--encoder-attention-heads"),
        ({"decoder_layers": 0}, "--decoder-layers 0"),
        ({"share_all_embeddings": True, "decoder_embed_dim": 8}, "--share-all-embeddings"),
        ({"init_type": "adaptive", "encoder_normalize_before": True}, "--encoder-normalize-before"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(FairseqError, match=message):
        tiny(**settings)


def test_tied_embeddings_need_one_dictionary():
    with pytest.raises(FairseqError, match="joined-dictionary"):
        Transformer(TransformerConfig(share_all_embeddings=True), 20, 24)
