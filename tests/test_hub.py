"""``TransformerModel.from_pretrained(...).translate(...)``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch

from fairseq.checkpoint import load_checkpoint
from fairseq.data.indexed_dataset import IndexedDataset
from fairseq.errors import FairseqError
from fairseq.generation import translate
from fairseq.models import TransformerModel
from tests.toys import toy_model, toy_sentences, write_toy_checkpoint, write_toy_databin


@pytest.fixture
def directory(tmp_path):
    """A directory with a model and its dictionaries, and a data-bin ``bin`` beside them."""
    write_toy_checkpoint(toy_model(), tmp_path / "model.pt")
    write_toy_databin(tmp_path / "bin")
    for language in ("xx", "yy"):
        shutil.copy(tmp_path / "bin" / f"dict.{language}.txt", tmp_path)
    return tmp_path


@pytest.fixture
def reference(shared):
    """The saved output of the original, number -> (source, hypothesis), without escaped or unknown words."""
    lines = (shared / "reference" / "fairseq012_tiny.generate.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, dict[int, str]] = {"S": {}, "H": {}}
    for line in lines:
        if match := re.match(r"([SH])-(\d+)\t(?:-[0-9.]+\t)?(.*)", line):
            found[match[1]][int(match[2])] = match[3]
    return {i: (s, found["H"][i]) for i, s in found["S"].items() if "&" not in s and "<unk>" not in s}


def test_translates_as_the_original(shared, reference):
    model = TransformerModel.from_pretrained(
        shared / "reference",
        checkpoint_file="fairseq012_tiny.pt",
        data_name_or_path="multi30k-databin",
        bpe="subword_nmt",
        bpe_codes="multi30k-databin/bpe.codes",
    )
    numbers = sorted(reference)[:30]
    sources, expected = zip(*(reference[i] for i in numbers), strict=True)
    assert model.translate(list(sources)) == list(expected)
    assert model.translate(sources[0]) == expected[0]
    assert model.translate(sources[0], beam=5, lenpen=1.0, max_len_b=100) == expected[0]


def test_batches_blanks_and_order(directory):
    model = TransformerModel.from_pretrained(directory)
    sentences = [" ".join(words) for words in toy_sentences(8)]
    sentences[2] = "  "
    together = model.translate(sentences, max_len_b=9)
    assert together[2] == ""
    assert together == [model.translate(s, max_len_b=9) for s in sentences]
    assert together == model.translate(sentences, max_len_b=9, batch_size=3)
    assert together == model.translate(sentences, max_len_b=9, max_tokens=8)
    assert together == model.translate(iter(sentences), max_len_b=9)
    assert model.translate([]) == []


def test_settings_reach_the_search(directory):
    model = TransformerModel.from_pretrained(directory, data_name_or_path="bin")
    assert len(model.translate("a b c", beam=2, min_len=6, max_len_b=6).split()) == 6
    sample = {"sampling": True, "sampling_topk": 8, "beam": 1, "max_len_b": 30, "min_len": 30}
    assert model.translate("a b", seed=1, **sample) == model.translate("a b", seed=1, **sample)
    assert model.translate("a b", seed=1, **sample) != model.translate("a b", seed=2, **sample)


def test_generate_agrees_with_the_saved_output(shared):
    """H- lines of the original are score and hypothesis, P- lines the scores of tokens, both in base 2."""
    model = TransformerModel.from_pretrained(
        shared / "reference",
        "fairseq012_tiny.pt",
        "multi30k-databin",
        bpe="subword_nmt",
        bpe_codes="multi30k-databin/bpe.codes",
    )
    lines = (shared / "reference" / "fairseq012_tiny.generate.txt").read_text(encoding="utf-8").splitlines()
    saved = {line.split("\t")[0]: line.split("\t")[1:] for line in lines if re.match(r"[SHP]-\d+\t", line)}
    numbers = [n for n in range(40) if "<unk>" not in saved[f"S-{n}"][0] and "&" not in saved[f"S-{n}"][0]][:10]
    found = model.generate([saved[f"S-{n}"][0] for n in numbers], nbest=1)
    for number, translation in zip(numbers, found, strict=True):
        score, text = saved[f"H-{number}"]
        (best,) = translation.hypotheses
        assert (best.text, best.attention) == (text, None)
        assert best.score == pytest.approx(float(score), abs=1e-3)
        assert best.token_scores == pytest.approx([float(p) for p in saved[f"P-{number}"][0].split()], abs=1e-3)
        assert len(best.tokens) == len(best.token_scores) and best.tokens[-1] == "</s>"


def test_generate(directory):
    model = TransformerModel.from_pretrained(directory)
    assert (model.source_lang, model.target_lang) == ("xx", "yy")
    one = model.generate("a ? ? b", beam=3, max_len_b=9, print_alignment=True)
    assert one.source_tokens == ["a", "?", "?", "b", "</s>"] and one.unknown == ["?"]
    scores = [hypothesis.score for hypothesis in one.hypotheses]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    for hypothesis in one.hypotheses:
        assert hypothesis.score == pytest.approx(sum(hypothesis.token_scores) / len(hypothesis.tokens), abs=1e-5)
        assert hypothesis.attention.shape == (5, len(hypothesis.tokens))
        assert torch.allclose(hypothesis.attention.sum(0), torch.ones(len(hypothesis.tokens)))
    assert one.hypotheses[0].text == model.translate("a ? ? b", beam=3, max_len_b=9)
    several = model.generate(["a ? ? b", ""], beam=3, nbest=2, max_len_b=9)
    assert [h.score for h in several[0].hypotheses] == pytest.approx(scores[:2])
    assert several[1].source_tokens == ["</s>"] and several[1].hypotheses[0].text == ""
    assert len(model.generate("a " * 2000, truncate_source=True, max_source_positions=7, beam=1).source_tokens) == 7
    with pytest.raises(FairseqError, match="sentence 8: 3 tokens, and the model reads at most 2"):
        model.generate(["a", "b c"], ids=[7, 8], max_source_positions=2)
    with pytest.raises(FairseqError, match="'nbest' makes no difference"):
        model.translate("a", nbest=2)
    with pytest.raises(FairseqError, match="--nbest 3"):
        model.generate("a", beam=2, nbest=3)


def test_step_by_step(shared, reference):
    """What fairseq's users do by hand; the ids are the data-bin's, the translation the original's."""
    from fairseq.models.transformer import TransformerModel as FromTheOldPlace

    assert FromTheOldPlace is TransformerModel
    folder = shared / "reference"
    files = {"data_name_or_path": "multi30k-databin", "bpe_codes": "multi30k-databin/bpe.codes"}
    model = TransformerModel.from_pretrained(
        folder, "fairseq012_tiny.pt", bpe="subword_nmt", tokenizer="moses", **files
    )
    model.eval()
    source = next(s for n, (s, _) in sorted(reference.items()) if n > 20)
    number = next(n for n, (s, _) in reference.items() if s == source)
    words = model.tokenize(source)
    tokens = model.binarize(model.apply_bpe(words))
    assert tokens.tolist() == IndexedDataset(folder / "multi30k-databin/test.en-de.en")[number].tolist()
    assert model.encode(source).equal(tokens)
    found = model.generate(tokens, beam=5)
    best = found[0]
    assert len(found) == 5 and best["tokens"][-1] == 2 and best["attention"] is None
    assert best["score"] == pytest.approx(float(best["positional_scores"].mean()), abs=1e-6)  # lenpen 1
    assert model.remove_bpe(model.string(best["tokens"])) == reference[number][1]
    text = model.detokenize(reference[number][1])
    assert text == model.decode(best["tokens"]) == model.translate(source) != reference[number][1]
    both = model.generate([tokens, model.encode("a dog .")], beam=2, nbest=1)
    assert [len(hypotheses) for hypotheses in both] == [1, 1]
    for wrong in (tokens[None], tokens.float()):
        with pytest.raises(
            FairseqError, match=r"ids of one dimension as encode returns them, not torch.* of shape \(.*\)$"
        ):
            model.generate(wrong)


def test_files_where_fairseq_has_them(directory, tmp_path, monkeypatch):
    """Codes in the model's directory under their usual names; other paths from the working directory."""
    for name in ("bpecodes", "code"):
        place = directory / name
        place.write_text("a b 3\n")
        assert TransformerModel.from_pretrained(directory, bpe="fastbpe").apply_bpe("abc") == "ab@@ c"
        place.unlink()
    monkeypatch.chdir(directory)
    (directory / "codes").write_text("#version: 0.2\nb c</w>\n")
    (directory / "elsewhere").mkdir()
    shutil.move("model.pt", "elsewhere")
    model = TransformerModel.from_pretrained("elsewhere", data_name_or_path="bin", bpe="subword_nmt", bpe_codes="codes")
    assert model.apply_bpe("abc") == "a@@ bc"


def test_a_search_can_be_stopped(directory):
    model = TransformerModel.from_pretrained(directory)
    steps = []

    def check() -> None:
        steps.append(1)
        if len(steps) == 7:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        model.generate(["a b", "c"], min_len=500, max_len_b=900, check=check)
    assert len(steps) == 7
    longer = model.generate("a b", min_len=20, max_len_b=20, check=lambda: steps.append(1))
    assert len(steps) == 7 + 21  # on a CPU, every step
    assert longer.hypotheses[0].text == model.translate("a b", min_len=20, max_len_b=20)


def test_ensemble_absolute_data_path_and_languages(directory):
    write_toy_checkpoint(toy_model(2), directory / "other.pt")
    both = TransformerModel.from_pretrained(
        directory, "model.pt:other.pt", directory / "bin", source_lang="yy", target_lang="xx", tokenizer="moses"
    )
    assert len(both.models) == 2
    assert isinstance(both.translate("a b"), str)


class _State(dict):
    """A dict that can be seen to go."""


def test_of_an_ensemble_one_checkpoint_is_in_memory_at_a_time(directory, monkeypatch):
    read: list[weakref.ref] = []

    def load(path):
        assert all(state() is None for state in read)
        state = _State(load_checkpoint(path))
        read.append(weakref.ref(state))
        return state

    monkeypatch.setattr(translate, "load_checkpoint", load)
    models, first = translate.load_ensemble([str(directory / "model.pt")] * 3)
    assert len(models) == len(read) == 3
    assert "args" in first and not {"model", "last_optimizer_state"} & first.keys()


def test_moving_models(directory):
    model = TransformerModel.from_pretrained(directory)
    assert model.to(dtype=torch.bfloat16) is model
    assert next(model.models[0].parameters()).dtype == torch.bfloat16
    assert model.to("cpu").device == torch.device("cpu")
    assert isinstance(model.translate("a b"), str)


def test_overrides(directory):
    model = TransformerModel.from_pretrained(directory, activation_fn="gelu")
    assert model.models[0].cfg.activation_fn == "gelu"


def test_errors(directory):
    load = TransformerModel.from_pretrained
    with pytest.raises(FairseqError, match="no such file"):
        load(directory, "none.pt")
    with pytest.raises(FairseqError, match="'activation' is no setting of a Transformer"):
        load(directory, activation="gelu")
    with pytest.raises(FairseqError, match=r"no such data-bin|dict\.xx\.txt"):
        load(directory, data_name_or_path="nowhere")
    with pytest.raises(FairseqError, match="--bpe-codes"):
        load(directory, bpe="subword_nmt")
    model = load(directory)
    with pytest.raises(FairseqError, match="'lenpenalty' is no setting of the search"):
        model.translate("a", lenpenalty=1)
    with pytest.raises(FairseqError, match="--beam 0"):
        model.translate("a", beam=0)
    with pytest.raises(FairseqError, match="sentence 1: 1,025 tokens"):
        model.translate(["a", "b " * 1024])


def test_importing_models_is_light():
    code = (
        "import sys, fairseq.models; print([m for m in sys.modules if m.startswith('fairseq.') and 'models' not in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
