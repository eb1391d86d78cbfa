"""``fairseq-clinic``: the paper's measurements, on models at the start of training and on checkpoints."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fairseq.cli import command
from fairseq.clinic import check, dependency, figures, gradients, omega, report, stability
from fairseq.clinic.results import load_results, save_result
from fairseq.clinic.subjects import Subject, first_batch, label_of, load_subject, named_file, variant
from fairseq.data.translation import Batch, TranslationData
from fairseq.errors import FairseqError
from fairseq.models.config import TransformerConfig
from fairseq.options import (
    ArchConfig,
    ClinicCheckpointConfig,
    ClinicConfig,
    ClinicDataConfig,
    ClinicDepthConfig,
    DataConfig,
    make_parser,
    parse_clinic_args,
    parse_train_args,
    section,
)
from fairseq.training.distributed import choose_device
from fairseq.utils.io import atomic_write

MEASURE = ((ClinicDataConfig, "data"), (ClinicConfig, "what to measure"), (ArchConfig, "model"))
CHECKPOINTS = ((ClinicCheckpointConfig, "checkpoints"),)
DEPTHS = ((ClinicDepthConfig, "depth"),)


def _parse(name: str, sections: tuple[tuple[type, str], ...], argv: list[str]) -> Namespace:
    args = parse_clinic_args(f"fairseq-clinic {name}", COMMANDS[name][1], sections, argv)
    args.name = args.name or name
    args.command = shlex.join(["fairseq-clinic", name, *argv])
    return args


def _open(args: Namespace) -> tuple[TranslationData, torch.device]:
    config = DataConfig(args.data, source_lang=args.source_lang, target_lang=args.target_lang)
    return TranslationData.open(config), choose_device(args.cpu)


def _subjects(args: Namespace, data: TranslationData, cfg: TransformerConfig) -> list[Subject]:
    """The models that --models names, in the shape of ``cfg``."""
    sizes = len(data.src_dict), len(data.tgt_dict)
    variants = [variant(cfg, name) for name in args.models.split(",")]
    return [Subject(label_of(own), own, sizes) for own in variants]


def _batches(
    args: Namespace, data: TranslationData, device: torch.device, configs: Iterable[TransformerConfig]
) -> dict[int, Batch]:
    """A batch a seed, of sentences that are not too long for any model of ``configs``."""
    lengths = [(cfg.max_source_positions, cfg.max_target_positions) for cfg in configs]
    longest = min(source for source, _ in lengths), min(target for _, target in lengths)
    return {seed: first_batch(data, args.max_tokens, seed, device, longest) for seed in args.seeds}


def _dependency(argv: list[str]) -> None:
    args = _parse("dependency", (*MEASURE, *CHECKPOINTS), argv)
    data, device = _open(args)
    if args.path:
        subjects = [load_subject(path, data, device) for path in args.path.split(":")]
    else:
        subjects = _subjects(args, data, section(TransformerConfig, args))
    labels = [subject.label for subject in subjects]
    if len(set(labels)) < len(labels):
        raise FairseqError(f"two of the models are called the same ({', '.join(labels)}); name them: --path NAME=FILE")
    batches = _batches(args, data, device, [subject.cfg for subject in subjects])
    entries = []
    for subject in subjects:
        models = [subject.fresh(seed, batch["net_input"]) for seed, batch in batches.items()]
        entries.append(_dependency_entry(subject, "at the start", models, batches))
        if subject.trained is not None:
            entries.append(_dependency_entry(subject, "trained", [subject.trained] * len(batches), batches))
        last = {stack: entries[-1][stack]["beta2"][-1][-1] for stack in ("encoder", "decoder")}
        print(
            f"{subject.label}, {entries[-1]['stage']}: the last sub-layer takes {last['encoder']:.1%} (encoder) and "
            f"{last['decoder']:.1%} (decoder) from its own branch",
            flush=True,
        )
    for stack in ("encoder", "decoder"):
        own = [{key: entry[key] for key in ("label", "stage", stack)} for entry in entries]
        figure = figures.dependency(own, stack)
        _save(args, "dependency", {"stack": stack, "models": own}, figure, f"{args.name}-{stack}")


def _dependency_entry(subject: Subject, stage: str, models: list[Any], batches: dict[int, Batch]) -> dict[str, Any]:
    """Mean over the seeds: of the models, or, of a trained one, of the batches."""
    runs = [
        dependency.layer_dependency(model, batch["net_input"])
        for model, batch in zip(models, batches.values(), strict=True)
    ]
    means = {stack: asdict(dependency.mean([run[stack] for run in runs])) for stack in ("encoder", "decoder")}
    return {"label": subject.label, "stage": stage, **means}


def _stability(argv: list[str]) -> None:
    args = _parse("stability", (*MEASURE, *DEPTHS), argv)
    if len(set(args.depths)) < 3 or any(depth % 2 for depth in args.depths):
        raise FairseqError("--depths: give at least three even numbers, such as 6,12,24")
    data, device = _open(args)
    cfg = section(TransformerConfig, args)
    batches = _batches(args, data, device, [cfg])
    cfg.decoder_layers = 1  # the encoder is measured; the gradient must come from somewhere
    results = []
    for name in args.models.split(","):
        changes = [_changes(args, data, cfg, name, depth, batches) for depth in args.depths]
        random, step = ([[pair[i] for pair in seeds] for seeds in changes] for i in (0, 1))
        label = label_of(variant(cfg, name))
        results.append({"label": label, **stability.summarize(args.depths, random, step)})
        print(stability.fits_as_text(results[-1]), flush=True)
    figure = figures.stability(results)
    _save(args, "stability", {"noise": stability.NOISE, "step": stability.STEP, "models": results}, figure)


def _changes(
    args: Namespace, data: TranslationData, cfg: TransformerConfig, name: str, depth: int, batches: dict[int, Batch]
) -> list[tuple[float, float]]:
    """(random, gradient step) output changes of one model and depth, an item a seed."""
    cfg.encoder_layers = depth // 2
    (subject,) = _subjects(Namespace(models=name), data, cfg)
    found = []
    for seed, batch in batches.items():
        model = subject.fresh(seed, batch["net_input"])
        output = partial(stability.encoder_output, model, batch["net_input"])
        moved = stability.matrices(model.encoder)
        random = stability.random_change(output, moved, seed)
        found.append((random, stability.gradient_change(model, batch, output, moved)))
    return found


def _gradients(argv: list[str]) -> None:
    args = _parse("gradients", MEASURE, argv)
    data, device = _open(args)
    subjects = _subjects(args, data, section(TransformerConfig, args))
    batches = _batches(args, data, device, [subject.cfg for subject in subjects])
    results = []
    for subject in subjects:
        runs = [
            gradients.gradient_norms(subject.fresh(seed, batch["net_input"]), batch) for seed, batch in batches.items()
        ]
        results.append({"label": subject.label, **gradients.mean(runs)})
        print(gradients.as_text(results[-1]), flush=True)
    _save(args, "gradients", {"models": results}, figures.gradients(results))


def _omega(argv: list[str]) -> None:
    parser = make_parser("fairseq-clinic omega", COMMANDS["omega"][1], ())
    parser.add_argument("paths", nargs="+", metavar="[NAME=]FILE", help="checkpoints or omega files")
    parser.add_argument("--out-dir", default="clinic", metavar="DIR", help="directory of results: JSON and PNG")
    parser.add_argument("--name", default="omega", help="name of the result's files")
    args = parser.parse_args(argv)
    args.command = shlex.join(["fairseq-clinic", "omega", *argv])
    results = []
    for path in args.paths:
        label, file = named_file(path)
        stacks = omega.read_omega(file)
        results.append({"label": label or Path(file).name} | {name: asdict(stack) for name, stack in stacks.items()})
        print(f"{file}\n{omega.table(stacks)}", flush=True)
    _save(args, "omega", {"models": results}, figures.omega(results))


def _check(argv: list[str]) -> None:
    args = parse_train_args(argv, "fairseq-clinic check", COMMANDS["check"][1])
    data = TranslationData.open(section(DataConfig, args))
    cfg = section(TransformerConfig, args)
    if args.max_tokens is None:
        raise FairseqError("fairseq-clinic check needs --max-tokens, the size of a batch")
    longest = args.max_source_positions, args.max_target_positions
    multiple = args.required_batch_size_multiple
    batch = first_batch(data, args.max_tokens, args.seed, torch.device("cpu"), longest, args.train_subset, multiple)
    diagnosis = check.diagnose(cfg, (len(data.src_dict), len(data.tgt_dict)), batch, args)
    print(check.as_text(diagnosis, args))
    sys.exit(0 if diagnosis.trains else 1)


def _report(argv: list[str]) -> None:
    parser = make_parser("fairseq-clinic report", COMMANDS["report"][1], ())
    parser.add_argument("--out-dir", default="clinic", metavar="DIR", help="directory of results, and of report.html")
    args = parser.parse_args(argv)
    page = report.render(load_results(args.out_dir), args.out_dir)
    path = Path(args.out_dir) / "report.html"
    with atomic_write(path) as handle:
        handle.write(page)
    print(f"wrote {path}")


def _save(args: Namespace, kind: str, data: dict[str, Any], figure: Any, name: str | None = None) -> None:
    name = name or args.name
    save_result(args.out_dir, name, kind, args.command, data, figure)
    print(f"wrote {name}.json and {name}.png in {args.out_dir}", flush=True)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "dependency": (_dependency, "How much each sub-layer depends on each residual branch, as heat maps."),
    "stability": (_stability, "How the output change grows with depth, for random and gradient perturbations."),
    "gradients": (_gradients, "Gradient norms of all sub-layers at the start of training."),
    "omega": (_omega, "omega of a checkpoint or an omega file, at the start and after training."),
    "check": (_check, "Whether a fairseq-train command line will train, with its size; status 1 if probably not."),
    "report": (_report, "One HTML page with everything measured so far."),
}


def _main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser("fairseq-clinic", "Measure why a deep Transformer trains or fails.", ())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, description) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    parser.parse_args(argv[:1])
    COMMANDS[argv[0]][0](argv[1:])


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main)(argv)


if __name__ == "__main__":
    main()
