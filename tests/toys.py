"""Small models and data for tests."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDatasetWriter
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import from_fairseq, to_fairseq
from fairseq.models.transformer import Transformer

WORDS = "abcdefghijkl"
VOCAB = 4 + len(WORDS)


def toy_model(seed: int = 1, sharpness: float = 4.0, **settings) -> Transformer:
    """Random, in float64 so that a comparison does not depend on rounding.

    Large positions and a large </s> make outputs of varied tokens and lengths; <s> never comes. sharpness: the larger,
    the less even the probabilities.
    """
    torch.manual_seed(seed)
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 2, "encoder_layers": 2}
    shape |= {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_learned_pos": True}
    model = Transformer(TransformerConfig(**(shape | settings)), VOCAB, VOCAB).double().eval()
    with torch.no_grad():
        assert model.decoder.embed_positions is not None
        model.decoder.embed_positions.weight.mul_(8)
        model.decoder.output_projection.weight.mul_(sharpness)
        model.decoder.output_projection.weight[2].mul_(1.5)
        last_norm = f"decoder.layers.{model.cfg.decoder_layers - 1}.ffn_residual.norm.bias"
        model.get_parameter(last_norm).fill_(0.2)  # what the projection sees sums to 0.2 * 16
        model.decoder.output_projection.weight[0] = -4.0
    return model


def toy_dictionary() -> Dictionary:
    """Single letters, the most frequent first."""
    return Dictionary.build({word: 100 - i for i, word in enumerate(WORDS)}, padding_factor=1)


def toy_sentences(count: int, seed: int = 0) -> list[list[str]]:
    """Random sentences of 1 to 7 letters; some letters are in no dictionary."""
    rng = np.random.default_rng(seed)
    return [rng.choice([*WORDS, "?"], size=rng.integers(1, 8)).tolist() for _ in range(count)]


def write_toy_databin(directory: Path, count: int = 10, only_source: bool = False) -> Path:
    """A data-bin xx-yy with a split ``test``."""
    directory.mkdir(parents=True, exist_ok=True)
    dictionary = toy_dictionary()
    for seed, language in enumerate(["xx"] if only_source else ["xx", "yy"]):
        with IndexedDatasetWriter(directory / f"test.xx-yy.{language}", np.uint16) as writer:
            for words in toy_sentences(count, seed):
                writer.add(dictionary.encode_line(" ".join(words)))
    for language in ("xx", "yy"):
        dictionary.save(directory / f"dict.{language}.txt")
    return directory


def write_toy_checkpoint(model: Transformer, path: Path) -> Path:
    """As fairseq saves it, in float32, for xx-yy."""
    args = Namespace(**model.cfg.flat(), arch="transformer", source_lang="xx", target_lang="yy", task="translation")
    parameters = {name: tensor.float() for name, tensor in to_fairseq(model.state_dict()).items()}
    torch.save({"args": args, "model": parameters, "optimizer_history": [], "extra_state": {}}, path)
    return path


def original_admin_model(data: Mapping[str, np.ndarray]) -> Transformer:
    """The freshly initialised model of the original Admin code in ``admin_3x2_init.npz``, omega all 1."""
    cfg = TransformerConfig(
        encoder_layers=3, decoder_layers=2, encoder_embed_dim=64, encoder_ffn_embed_dim=128, encoder_attention_heads=4,
        decoder_attention_heads=4, share_all_embeddings=True, dropout=0.0, init_type="adaptive",
    )  # fmt: skip
    model = Transformer(cfg, 9712, 9712)
    parameters = {key.removeprefix("param/"): torch.tensor(data[key]) for key in data if key.startswith("param/")}
    model.load_state_dict(from_fairseq(parameters))
    return model
