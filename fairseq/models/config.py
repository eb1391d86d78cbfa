"""The Transformer's settings and the named presets of them (``--arch``)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass, fields
from typing import Any

import fairseq.admin.residual  # noqa: F401  (it registers the rules, whose flags are settings too)
from fairseq.registry import ARCHITECTURES, RESIDUAL_RULES
from fairseq.utils.flags import default_of, flag, flag_names, from_namespace, others, parse_value

ACTIVATIONS = ("relu", "gelu", "gelu_accurate", "gelu_fast", "tanh", "linear", "swish")


@dataclass
class TransformerConfig:
    """Size and shape of an encoder-decoder Transformer; the defaults are Vaswani et al.'s (2017) base model.

    ``decoder_embed_dim`` and ``decoder_ffn_embed_dim`` follow the encoder's when None.
    """

    encoder_layers: int = flag(6, "encoder layers", least=1)
    encoder_embed_dim: int = flag(512, "encoder model dimension", least=1)
    encoder_ffn_embed_dim: int = flag(2048, "encoder feed-forward dimension", least=1)
    encoder_attention_heads: int = flag(8, "encoder attention heads", least=1)
    encoder_normalize_before: bool = flag(False, "Pre-LN encoder")
    encoder_learned_pos: bool = flag(False, "learned encoder positions instead of sinusoidal ones")
    decoder_layers: int = flag(6, "decoder layers", least=1)
    decoder_embed_dim: int | None = flag(
        None, "decoder model dimension (default: the preset's, else the encoder's)", least=1
    )
    decoder_ffn_embed_dim: int | None = flag(
        None, "decoder feed-forward dimension (default: the preset's, else the encoder's)", least=1
    )
    decoder_attention_heads: int = flag(8, "decoder attention heads", least=1)
    decoder_normalize_before: bool = flag(False, "Pre-LN decoder")
    decoder_learned_pos: bool = flag(False, "learned decoder positions instead of sinusoidal ones")
    dropout: float = flag(0.1, "dropout after embeddings and before each residual sum", least=0, below=1)
    attention_dropout: float = flag(0.0, "dropout of attention weights", least=0, below=1)
    activation_dropout: float = flag(
        0.0, "dropout inside the feed-forward sub-layer", "--relu-dropout", least=0, below=1
    )
    activation_fn: str = flag("relu", "feed-forward activation", choices=ACTIVATIONS)
    share_all_embeddings: bool = flag(False, "one matrix for encoder input, decoder input and output")
    share_decoder_input_output_embed: bool = flag(False, "one matrix for decoder input and output")
    no_token_positional_embeddings: bool = flag(False, "no positional embeddings")
    layernorm_embedding: bool = flag(False, "LayerNorm after the embeddings")
    no_scale_embedding: bool = flag(False, "do not multiply embeddings by sqrt(dim)")
    init_type: str = "default"
    rule_settings: dict[str, Any] = others(RESIDUAL_RULES.flag_names)  # as given
    max_source_positions: int = 1024
    max_target_positions: int = 1024

    def __post_init__(self) -> None:
        if self.decoder_embed_dim is None:
            self.decoder_embed_dim = self.encoder_embed_dim
        if self.decoder_ffn_embed_dim is None:
            self.decoder_ffn_embed_dim = self.encoder_ffn_embed_dim

    def rule_config(self) -> Any:
        """The init type's own settings, an instance of the dataclass it is registered with; None if it has none.

        Raises FairseqError when the init type is not known.
        """
        config = RESIDUAL_RULES.config(self.init_type)
        return None if config is None else from_namespace(config, self.rule_settings)

    def own_settings(self) -> dict[str, Any]:
        """``rule_config`` as a dict."""
        config = self.rule_config()
        return {} if config is None else asdict(config)

    def flat(self) -> dict[str, Any]:
        """All settings in one dict, as flags and checkpoints have them; ``from_namespace`` reads it back."""
        return {name: value for name, value in asdict(self).items() if name != "rule_settings"} | self.own_settings()


def register_architecture(name: str, **settings: Any) -> None:
    """Add preset ``name``: TransformerConfig fields that differ from the defaults.

    Raises FairseqError when the name is taken, TypeError for a field that TransformerConfig lacks.
    """
    TransformerConfig(**settings)
    ARCHITECTURES.add(name, settings)


def resolve_architecture(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The architecture's settings: what ``given`` names, else preset ``name``'s value, else the default."""
    preset = ARCHITECTURES.get(name)
    defaults = {field.name: default_of(field) for field in fields(TransformerConfig)}
    resolved = asdict(from_namespace(TransformerConfig, defaults | preset | _known(given)))
    del resolved["rule_settings"]  # no architecture has them
    return resolved


def setting_names() -> set[str]:
    """What ``TransformerConfig.flat`` may have."""
    return {field.name for field in fields(TransformerConfig)} - {"rule_settings"} | RESIDUAL_RULES.flag_names()


def left_open(args: Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of the init type's own that no flag gave and a checkpoint has. args: flags; stored: its settings.

    Raises ValueError for a value that the flag would refuse.
    """
    config = RESIDUAL_RULES.config(args.init_type)
    if config is None:
        return {}
    names = [name for name in flag_names(config) if name in stored and name not in args]
    return {name: parse_value(config, name, stored[name]) for name in names}


def _known(given: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(TransformerConfig)}
    return {key: value for key, value in given.items() if key in names}


_BIG = {  # the decoder's sizes too: as in fairseq, they do not follow a flag of the encoder's
    "encoder_embed_dim": 1024,
    "encoder_ffn_embed_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_embed_dim": 1024,
    "decoder_ffn_embed_dim": 4096,
    "decoder_attention_heads": 16,
    "dropout": 0.3,
}
register_architecture("transformer")
register_architecture("transformer_wmt_en_de")
register_architecture(
    "transformer_iwslt_de_en",
    encoder_ffn_embed_dim=1024,
    encoder_attention_heads=4,
    decoder_embed_dim=512,
    decoder_ffn_embed_dim=1024,
    decoder_attention_heads=4,
)
register_architecture("transformer_vaswani_wmt_en_de_big", **_BIG)
register_architecture("transformer_vaswani_wmt_en_fr_big", **_BIG | {"dropout": 0.1})
register_architecture("transformer_wmt_en_de_big", **_BIG | {"attention_dropout": 0.1})
register_architecture(
    "transformer_wmt_en_de_big_t2t",
    **_BIG | {"attention_dropout": 0.1, "activation_dropout": 0.1},
    encoder_normalize_before=True,
    decoder_normalize_before=True,
)
register_architecture(
    "transformer_tiny",
    encoder_layers=4,
    encoder_embed_dim=128,
    encoder_ffn_embed_dim=256,
    encoder_attention_heads=4,
    decoder_layers=4,
    decoder_attention_heads=4,
)
