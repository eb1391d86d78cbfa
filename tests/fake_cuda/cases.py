"""The real commands on `tests.fake_cuda`, against the CPU's results; `tests/test_fake_cuda.py` starts this."""

from __future__ import annotations

import logging

import pytest
import torch

from fairseq import admin
from fairseq.cli.clinic import main as clinic
from fairseq.cli.generate import main as generate
from fairseq.cli.train import main as train
from fairseq.cli.validate import main as validate
from fairseq.generation.beam_search import _Ensemble
from fairseq.hub import TransformerModel
from fairseq.options import GenerationConfig
from fairseq.training.precision import autocast
from tests.toys import toy_model, write_toy_checkpoint, write_toy_databin
from tests.training_runs import command_line, logged

NO_DROPOUT = ("--dropout", 0, "--attention-dropout", 0)
BLEU = ("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}')
TRAINING = [
    ("--checkpoint-activations", "--bf16", "--update-freq", 2),
    ("--offload-activations",),
    ("--optimizer", "adafactor"),
    ("--optimizer", "sgd", "--fp16"),
    ("--init-type", "adaptive", "--bf16", *BLEU),
    ("--cuda-graphs", "--fp16", "--fp16-init-scale", 2**30, *BLEU),
    ("--cuda-graphs", "--encoder-learned-pos", "--layernorm-embedding", "--batch-shapes", 2, "--num-workers", 1),
]
GENERATION = [
    ("--nbest", 3, "--max-len-b", 9),
    ("--sampling", "--sampling-topp", 0.8),
    ("--sampling", "--sampling-topk", 5, "--batch-size", 3),
    ("--prefix-size", 2, "--no-repeat-ngram-size", 2),
    ("--print-alignment", "--min-len", 3, "--unkpen", 1),
    ("--score-reference", "--batch-size", 4),
    ("--score-reference", "--print-alignment"),
    ("--cuda-graphs", "--nbest", 2, "--max-len-b", 20, "--batch-size", 5),
]


def _train(databin, directory, *flags, cpu=False):
    """What the command logs of its updates."""
    logging.getLogger().setLevel(logging.INFO)
    eager = [] if "--cuda-graphs" in flags else ["--no-cuda-graphs"]
    line = command_line(databin, directory, "--clip-norm", 2, *NO_DROPOUT, *flags, *eager)
    train(line if cpu else [word for word in line if word != "--cpu"])
    return [line["loss"] for line in logged(directory) if "update" in line]


@pytest.mark.parametrize("flags", TRAINING, ids=lambda flags: " ".join(map(str, flags)))
def test_training_stops_and_goes_on(toy_databin, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    _train(toy_databin, tmp_path / "gpu", *flags, "--max-update", 4)
    losses = _train(toy_databin, tmp_path / "gpu", *flags, "--max-update", 6)
    assert len(losses) >= 6
    if "--fp16" not in flags:  # which the CPU does not train in
        on_cpu = [flag for flag in flags if flag not in ("--offload-activations", "--cuda-graphs")]
        expected = _train(toy_databin, tmp_path / "cpu", *on_cpu, "--max-update", 6, cpu=True)
        assert losses == pytest.approx(expected, rel=2e-2 if "--bf16" in flags else 2e-3)


@pytest.fixture
def toy(tmp_path):
    databin = write_toy_databin(tmp_path / "bin")
    return databin, *(write_toy_checkpoint(toy_model(seed), tmp_path / f"model{seed}.pt") for seed in (1, 2))


def _lines(capsys, *argv):
    """What generation prints, scores rounded."""
    generate([*map(str, argv), "--num-workers", "0"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line[1:2] == "-"]
    return sorted([line[0], *(word for field in line[1:] for word in field.split())] for line in lines)


@pytest.mark.parametrize("flags", GENERATION, ids=lambda flags: " ".join(map(str, flags)))
def test_generation_is_the_cpus(toy, capsys, caplog, flags):
    databin, *models = toy
    path = ":".join(map(str, models)) if "--nbest" in flags else models[0]
    runs = [_lines(capsys, databin, "--path", path, *flags, *device) for device in ((), ("--cpu",))]
    assert len(runs[0]) == len(runs[1]) > 10
    for one, other in zip(*runs, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), abs=2e-4)
    assert "failed" not in caplog.text


@pytest.mark.parametrize("precision", ["--fp16", "--bf16"])
def test_generation_in_16_bits(toy, capsys, precision):
    assert _lines(capsys, toy[0], "--path", toy[1], precision, "--sampling")
    assert _lines(capsys, toy[0], "--path", toy[1], precision, "--print-alignment")


def test_probabilities_are_float32_under_autocast():
    """As when ``--eval-bleu`` translates while training in 16 bits."""
    model, device = toy_model().float().cuda(), torch.device("cuda", 0)
    with torch.no_grad(), autocast(device, fp16=True, bf16=False):
        ensemble = _Ensemble([model], torch.full((2, 3), 5, device=device), GenerationConfig(), attn=False)
        features, _ = ensemble.step(torch.full((2,), 2, device=device))
        lprobs, offsets = ensemble.lprobs(features)
    assert lprobs.dtype == offsets.dtype == torch.float32


def test_validation_clinic_and_hub(toy, toy_databin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _train(toy_databin, tmp_path / "run", "--max-update", 2)
    checkpoint = str(tmp_path / "run/checkpoint_last.pt")
    validate([str(toy_databin), "--path", checkpoint, "--valid-subset", "valid", "--fp16"])
    clinic(["gradients", str(toy_databin), "--path", checkpoint, "--seeds", "1", "--max-tokens", "64"])
    clinic(["dependency", str(toy_databin), "--path", checkpoint, "--seeds", "1", "--max-tokens", "64"])
    model = TransformerModel.from_pretrained(toy[1].parent, toy[1].name, "bin")
    expected = model.translate(["a b c", "d e"])
    assert model.cuda().translate(["a b c", "d e"]) == expected
    assert model.half().translate("a b c")


def test_profile_is_the_cpus():
    tokens = torch.randint(4, 10, (4, 6))
    batch = {"src_tokens": tokens, "src_lengths": torch.full((4,), 6), "prev_output_tokens": tokens}
    model = toy_model(init_type="adaptive-profiling").float()
    expected = admin.profile(model, batch, deterministic=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = admin.profile(model.cuda(), {k: v.cuda() for k, v in batch.items()}, deterministic=True)
    assert found.encoder + found.decoder == pytest.approx(expected.encoder + expected.decoder, rel=1e-5)


def test_what_a_gpu_refuses_is_refused():
    """The stand-in is worth something."""
    x = torch.ones(2, 2, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x @ torch.ones(2, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for wait in (
            x.sum().item,
            x.nonzero,
            x.cpu,
            lambda: x[x > 0],
            lambda: torch.ones(9).to("cuda", non_blocking=True),
        ):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
        assert torch.ones(9).pin_memory().to("cuda", non_blocking=True).is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with (
        pytest.raises(RuntimeError, match="capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()),
    ):
        x.sum().item()
