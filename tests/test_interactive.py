"""``fairseq-interactive``: raw text in, translations out, a buffer at a time."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fairseq.cli.export import main as export
from fairseq.cli.generate import main as generate
from fairseq.cli.interactive import main
from tests.toys import toy_model, toy_sentences, write_toy_checkpoint, write_toy_databin

LIMIT = ("--max-len-b", "9", "--cpu")


@pytest.fixture
def toy(tmp_path) -> tuple[str, str]:
    """A data-bin and a checkpoint."""
    return str(write_toy_databin(tmp_path / "bin")), str(write_toy_checkpoint(toy_model(), tmp_path / "model.pt"))


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def fields(output: str, kind: str) -> list[list[str]]:
    return [line.split("\t") for line in output.splitlines() if line.startswith(kind + "-")]


def text_of(sentences: list[list[str]]) -> bytes:
    return "".join(" ".join(words) + "\n" for words in sentences).encode()


@pytest.mark.parametrize("buffer_size", ["0", "3", "100"])
def test_agrees_with_generate(toy, monkeypatch, capsys, buffer_size):
    databin, path = toy
    generate([databin, "--path", path, "--num-workers", "0", *LIMIT])
    expected = capsys.readouterr().out
    stdin(monkeypatch, text_of(toy_sentences(10, 0)))
    main([databin, "--path", path, "--buffer-size", buffer_size, *LIMIT])
    printed = capsys.readouterr().out
    assert [f[0] for f in fields(printed, "S")] == [f"S-{i}" for i in range(10)]
    assert sorted(fields(printed, "S")) == sorted(fields(expected, "S"))
    assert {f[0]: f[2] for f in fields(printed, "H")} == {f[0]: f[2] for f in fields(expected, "H")}


def test_ctranslate2(toy, monkeypatch, capsys, tmp_path):
    pytest.importorskip("ctranslate2", reason="pip install -e .[export]")
    databin, path = toy
    export([path, "--data", databin, "--format", "ctranslate2", "--output", str(tmp_path / "out")])
    printed = []
    for backend, model in (("native", path), ("ctranslate2", str(tmp_path / "out"))):
        stdin(monkeypatch, text_of(toy_sentences(6, 0)) + b"\n")
        capsys.readouterr()
        main([databin, "--backend", backend, "--path", model, "--buffer-size", "4", "--print-alignment", *LIMIT])
        printed.append(capsys.readouterr().out)
    native, other = printed
    assert len(fields(native, "A")) == len(fields(other, "A")) == 7
    for kind in "SHDPA":
        for a, b in zip(fields(native, kind), fields(other, kind), strict=True):
            assert [x for x in a if "." not in x] == [x for x in b if "." not in x]  # all but scores
    scores = [[float(f[1]) for f in fields(text, "H")] for text in printed]
    assert scores[0] == pytest.approx(scores[1], abs=2e-4)
    with pytest.raises(SystemExit):
        main([databin, "--backend", "ctranslate2", "--path", str(tmp_path / "out"), "--unkpen", "1"])
    assert "--backend ctranslate2 does not have --unkpen" in capsys.readouterr().err


def test_source_lines_have_the_models_tokens(toy, tmp_path, monkeypatch, capsys):
    databin, path = toy
    dictionary = tmp_path / "bin" / "dict.xx.txt"
    dictionary.write_text(dictionary.read_text().replace("a ", "a@@ ", 1))
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\nd e</w>\n")
    for flags, expected in (((), "a@@ b c"), (("--remove-bpe",), "ab c")):  # fairseq-generate alone has plain text here
        stdin(monkeypatch, b"ab c\n")
        main([databin, "--path", path, "--bpe", "subword_nmt", "--bpe-codes", str(codes), *flags, *LIMIT])
        assert fields(capsys.readouterr().out, "S") == [["S-0", expected]]


def test_order_of_lines_and_blank_lines(toy, monkeypatch, capsys):
    databin, path = toy
    stdin(monkeypatch, b"a b c\n\n   \nd e")
    main([databin, "--path", path, "--nbest", "2", "--print-alignment", "--buffer-size", "9", *LIMIT])
    printed = capsys.readouterr().out
    heads = [line.split("\t")[0] for line in printed.splitlines()]
    kinds = {i: "".join(h[0] for h in heads if h.endswith(f"-{i}")) for i in range(4)}
    assert kinds == {0: "SWHDPAHDPA", 1: "SWHDPA", 2: "SWHDPA", 3: "SWHDPAHDPA"}
    assert fields(printed, "H")[2:4] == [["H-1", "0.0", ""], ["H-2", "0.0", ""]]
    assert re.fullmatch(r"W-0\t\d+\.\d{3}\tseconds", next(line for line in printed.splitlines() if line[0] == "W"))


def test_padding_side_changes_nothing(toy, monkeypatch, capsys):
    databin, path = toy
    printed = []
    for left in ("True", "False"):
        stdin(monkeypatch, text_of(toy_sentences(6, 0)))
        main([databin, "--path", path, "--buffer-size", "6", "--left-pad-source", left, *LIMIT])
        printed.append([f[2] for f in fields(capsys.readouterr().out, "H")])
    assert printed[0] == printed[1]


def test_input_file_unknown_words_and_windows_line_ends(toy, capsys, tmp_path):
    databin, path = toy
    (tmp_path / "in.txt").write_bytes("a zebra b\r\nüber\r\n".encode())
    arguments = [databin, "--path", path, "--input", str(tmp_path / "in.txt"), *LIMIT, "--unkpen", "-30"]
    main(arguments)
    printed = capsys.readouterr().out
    assert fields(printed, "S") == [["S-0", "a <unk> b"], ["S-1", "<unk>"]]
    assert "<unk>" in fields(printed, "H")[1][2]
    main([*arguments, "--replace-unk"])
    assert "über" in fields(capsys.readouterr().out, "H")[1][2]


def test_each_buffer_is_flushed(toy, monkeypatch, capsys):
    databin, path = toy
    stdin(monkeypatch, b"a b\nc d\ne f\n")
    flushed: list[int] = []
    real = sys.stdout

    class Recorder(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue().count("S-"))

    monkeypatch.setattr(sys, "stdout", Recorder())
    main([databin, "--path", path, "--buffer-size", "2", *LIMIT])
    monkeypatch.setattr(sys, "stdout", real)
    assert flushed[:2] == [2, 3]


@pytest.mark.slow
def test_raw_text_through_tokeniser_and_bpe(shared, monkeypatch, capsys):
    """The original's own test set from its plain words gives the saved hypotheses."""
    reference = shared / "reference"
    saved = (reference / "fairseq012_tiny.generate.txt").read_text(encoding="utf-8").splitlines()
    sources = dict(line[2:].split("\t") for line in saved if line.startswith("S-"))
    expected = {f[0][2:]: f[2] for f in (line.split("\t") for line in saved if line.startswith("H-"))}
    numbers = [i for i in sorted(sources, key=int) if "&" not in sources[i] and "<unk>" not in sources[i]][:40]
    stdin(monkeypatch, text_of([sources[i].split() for i in numbers]))
    databin, path = str(reference / "multi30k-databin"), str(reference / "fairseq012_tiny.pt")
    codes = str(reference / "multi30k-databin" / "bpe.codes")
    arguments = ["--tokenizer", "space", "--bpe", "subword_nmt", "--bpe-codes", codes, "--buffer-size", "40", "--cpu"]
    main([databin, "--path", path, *arguments])
    printed = capsys.readouterr().out
    assert [f[2] for f in fields(printed, "D")] == [expected[i] for i in numbers]


# -- errors


def assert_fails(capsys: pytest.CaptureFixture[str], status: int, message: str, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([*argv, "--cpu"])
    assert exit_info.value.code == status
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    return printed.out


def test_invalid_utf8_names_the_line(toy, monkeypatch, capsys):
    databin, path = toy
    stdin(monkeypatch, b"a b\nc\n\xff\xfe\nd\n")
    out = assert_fails(
        capsys, 1, "standard input, line 3: not valid UTF-8", databin, "--path", path, "--buffer-size", "9"
    )
    assert [f[0] for f in fields(out, "S")] == ["S-0", "S-1"]  # what came before is not lost


def test_too_long_lines(toy, monkeypatch, capsys, tmp_path):
    databin, path = toy
    content = b"a b\n" + b"c " * 1024 + b"\nd\n"
    stdin(monkeypatch, content)
    assert_fails(capsys, 1, "line 2: 1,025 tokens, and the model reads at most 1,024", databin, "--path", path)
    stdin(monkeypatch, content)
    main([databin, "--path", path, "--skip-invalid-size-inputs-valid-test", *LIMIT])
    assert [f[0] for f in fields(capsys.readouterr().out, "S")] == ["S-0", "S-2"]
    stdin(monkeypatch, content)
    main([databin, "--path", path, "--truncate-source", *LIMIT])
    assert fields(capsys.readouterr().out, "S")[1] == ["S-1", " ".join("c" * 1023)]


def test_missing_input_and_references(toy, monkeypatch, capsys):
    databin, path = toy
    assert_fails(capsys, 1, "--input nowhere: cannot read", databin, "--path", path, "--input", "nowhere")
    assert_fails(capsys, 1, "--bpe-codes", databin, "--path", path, "--bpe", "subword_nmt")
    assert_fails(capsys, 2, "--path FILE is missing", databin)


def test_flags_that_would_do_nothing_are_usage_errors(toy, capsys):
    databin, path = toy
    needs_databin = ["--gen-subset=test", "--num-workers=2", "--required-batch-size-multiple=8", "--num-shards=2"]
    needs_references = ["--prefix-size=1", "--score-reference", "--scoring=bleu", "--quiet"]
    needs_progress = ["--log-format=none", "--log-interval=1", "--no-progress-bar"]
    for flag in [*needs_databin, *needs_references, *needs_progress, "--max-target-positions=9"]:
        assert_fails(capsys, 2, f"unrecognized arguments: {flag}", databin, "--path", path, flag)


def test_no_input_at_all(toy, monkeypatch, capsys):
    databin, path = toy
    stdin(monkeypatch, b"")
    main([databin, "--path", path, *LIMIT])
    assert capsys.readouterr().out == ""
