"""Checkpoints of fairseq 0.8 to 0.12, of the original Admin code and ours -> models.

The file is a dict with ``args`` (a Namespace) or ``cfg`` (nested dicts), ``model`` (parameters), and what training
needs to resume. A checkpoint is complete: omega is among the parameters, so loading needs no omega file.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fairseq.admin.fold import PLAIN
from fairseq.admin.omega import OmegaProfile
from fairseq.admin.residual import ADMIN, CLOSED_FORM, PROFILING
from fairseq.data.dictionary import Dictionary
from fairseq.errors import MORE_MEMORY, FairseqError, out_of_memory_ends
from fairseq.models.config import TransformerConfig
from fairseq.models.state_dict import from_fairseq
from fairseq.models.transformer import Transformer
from fairseq.utils import safe_pickle
from fairseq.utils.flags import from_namespace
from fairseq.utils.io import atomic_write
from fairseq.utils.symbols import SPECIAL_SYMBOLS

# Settings that fairseq 0.12 refuses to read: unset ones that it has a default of, and parts that it does not have
_REFUSED: dict[str, Any] = {"distributed_world_size": None, "min_lr": None, "total_num_update": None}
_REFUSED |= {"optimizer": "radam", "lr_scheduler": "linear"}
SIZE_RATIO = 4  # decoders may have wider attention to the encoder, and narrower
MOST_POSITIONS = 2**20
# fairseq's settings of other models; some change no parameter's name or shape, so that nothing else would tell
_OTHER_MODELS = (
    *("adaptive_input", "adaptive_softmax_cutoff"),
    *("cross_self_attention", "layer_wise_attention", "no_cross_attention"),
)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's dict, tensors on the CPU, ``args`` as a flat dict of settings, whatever fairseq wrote it.

    Nothing pickled in the file is executed. Raises FairseqError when it is damaged, which its checksums
    tell, or no fairseq checkpoint.
    """
    state = safe_pickle.load(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise FairseqError(f"checkpoint {path}: not a fairseq checkpoint (no parameters under 'model')")
    for name, tensor in state["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FairseqError(f"checkpoint {path}: 'model' holds something that is no named tensor")
    return state | {"args": _settings(state, path)}


def _settings(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    args = state.get("args")
    if isinstance(args, Namespace):
        return {key: safe_pickle.plain(value) for key, value in vars(args).items()}
    cfg = safe_pickle.plain(state.get("cfg"))
    if not isinstance(cfg, dict):
        raise FairseqError(f"checkpoint {path}: no settings ('args' or 'cfg') in it")
    flat: dict[str, Any] = {}
    for group, values in cfg.items():
        if isinstance(values, Namespace):
            values = vars(values)
        if isinstance(values, dict):
            component = values.get("_name")
            if isinstance(component, str):
                flat[group] = component
            flat |= {key: value for key, value in values.items() if key != "_name"}
    model = cfg.get("model")
    model = vars(model) if isinstance(model, Namespace) else model or {}
    # fairseq's model group wins: other groups repeat some of its names with values of their own
    return flat | {key: value for key, value in model.items() if key != "_name"}


def model_config(args: dict[str, Any], parameters: dict[str, Tensor]) -> TransformerConfig:
    """The Transformer's settings as a checkpoint gives them. args: flat settings; parameters: with our names."""
    cfg = from_namespace(TransformerConfig, {k: v for k, v in args.items() if v is not None})
    has_omega = any(name.endswith("_residual.omega") for name in parameters)
    if has_omega and cfg.init_type in ("default", PROFILING):
        cfg.init_type = ADMIN
    elif not has_omega and cfg.init_type in (ADMIN, PROFILING, CLOSED_FORM):
        cfg.init_type = "default"
    return cfg


def require_supported(args: dict[str, Any], path: str | Path) -> None:
    """Raise FairseqError when a checkpoint's settings are those of a model that is not here. args: flat settings."""
    for name in _OTHER_MODELS:
        if args.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise FairseqError(f"checkpoint {path}: trained with {flag}, which is not supported")


class _Undrawn(TorchFunctionMode):
    """Random initial weights are not drawn: what is to be overwritten need not cost most of the time of building."""

    _DRAWING = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_from_checkpoint(
    state: dict[str, Any], path: str | Path, overrides: dict[str, Any] | None = None
) -> Transformer:
    """A model with the parameters of ``load_checkpoint(path)``'s result, in float32 on the CPU, in eval mode."""
    require_supported(state["args"], path)
    try:
        with out_of_memory_ends(f"making the model of checkpoint {path}", MORE_MEMORY):
            parameters = {name: tensor.float() for name, tensor in from_fairseq(state["model"]).items()}
            cfg = model_config(state["args"] | (overrides or {}), parameters)
            src_vocab = parameters["encoder.embed_tokens.weight"].size(0)
            tgt_vocab = parameters["decoder.embed_tokens.weight"].size(0)
            _check_size(cfg, parameters, path)
            with _Undrawn():
                model = Transformer(cfg, src_vocab, tgt_vocab)
    except KeyError as error:
        raise FairseqError(f"checkpoint {path}: no parameter {error}; is it a Transformer for translation?") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, IndexError) as error:
        raise FairseqError(f"checkpoint {path}: its settings make no Transformer: {error}") from error
    load_parameters(model, parameters, path)
    return model.eval()


def _check_size(cfg: TransformerConfig, parameters: dict[str, Tensor], path: str | Path) -> None:
    """Raise FairseqError when the settings ask for a model far larger than the parameters, before it is made."""
    rows = min(parameters[f"{stack}.embed_tokens.weight"].size(0) for stack in ("encoder", "decoder"))
    least = len(SPECIAL_SYMBOLS)
    if rows < least:
        raise FairseqError(f"checkpoint {path}: embeddings of {rows} tokens; every dictionary has {least}")
    size = 0
    for stack in ("encoder", "decoder"):
        layers, dim, ffn_dim = (getattr(cfg, f"{stack}_{name}") for name in ("layers", "embed_dim", "ffn_embed_dim"))
        stored = len({name.split(".")[2] for name in parameters if name.startswith(f"{stack}.layers.")})
        if layers > stored:
            raise FairseqError(f"checkpoint {path}: its settings say {layers} {stack} layers, it has {stored}")
        size += layers * (4 * dim * dim + 2 * dim * ffn_dim) + dim * parameters[f"{stack}.embed_tokens.weight"].size(0)
    positions = max(cfg.max_source_positions, cfg.max_target_positions)
    held = sum(tensor.numel() for tensor in parameters.values())
    if size > SIZE_RATIO * held or positions > MOST_POSITIONS:
        raise FairseqError(
            f"checkpoint {path}: its settings make a model of {size:,} parameters and {positions:,} positions, it has "
            f"{held:,}"
        )


def load_parameters(model: Transformer, parameters: dict[str, Tensor], path: str | Path, otherwise: str = "") -> None:
    """Fill ``model`` with ``parameters`` (our names). Raises FairseqError naming what does not fit.

    otherwise: what else than giving the right flags the user may do about that, to end the message with.
    """
    own = model.state_dict()
    remedy = f"give the flags it was trained with, --init-type included{otherwise}"
    missing, extra = sorted(own.keys() - parameters.keys()), sorted(parameters.keys() - own.keys())
    if missing:
        raise FairseqError(f"checkpoint {path} does not fit the model: it lacks {_some(missing)}; {remedy}")
    if extra:
        raise FairseqError(f"checkpoint {path} does not fit the model, which has no {_some(extra)}; {remedy}")
    for name, tensor in own.items():
        if tensor.shape != parameters[name].shape:
            if name.endswith("embed_tokens.weight") and tensor.size(0) != parameters[name].size(0):
                remedy = "give the data-bin it was trained on, which has another dictionary"
            raise FairseqError(
                f"checkpoint {path} does not fit the model: {name} is {tuple(parameters[name].shape)} in the file "
                f"and {tuple(tensor.shape)} in the model; {remedy}"
            )
    first: dict[int, str] = {}  # of the names that share a parameter
    for name, tensor in own.items():
        shared = first.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        one, other = parameters[shared], parameters[name]
        if one.data_ptr() != other.data_ptr() and not torch.equal(one, other):  # one of them would be lost
            raise FairseqError(
                f"checkpoint {path} does not fit the model, which shares {shared} and {name}: they differ in the file; "
                f"{remedy}"
            )
    model.load_state_dict(parameters)


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def load_model(path: str | Path, data_dir: str | Path | None = None, device: str | torch.device = "cpu") -> Transformer:
    """Any supported checkpoint as a model in eval mode on ``device``; dictionary sizes are read from it.

    data_dir: a data-bin whose dictionaries must be of those sizes. Raises FairseqError when it does not fit or the file
    is damaged.
    """
    state = load_checkpoint(path)
    model = build_from_checkpoint(state, path)
    if data_dir is not None:
        languages = [str(state["args"].get(f"{side}_lang")) for side in ("source", "target")]
        files = [Path(data_dir) / f"dict.{language}.txt" for language in languages]
        src, tgt = (Dictionary.load(file) if file.is_file() else None for file in files)
        check_dictionaries(model, path, data_dir, (languages[0], src), (languages[1], tgt))
    return model.to(device)


def check_dictionaries(
    model: Transformer,
    path: str | Path,
    data_dir: str | Path,
    src: tuple[str, Dictionary | None],
    tgt: tuple[str, Dictionary | None],
) -> None:
    """Raise FairseqError unless a data-bin's dictionaries are as large as the embeddings of checkpoint ``path``.

    src, tgt: language and dictionary; one that is None is not compared.
    """
    for side, (language, dictionary), stack in (("source", src, model.encoder), ("target", tgt, model.decoder)):
        entries = stack.embed_tokens.num_embeddings
        if dictionary is not None and len(dictionary) != entries:
            raise FairseqError(
                f"checkpoint {path} was trained with a {side} dictionary of {entries} entries, but "
                f"{Path(data_dir) / f'dict.{language}.txt'} has {len(dictionary)}; use the data-bin it was trained on"
            )


def check_languages(args: dict[str, Any], source_lang: str, target_lang: str, path: str | Path) -> None:
    """Raise FairseqError when a checkpoint of settings ``args`` translates the other way round."""
    if source_lang != target_lang and (args.get("source_lang"), args.get("target_lang")) == (target_lang, source_lang):
        raise FairseqError(
            f"checkpoint {path} translates {target_lang}-{source_lang}, not {source_lang}-{target_lang}; "
            "swap --source-lang and --target-lang"
        )


def updates_of(state: dict[str, Any]) -> int:
    """How many updates a checkpoint was trained for; 0 if it does not say."""
    try:
        return int(state["optimizer_history"][-1]["num_updates"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return 0


def starting_omega(state: dict[str, Any]) -> OmegaProfile | None:
    """The omega that a checkpoint's training started from; None if it does not say."""
    extra = state.get("extra_state")
    return OmegaProfile.from_dict(extra.get("omega")) if isinstance(extra, dict) else None


def stored_settings(args: dict[str, Any]) -> Namespace:
    """Settings as a checkpoint keeps them: so that fairseq 0.12 reads those of an ordinary Transformer and no others.

    The parameters of `deepnet`, say, have an ordinary model's names and shapes, and it would translate with them.
    """
    if args.get("init_type", "default") not in PLAIN:
        return Namespace(**args | {"distributed_world_size": None})  # which it refuses
    kept = {key: value for key, value in args.items() if key not in _REFUSED or value != _REFUSED[key]}
    if isinstance(kept.get("eval_bleu_args"), dict):
        kept["eval_bleu_args"] = json.dumps(kept["eval_bleu_args"])
    return Namespace(**kept)


def without_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """The settings and history of a loaded checkpoint, in the form that fairseq wrote them."""
    cfg = data_only(safe_pickle.plain(state.get("cfg")))
    history = data_only(safe_pickle.plain(state.get("optimizer_history")))
    return {
        "args": None if cfg else stored_settings(data_only(state["args"])),
        **({"cfg": cfg} if cfg else {}),
        "optimizer_history": history or [{"optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}],
        "extra_state": data_only(safe_pickle.plain(state.get("extra_state"))) or {"train_iterator": {"epoch": 1}},
        "last_optimizer_state": None,
    }


def data_only(value: Any) -> Any:
    """``value`` without objects of foreign classes, which could not be read again: None in their place."""
    if isinstance(value, dict):
        return {key: data_only(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(data_only(item) for item in value)
    if isinstance(value, Namespace):
        return Namespace(**data_only(vars(value)))
    return value if isinstance(value, (bool, int, float, str, Tensor)) else None


def save_checkpoint(state: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint's dict, at once. Raises FairseqError when it cannot be written."""
    with out_of_memory_ends(f"writing {path}", MORE_MEMORY), atomic_write(path, "wb") as handle:
        torch.save(state, handle)
