"""The flags of each command, its parser, and the checks that need more than one flag."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeAlias

from fairseq import __version__
from fairseq.errors import FairseqError
from fairseq.options.clinic import ClinicDepthConfig
from fairseq.options.common import CommonConfig, LogConfig
from fairseq.options.data import DataConfig, SubsetConfig
from fairseq.options.generation import (
    BackendConfig,
    GenerateDataConfig,
    GenerationConfig,
    InteractiveConfig,
    ReferenceConfig,
    ServeConfig,
    TextConfig,
)
from fairseq.options.model import ComponentConfig, ModelPathConfig
from fairseq.options.parser import Parser
from fairseq.options.training import (
    LAST,
    CheckpointConfig,
    DistributedConfig,
    MemoryConfig,
    OptimizationConfig,
    TrainDataConfig,
    TrainLogConfig,
    ValidationConfig,
)
from fairseq.registry import CRITERIONS, LR_SCHEDULERS, OPTIMIZERS, RESIDUAL_RULES, Registry, import_user_dir
from fairseq.utils.flags import add_flags, from_namespace, spellings_of

Sections: TypeAlias = tuple[tuple[type, str], ...]  # dataclasses, each with the title of its group in --help

COMPONENTS: tuple[tuple[str, Registry[Any]], ...] = (
    ("criterion", CRITERIONS),
    ("optimizer", OPTIMIZERS),
    ("lr_scheduler", LR_SCHEDULERS),
    ("init_type", RESIDUAL_RULES),
)

TRAIN_SECTIONS: Sections = (
    (DataConfig, "data and batches"),
    (SubsetConfig, "reading"),
    (TrainDataConfig, "training data"),
    (ValidationConfig, "validation"),
    (ComponentConfig, "model, criterion, optimiser"),
    (OptimizationConfig, "optimisation"),
    (CheckpointConfig, "checkpoints"),
    (DistributedConfig, "several processes"),
    (MemoryConfig, "memory"),
    (CommonConfig, "common"),
    (LogConfig, "progress"),
    (TrainLogConfig, "logs and loss scaling"),
)

GENERATE_SECTIONS: Sections = (
    (DataConfig, "data and batches"),
    (SubsetConfig, "reading"),
    (ModelPathConfig, "model"),
    (BackendConfig, "backend"),
    (GenerateDataConfig, "subset and score"),
    (GenerationConfig, "search"),
    (ReferenceConfig, "references"),
    (TextConfig, "text"),
    (CommonConfig, "common"),
    (LogConfig, "progress"),
)

INTERACTIVE_SECTIONS: Sections = (
    (DataConfig, "data and batches"),
    (ModelPathConfig, "model"),
    (BackendConfig, "backend"),
    (InteractiveConfig, "input"),
    (ServeConfig, "web page"),
    (GenerationConfig, "search"),
    (TextConfig, "text"),
    (CommonConfig, "common"),
)

VALIDATE_SECTIONS: Sections = (
    (DataConfig, "data and batches"),
    (SubsetConfig, "reading"),
    (ModelPathConfig, "model"),
    (ValidationConfig, "validation"),
    (CommonConfig, "common"),
    (LogConfig, "progress"),
)


def make_parser(prog: str, description: str, sections: Sections) -> Parser:
    """A parser with the flags of ``sections``; unknown and abbreviated flags are usage errors (exit 2)."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    parser.elsewhere = _command_of
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for config, title in sections:
        add_flags(parser, config, title)
    return parser


def _command_of(flag: str) -> str:
    """A command that has ``flag``; empty if none has it."""
    for command, sections in (
        ("fairseq-train", TRAIN_SECTIONS),
        ("fairseq-generate", GENERATE_SECTIONS),
        ("fairseq-interactive", INTERACTIVE_SECTIONS),
    ):
        if any(flag in spellings_of(config) for config, _ in sections):
            return command
    if "torch" not in sys.modules:  # the rest would import it, which takes seconds
        return ""
    from fairseq import criterions, optim  # noqa: F401  (they register themselves)
    from fairseq.models.config import TransformerConfig

    parts = [registry.config(name) for _, registry in COMPONENTS for name in registry.names()]
    in_training = any(flag in spellings_of(config) for config in [TransformerConfig, *filter(None, parts)])
    return "fairseq-train" if in_training else ""


def parse_args(
    prog: str,
    description: str,
    sections: Sections,
    argv: list[str] | None,
    check: Callable[[argparse.Namespace], None] = lambda args: None,
) -> argparse.Namespace:
    """Parse a command that has no interchangeable parts. Exits with status 2 on a usage error.

    check: raises FairseqError for flags that contradict each other, which is a usage error.
    """
    _load_user_dir(argv)
    parser = make_parser(prog, description, sections)
    args = parser.parse_args(argv)
    _check_precision(parser, args)
    try:
        check(args)
    except FairseqError as error:
        parser.error(str(error))
    return args


def _before_parsing(argv: list[str] | None, option: str, default: Any = None) -> Any:
    """The value of a flag that the parser depends on. A wrong one is said when the parser is complete."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(option, nargs="?", const=default, default=default, dest="value")
    return first.parse_known_args(argv)[0].value


def _wants_help(argv: list[str] | None) -> bool:
    return any(argument in ("-h", "--help") for argument in (sys.argv[1:] if argv is None else argv))


def _load_user_dir(argv: list[str] | None) -> None:
    import_user_dir(_before_parsing(argv, "--user-dir"))


def check_result_name(parser: argparse.ArgumentParser, name: str) -> None:
    """A usage error when ``--name`` would put a result outside ``--out-dir``, where the report does not look."""
    if Path(name).name != name:
        parser.error(f"--name {name}: a name, not a path; directories are --out-dir's")


def parse_clinic_args(prog: str, description: str, sections: Sections, argv: list[str] | None) -> argparse.Namespace:
    """Parse a command that measures models of an architecture, or checkpoints; see ``parse_args``."""
    from fairseq.models.config import TransformerConfig, resolve_architecture

    _load_user_dir(argv)
    parser = make_parser(prog, description, sections)
    said_otherwise = {"encoder_normalize_before", "decoder_normalize_before"}  # by --models
    if (ClinicDepthConfig, "depth") in sections:
        said_otherwise |= {"encoder_layers", "decoder_layers"}
    shape = add_flags(parser, TransformerConfig, "architecture", suppress_defaults=True, skip=said_otherwise)
    models = _before_parsing(argv, "--models", "")
    wants_help = _wants_help(argv)
    wanted = RESIDUAL_RULES.names() if wants_help else models.split(",")
    shape |= _add_component_flags(parser, RESIDUAL_RULES, wanted, "--models", suppress_defaults=not wants_help)
    args = parser.parse_args(argv)
    given = [name for name in ("models", *sorted(shape)) if getattr(args, name, None) is not None]
    if getattr(args, "path", None) and given:
        parser.error(f"--{given[0].replace('_', '-')} does nothing with --path: checkpoints say what they are")
    check_result_name(parser, args.name or "")
    args.models = args.models or "post-ln,pre-ln,adaptive"
    vars(args).update(resolve_architecture(args.arch, vars(args)))
    return args


def parse_train_args(
    argv: list[str] | None = None,
    prog: str = "fairseq-train",
    description: str = "Train a translation model, or profile one with --init-type adaptive-profiling.",
) -> argparse.Namespace:
    """Parse ``fairseq-train``'s flags; the chosen architecture fills in what the user left open.

    Only the flags of the chosen optimiser, schedule, criterion and init type are accepted; ``--help`` lists them all.
    Exits with status 2 on a usage error; raises FairseqError when ``--user-dir`` fails.
    """
    from fairseq import criterions, optim  # noqa: F401  (they register themselves)
    from fairseq.models.config import TransformerConfig, resolve_architecture

    argv = sys.argv[1:] if argv is None else argv
    _load_user_dir(argv)
    parser = make_parser(prog, description, TRAIN_SECTIONS)
    taken = set(vars(parser.parse_known_args(["-"])[0]))
    add_flags(parser, TransformerConfig, "architecture", suppress_defaults=True, skip=taken)
    wants_help = _wants_help(argv)
    for name, registry in COMPONENTS:
        option = f"--{name.replace('_', '-')}"
        chosen = _before_parsing(argv, option, getattr(ComponentConfig, name))
        # a rule's flags that are not given are left open: the checkpoint that is resumed from may say them
        left_open = registry is RESIDUAL_RULES and not wants_help
        _add_component_flags(parser, registry, registry.names() if wants_help else [chosen], option, left_open)
    args = parser.parse_args(argv)
    if args.min_lr is not None and args.lr_scheduler != "cosine":
        args.stop_min_lr, args.min_lr = args.min_lr, None  # its meaning in fairseq to 0.10
    _check_init_type_flags(parser, args)
    vars(args).update(resolve_architecture(args.arch, vars(args)))
    _check_precision(parser, args)
    _check_contradictions(parser, args)
    return args


def _add_component_flags(
    parser: Parser, registry: Registry[Any], wanted: Collection[str], chooser: str, suppress_defaults: bool = False
) -> set[str]:
    """Add the flags of the parts ``wanted`` of a registry; of the others, ``parser`` tells whose they are.

    chooser: the flag that chooses among the parts. Returns the names added. Raises FairseqError when a part has a flag
    that is there already; parts of one registry may share theirs.
    """
    taken = parser.taken()
    added: set[str] = set()
    for entry in registry.names():
        config = registry.config(entry)
        if config is None:
            continue
        clash = sorted(taken.intersection(spellings_of(config)))
        if clash:
            raise FairseqError(
                f"{registry.kind} '{entry}' has a flag {clash[0]} of its own, which {parser.prog} has already; "
                "give it another name"
            )
        if entry in wanted:
            title = f"{registry.kind} {', '.join(name for name in registry.names() if registry.config(name) is config)}"
            added |= add_flags(parser, config, title, suppress_defaults=suppress_defaults, skip=added)
        else:
            parser.others |= dict.fromkeys(spellings_of(config), f"{chooser} {entry}")
    return added


def _check_init_type_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what would do nothing. args: before the architecture has filled in what was not given."""
    from fairseq.admin.residual import ADMIN, measures_omega  # torch, which preprocess does without

    for given, flag_name in (
        (args.profile_batches != 1, "--profile-batches"),
        (args.profile_deterministic, "--profile-deterministic"),
    ):
        if given and not measures_omega(args.init_type):
            parser.error(f"{flag_name} does nothing with --init-type {args.init_type}; it is for {ADMIN}")


def _check_precision(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    fp16, bf16, cpu = (getattr(args, name, False) for name in ("fp16", "bf16", "cpu"))
    if fp16 and bf16:
        parser.error("--fp16 and --bf16 contradict each other; give one")
    if fp16 and cpu:
        parser.error("--fp16 needs a GPU; on the CPU use --bf16 or float32")


def _check_contradictions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    bleu, largest = args.best_checkpoint_metric == "bleu", args.maximize_best_checkpoint_metric
    finetunes = args.finetune_from_model is not None
    checkpoints = args.checkpoint_activations or args.offload_activations
    for wrong, message in (
        (args.max_tokens is None and args.batch_size is None, "give --max-tokens or --batch-size"),
        (bleu and not args.eval_bleu, "--best-checkpoint-metric bleu needs --eval-bleu"),
        (bleu != largest, "bleu as --best-checkpoint-metric, and only bleu, needs --maximize-best-checkpoint-metric"),
        (args.patience > 0 and args.disable_validation, "--patience needs validation; drop --disable-validation"),
        (finetunes and args.restore_file != LAST, "--finetune-from-model contradicts --restore-file; give one"),
        (
            args.ddp_backend == "fully_sharded" and args.optimizer == "adafactor",
            "--optimizer adafactor needs whole matrices, which --ddp-backend fully_sharded divides; use adam or radam",
        ),
        (
            args.checkpoint_activations_every > 1 and not checkpoints,
            "--checkpoint-activations-every does nothing without --checkpoint-activations",
        ),
    ):
        if wrong:
            parser.error(message)


def section(config: type, args: argparse.Namespace) -> Any:
    """The part of the flat namespace that belongs to dataclass ``config``, as an instance of it."""
    return from_namespace(config, args)
