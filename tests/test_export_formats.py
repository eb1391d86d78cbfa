"""``fairseq-export`` to CTranslate2 and Hugging Face: the same numbers as here, the directories, and what is refused.

And ``fairseq-generate --backend ctranslate2``, whose lines are compared with the native search's.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fairseq.admin.residual import AdminResidual, ReZeroPostLN
from fairseq.cli import generate
from fairseq.cli.export import main
from fairseq.data.dictionary import Dictionary
from fairseq.errors import FairseqError
from fairseq.export.self_check import random_batch
from fairseq.generation.ctranslate2_backend import CTranslate2Model
from fairseq.generation.score_reference import score_reference
from fairseq.generation.translate import pad_rows, without_padding
from fairseq.models.config import TransformerConfig
from fairseq.models.transformer import Transformer
from tests import training_runs
from tests.toys import VOCAB, write_toy_checkpoint, write_toy_databin

ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install -e .[export]")
transformers = pytest.importorskip("transformers", reason="pip install -e .[export]")

PRE_LN = {"encoder_normalize_before": True, "decoder_normalize_before": True}
TIED = {"share_all_embeddings": True}
SHAPES: list[dict[str, Any]] = [  # that both formats have
    TIED,
    {"share_decoder_input_output_embed": True, "encoder_learned_pos": True, "no_scale_embedding": True},
    {"no_token_positional_embeddings": True, "activation_fn": "gelu"},
    {"layernorm_embedding": True, **TIED, "activation_fn": "gelu_fast"},
    {**PRE_LN, **TIED, "activation_fn": "swish"},
    {**PRE_LN, **TIED, "layernorm_embedding": True, "decoder_layers": 3},
    {"init_type": "adaptive", **TIED},
    {"init_type": "adaptive", "layernorm_embedding": True, **TIED},
    {"init_type": "adaptive-closed-form", "rule_settings": {"omega": "constant"}},
    {"init_type": "deepnet", **TIED},
    {"init_type": "rezero_postln", **TIED},
    {"init_type": "looklinear", "max_source_positions": 30, "max_target_positions": 40},
]
CTRANSLATE2_SHAPES: list[dict[str, Any]] = [
    {"decoder_embed_dim": 24, "decoder_ffn_embed_dim": 20, "decoder_attention_heads": 4},
    {"encoder_normalize_before": True, "activation_fn": "tanh"},
    PRE_LN,
]


def small_model(**settings: Any) -> Transformer:
    """Freshly initialised, in float32."""
    torch.manual_seed(3)
    shape = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 2, "encoder_layers": 2}
    shape |= {"decoder_layers": 2, "decoder_attention_heads": 2}
    return Transformer(TransformerConfig(**(shape | settings)), VOCAB, VOCAB).eval()


def trained_like(**settings: Any) -> Transformer:
    """A small model with LayerNorms, biases, omega and alpha that are nowhere as they start."""
    model = small_model(**settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.7, 1.3)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.uniform_(-0.2, 0.2)
            elif isinstance(module, AdminResidual):
                module.omega.uniform_(0.5, 2)
            elif isinstance(module, ReZeroPostLN):
                module.alpha.fill_(0.7)
    return model


def export(directory: Path, model: Transformer, form: str, *flags: object) -> Path:
    """Write a checkpoint of ``model`` and export it; returns the export's directory."""
    databin = directory / "bin"
    if not databin.exists():
        write_toy_databin(databin, 12)
    write_toy_checkpoint(model, directory / "model.pt")
    output = directory / f"{form}-{len(list(directory.iterdir()))}"
    argv = [directory / "model.pt", "--data", databin, "--format", form, "--output", output, *flags]
    main([*map(str, argv)])
    return output


def assert_refused(
    capsys: pytest.CaptureFixture[str], message: str, directory: Path, form: str, **settings: Any
) -> None:
    """And nothing is left."""
    write_toy_databin(directory / "bin")
    write_toy_checkpoint(small_model(**settings), directory / "model.pt")
    before = sorted(directory.iterdir())
    flags = ("--data", directory / "bin", "--format", form, "--output", directory / "out")
    training_runs.assert_fails(capsys, 1, message, directory / "model.pt", *flags, main=main)
    assert sorted(directory.iterdir()) == before


def lines(capsys: pytest.CaptureFixture[str], databin: Path, *flags: object) -> dict[str, str]:
    """What ``fairseq-generate`` prints: ``H-3`` -> the rest of the line (of n-best: ``H-3 0``, ... too)."""
    capsys.readouterr()
    generate.main([str(databin), "--cpu", "--num-workers", "0", *map(str, flags)])
    found: dict[str, str] = {}
    for line in filter(lambda text: "\t" in text, capsys.readouterr().out.splitlines()):
        name, _, rest = line.partition("\t")
        found[f"{name} {sum(key.startswith(f'{name} ') for key in found)}" if name in found else name] = rest
    return found


def hypotheses(capsys: pytest.CaptureFixture[str], databin: Path, checkpoint: Path) -> list[tuple[str, str]]:
    """Of the native search: sources and translations, segmented."""
    found = lines(capsys, databin, "--path", checkpoint, "--max-len-b", 100)
    return [
        (line, found[name.replace("S", "H")].split("\t")[1]) for name, line in found.items() if name.startswith("S-")
    ]


# -- CTranslate2


@pytest.mark.parametrize("settings", SHAPES + CTRANSLATE2_SHAPES, ids=str)
def test_ctranslate2_log_probabilities(settings, tmp_path, capsys):
    model = trained_like(**settings)
    path = export(tmp_path, model, "ctranslate2")
    words = Dictionary.load(tmp_path / "bin" / "dict.xx.txt").symbols
    src, prev = random_batch(model, seed=4)
    sources = [[words[i] for i in without_padding(row).tolist()[:-1]] for row in src]
    targets = [[words[i] for i in without_padding(row).tolist()[1:]] for row in prev]
    found = ctranslate2.Translator(str(path)).score_batch(sources, targets)
    ended = [torch.cat([without_padding(row)[1:], torch.tensor([2])]) for row in prev]
    for result, (expected,) in zip(found, score_reference([model], src, ended), strict=True):
        torch.testing.assert_close(torch.tensor(result.log_probs), expected.positional_scores, atol=1e-4, rtol=0)
    out = capsys.readouterr().out
    assert ("is folded into an ordinary Post-LN" in out) == (model.cfg.init_type not in ("default", "looklinear"))
    assert re.search(r"\d+ of 12 translations agree", out)  # not all: toys go on to the longest output


def test_ctranslate2_directory(tmp_path, capsys):
    path = export(tmp_path, trained_like(**TIED), "ctranslate2")
    assert {p.name for p in path.iterdir()} == {"model.bin", "config.json", "shared_vocabulary.json"}
    assert json.loads((path / "shared_vocabulary.json").read_text())[:5] == ["<s>", "<pad>", "</s>", "<unk>", "a"]
    config = json.loads((path / "config.json").read_text())
    assert (config["decoder_start_token"], config["source_lang"]) == ("</s>", "xx")
    out = capsys.readouterr().out
    assert re.match(rf"wrote {path}: CTranslate2, weights in float32, [\d,]+ parameters\nself-check", out)


@pytest.mark.parametrize("quantization", ["int8", "int8_float32", "float16", "bfloat16"])
def test_ctranslate2_quantized(quantization, tmp_path, capsys):
    path = export(tmp_path, trained_like(**TIED), "ctranslate2", "--quantization", quantization)
    plain = export(tmp_path, trained_like(**TIED), "ctranslate2")
    assert (path / "model.bin").stat().st_size < 0.95 * (plain / "model.bin").stat().st_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"init_type": "rezero"},
            "needs an ordinary Transformer: init type rezero cannot be folded",
        ),
        ({"init_type": "subln"}, "LayerNorm inside each branch"),
        ({"init_type": "b2t"}, "adds the layer's input once more"),
        ({"activation_fn": "linear"}, "CTranslate2 has no --activation-fn linear"),
    ],
)
def test_ctranslate2_refuses(settings, message, tmp_path, capsys):
    assert_refused(capsys, message, tmp_path, "ctranslate2", **settings)


# -- Hugging Face


@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_huggingface_logits(settings, tmp_path, capsys):
    model = trained_like(**settings)
    path = export(tmp_path, model, "huggingface")
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    src, prev = random_batch(model, seed=4)
    ids = pad_rows([without_padding(row) for row in src])
    with torch.no_grad():
        found = loaded(input_ids=ids, attention_mask=ids.ne(1).long(), decoder_input_ids=prev).logits
        expected = model(src, None, prev)[0]
    torch.testing.assert_close(found[prev.ne(1)], expected[prev.ne(1)], atol=1e-4, rtol=1e-5)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in path.iterdir()} == names
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in path.iterdir())


def test_huggingface_translates_text(shared, tmp_path, capsys):
    """Text in, text out, from the directory alone; the native hypotheses."""
    path = tmp_path / "out"
    reference, databin = shared / "reference" / "fairseq012_tiny.pt", shared / "reference" / "multi30k-databin-test200"
    main([str(reference), "--data", str(databin), "--format", "huggingface", "--output", str(path)])
    assert "16 of 16 translations agree" in capsys.readouterr().out
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    native = hypotheses(capsys, databin, reference)
    sentences = [source for source, _ in native[:24]]
    outputs = loaded.generate(**tokenizer(sentences, return_tensors="pt", padding=True))
    found = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    assert [a == b for a, (_, b) in zip(found, native, strict=False)].count(True) >= 23


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_huggingface_precision(precision, tmp_path, capsys):
    path = export(tmp_path, trained_like(**TIED), "huggingface", "--quantization", precision)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(path, dtype="auto")
    assert loaded.dtype == getattr(torch, precision)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PRE_LN, "Pre-LN, PegasusForConditionalGeneration, has one matrix"),
        ({"encoder_normalize_before": True}, "encoder and decoder differ in Pre-LN and Post-LN"),
        ({"decoder_embed_dim": 24}, "different dimensions (16 and 24)"),
        ({"layernorm_embedding": True}, "LayerNorm after the embeddings, BartForConditionalGeneration, has one matrix"),
        ({"init_type": "rezero"}, "which has no LayerNorm"),
    ],
)
def test_huggingface_refuses(settings, message, tmp_path, capsys):
    assert_refused(capsys, message, tmp_path, "huggingface", **settings)


# -- both


@pytest.mark.parametrize("form", ["ctranslate2", "huggingface"])
def test_what_computes_something_else_leaves_nothing(form, tmp_path, capsys, monkeypatch):
    from fairseq import admin

    fold = admin.fold

    def forgetful(model: Transformer) -> Transformer:
        plain = fold(model)
        with torch.no_grad():
            plain.encoder.layers[1].feed_forward.fc1.weight.mul_(1.5)
        return plain

    monkeypatch.setattr(admin, "fold", forgetful)
    assert_refused(capsys, "computes something else", tmp_path, form, init_type="adaptive")


def test_other_errors(tmp_path, capsys):
    path = write_toy_checkpoint(small_model(), tmp_path / "model.pt")
    flags = (path, "--format", "ctranslate2", "--output", tmp_path / "out")
    training_runs.assert_fails(capsys, 1, "no dict.xx.txt and dict.yy.txt in", *flags, main=main)
    databin = write_toy_databin(tmp_path / "bin")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    training_runs.assert_fails(capsys, 1, "is there already", *flags, "--data", databin, main=main)
    huggingface = (path, "--format", "huggingface", "--quantization", "int8", "--output", tmp_path / "new")
    training_runs.assert_fails(capsys, 1, "no --quantization int8", *huggingface, main=main)
    fairseq = (path, "--quantization", "int8", "--output", tmp_path / "new")
    training_runs.assert_fails(capsys, 1, "--quantization does nothing", *fairseq, main=main)
    dictionary = databin / "dict.xx.txt"
    dictionary.write_text(dictionary.read_text().replace("b ", "a ", 1).replace("99", "99 #fairseq:overwrite"))
    training_runs.assert_fails(
        capsys, 1, "every token once", *flags[:-1], tmp_path / "new", "--data", databin, main=main
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["ctranslate2", "transformers"])
def test_missing_package(package, tmp_path):
    """As a process that cannot import it."""
    form = "ctranslate2" if package == "ctranslate2" else "huggingface"
    write_toy_databin(tmp_path / "bin")
    path = write_toy_checkpoint(small_model(), tmp_path / "model.pt")
    argv = [str(path), "--data", str(tmp_path / "bin"), "--format", form, "--output", str(tmp_path / "out")]
    code = f"import sys; sys.modules[{package!r}] = None; from fairseq.cli.export import main; main({argv!r})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1
    assert f"--format {form} needs the package {package}" in process.stderr
    assert "pip install -e '.[export]'" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out").exists()


# -- fairseq-generate --backend ctranslate2


@pytest.fixture
def exported(tmp_path, capsys) -> Path:
    return export(tmp_path, trained_like(**TIED, init_type="adaptive"), "ctranslate2")


@pytest.fixture(scope="module")
def reference_export(shared, tmp_path_factory) -> Path:
    """A trained model in CTranslate2's format."""
    path = tmp_path_factory.mktemp("reference") / "out"
    checkpoint, databin = shared / "reference" / "fairseq012_tiny.pt", shared / "reference" / "multi30k-databin-test200"
    main([str(checkpoint), "--data", str(databin), "--format", "ctranslate2", "--output", str(path)])
    return path


def assert_same_lines(found: dict[str, str], expected: dict[str, str], share: float) -> None:
    """At least ``share`` of them: the words alike, the numbers to 2e-4."""
    assert list(found) == list(expected)
    number = r"-?\d+\.\d+"
    same = 0
    for name, line in expected.items():
        values = [[float(word) for word in re.findall(number, text)] for text in (line, found[name])]
        if re.sub(number, "", found[name]) == re.sub(number, "", line):
            same += values[1] == pytest.approx(values[0], abs=2e-4)
    assert same >= share * len(expected)


@pytest.mark.parametrize(
    "flags",
    [
        ("--nbest", 3, "--lenpen", 0.6, "--remove-bpe"),
        ("--unnormalized", "--min-len", 6, "--beam", 4, "--print-alignment"),
        ("--prefix-size", 2, "--no-repeat-ngram-size", 2, "--batch-size", 8),
    ],
    ids=str,
)
def test_backend_prints_the_same_lines(flags, shared, reference_export, capsys):
    reference, databin = shared / "reference" / "fairseq012_tiny.pt", shared / "reference" / "multi30k-databin-test200"
    part = ("--num-shards", 10, *flags)
    expected = lines(capsys, databin, "--path", reference, "--max-len-b", 50, *part)
    found = lines(capsys, databin, "--path", reference_export, "--backend", "ctranslate2", "--max-len-b", 50, *part)
    assert len(expected) >= 20 * 5
    assert_same_lines(found, expected, share=0.9)


def test_backend_scores_references(exported, tmp_path, capsys):
    flags = (tmp_path / "bin", "--score-reference")
    expected = lines(capsys, *flags, "--path", tmp_path / "model.pt")
    assert_same_lines(lines(capsys, *flags, "--path", exported, "--backend", "ctranslate2"), expected, share=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("decoder/alignment_layer", b"\xfb\xff", "decoder/alignment_layer is -5"),
        ("decoder/num_heads", b"\x03\x00", "decoder/num_heads is 3"),
        ("encoder/num_heads", b"\x00\x00", "encoder/num_heads is 0"),
    ],
)
def test_backend_refuses_numbers_that_ctranslate2_trusts(exported, tmp_path, name, content, message):
    """An attention layer of -5 has CTranslate2 write before its memory."""
    directory = shutil.copytree(exported, tmp_path / "changed")
    model = (directory / "model.bin").read_bytes()
    header = name.encode() + b"\0" + bytes([0, 2]) + (2).to_bytes(4, "little")  # rank, int16, bytes
    assert model.count(header) == 1
    start = model.index(header) + len(header)
    (directory / "model.bin").write_bytes(model[:start] + content + model[start + 2 :])
    with pytest.raises(FairseqError, match=message):
        CTranslate2Model(directory)


def test_backend_names_what_ctranslate2_misses(exported, tmp_path):
    """A model whose parts are all right, of which one is not there."""
    directory = shutil.copytree(exported, tmp_path / "changed")
    model = (directory / "model.bin").read_bytes()
    name = b"decoder/layer_0/attention/linear_2/weight"
    (directory / "model.bin").write_bytes(model.replace(name, b"decoder/layer_1/attention/linear_2/weight"))
    with pytest.raises(FairseqError, match="linear_2/weight"):
        CTranslate2Model(directory)


@pytest.mark.parametrize("cut", [0, 3, 40, -1])
def test_backend_refuses_a_model_cut_short(exported, tmp_path, cut):
    directory = shutil.copytree(exported, tmp_path / "cut")
    (directory / "model.bin").write_bytes((directory / "model.bin").read_bytes()[:cut])
    with pytest.raises(
        FairseqError, match=r"model.bin: not a model of fairseq-export, or damaged: .*; export it again"
    ):
        CTranslate2Model(directory)


def test_backend_longest_output(exported, tmp_path, capsys):
    """Outputs that do not end by themselves end in a scored ``</s>``, as here."""
    found = lines(capsys, tmp_path / "bin", "--path", exported, "--backend", "ctranslate2", "--max-len-b", 4)
    scores = [line.split() for name, line in found.items() if name.startswith("P-")]
    assert max(map(len, scores)) == 5
    for name, line in found.items():
        if name.startswith("H-"):
            score, *words = line.split()
            positional = [float(value) for value in found[name.replace("H", "P")].split()]
            assert len(words) == len(positional) - 1
            assert sum(positional) / len(positional) == pytest.approx(float(score), abs=1e-3)


def test_backend_refuses(exported, tmp_path, capsys):
    def refused(message: str, *flags: object, databin: Path = tmp_path / "bin") -> None:
        argv = (databin, "--cpu", "--path", exported, "--backend", "ctranslate2", *flags)
        training_runs.assert_fails(capsys, 1, message, *argv, main=generate.main)

    refused("does not have --max-len-a", "--max-len-a", 1)
    refused("does not have --sampling", "--sampling")
    refused("does not have --bf16", "--bf16")
    refused("does not have --temperature", "--temperature", 2)
    refused("cannot read", "--path", tmp_path)
    refused("a reference ends within", "--prefix-size", 9)
    other = write_toy_databin(tmp_path / "other")
    (other / "dict.yy.txt").write_text("z 1\n")
    refused("another target vocabulary", databin=other)
    assert len(Dictionary.load(tmp_path / "bin" / "dict.yy.txt")) == VOCAB
