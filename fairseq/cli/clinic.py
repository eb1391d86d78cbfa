"""``fairseq-clinic``: the paper's measurements, on models at the start of training and on checkpoints."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fairseq.cli import command
from fairseq.clinic import check, figures, gradients, omega, report, stability
from fairseq.clinic.measure import Batches, batches_of, measure_dependency, measure_gradients, measure_stability
from fairseq.clinic.results import check_out_dir, load_results, save_result
from fairseq.clinic.subjects import (
    Subject,
    first_batch,
    label_of,
    load_subject,
    named_file,
    printable,
    split_paths,
    variant,
)
from fairseq.data.translation import TranslationData
from fairseq.errors import FairseqError, out_of_memory_ends
from fairseq.models.config import TransformerConfig
from fairseq.options import (
    ArchConfig,
    ClinicCheckpointConfig,
    ClinicConfig,
    ClinicDataConfig,
    ClinicDepthConfig,
    ClinicOutputConfig,
    ClinicReportConfig,
    DataConfig,
    Sections,
    check_result_name,
    make_parser,
    parse_clinic_args,
    parse_train_args,
    section,
)
from fairseq.utils.devices import choose_device
from fairseq.utils.io import atomic_write

OUTPUT = ((ClinicOutputConfig, "results"),)
MEASURE = ((ClinicDataConfig, "data"), (ClinicConfig, "what to measure"), *OUTPUT, (ArchConfig, "model"))
CHECKPOINTS = ((ClinicCheckpointConfig, "checkpoints"),)
DEPTHS = ((ClinicDepthConfig, "depth"),)


def _parse(name: str, sections: Sections, argv: list[str]) -> Namespace:
    args = parse_clinic_args(f"fairseq-clinic {name}", COMMANDS[name][1], sections, argv)
    check_out_dir(args.out_dir)
    args.name = args.name or name
    args.command = shlex.join(["fairseq-clinic", name, *argv])
    return args


def _open(args: Namespace) -> tuple[TranslationData, torch.device]:
    config = DataConfig(args.data, source_lang=args.source_lang, target_lang=args.target_lang)
    return TranslationData.open(config), choose_device(args.cpu)


def _subjects(args: Namespace, data: TranslationData, device: torch.device) -> list[Subject]:
    """The checkpoints of --path, or else the models that --models names, in the shape that the flags give."""
    if args.path:
        subjects = [load_subject(path, data, device) for path in split_paths(args.path)]
    else:
        cfg: TransformerConfig = section(TransformerConfig, args)
        variants = [variant(cfg, name) for name in args.models.split(",")]
        subjects = [Subject(label_of(own), own, _vocabularies(data)) for own in variants]
    labels = [subject.label for subject in subjects]
    if len(set(labels)) < len(labels):
        raise FairseqError(f"two of the models are called the same ({', '.join(labels)}); name them: --path NAME=FILE")
    return subjects


def _vocabularies(data: TranslationData) -> tuple[int, int]:
    return len(data.src_dict), len(data.tgt_dict)


def _prepare(name: str, argv: list[str]) -> tuple[Namespace, list[Subject], Batches]:
    """Flags, models and batches of a command that measures models of one depth, or checkpoints."""
    args = _parse(name, (*MEASURE, *CHECKPOINTS), argv)
    data, device = _open(args)
    subjects = _subjects(args, data, device)
    return args, subjects, batches_of(data, args.seeds, args.max_tokens, device, [own.cfg for own in subjects])


def _dependency(argv: list[str]) -> None:
    args, subjects, batches = _prepare("dependency", argv)
    entries = [entry for subject in subjects for entry in measure_dependency(subject, batches)]
    for entry in entries:
        encoder, decoder = (entry[stack]["beta2"][-1][-1] for stack in ("encoder", "decoder"))
        print(
            f"{entry['label']}, {entry['stage']}: the last sub-layer takes {encoder:.1%} (encoder) and "
            f"{decoder:.1%} (decoder) from its own branch"
        )
    for stack in ("encoder", "decoder"):
        own = [{key: entry[key] for key in ("label", "stage", stack)} for entry in entries]
        figure = figures.dependency(own, stack)
        _save(args, "dependency", {"stack": stack, "models": own}, figure, f"{args.name}-{stack}")


def _stability(argv: list[str]) -> None:
    args = _parse("stability", (*MEASURE, *DEPTHS), argv)
    if len(set(args.depths)) < 3 or any(depth % 2 for depth in args.depths):
        raise FairseqError("--depths: give at least three even numbers, such as 6,12,24")
    data, device = _open(args)
    cfg: TransformerConfig = section(TransformerConfig, args)
    names = args.models.split(",")
    for name in names:
        variant(cfg, name)  # an unknown one is said before the others are measured
    batches = batches_of(data, args.seeds, args.max_tokens, device, [cfg])
    results = []
    for name in names:
        results.append(measure_stability(cfg, name, _vocabularies(data), args.depths, batches))
        print(stability.fits_as_text(results[-1]), flush=True)
    content = {"noise": stability.NOISE, "step": stability.STEP, "models": results}
    _save(args, "stability", content, figures.stability(results))


def _gradients(argv: list[str]) -> None:
    args, subjects, batches = _prepare("gradients", argv)
    results = [result for subject in subjects for result in measure_gradients(subject, batches)]
    print(*map(gradients.as_text, results), sep="\n")
    _save(args, "gradients", {"models": results}, figures.gradients(results))


def _omega(argv: list[str]) -> None:
    parser = make_parser("fairseq-clinic omega", COMMANDS["omega"][1], OUTPUT)
    parser.add_argument("paths", nargs="+", metavar="[NAME=]FILE", help="checkpoints or omega files")
    args = parser.parse_args(argv)
    args.name = args.name or "omega"
    check_result_name(parser, args.name)
    args.command = shlex.join(["fairseq-clinic", "omega", *argv])
    check_out_dir(args.out_dir)
    results = []
    for path in args.paths:
        label, file = named_file(path)
        stacks = omega.read_omega(file)
        results.append(
            {"label": label or printable(Path(file).name)} | {name: asdict(stack) for name, stack in stacks.items()}
        )
        print(f"{printable(file)}\n{omega.table(stacks)}", flush=True)
    _save(args, "omega", {"models": results}, figures.omega(results))


def _check(argv: list[str]) -> None:
    args = parse_train_args(argv, "fairseq-clinic check", COMMANDS["check"][1])
    data = TranslationData.open(section(DataConfig, args), args.required_seq_len_multiple)
    cfg = section(TransformerConfig, args)
    if args.max_tokens is None:
        raise FairseqError("fairseq-clinic check needs --max-tokens, the size of a batch")
    longest = args.max_source_positions, args.max_target_positions
    batch = first_batch(
        data,
        args.max_tokens,
        args.seed,
        torch.device("cpu"),
        longest,
        args.train_subset,
        args.required_batch_size_multiple,
        args.upsample_primary,
    )
    diagnosis = check.diagnose(cfg, _vocabularies(data), batch, args)
    print(check.as_text(diagnosis))
    sys.exit(0 if diagnosis.trains else 1)


def _report(argv: list[str]) -> None:
    sections = ((ClinicReportConfig, "results"),)
    args = make_parser("fairseq-clinic report", COMMANDS["report"][1], sections).parse_args(argv)
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
    "gradients": (_gradients, "Gradient norms of all sub-layers, at the start of training and after it."),
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
    with out_of_memory_ends(f"fairseq-clinic {argv[0]}", "lower --max-tokens, or measure a smaller model"):
        COMMANDS[argv[0]][0](argv[1:])


def main(argv: list[str] | None = None) -> None:
    """Entry point. argv: the arguments without the program's name, by default ``sys.argv[1:]``."""
    command(_main)(argv)


if __name__ == "__main__":
    main()
