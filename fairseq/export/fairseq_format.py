"""Checkpoints that plain fairseq, 0.8 to 0.12, reads and translates with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq import admin
from fairseq.admin.fold import FOLDABLE, PLAIN, fold_notes
from fairseq.checkpoint import (
    build_from_checkpoint,
    data_only,
    load_checkpoint,
    save_checkpoint,
    stored_settings,
    without_optimizer,
)
from fairseq.errors import FairseqError
from fairseq.export.plain import refuse_flags
from fairseq.export.self_check import ROWS, check_agreement
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import fused, to_fairseq
from fairseq.options import ExportConfig

# Settings kept besides the model's. How it was trained is left out: fairseq 0.12 checks every setting that it finds.
_KEPT = ("source_lang", "target_lang", "data", "truncate_source", "criterion", "label_smoothing", "sentence_avg")
_DEFAULTS = {"arch": "transformer", "task": "translation", "left_pad_source": True, "left_pad_target": False}
_HUB = {"max_tokens": None, "max_sentences": None}  # without these fairseq 0.10's from_pretrained cannot translate


def export_fairseq(config: ExportConfig) -> list[str]:
    """Write ``config.checkpoint`` with the settings that matter to its use and parameters in float32.

    config.output: a directory, for model.pt, or a file called *.pt. config.fold: as an ordinary Post-LN model. Returns
    lines to print. Raises FairseqError, and leaves no file, when the checkpoint cannot be read or folded, the file
    cannot be written, or what would be read from it does not compute what the original does.
    """
    checkpoint, output, fold = config.checkpoint, config.output, config.fold
    refuse_flags(config, "quantization", "data", "bpe", "bpe_codes", "sentencepiece_model")
    path = Path(output) if Path(output).suffix == ".pt" else Path(output) / "model.pt"
    if path.resolve() == Path(checkpoint).resolve():
        raise FairseqError(f"--output {output}: is the checkpoint itself; name another place")
    state = load_checkpoint(checkpoint)
    model = build_from_checkpoint(state, checkpoint)
    exported = admin.fold(model) if fold else model
    args = _settings(state["args"], exported.cfg)
    parameters = to_fairseq(exported.state_dict(), positions=not exported.cfg.no_token_positional_embeddings)
    if exported.cfg.init_type in PLAIN and not exported.cfg.no_scale_embedding:  # 0.8 would take others for such a one
        parameters = fused(parameters)
    written = build_from_checkpoint({"args": args, "model": parameters}, path)
    agreement = check_agreement(model, lambda src, prev: written(src, None, prev)[0])
    new = without_optimizer(state) | {"args": stored_settings(args), "model": parameters}
    save_checkpoint({name: value for name, value in new.items() if name != "cfg"}, path)
    notes = _notes(model.cfg, exported.cfg, fold)
    return [
        f"wrote {path}: {sum(p.numel() for p in exported.parameters()):,} parameters",
        *(f"note: {note}" for note in notes),
        f"self-check on {ROWS} random sentences: {agreement}",
    ]


def _settings(args: dict[str, Any], cfg: TransformerConfig) -> dict[str, Any]:
    """What the exported file says of the model and its languages. args: the checkpoint's settings."""
    kept = {name: args[name] for name in (*_KEPT, *_DEFAULTS) if args.get(name) is not None}
    return _HUB | _DEFAULTS | data_only(kept) | cfg.flat()


def _notes(before: TransformerConfig, after: TransformerConfig, fold: bool) -> list[str]:
    """What a reader of the file should know. before, after: the settings of the model and of what is exported."""
    is_plain = before.init_type in PLAIN
    if fold:
        what = "there was nothing to fold: it is" if is_plain else f"init type {before.init_type} is folded into"
        return [f"{what} an ordinary Post-LN Transformer", *fold_notes(before, after)]
    if is_plain:
        return []
    advice = "; --fold makes an ordinary Post-LN Transformer of it" if before.init_type in FOLDABLE else ""
    return [f"plain fairseq cannot read init type {before.init_type}{advice}"]
