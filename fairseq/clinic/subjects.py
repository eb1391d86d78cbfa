"""What the clinic measures: models as training would start them, and checkpoints; and the batch to run them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq import admin
from fairseq.admin.residual import ADMIN, CLOSED_FORM, PROFILING, measures_omega
from fairseq.checkpoint import (
    build_from_checkpoint,
    check_dictionaries,
    check_languages,
    load_checkpoint,
    starting_omega,
)
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.translation import Batch, TranslationData
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from fairseq.registry import RESIDUAL_RULES
from fairseq.training.transfer import to_device

LABELS = {
    "post-ln": "Post-LN",
    "pre-ln": "Pre-LN",
    ADMIN: "Admin",
    CLOSED_FORM: "Admin, closed form",
    "rezero": "ReZero",
    "rezero_postln": "ReZero + Post-LN",
    "looklinear": "LookLinear",
    "deepnet": "DeepNet",
    "subln": "Sub-LN",
    "b2t": "B2T",
}


def variant_names() -> list[str]:
    """What can be measured by name: post-ln, pre-ln, and every other init type."""
    return ["post-ln", "pre-ln", *(name for name in RESIDUAL_RULES.names() if name not in ("default", PROFILING))]


def variant(cfg: TransformerConfig, name: str) -> TransformerConfig:
    """``cfg`` with the residual rule called ``name``. Raises FairseqError for a name that is none."""
    if name not in variant_names():
        raise FairseqError(f"--models: unknown model '{name}' (choose from {', '.join(variant_names())})")
    before = name == "pre-ln"
    init_type = "default" if name in ("post-ln", "pre-ln") else name
    return replace(cfg, init_type=init_type, encoder_normalize_before=before, decoder_normalize_before=before)


def label_of(cfg: TransformerConfig) -> str:
    """What a model is called in tables and figures."""
    if cfg.init_type != "default":
        return LABELS.get(cfg.init_type, cfg.init_type)
    before = (cfg.encoder_normalize_before, cfg.decoder_normalize_before)
    names = {(False, False): "Post-LN", (True, True): "Pre-LN", (True, False): "Pre-LN encoder"}
    return names.get(before, "Pre-LN decoder")


@dataclass
class Subject:
    """A model under measurement: its settings, and its parameters after training if it comes from a checkpoint."""

    label: str
    cfg: TransformerConfig
    vocabularies: tuple[int, int]  # source, target
    trained: Transformer | None = None
    start: admin.OmegaProfile | None = None  # omega that its training started from

    def fresh(self, seed: int, inputs: Mapping[str, Any]) -> Transformer:
        """The model as training with ``--seed`` would start it, omega profiled on ``inputs`` if it has one."""
        return fresh_model(self.cfg, self.vocabularies, seed, inputs, self.start)


def fresh_model(
    cfg: TransformerConfig,
    vocabularies: tuple[int, int],
    seed: int,
    inputs: Mapping[str, Any],
    start: admin.OmegaProfile | None = None,
) -> Transformer:
    """A model in float64 and eval mode on the device of ``inputs``, initialised as for training.

    start: omega, if the init type starts from a measured one; measured on ``inputs`` if None.
    """
    torch.manual_seed(seed)
    model = Transformer(cfg, *vocabularies).to(inputs["src_tokens"].device)
    if measures_omega(cfg.init_type):
        admin.apply_profile(model, start or admin.profile(model, inputs))
    return model.double().eval()


def named_file(text: str) -> tuple[str, str]:
    """(label, file) of ``LABEL=FILE``, or of a ``FILE``, whose label is empty and whose path may have a = in it."""
    label, equals, file = text.partition("=")
    return (printable(label), file) if equals and not Path(text).exists() else ("", text)


def printable(text: str) -> str:
    """``text``, which may be a file name that is no UTF-8, in a form that figures and terminals can show."""
    return text.encode("utf-8", "backslashreplace").decode()


def split_paths(text: str) -> list[str]:
    """The parts of ``--path``. A colon that no part begins or ends at, as in ``post: lr 1=a.pt``, is part of a label.

    A part ends at a colon when what it names so far, after its label, is a file.
    """
    parts, current = [], ""
    for piece in text.split(":"):
        current = f"{current}:{piece}" if current else piece
        if Path(named_file(current)[1]).exists():
            parts.append(current)
            current = ""
    return parts + ([current] if current or not parts else [])


def load_subject(path: str, data: TranslationData, device: torch.device) -> Subject:
    """A checkpoint, given as ``FILE`` or ``LABEL=FILE``.

    Raises FairseqError when it cannot be read, or was trained with other dictionaries than those of ``data``.
    """
    label, file = named_file(path)
    state = load_checkpoint(file)
    trained = build_from_checkpoint(state, file).to(device).double()
    languages = (data.source_lang, data.src_dict), (data.target_lang, data.tgt_dict)
    check_languages(state["args"], data.source_lang, data.target_lang, file)
    check_dictionaries(trained, file, data.config.data.split(":")[0], *languages)
    sizes = (trained.encoder.embed_tokens.num_embeddings, trained.decoder.embed_tokens.num_embeddings)
    return Subject(label or label_of(trained.cfg), trained.cfg, sizes, trained, starting_omega(state))


def first_batch(
    data: TranslationData,
    max_tokens: int,
    seed: int,
    device: torch.device,
    max_positions: tuple[int, int],
    subset: str = "train",
    required_batch_size_multiple: int = 8,
    upsample_primary: int = 1,
) -> Batch:
    """The first training batch of epoch 1, as training with ``--seed`` and ``--max-tokens`` would see it.

    max_positions: (source, target); longer sentences are left out.
    """
    itr = EpochBatchIterator(
        lambda epoch: data.load(subset, epoch, upsample_primary=upsample_primary),
        max_tokens=max_tokens,
        max_sentences=data.config.batch_size,
        required_batch_size_multiple=required_batch_size_multiple,
        max_positions=max_positions,
        seed=seed,
    )
    return to_device(itr.first_batch(), device)


def sublayers(stack: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(kind, branch, residual rule) of every sub-layer of an encoder or decoder, in order."""
    found = []
    for layer in stack.layers:  # type: ignore[union-attr]
        for kind, branch in (("self_attn", "self_attn"), ("encoder_attn", "encoder_attn"), ("ffn", "feed_forward")):
            if hasattr(layer, branch):
                found.append((kind, getattr(layer, branch), getattr(layer, f"{kind}_residual")))
    return found


def stream_of(x: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The stream in what a residual rule takes or returns: the tensor itself, or the first of several (B2T)."""
    return x if isinstance(x, Tensor) else x[0]
