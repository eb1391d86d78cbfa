"""The omega profile: one number a residual sub-layer, and its text file.

The file has one line a sub-layer, ``index value``: the encoder's in order, then the decoder's, whose index starts at 1
again. ``#`` starts a comment line; ours name the model and the conditions of the profile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairseq.admin.residual import ADMIN, PROFILING, AdminResidual
from fairseq.errors import FairseqError
from fairseq.utils.io import atomic_write, refuse_bom

LARGEST_FILE = 2**24
_FLOAT = torch.finfo(torch.float32)


@dataclass
class OmegaProfile:
    """encoder, decoder: the scalar that fills each sub-layer's omega vector, in order. comments: lines without '#'."""

    encoder: list[float]
    decoder: list[float]
    comments: list[str] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write the file atomically. Values read back bit for bit. Raises FairseqError when it cannot be written."""
        with atomic_write(path) as handle:
            for comment in self.comments:
                handle.write(f"# {comment}\n")
            for stack in (self.encoder, self.decoder):
                for index, value in enumerate(stack, start=1):
                    handle.write(f"{index} {value!r}\n")

    def to_dict(self) -> dict[str, list[float]]:
        """The values alone, for a checkpoint."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @classmethod
    def from_dict(cls, values: Any) -> OmegaProfile | None:
        """``to_dict``'s result as a profile; None for anything else, such as what older checkpoints have."""
        stacks: list[list[float]] = []
        for name in ("encoder", "decoder"):
            stack = values.get(name) if isinstance(values, dict) else None
            if not isinstance(stack, list) or not all(isinstance(v, (int, float)) and abs(v) < 1e300 for v in stack):
                return None
            stacks.append([float(v) for v in stack])
        return cls(stacks[0], stacks[1])

    @classmethod
    def load(cls, path: str | Path) -> OmegaProfile:
        """Read a file, ours or one published with the original code.

        Raises FairseqError naming file and line when it is missing or malformed, an index is out of order, or a value
        is not a positive finite number in float32.
        """
        try:
            with open(path, "rb") as handle:
                data = handle.read(LARGEST_FILE + 1)
            if len(data) > LARGEST_FILE:
                raise FairseqError(f"omega file {path}: more than {LARGEST_FILE:,} bytes; is it an omega file?")
            refuse_bom(data, f"omega file {path}")
            lines = data.decode("utf-8").splitlines()
        except OSError as error:
            raise FairseqError(
                f"omega file {path}: {error.strerror}; make it with --init-type adaptive-profiling"
            ) from error
        except UnicodeDecodeError as error:
            raise FairseqError(f"omega file {path}: not a text file") from error
        comments: list[str] = []
        stacks: list[list[float]] = []
        for number, line in enumerate(lines, start=1):
            if line.startswith("#"):
                comments.append(line[1:].strip())
            elif line.strip():
                index, value = _parse_line(line, f"omega file {path}, line {number}")
                if index == 1:
                    stacks.append([])
                if not stacks or index != len(stacks[-1]) + 1 or len(stacks) > 2:
                    raise FairseqError(
                        f"omega file {path}, line {number}: index {index} is out of order; the encoder's lines run "
                        "from 1, then the decoder's from 1"
                    )
                stacks[-1].append(value)
        if len(stacks) != 2:
            raise FairseqError(f"omega file {path}: {len(stacks)} runs of indices, expected encoder and decoder")
        return cls(stacks[0], stacks[1], comments)


def _parse_line(line: str, where: str) -> tuple[int, float]:
    fields = line.split()
    try:
        index, value = int(fields[0]), float(fields[1])
        if len(fields) != 2:
            raise ValueError
    except (ValueError, IndexError):
        raise FairseqError(f"{where}: '{line[:60]}' is not 'index value'") from None
    if not _FLOAT.tiny <= value <= _FLOAT.max:  # nan too
        raise FairseqError(f"{where}: omega {value} is not a positive finite number in float32")
    return index, value


def admin_residuals(stack: nn.Module) -> list[AdminResidual]:
    """The Admin residuals of an encoder or decoder, in sub-layer order."""
    return [module for module in stack.modules() if isinstance(module, AdminResidual)]


def current_profile(model: nn.Module) -> OmegaProfile | None:
    """The mean of every omega vector of ``model``; None for a model without omega."""
    residuals = [admin_residuals(stack) for stack in (model.encoder, model.decoder)]  # type: ignore[arg-type]
    encoder, decoder = ([float(r.omega.detach().mean()) for r in stack] for stack in residuals)
    return OmegaProfile(encoder, decoder) if encoder and decoder else None


def apply_profile(model: nn.Module, profile: OmegaProfile, path: str | Path | None = None) -> None:
    """Fill every omega vector of ``model`` (a Transformer of init type adaptive) with its profile value.

    path: the profile's file, for messages. Raises FairseqError when the numbers of sub-layers differ; the model is then
    untouched.
    """
    name = "the omega profile" if path is None else f"omega file {path}"
    stacks = [("encoder", model.encoder, profile.encoder), ("decoder", model.decoder, profile.decoder)]
    for side, stack, values in stacks:
        found = len(admin_residuals(stack))  # type: ignore[arg-type]
        if found != len(values):
            raise FairseqError(
                f"{name} has {len(values)} {side} sub-layers and the model {found}; "
                "profile this architecture with --init-type adaptive-profiling or name another --omega-file"
            )
    for _, stack, values in stacks:
        for residual, value in zip(admin_residuals(stack), values, strict=True):  # type: ignore[arg-type]
            with torch.no_grad():
                residual.omega.fill_(value)


_MODEL = [f"{stack}_{name}" for stack in ("encoder", "decoder") for name in ("layers", "embed_dim", "ffn_embed_dim")]
_MODEL += ["encoder_attention_heads", "decoder_attention_heads", "activation_fn", "init_type"]
_DROPOUT = ["dropout", "attention_dropout", "activation_dropout"]


def _settings(cfg: Any) -> dict[str, str]:
    """What a profile depends on, by name; the rule's own settings too."""
    own = {name: "".join(str(value).split()) for name, value in sorted(cfg.own_settings().items())}
    values = {name: str(getattr(cfg, name)) for name in (*_MODEL, *_DROPOUT)} | own
    return values | {"init_type": ADMIN} if cfg.init_type == PROFILING else values  # one rule, two names


def describe(cfg: Any, conditions: str, deterministic: bool = False) -> list[str]:
    """Comment lines naming the model (a TransformerConfig) and the conditions of a profile, dropout if it was on."""
    settings = {name: value for name, value in _settings(cfg).items() if name not in _DROPOUT or not deterministic}
    model = "model: " + " ".join(f"{name}={value}" for name, value in settings.items())
    return [model, f"profiled with: {conditions}{' dropout=off' if deterministic else ''}"]


def check_comments(profile: OmegaProfile, cfg: Any, path: str | Path) -> None:
    """Raise FairseqError when the comments of a profile name another model than ``cfg`` (a TransformerConfig).

    Profiles without comments pass; ``apply_profile`` still compares the numbers of sub-layers.
    """
    own = _settings(cfg)
    for comment in profile.comments:
        if not comment.startswith("model:"):
            continue
        for setting in comment.removeprefix("model:").split():
            name, _, value = setting.partition("=")
            if name in own and value != own[name]:
                raise FairseqError(
                    f"omega file {path} was profiled with {name}={value}, this model has {own[name]}; "
                    "profile it with --init-type adaptive-profiling or name another --omega-file"
                )
