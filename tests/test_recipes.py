"""The shell recipes: they explain themselves, call the commands in order with flags that exist, skip what is done."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.training_runs import flags_of

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [
    ROOT / "nmt-experiments" / f"{name}.sh"
    for name in ("multi30k_en-de", "iwslt14_de-en", "wmt14_en-de", "wmt14_en-fr", "tatoeba_de-en")
]
PREPARE = [
    ROOT / "scripts" / f"prepare_{name}.sh" for name in ("multi30k", "iwslt14", "wmt14_en-de", "wmt14_en-fr", "tatoeba")
]
# Stands in for every fairseq-* command: notes its arguments, makes the files that the next step needs.
STUB = """#!/usr/bin/env bash
set -eu
printf '%s' "${0##*/}" >> "$LOG"; printf '\\t%s' "$@" >> "$LOG"; echo >> "$LOG"
args=" $* "
value() { local rest=${args#* "$1" }; echo "${rest%% *}"; }
case "${0##*/} $args" in
    fairseq-preprocess*) mkdir -p "$(value --destdir)" ;;
    fairseq-train*adaptive-profiling*) echo "1 1.0" > "$(value --omega-file)" ;;
    fairseq-train*) for n in 1 2 3; do touch "$(value --save-dir)/checkpoint$n.pt"; done ;;
    fairseq-average*) touch "$(value --output)" ;;
    fairseq-generate*) printf 'H-1\\t-1\\tgut &amp; schön .\\nH-0\\t-1\\tja !\\nGenerate test: BLEU4 = 12.34\\n' ;;
    fairseq-score*) echo "BLEU = 56.78" ;;
esac
"""
# Stands in for Python where a recipe asks torch how many GPUs there are, which takes seconds; runs the rest.
PYTHON_STUB = """#!/usr/bin/env bash
if [[ $1 == -c && $2 == *"import torch"* ]]; then echo "0 "; else exec {python} "$@"; fi
"""


def bash(*args: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["bash", *map(str, args)]
    return subprocess.run(command, env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("script", [*RECIPES, *PREPARE], ids=lambda path: path.name)
def test_help_and_misuse(script: Path, tmp_path: Path) -> None:
    assert bash("-n", script).returncode == 0
    shown = bash(script, "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--data DIR" in shown.stdout and "shellcheck" not in shown.stdout
    wrong = bash(script, "--bogus", "1", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: --bogus: unknown option")
    absent = bash(script, "--data", tmp_path / "absent", "--out", tmp_path / "out")
    assert absent.returncode == 1 and "no such directory" in absent.stderr
    empty = bash(script, "--data", tmp_path, "--out", tmp_path / "out")
    assert empty.returncode == 1 and f"is in {tmp_path}" in empty.stderr


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """Environment with stand-ins for the commands, which write to tmp_path/log, and for Python."""
    (tmp_path / "bin").mkdir()
    commands = {f"fairseq-{name}": STUB for name in ("preprocess", "train", "average", "generate", "score")}
    for name, text in {**commands, "python": PYTHON_STUB.format(python=shlex.quote(sys.executable))}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    python = str(tmp_path / "bin" / "python")
    return {"PATH": path, "LOG": str(tmp_path / "log"), "PYTHON": python, "PRECISION": "--bf16"}


def calls(tmp_path: Path) -> list[list[str]]:
    return [line.split("\t") for line in (tmp_path / "log").read_text().splitlines()]


def multi30k(folder: Path) -> Path:
    """A tiny data set under Multi30k's file names."""
    folder.mkdir()
    for name in ("train", "val", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco"):
        for language in ("en", "de"):
            (folder / f"{name}.lc.norm.tok.{language}").write_text(f"a small {name} .\nabab abab {language}\n")
    return folder


def wmt14_en_de(folder: Path) -> Path:
    """A tiny data set under the names of WMT'14 English-German."""
    folder.mkdir()
    for corpus in ("europarl-v7", "commoncrawl", "news-commentary-v9"):
        for language in ("en", "de"):
            text = "".join(f"The well-known {corpus} number {n}.\n" for n in range(100))
            (folder / f"{corpus}.de-en.{language}").write_text(text)
    for name in ("src.en", "ref.de"):
        text = '<seg id="1">Ja!</seg>\n<seg id="2">Gut & schön.</seg>\n'
        (folder / f"newstest2014-deen-{name}.sgm").write_text(text)
    return folder


@pytest.mark.slow
def test_multi30k_recipe_of_each_model(tmp_path: Path, stubs: dict[str, str]) -> None:
    options = ["--data", multi30k(tmp_path / "data"), "--out", tmp_path / "out", "--workers", 1, "--epochs", 3]
    for model in ("admin", "postln", "preln"):
        result = bash(RECIPES[0], *options, "--model", model, "--layers", 2, "--", "--log-interval", 5, env=stubs)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("BLEU4 = 12.34") == 3
    commands = [call[0].removeprefix("fairseq-") for call in calls(tmp_path)]
    rest = ["average", "generate", "generate", "generate"]
    assert commands == ["preprocess", "train", "train", *rest, "train", *rest, "train", *rest]
    profile, admin, postln, preln = (" ".join(call) for call in calls(tmp_path) if call[0] == "fairseq-train")
    for call in (profile, admin, postln, preln):
        assert "--arch transformer_tiny --share-all-embeddings --dropout 0.3 --optimizer adam" in call
        assert "--encoder-layers 2 --decoder-layers 2 --max-tokens 4096" in call and "--log-interval 5" in call
    omega = f"--omega-file {tmp_path}/out/admin-2L-2L/profile.ratio.init"
    assert f"--init-type adaptive-profiling {omega}" in profile and "--bf16" not in profile
    assert f"--init-type adaptive {omega}" in admin and admin.endswith("--bf16")
    assert "--init-type default" in postln and "normalize-before" not in postln
    assert "--init-type default --encoder-normalize-before --decoder-normalize-before" in preln
    average = next(call for call in calls(tmp_path) if call[0] == "fairseq-average")
    assert average[average.index("--num-epoch-checkpoints") + 1] == "3"

    before = len(calls(tmp_path))
    again = bash(RECIPES[0], *options, "--layers", 2, "--", "--log-interval", 5, env=stubs, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("BLEU4 = 12.34") == 3
    assert len(calls(tmp_path)) == before
    longer = bash(RECIPES[0], *options, "--layers", 2, "--epochs", 4, "--", "--log-interval", 5, env=stubs)
    assert longer.returncode == 0
    assert [call[0].removeprefix("fairseq-") for call in calls(tmp_path)[before:]] == ["train", "train", *rest]


@pytest.mark.slow
def test_wmt14_recipe_and_its_flags(tmp_path: Path, stubs: dict[str, str]) -> None:
    options = ["--data", wmt14_en_de(tmp_path / "data"), "--out", tmp_path / "out", "--workers", 1]
    result = bash(RECIPES[2], *options, "--layers", 18, env=stubs | {"PYTHON": sys.executable})
    assert result.returncode == 0, result.stderr
    assert re.search(r"^== \d+ GPU\(s\) with --bf16$", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("Generate test: BLEU4 = 12.34\nBLEU = 56.78\n")
    run = tmp_path / "out" / "admin-18L-18L"
    assert (run / "hypotheses.txt").read_text() == "ja!\ngut & schön.\n"  # in order, detokenised
    assert (tmp_path / "out" / "text" / "test.raw.de").read_text() == "Ja!\nGut & schön.\n"
    assert (tmp_path / "out" / "text" / "valid.en").read_text().count("\n") == 3  # every 100th of 300
    for call in calls(tmp_path):
        assert {arg for arg in call[1:] if re.match(r"--?[a-z]", arg)} <= flags_of(call[0]), call[0]


@pytest.mark.slow
def test_tatoeba_recipe_of_every_model(tmp_path: Path, stubs: dict[str, str]) -> None:
    """From the zip file to one training a model, with its init type; the test set shares no English sentence."""
    (tmp_path / "data").mkdir()
    lines = [f"Sentence number {n}.\tSatz Nummer {n}, {k}.\tCC-BY" for n in range(200) for k in range(1 + n % 2)]
    with zipfile.ZipFile(tmp_path / "data" / "deu-eng.zip", "w") as archive:
        archive.writestr("deu.txt", "\n".join(lines) + "\n")
    options = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--workers", 1]
    models = ["admin", "closed-form", "rezero", "rezero_postln", "looklinear", "deepnet", "subln", "b2t"]
    for model in models:
        result = bash(RECIPES[4], *options, "--model", model, env=stubs)
        assert result.returncode == 0, result.stderr
    types = [call[call.index("--init-type") + 1] for call in calls(tmp_path) if call[0] == "fairseq-train"]
    assert types == ["adaptive-profiling", "adaptive", "adaptive-closed-form", *models[2:]]
    train = next(call for call in calls(tmp_path) if call[0] == "fairseq-train")
    assert {arg for arg in train[1:] if re.match(r"--?[a-z]", arg)} <= flags_of("fairseq-train")
    text = tmp_path / "out" / "text"
    parts = {part: (text / f"{part}.en").read_text().splitlines() for part in ("train", "valid", "test")}
    assert {part: len(set(lines)) for part, lines in parts.items()} == {"train": 196, "valid": 2, "test": 2}
    assert not set(parts["train"]) & set(parts["test"] + parts["valid"])
    wrong = bash(RECIPES[4], *options, "--model", "nothing", env=stubs)
    assert wrong.returncode == 2 and "--model nothing: unknown" in wrong.stderr
