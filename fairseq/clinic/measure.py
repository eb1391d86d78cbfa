"""Whole measurements: models of several seeds, each on its own batch, averaged into one result with a label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from fairseq.clinic import dependency, gradients, stability
from fairseq.clinic.subjects import Subject, first_batch, fresh_model, label_of, variant
from fairseq.data.translation import Batch, TranslationData
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer

Batches = Mapping[int, Batch]  # by seed
AT_THE_START, TRAINED = "at the start", "trained"


def batches_of(
    data: TranslationData,
    seeds: Sequence[int],
    max_tokens: int,
    device: torch.device,
    configs: Iterable[TransformerConfig],
) -> Batches:
    """A batch a seed, of sentences that are not too long for any model of ``configs``."""
    lengths = [(cfg.max_source_positions, cfg.max_target_positions) for cfg in configs]
    longest = min(source for source, _ in lengths), min(target for _, target in lengths)
    return {seed: first_batch(data, max_tokens, seed, device, longest) for seed in seeds}


def _stages(subject: Subject, batches: Batches) -> Iterator[tuple[str, list[Transformer]]]:
    """The models to run on the batches, one on each: fresh ones of the seeds, then the trained one if there is one."""
    yield AT_THE_START, [subject.fresh(seed, batch["net_input"]) for seed, batch in batches.items()]
    if subject.trained is not None:
        yield TRAINED, [subject.trained] * len(batches)


def measure_dependency(subject: Subject, batches: Batches) -> Iterator[dict[str, Any]]:
    """For each stage of a subject: label, stage, and ``StackDependency`` as dicts for encoder and decoder."""
    for stage, models in _stages(subject, batches):
        pairs = zip(models, batches.values(), strict=True)
        runs = [dependency.layer_dependency(model, batch["net_input"]) for model, batch in pairs]
        means = {stack: asdict(dependency.mean([run[stack] for run in runs])) for stack in ("encoder", "decoder")}
        yield {"label": subject.label, "stage": stage, **means}


def measure_gradients(subject: Subject, batches: Batches) -> Iterator[dict[str, Any]]:
    """For each stage of a subject: a label and ``gradients.mean``'s result."""
    for stage, models in _stages(subject, batches):
        runs = [gradients.gradient_norms(model, batch) for model, batch in zip(models, batches.values(), strict=True)]
        label = subject.label if subject.trained is None else f"{subject.label}, {stage}"
        yield {"label": label, **gradients.mean(runs)}


def measure_stability(
    cfg: TransformerConfig, name: str, vocabularies: tuple[int, int], depths: Sequence[int], batches: Batches
) -> dict[str, Any]:
    """A label and ``stability.summarize``'s result for encoders of ``depths`` sub-layers with the rule ``name``.

    A single decoder layer stands on them, since the gradient must come from somewhere.
    """
    random: list[list[float]] = []
    step: list[list[float]] = []
    for depth in depths:
        own = variant(replace(cfg, encoder_layers=depth // 2, decoder_layers=1), name)
        random.append([])
        step.append([])
        for seed, batch in batches.items():
            model = fresh_model(own, vocabularies, seed, batch["net_input"])
            output = partial(stability.encoder_output, model, batch["net_input"])
            moved = stability.matrices(model.encoder)
            random[-1].append(stability.random_change(output, moved, seed))
            step[-1].append(stability.gradient_change(model, batch, output, moved))
    return {"label": label_of(variant(cfg, name)), **stability.summarize(depths, random, step)}
