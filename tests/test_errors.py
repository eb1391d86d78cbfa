"""Each message in ``docs/errors.md``, caused by the command line that a user would type; none is left out."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fairseq.admin.profiling import profile
from fairseq.checkpoint import load_model
from fairseq.cli import average, clinic, export, generate, interactive, preprocess, score, train, validate
from fairseq.data.batching import BatchLimits, plan_batches
from fairseq.errors import FairseqError
from fairseq.generation.scoring import Scorer
from fairseq.models import TransformerModel
from fairseq.training.averaging import average_checkpoints, last_checkpoints
from tests.error_cases import CASES, ELSEWHERE, UNCAUSED, write_material
from tests.training_runs import ROOT, load_script

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (average, clinic, export, generate, interactive, preprocess, score, train, validate)
} | {"prepare_corpus": load_script("prepare_corpus")}
PYTHON = {
    "load": partial(TransformerModel.from_pretrained, ".", data_name_or_path="bin"),
    **{
        f.__name__: f
        for f in (Scorer, average_checkpoints, last_checkpoints, load_model, plan_batches, profile, BatchLimits)
    },
    "np": np,
}


def _documented() -> dict[str, int | None]:
    """Message -> exit status; None: it is raised."""
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \|.*\| (\d+|-) \|$", text, re.MULTILINE)
    assert len(rows) == len(dict(rows)) == len(re.findall(r"^\| `", text, re.MULTILINE))
    return {message: None if status == "-" else int(status) for message, status in rows}


DOCUMENTED = _documented()


def _start(message: str) -> str:
    """Its key in CASES, ELSEWHERE or UNCAUSED."""
    return max((start for start in (*CASES, *ELSEWHERE, *UNCAUSED) if message.startswith(start)), key=len, default="")


CAUSED = [message for message in DOCUMENTED if _start(message) in CASES]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("material")
    write_material(root)
    if importlib.util.find_spec("ctranslate2"):
        _write_ctranslate2(root)
    return root


def _write_ctranslate2(root: Path) -> None:
    export.main(shlex.split(f"{root}/toy.pt --data {root}/bin --output {root}/model.ct2 --format ctranslate2"))
    config = (root / "model.ct2" / "config.json").read_text()
    for name, file, text in (
        ("no_json", "config.json", "{"),
        ("other_json", "config.json", "[]"),
        ("no_words", "shared_vocabulary.json", "[1, []]"),
        ("no_positions", "config.json", config.replace('"max_source_positions": ', '"max_source_positions": -')),
        ("no_start", "config.json", config.replace('"decoder_start_token": "</s>"', '"decoder_start_token": 3')),
        ("other_words", "shared_vocabulary.json", '["<s>", "<pad>", "</s>", "<unk>"]'),
        ("empty", "model.bin", ""),
    ):
        directory = root / f"{name}.ct2"
        directory.mkdir()
        for path in (root / "model.ct2").iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        (directory / file).write_text(text)


def _names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")} - {"out"}  # where checkpoints would have been


def _pattern(message: str) -> str:
    return re.escape(message).replace(r"\*", ".*")


def check_error(status: int | None, message: str, code: object, err: str) -> None:
    """A command said the documented ``message`` in one line, and ended with its status."""
    lines = [line for line in err.splitlines() if " | " not in line]  # log lines, which have a time
    assert code == status, err
    assert "Traceback" not in err
    prefix, _, said = lines[-1].partition("error: ")
    assert re.fullmatch(_pattern(message), said), said
    assert len(lines) == 1 or (status == 2 and lines[0].startswith("usage: ")), err
    assert prefix == ("" if status == 1 else prefix)


@pytest.mark.parametrize("message", CAUSED)
def test_documented(material, monkeypatch, capsys, message):
    monkeypatch.chdir(material)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = _names(material)
    for case in CASES[_start(message)]:
        missing, _, line = case.rpartition(": ") if case.startswith("without ") else ("", "", case)
        for package in ("ctranslate2", "transformers"):
            if not missing and f"{package} " in f"{line} ".replace("huggingface", "transformers"):
                pytest.importorskip(package)
        shutil.rmtree("out", ignore_errors=True)
        command, *argv = shlex.split(line) if not line.startswith("python ") else line.split(" ", 1)
        if "PORT" in line:
            continue  # in processes of its own, below
        if command == "python":
            with pytest.raises(FairseqError) as raised:
                exec(argv[0], dict(PYTHON))
            assert re.fullmatch(_pattern(message), str(raised.value)), str(raised.value)
            continue
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
            if missing:
                _uninstall(patch, missing.removeprefix("without "))
            COMMANDS[command].main(argv)
        check_error(DOCUMENTED[message], message, exit_info.value.code, capsys.readouterr().err)
        assert _names(material) == before, line


def _uninstall(patch: pytest.MonkeyPatch, package: str) -> None:
    users = ("fairseq.interactive.server", "torch.utils.tensorboard")
    for name in [name for name in sys.modules if name.startswith((f"{package}.", *users))]:
        patch.delitem(sys.modules, name)
    patch.delattr("fairseq.interactive.server", raising=False)
    patch.setitem(sys.modules, package, None)


def test_every_case_is_documented():
    starts = (*CASES, *ELSEWHERE, *UNCAUSED)
    assert len(set(starts)) == len(starts)
    assert sorted(map(_start, DOCUMENTED)) == sorted(starts)
    for place in ELSEWHERE.values():
        file, test = place.split("::")
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), place


PROCESSES = ["* has * lines and", "checkpoint *: damaged", "--fp16 and --bf16", "--distributed-port", "--out-dir *"]


@pytest.mark.parametrize("start", PROCESSES)
def test_as_processes(material, start):
    [message] = [message for message in DOCUMENTED if _start(message) == start]
    before = _names(material)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        line = CASES[start][0].replace("PORT", str(busy.getsockname()[1]))
        command, *argv = shlex.split(line)
        result = subprocess.run(
            [sys.executable, "-m", f"fairseq.cli.{command}", *argv],
            cwd=material,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    check_error(DOCUMENTED[message], message, result.returncode, result.stderr)
    assert _names(material) == before


# -- every error of the package has a row

# Calls that say an error -> what comes before its text in the message
ERRORS = {"FairseqError": "", "error": "", "ArgumentTypeError": "argument *: "}
FORWARDED = {  # file, expression: texts that are made elsewhere
    ("options/commands.py", "str(error)"): "a FairseqError",
    ("training/distributed.py", "errors.get()"): "a FairseqError of another process",
}


def _template(node: ast.expr) -> str:
    """The text of an expression, ``*`` for what is known only at run time."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "*"


def _tabled(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and texts of the pairs (condition, text) in a function that raises what applies."""
    for node in ast.walk(function):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and "" != _template(node.elts[1]) != "*":
            yield node.lineno, _template(node.elts[1])


def _sites(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and templates of all errors that a file says."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    classes = {n.name for n in nodes if isinstance(n, ast.ClassDef) and "FairseqError" in map(_name, n.bases)}
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    for node in nodes:
        if not isinstance(node, ast.Call) or not (name := _name(node.func)) or name not in {*ERRORS, *classes}:
            continue
        if isinstance(node.func, ast.Attribute) and _name(node.func.value) == "logger":
            continue
        [argument] = node.args
        tabled: list[tuple[int, str]] = []
        if isinstance(argument, ast.Name):
            around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
            tabled = list(_tabled(around[-1])) if around else []
        if tabled:
            yield from tabled
        elif (path.relative_to(ROOT / "fairseq").as_posix(), ast.unparse(argument)) not in FORWARDED:
            yield node.lineno, ERRORS.get(name, "") + _template(argument)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_documented(template: str) -> bool:
    """Whether a row says it: as its pattern, or, where a row says more than the template, as an instance of it."""
    if any(re.fullmatch(_pattern(message), template) for message in DOCUMENTED):
        return True
    literal = max(template.split("*"), key=len)
    return len(literal) >= 10 and any(re.fullmatch(_pattern(template), message) for message in DOCUMENTED)


def test_every_error_is_documented():
    found = [(path, *site) for path in sorted((ROOT / "fairseq").rglob("*.py")) for site in _sites(path)]
    assert len(found) > 200
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {template}" for path, line, template in found if not _is_documented(template)
    ]
    assert not missing, "add rows to docs/errors.md:\n" + "\n".join(missing)
