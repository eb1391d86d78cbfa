"""On a real GPU: updates and searches by CUDA graphs are the eager ones, and no update waits.

``pytest tests/test_cuda.py`` needs nothing but the repository and a GPU.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fairseq.cli.train import main
from fairseq.criterions.cross_entropy import smoothed_nll
from fairseq.data.translation import TranslationData
from fairseq.generation import capture
from fairseq.generation.beam_search import Sources
from fairseq.options import DataConfig, GenerationConfig, parse_train_args, section
from fairseq.training.distributed import World
from fairseq.training.train import build_model
from fairseq.training.trainer import Trainer
from tests.test_search_graphs import LENGTHS, agree, long_model, search, toy_batches
from tests.training_runs import batches_of_shapes, command_line, endless_updates, logged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here")

NO_DROPOUT = ("--dropout", 0, "--attention-dropout", 0)
INIT_TYPES = ("default", "adaptive", "adaptive-closed-form", "rezero", "rezero_postln", "deepnet", "subln", "b2t")
CASES = [
    *(("--init-type", name) for name in (*INIT_TYPES, "looklinear")),
    ("--encoder-normalize-before", "--decoder-normalize-before", "--share-all-embeddings"),
    ("--update-freq", 2),
    ("--update-freq", 3, "--sentence-avg"),
    ("--criterion", "cross_entropy"),
    ("--optimizer", "radam", "--adam-betas", "(0.9,0.98)"),
    ("--bf16",),
    ("--bf16", "--update-freq", 2),
]


def _command(databin: Path, directory: Path, *flags: object) -> list[str]:
    line = command_line(databin, directory, "--clip-norm", 2, "--weight-decay", 0.01, *flags)
    return [word for word in line if word != "--cpu"]


def _trainer(databin, *flags, fp16=False):
    """A trainer on the GPU, and batches of three shapes without end."""
    eager = [] if "--cuda-graphs" in flags else ["--no-cuda-graphs"]
    args = parse_train_args(_command(databin, Path("unused"), *flags, *eager))
    args.fp16 = fp16
    data = TranslationData.open(section(DataConfig, args))
    model = build_model(args, len(data.src_dict), len(data.tgt_dict))
    trainer = Trainer(args, model, World(0, 1, torch.device("cuda", 0)))
    return trainer, endless_updates(trainer, batches_of_shapes(databin, 3, 250, pin_memory=True))


def _train(databin: Path, directory: Path, *flags: object) -> None:
    """The real command, in this process and on one GPU."""
    logging.getLogger().setLevel(logging.INFO)
    main(_command(databin, directory, "--distributed-world-size", 1, *flags))


def _losses(trainer, batches, count):
    losses = []
    for _ in range(count):
        trainer.train_step(next(batches))
        stats = trainer.take_stats()
        losses.append([stats["loss"] / max(stats["sample_size"], 1), stats["gnorm"], stats["ntokens"]])
    return losses


def _flat(lines):
    return [number for line in lines for number in line]


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: " ".join(map(str, flags)))
def test_graphs_train_as_eager_does(toy_databin, flags, caplog):
    """Dropout is on: the random numbers are the same, too."""
    expected = _losses(*_trainer(toy_databin, *flags), 20)
    trainer, batches = _trainer(toy_databin, *flags, "--cuda-graphs")
    with caplog.at_level(logging.WARNING):
        losses = _losses(trainer, batches, 20)
    assert not [record.message for record in caplog.records if "cuda-graphs" in record.message]
    assert trainer.graphs._graphs
    rel = 3e-2 if "--bf16" in flags else 1e-3
    assert _flat(losses) == pytest.approx(_flat(expected), rel=rel)


def test_fp16_scale_goes_the_same_way(toy_databin):
    runs = []
    for graphs in ((), ("--cuda-graphs",)):
        flags = (*NO_DROPOUT, "--lr", 1e-3, "--fp16-init-scale", 2**30, "--fp16-scale-window", 8, *graphs)
        trainer, batches = _trainer(toy_databin, *flags, fp16=True)
        scales, losses = [], []
        for _ in range(40):
            trainer.train_step(next(batches))
            scales.append(trainer.scaler.scale)
            losses.append(trainer.take_stats()["loss"])
        runs.append((scales, losses))
    assert trainer.graphs._graphs
    assert min(runs[0][0]) < 2**30
    assert runs[1][0] == runs[0][0]
    assert runs[1][1] == pytest.approx(runs[0][1], rel=3e-2)


def test_two_hundred_updates(toy_databin):
    flags = (*NO_DROPOUT, "--lr", 1e-3)
    expected = _losses(*_trainer(toy_databin, *flags), 200)
    trainer, batches = _trainer(toy_databin, *flags, "--cuda-graphs")
    losses = _losses(trainer, batches, 200)
    assert trainer.graphs._graphs
    assert [line[0] for line in losses] == pytest.approx([line[0] for line in expected], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [(), ("--bf16",)])
def test_compiled_and_captured(toy_databin, precision, caplog):
    torch.compiler.reset()
    flags = (*NO_DROPOUT, *precision, "--encoder-layers", 2, "--decoder-layers", 2)
    expected = _losses(*_trainer(toy_databin, *flags), 20)
    trainer, batches = _trainer(toy_databin, *flags, "--compile", "--cuda-graphs")
    with caplog.at_level(logging.WARNING):
        losses = _losses(trainer, batches, 20)
    assert not [record.message for record in caplog.records if "failed" in record.message]
    assert trainer.graphs._graphs
    assert _flat(losses) == pytest.approx(_flat(expected), rel=3e-2 if precision else 1e-3)


@pytest.mark.parametrize("flags", [(), ("--update-freq", 2), ("--bf16",)], ids=str)
@pytest.mark.parametrize("graphs", [(), ("--cuda-graphs",)], ids=["eager", "graphs"])
def test_an_update_does_not_wait(toy_databin, flags, graphs):
    trainer, batches = _trainer(toy_databin, *flags, *graphs)
    _losses(trainer, batches, 20)
    waiting = [next(batches) for _ in range(8)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for micro_batches in waiting:
            trainer.train_step(micro_batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flags", [(), ("--update-freq", 2)], ids=str)
def test_skipped_updates(toy_databin, flags):
    runs = []
    for graphs in ((), ("--cuda-graphs",)):
        trainer, batches = _trainer(toy_databin, *flags, *graphs)
        bias, losses = trainer.model.encoder.layers[0].self_attn.out_proj.bias, []
        for update in range(30):
            kept = bias.detach().clone()
            with torch.no_grad():
                if update in (20, 21, 26):
                    bias.fill_(float("inf"))
            trainer.train_step(next(batches))
            losses.append(trainer.take_stats()["loss"])
            with torch.no_grad():
                if update in (20, 21, 26):
                    bias.copy_(kept)
        runs.append(losses)
        assert (trainer.num_updates, trainer.skipped.count) == (27, 3)
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)


def test_resuming_is_exact(toy_databin, tmp_path):
    flags = ("--cuda-graphs", "--batch-shapes", 2, "--max-tokens", 250, "--no-epoch-checkpoints")
    losses = {}
    for directory, update in (("whole", 24), ("parts", 11), ("parts", 24)):
        _train(toy_databin, tmp_path / directory, *flags, "--max-update", update)
    for directory in ("whole", "parts"):
        lines = logged(tmp_path / directory)
        losses[directory] = {line["num_updates"]: line["loss"] for line in lines if "update" in line}
    assert losses["parts"].keys() == losses["whole"].keys() == set(range(1, 25))
    for update, loss in losses["parts"].items():
        assert loss == pytest.approx(losses["whole"][update], rel=1e-4)


def test_a_criterion_that_waits_goes_on_without_graphs(toy_databin, caplog):
    trainer, batches = _trainer(toy_databin, "--cuda-graphs")

    def waits(logits, target):
        loss, nll = smoothed_nll(logits, target, 0.1, 1)
        return loss * (1.0 if loss.item() else 0.5), nll

    trainer.criterion = waits
    with caplog.at_level(logging.WARNING):
        losses = _losses(trainer, batches, 20)
    said = [record.message for record in caplog.records if "cuda-graphs" in record.message]
    assert len(said) == 1
    assert said[0].startswith("--cuda-graphs failed, going on without: ")
    assert losses[-1][0] < losses[0][0]


def test_out_of_memory_while_recording_leaves_the_shape_out(toy_databin, caplog):
    trainer, batches = _trainer(toy_databin, "--cuda-graphs")
    graphs, losses = trainer.graphs, trainer.losses
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def runs_out(batch):
        if torch.cuda.is_current_stream_capturing() and failures:
            raise failures.pop()
        return losses(batch)

    trainer.losses = runs_out
    with caplog.at_level(logging.WARNING):
        _losses(trainer, batches, 30)
    assert [record.message for record in caplog.records if "out of memory for batches" in record.message]
    assert graphs._graphs
    assert len(graphs._without) == 1


def test_validation_between_updates(toy_databin, tmp_path):
    """By the real command: other shapes and no gradients between repeated updates, BLEU included."""
    flags = ("--cuda-graphs", "--max-tokens", 250, "--no-save", "--max-update", 40)
    flags += ("--validate-interval-updates", 10, "--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}')
    _train(toy_databin, tmp_path, *flags)
    lines = logged(tmp_path)
    assert [line["num_updates"] for line in lines if "update" in line] == list(range(1, 41))
    assert sum("valid_loss" in line for line in lines) >= 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beam", [1, 5])
def test_graphs_search_as_ordinary_steps_do(beam, dtype, caplog):
    models = [long_model(seed).to("cuda", dtype) for seed in (1, 2)]
    batches = [Sources(batch.src_tokens.cuda()) for batch in toy_batches()]
    cfg = GenerationConfig(max_len_b=45, beam=beam)
    expected = search(models, cfg, batches)
    for _ in range(2):  # the second time all is recorded
        found = search(models, replace(cfg, cuda_graphs=True), batches)
        if dtype == torch.float64:
            agree(found, expected)
        else:  # in which sums in another order may find other translations
            assert [len(hypotheses) for batch in found for hypotheses in batch] == [beam] * sum(map(len, LENGTHS))
    _, graphs = capture._KEPT[models[0]]
    assert len(graphs._steps) > 2
    assert not [record.message for record in caplog.records if "cuda-graphs" in record.message]
