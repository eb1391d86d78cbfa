"""``fairseq-generate``: the originals' saved output, and the command's promises on a small random model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.checkpoint import load_model
from fairseq.cli.generate import main
from fairseq.data.dictionary import Dictionary
from fairseq.data.indexed_dataset import IndexedDataset
from fairseq.errors import FairseqError
from fairseq.generation import translate
from fairseq.generation.beam_search import Sources
from fairseq.generation.history import Hypothesis
from fairseq.generation.output import TextFormat, hard_alignment, load_alignment_dictionary
from fairseq.generation.translate import batch_limits, translate_ids
from fairseq.options import GenerationConfig
from tests.toys import VOCAB, toy_dictionary, toy_model, write_toy_checkpoint, write_toy_databin

Run = Callable[..., list[str]]


@pytest.fixture
def run(capsys) -> Run:
    """Run the command on the CPU in this process; returns the lines it printed."""

    def run(*argv: object) -> list[str]:
        main([*map(str, argv), "--cpu", "--num-workers", "0"])
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def toy(tmp_path) -> tuple[Path, Path]:
    """A data-bin and a checkpoint."""
    return write_toy_databin(tmp_path / "bin"), write_toy_checkpoint(toy_model(), tmp_path / "model.pt")


def parse(lines: list[str]) -> dict[str, dict[int, list[list[str]]]]:
    """kind -> sentence -> the other fields of each of its lines."""
    found: dict[str, dict[int, list[list[str]]]] = {}
    for line in lines:
        if match := re.match(r"([A-Z])-(\d+)\t", line):
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(line.split("\t")[1:])
    return found


def assert_equal_output(a: list[str], b: list[str]) -> None:
    """The same lines in any order; scores to float32 accuracy, since sums over padded batches differ in rounding."""
    left, right = parse(a), parse(b)
    assert [line for line in a if line.startswith("Generate")] == [line for line in b if line.startswith("Generate")]
    for kind in left.keys() | right.keys():
        assert left[kind].keys() == right[kind].keys()
        for i, fields in left[kind].items():
            for x, y in zip(fields, right[kind][i], strict=True):
                assert x[1:] == y[1:]
                if kind in "HDP":
                    values = [[float(word) for word in line[0].split()] for line in (x, y)]
                    assert values[0] == pytest.approx(values[1], abs=1.1e-4)
                else:
                    assert x == y


# -- the originals' output


def assert_same_output(ours: list[str], theirs: list[str], their_base: float) -> None:
    """Same sentences and hypotheses; scores, converted to base 2, to 1e-3; positional ones to the printed digits."""
    found, expected = parse(ours), parse(theirs)
    scale = math.log(their_base, 2)
    for kind in "ST":
        assert found[kind] == expected[kind]
    assert found["H"].keys() == expected["H"].keys()
    for i, [[score, text]] in expected["H"].items():
        [[our_score, our_text]] = found["H"][i]
        assert our_text == text
        assert float(our_score) == pytest.approx(float(score) * scale, abs=1e-3)
        assert found["D"][i] == found["H"][i]
        positional = [float(x) * scale for x in expected["P"][i][0][0].split()]
        assert [float(x) for x in found["P"][i][0][0].split()] == pytest.approx(positional, abs=3e-4)


@pytest.mark.slow
def test_fairseq_08_reference(shared, run):
    reference = shared / "reference"
    lines = run(
        reference / "multi30k-databin-test200",
        *("--path", reference / "fairseq08_postln_3x3.pt", "--batch-size", 128, "--remove-bpe", "subword_nmt"),
    )
    theirs = (reference / "fairseq08_postln_3x3.generate200.txt").read_text(encoding="utf-8").splitlines()
    assert_same_output(lines, theirs, math.e)
    assert lines[-1] == theirs[-1].removeprefix("| ")
    assert "BLEU4 = 27.36" in lines[-1]


@pytest.mark.slow
def test_fairseq_012_reference(shared, run):
    reference = shared / "reference"
    databin, path = reference / "multi30k-databin", reference / "fairseq012_tiny.pt"
    lines = run(databin, "--path", path, "--batch-size", 100, "--remove-bpe", "subword_nmt")
    theirs = (reference / "fairseq012_tiny.generate.txt").read_text(encoding="utf-8").splitlines()
    assert_same_output(lines, theirs, 2)
    assert lines[-1] == theirs[-1]
    assert "BLEU4 = 33.07" in lines[-1]


# A-42 of fairseq 0.12.2, "people sit inside a train .", a line for each of "personen sitzen in einem zug . </s>"
SOFT = """
0.941015,0.031526,0.003529,0.010216,0.009058,0.002383,0.002273
0.002539,0.893822,0.067256,0.006006,0.011679,0.008838,0.009859
0.005658,0.014934,0.534417,0.130111,0.111178,0.102263,0.101438
0.024813,0.044674,0.033700,0.486348,0.284155,0.062286,0.064023
0.000563,0.008495,0.006901,0.019398,0.912678,0.029115,0.022850
0.003030,0.005932,0.067172,0.030962,0.025980,0.394310,0.472613
0.024391,0.012013,0.026041,0.051758,0.022297,0.406845,0.456655
"""


def test_soft_alignment(shared, run):
    reference = shared / "reference"
    one = ("--batch-size", 1, "--num-shards", 200, "--shard-id", 0, "--beam", 1)  # the shortest
    lines = run(
        reference / "multi30k-databin-test200",
        "--path",
        reference / "fairseq012_tiny.pt",
        *one,
        "--print-alignment",
        "soft",
    )
    [[found]] = parse(lines)["A"][42]
    ours, theirs = ([[float(x) for x in word.split(",")] for word in text.split()] for text in (found, SOFT))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_original_admin_checkpoint_generates_without_omega_file(shared, run):
    reference = shared / "reference"
    path = reference / "fairseq08_admin_1x1_full.pt"
    databin = reference / "multi30k-databin-test200"
    lines = run(databin, "--path", path, "--beam", 2, "--max-len-b", 3, "--num-shards", 4)
    hypotheses = parse(lines)["H"]
    assert hypotheses
    assert all(math.isfinite(float(score)) for [[score, _]] in hypotheses.values())


# -- the command on a small model


def test_lines_and_their_order(toy, run):
    databin, path = toy
    lines = run(databin, "--path", path, "--nbest", 2, "--max-len-b", 10, "--print-alignment")
    kinds = [line[0] for line in lines[:-1]]
    assert kinds == list("ST" + "HDPA" * 2) * 10
    assert re.fullmatch(r"Generate test with beam=5: BLEU4 = .*", lines[-1])
    found = parse(lines)
    for i in range(10):
        scores = [float(score) for score, _ in found["H"][i]]
        assert scores == sorted(scores, reverse=True)
        for (score, text), [positional], [pairs] in zip(found["H"][i], found["P"][i], found["A"][i], strict=True):
            values = [float(x) for x in positional.split()]
            assert float(score) == pytest.approx(sum(values) / len(values), abs=1e-4)
            assert float(np.float32(score)) == float(score)
            assert len(values) == len(text.split()) + 1
            assert [int(pair.split("-")[1]) for pair in pairs.split()] == list(range(len(text.split())))
            assert all(int(pair.split("-")[0]) < len(found["S"][i][0][0].split()) for pair in pairs.split())
    assert "<<unk>>" in "".join(text for [[text]] in found["T"].values())  # a reference's unknown word matches nothing
    assert "<<unk>>" not in "".join(text for [[text]] in found["S"].values())


def test_every_sentence_once_and_the_same_whatever_the_batch(toy, run):
    databin, path = toy
    arguments = (databin, "--path", path, "--max-len-a", 1.2, "--max-len-b", 3)
    expected = run(*arguments)
    assert sorted(parse(expected)["H"]) == list(range(10))
    for size in (1, 3, 8):
        assert_equal_output(run(*arguments, "--batch-size", size), expected)
    assert_equal_output(run(*arguments, "--max-tokens", 9, "--required-batch-size-multiple", 1), expected)


def test_shards_are_a_partition(toy, run):
    databin, path = toy
    arguments = (databin, "--path", path, "--batch-size", 2, "--required-batch-size-multiple", 1, "--max-len-b", 4)
    shards = [parse(run(*arguments, "--num-shards", 3, "--shard-id", i))["H"] for i in range(3)]
    assert sorted(i for shard in shards for i in shard) == list(range(10))
    empty = run(*arguments, "--num-shards", 9, "--shard-id", 8)
    assert empty == []


def test_quiet_prints_the_score_alone(toy, run):
    databin, path = toy
    [line] = run(databin, "--path", path, "--quiet", "--max-len-b", 9)
    assert line == run(databin, "--path", path, "--max-len-b", 9)[-1]


def test_scorers(toy, run):
    databin, path = toy
    [line] = run(databin, "--path", path, "--quiet", "--sacrebleu")
    assert [line] == run(databin, "--path", path, "--quiet", "--scoring", "sacrebleu")
    assert line.startswith("Generate test with beam=5: BLEU|") and "tok:13a" in line
    [line] = run(databin, "--path", path, "--quiet", "--scoring", "chrf")
    assert "chrF2|" in line


def test_batches_shrink_as_the_beam_widens(toy, run, monkeypatch):
    """What fills the memory is hypotheses: with a beam of 20,000 one sentence at a time, unless flags say else."""
    assert batch_limits(None, None, 5) == (12000, 2400)
    assert batch_limits(None, None, 20000) == (12000, 1)
    assert batch_limits(None, 64, 20000) == (None, 64)
    databin, path = toy
    arguments = (databin, "--path", path, "--required-batch-size-multiple", 1, "--max-len-b", 9)
    expected = run(*arguments)
    monkeypatch.setattr(translate, "DEFAULT_MAX_ROWS", 15)
    sizes: list[int] = []
    search = translate.search_batches

    def watched(models: object, sources: Iterable[Sources], *rest: object, **settings: object) -> object:
        return search(models, (sizes.append(len(s.ids)) or s for s in sources), *rest, **settings)

    monkeypatch.setattr(translate, "search_batches", watched)
    assert_equal_output(run(*arguments), expected)
    assert max(sizes) == 3


def test_results_path(toy, run, tmp_path):
    databin, path = toy
    arguments = (databin, "--path", path, "--max-len-b", 9)
    expected = run(*arguments)
    assert run(*arguments, "--results-path", tmp_path / "out") == expected[-1:]
    assert (tmp_path / "out" / "generate-test.txt").read_text(encoding="utf-8").splitlines() == expected
    run(*arguments, "--results-path", tmp_path / "out", "--num-shards", 2, "--shard-id", 1)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["generate-test.shard1.txt", "generate-test.txt"]


def test_score_reference(toy, run):
    databin, path = toy
    found = parse(run(databin, "--path", path, "--score-reference"))
    model = load_model(path).double()
    source, target = (IndexedDataset(databin / f"test.xx-yy.{language}") for language in ("xx", "yy"))
    for i in range(10):
        src, tgt = (torch.from_numpy(side[i].astype(np.int64))[None] for side in (source, target))
        prev = torch.cat([torch.tensor([[2]]), tgt[:, :-1]], dim=1)
        lprobs = model(src, None, prev)[0].log_softmax(-1).gather(2, tgt[:, :, None])[0, :, 0] / math.log(2)
        [[score, text]] = found["H"][i]
        assert text == found["T"][i][0][0].replace("<<unk>>", "<unk>")
        assert float(score) == pytest.approx(lprobs.mean().item(), abs=1e-5)
        assert [float(x) for x in found["P"][i][0][0].split()] == pytest.approx(lprobs.tolist(), abs=6e-5)


def test_prefix_is_the_references(toy, run):
    databin, path = toy
    found = parse(run(databin, "--path", path, "--prefix-size", 2, "--max-len-b", 6))
    for i, [[_, text]] in found["H"].items():
        target = found["T"][i][0][0].replace("<<unk>>", "<unk>").split()
        assert text.split()[:2] == target[:2]
        if len(target) < 2:
            assert text.split() == target


def test_ensemble_and_repeated_sampling(toy, run, tmp_path):
    databin, path = toy
    other = write_toy_checkpoint(toy_model(2), tmp_path / "other.pt")
    alone, both = (run(databin, "--path", p, "--max-len-b", 9) for p in (path, f"{path}:{other}"))
    assert parse(alone)["H"] != parse(both)["H"]
    assert_equal_output(run(databin, "--path", f"{path}:{path}", "--max-len-b", 9), alone)
    sampling = (databin, "--path", path, "--sampling", "--sampling-topk", 5, "--beam", 1, "--max-len-b", 9)
    assert_equal_output(run(*sampling, "--seed", 3), run(*sampling, "--seed", 3, "--batch-size", 8))
    assert run(*sampling, "--seed", 3) != run(*sampling, "--seed", 4)


def test_languages_from_flags_checkpoint_or_databin(toy, run, tmp_path, capsys):
    databin, path = toy
    arguments = ("--path", path, "--max-len-b", 5)
    expected = run(databin, *arguments)
    assert run(databin, *arguments, "-s", "xx", "-t", "yy") == expected
    with pytest.raises(SystemExit):
        run(databin, *arguments, "-s", "yy", "-t", "xx")
    assert "swap --source-lang and --target-lang" in capsys.readouterr().err
    model = toy_model()
    write_toy_checkpoint(model, tmp_path / "nolang.pt")
    state = torch.load(tmp_path / "nolang.pt", weights_only=False)
    state["args"].source_lang = state["args"].target_lang = None
    torch.save(state, tmp_path / "nolang.pt")
    arguments = ("--path", tmp_path / "nolang.pt", "--max-len-b", 5)
    assert run(databin, *arguments) == expected
    swapped = parse(run(databin, *arguments, "-s", "yy", "-t", "xx"))
    assert swapped["S"] == {i: [[t[0][0].replace("<<unk>>", "<unk>")]] for i, t in parse(expected)["T"].items()}


def test_no_target_side(run, tmp_path):
    databin = write_toy_databin(tmp_path / "bin", only_source=True)
    path = write_toy_checkpoint(toy_model(), tmp_path / "model.pt")
    lines = run(databin, "--path", path, "--max-len-b", 5)
    assert {line[0] for line in lines} == set("SHDP")


def test_bf16(toy, run):
    databin, path = toy
    found = parse(run(databin, "--path", path, "--max-len-b", 9, "--bf16"))
    assert all(math.isfinite(float(score)) for [[score, _]] in found["H"].values())


# -- unknown words and alignment


def hypothesis(tokens: list[int], attention: list[list[float]]) -> Hypothesis:
    return Hypothesis(torch.tensor(tokens), -1.0, torch.zeros(len(tokens)), torch.tensor(attention))


def test_hard_alignment_and_unknown_words():
    words = toy_dictionary()
    # attention: (source a ? b </s>, target <unk> c </s>); </s> is never aligned to
    found = hypothesis([3, words.index("c"), 2], [[0.1, 0.4, 0.0], [0.3, 0.2, 0.1], [0.2, 0.1, 0.1], [0.4, 0.3, 0.8]])
    assert hard_alignment(found) == [(1, 0), (0, 1)]
    text = TextFormat(words, words)
    assert text.hypothesis(found, ["a", "?", "b"]) == "<unk> c"
    text.alignment_dictionary = {}
    assert text.hypothesis(found, ["a", "?", "b"]) == "? c"
    text.alignment_dictionary = {"?": "!"}
    assert text.hypothesis(found, ["a", "?", "b"]) == "! c"
    assert hard_alignment(hypothesis([4, 2], [[1.0, 1.0]])) == []


def test_replace_unk(toy, run, tmp_path):
    databin, path = toy
    arguments = (databin, "--path", path, "--unkpen", -9, "--max-len-b", 5)
    assert any("<unk>" in text for [[_, text]] in parse(run(*arguments))["H"].values())
    (tmp_path / "words.txt").write_text("".join(f"{w} {w.upper()}\n" for w in "abcdefghijkl") + "<unk> U\n")
    found = parse(run(*arguments, "--replace-unk", tmp_path / "words.txt"))["H"]
    assert all("<unk>" not in text and text.upper() != text.lower() for [[_, text]] in found.values())
    assert run(*arguments, "--replace-unk")  # without a file: the source's words as they are


def test_alignment_dictionary_errors(tmp_path):
    with pytest.raises(FairseqError, match="cannot read"):
        load_alignment_dictionary(str(tmp_path / "none"))
    (tmp_path / "bad").write_text("a b\nc\n")
    with pytest.raises(FairseqError, match="line 2"):
        load_alignment_dictionary(str(tmp_path / "bad"))


def test_lines_by_hand():
    words = toy_dictionary()
    text = TextFormat(words, words, decode=str.upper, decode_source=str.title, print_alignment="hard")
    ids = torch.tensor([words.index("b"), 3, 2])
    found = Hypothesis(ids, -math.log(2), torch.tensor([-1.0, -2.0, -0.5]), torch.eye(3))
    assert text.hypothesis_lines(7, found, ["a", "?"]) == [
        "H-7\t-1.0\tb <unk>",
        "D-7\t-1.0\tB <UNK>",
        "P-7\t-1.4427 -2.8854 -0.7213",
        "A-7\t0-0 1-1",
    ]
    soft = replace(text, print_alignment="soft").hypothesis_lines(7, found, ["a", "?"])
    assert soft[-1] == "A-7\t1.000000,0.000000,0.000000 0.000000,1.000000,0.000000 0.000000,0.000000,1.000000"
    assert text.source(ids) == "B <Unk>"
    assert text.target(ids) == "B <<UNK>>"


def test_detokeniser(toy, run):
    databin, path = toy
    plain, decoded = (parse(run(databin, "--path", path, "--max-len-b", 6, *t)) for t in ((), ("--tokenizer", "moses")))
    assert plain["H"] == decoded["H"]
    assert decoded["D"].keys() == plain["D"].keys()


# -- batches of raw ids


def test_translate_ids_keeps_order_and_limits():
    model = toy_model()
    sentences = [torch.tensor([*range(4, 4 + n), 2]) for n in (5, 0, 2, 7, 1, 0)]
    cfg = GenerationConfig(max_len_b=6)
    expected = translate_ids([model], sentences, cfg)
    assert [len(t.src_tokens) for t in expected] == [6, 1, 3, 8, 2, 1]
    for i in (1, 5):
        assert expected[i].hypotheses[0].tokens.tolist() == [2]
        assert expected[i].hypotheses[0].score == 0
    for limits in ({"max_tokens": 8}, {"max_tokens": 1}, {"batch_size": 2}):
        found = translate_ids([model], sentences, cfg, ids=[9, 8, 7, 6, 5, 4], **limits)
        assert [t.id for t in found] == [9, 8, 7, 6, 5, 4]
        tokens = [[h.tokens.tolist() for t in ts for h in t.hypotheses] for ts in (found, expected)]
        assert tokens[0] == tokens[1]
    assert translate_ids([model], [], cfg) == []


# -- errors


def assert_fails(capsys, status: int, message: str, *argv: object) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, argv), "--cpu", "--num-workers", "0"])
    assert exit_info.value.code == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert len([line for line in printed.err.splitlines() if "error: " in line]) == 1


def test_errors_are_one_line(toy, capsys, tmp_path):
    databin, path = toy
    fails: list[tuple[object, ...]] = [
        ("no such file", databin, "--path", tmp_path / "none.pt"),
        ("name a checkpoint", databin, "--path", f"{path}:"),
        ("no split 'dev'", databin, "--path", path, "--gen-subset", "dev"),
        ("--shard-id 2", databin, "--path", path, "--num-shards", 2, "--shard-id", 2),
        ("'layers' is no setting", databin, "--path", path, "--model-overrides", '{"layers": 2}'),
        ("--replace-unk", databin, "--path", path, "--replace-unk", tmp_path / "none"),
        ("--max-source-positions 3", databin, "--path", path, "--max-source-positions", 3),
    ]
    for message, *argv in fails:
        assert_fails(capsys, 1, str(message), *argv)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert_fails(capsys, 1, "damaged or not a checkpoint", databin, "--path", tmp_path / "junk.pt")


def test_usage_errors(toy, capsys):
    databin, path = toy
    assert_fails(capsys, 2, "--path FILE is missing", databin)
    assert_fails(capsys, 2, "--beam 0", databin, "--path", path, "--beam", 0)
    assert_fails(capsys, 2, "--nbest 9", databin, "--path", path, "--nbest", 9)
    assert_fails(capsys, 2, "--batch-size", databin, "--path", path, "--batch-size", 0)
    assert_fails(capsys, 2, "--prefix-size: -1", databin, "--path", path, "--prefix-size", -1)
    assert_fails(capsys, 2, "--fp16 needs a GPU", databin, "--path", path, "--fp16", "--cpu")
    assert_fails(capsys, 2, "contradict", databin, "--path", path, "--fp16", "--bf16")
    assert_fails(capsys, 2, "--beem", databin, "--path", path, "--beem", 3)


def test_dictionaries_must_fit_the_checkpoint(toy, capsys):
    databin, path = toy
    Dictionary.build({f"w{i}": 1 for i in range(VOCAB)}).save(databin / "dict.yy.txt")
    assert_fails(capsys, 1, "target dictionary of 16 entries", databin, "--path", path)


def test_ensemble_of_other_data(toy, capsys, shared):
    databin, path = toy
    other = shared / "reference" / "fairseq012_tiny.pt"
    assert_fails(capsys, 1, "an ensemble needs models of the same data", databin, "--path", f"{path}:{other}")


def test_failure_leaves_no_results(toy, capsys, tmp_path):
    databin, _ = toy
    model = toy_model()
    with torch.no_grad():
        model.decoder.output_projection.weight.fill_(math.nan)
    path = write_toy_checkpoint(model, tmp_path / "nan.pt")
    assert_fails(capsys, 1, "not finite", databin, "--path", path, "--results-path", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_too_long_sentences_are_left_out_on_request(toy, run):
    databin, path = toy
    arguments = ("--max-source-positions", 5, "--max-target-positions", 5, "--max-len-b", 4)
    found = parse(run(databin, "--path", path, *arguments, "--skip-invalid-size-inputs-valid-test"))
    sizes = [np.asarray(IndexedDataset(databin / f"test.xx-yy.{language}").sizes) for language in ("xx", "yy")]
    assert sorted(found["H"]) == np.flatnonzero(np.maximum(*sizes) <= 5).tolist()
