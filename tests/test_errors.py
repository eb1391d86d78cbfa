"""Each message in ``docs/errors.md``, caused by the command line that a user would type."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq.cli import clinic, generate, interactive, preprocess, score, train, validate
from tests.toys import toy_model, write_toy_checkpoint, write_toy_databin
from tests.training_runs import ROOT, TINY

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (clinic, generate, interactive, preprocess, score, train, validate)
}
TRAIN = shlex.join(TINY) + " --save-dir out"
# The beginning of a documented message -> command lines in a directory of `_material`'s files
CASES = {
    "* has * lines and": ["preprocess -s xx -t yy --trainpref short --destdir out"],
    "*, line *: not UTF-8": [
        f"preprocess -s xx -t yy --trainpref {name} --destdir out" for name in ("latin", "binary")
    ],
    "*: the file is empty": ["preprocess -s xx -t yy --trainpref empty --destdir out"],
    "*: cannot read: *": [
        "preprocess -s xx -t yy --trainpref nowhere --destdir out",
        "interactive bin --path toy.pt --cpu --input bin",
        "score --sys nowhere --ref good.xx",
    ],
    "*: begins with a byte order mark": [
        "preprocess -s xx -t yy --trainpref bom --destdir out",
        "preprocess -s xx -t yy --trainpref good --srcdict bom.xx --destdir out",
        "interactive bin --path toy.pt --cpu --input bom.xx",
        "score --sys bom.xx --ref bom.xx",
    ],
    "*: cannot write: *": ["preprocess -s xx -t yy --trainpref good --destdir good.xx/out"],
    "give the source language": ["preprocess -t yy --trainpref good --destdir out"],
    "nothing to do": ["preprocess -s xx -t yy --destdir out"],
    "*: another dictionary is there": ["preprocess -s xx -t yy --trainpref good --destdir bin"],
    "*, line *: '*' is not 'token count'": ["preprocess -s xx -t yy --trainpref good --srcdict good.xx --destdir out"],
    "*, line *: '*' is in the dictionary": ["preprocess -s xx -t yy --trainpref good --srcdict twice --destdir out"],
    "*: the dictionary is empty": ["preprocess -s xx -t yy --trainpref good --srcdict empty.xx --destdir out"],
    "*, line *: more than": ["preprocess -s xx -t yy --trainpref good --srcdict long --destdir out"],
    "*: cannot read the dictionary": ["preprocess -s xx -t yy --trainpref good --srcdict bin --destdir out"],
    "*: no such data-bin": [f"train nowhere {TRAIN} --max-epoch 1"],
    "*: no split '*'": ["generate bin --path toy.pt --cpu --gen-subset nope", f"train bin {TRAIN} --max-epoch 1"],
    "*: cut short": ["generate cutbin --path toy.pt --cpu"],
    "*: * bytes do not fit": ["generate cutidx --path toy.pt --cpu"],
    "*: its sizes and offsets": ["generate badidx --path toy.pt --cpu"],
    "*: not fairseq's mmap": ["generate notidx --path toy.pt --cpu"],
    "*: token id *": ["generate badids --path toy.pt --cpu --num-workers 0"],
    "checkpoint * was trained with": ["generate other --path toy.pt --cpu", "validate other --path toy.pt --cpu"],
    "checkpoint * translates": [
        f"{command} bin --path toy.pt --cpu -s yy -t xx" for command in ("generate", "validate", "interactive")
    ],
    "checkpoint *: no such file": ["generate bin --path nowhere.pt --cpu"],
    "checkpoint *: is a directory": ["generate bin --path bin --cpu"],
    "checkpoint *: damaged": [f"generate bin --path {name} --cpu" for name in ("cut.pt", "good.xx", "empty.xx")],
    "checkpoint *: not a fairseq": ["generate bin --path tensor.pt --cpu"],
    "checkpoint * does not fit": [f"train bin {TRAIN} --max-epoch 1 --train-subset test --finetune-from-model toy.pt"],
    "checkpoint *: * is not finite": [
        f"train bin {TRAIN} --max-epoch 1 --train-subset test --finetune-from-model nan.pt --encoder-layers 2 "
        "--decoder-layers 2 --decoder-learned-pos"
    ],
    "training diverges": [
        f"train bin {TRAIN} --max-epoch 20 --train-subset test --disable-validation --no-save --lr 1e30 "
        "--lr-scheduler fixed"
    ],
    "omega file * has": [
        f"train bin {TRAIN} --max-epoch 1 --train-subset test --init-type adaptive --omega-file omega.deep"
    ],
    "omega file *, line": [
        f"train bin {TRAIN} --max-epoch 1 --train-subset test --init-type adaptive --omega-file good.xx"
    ],
    "omega file *: not a text": [
        f"train bin {TRAIN} --max-epoch 1 --train-subset test --init-type adaptive --omega-file binary.xx"
    ],
    "sentence * has": [f"train bin {TRAIN} --max-epoch 1 --train-subset test --valid-subset test --max-tokens 3"],
    "training would never": [f"train bin {TRAIN} --train-subset test"],
    "--restore-file *": [f"train bin {TRAIN} --max-epoch 1 --train-subset test --restore-file nowhere.pt"],
    "--save-dir *": [f"train bin {TRAIN} --max-epoch 1 --train-subset test --save-dir good.xx/out"],
    "--fp16 needs a GPU and": ["train bin --max-tokens 100 --max-epoch 1 --fp16 --save-dir out"],
    "--fp16 needs a GPU; on": [f"train bin {TRAIN} --max-epoch 1 --fp16"],
    "process * cannot meet": [
        f"train bin {TRAIN} --max-epoch 1 --train-subset test --distributed-world-size 2 --distributed-port PORT"
    ],
    "--user-dir *": [f"train bin {TRAIN} --max-epoch 1 --user-dir bin"],
    "argument --arch": [f"train bin {TRAIN} --arch nope"],
    "unrecognized arguments": [f"train bin {TRAIN} --max-tokns 3", "generate bin --path toy.pt --beem 3"],
    "--fp16 and --bf16": [
        f"train bin {TRAIN} --fp16 --bf16",
        "generate bin --path toy.pt --fp16 --bf16",
        "validate bin --path toy.pt --fp16 --bf16",
    ],
    "give --max-tokens or": ["train bin --max-epoch 1 --save-dir out"],
    "--path FILE is missing": ["generate bin", "validate bin", "interactive bin"],
    "argument --adam-betas": [
        f"train bin {TRAIN} --adam-betas {shlex.quote(v)}" for v in ("(" * 5000, "0.9", f"({'9' * 400},)")
    ],
    "argument --model-overrides": [f"generate bin --path toy.pt --model-overrides {'[' * 5000}"],
    "*, line *: not valid UTF-8": ["interactive bin --path toy.pt --cpu --input latin.xx"],
    "--bpe-codes *": [f"interactive bin --path toy.pt --cpu --input good.xx --bpe subword_nmt --bpe-codes {n}"
                      for n in ("nowhere", "binary.xx", "bom.xx")],
    "--sentencepiece-model *": [
        f"interactive bin --path toy.pt --cpu --input good.xx --bpe sentencepiece --sentencepiece-model {name}"
        for name in ("nowhere", "good.xx")
    ],
    "* has * lines, *": ["score --sys short.yy --ref short.xx"],
    "*: no results": ["clinic report --out-dir bin"],
    "*: not a result": ["clinic report --out-dir json"],
    "--out-dir *": ["clinic omega omega.deep --out-dir good.xx/out"],
}  # fmt: skip


def _documented() -> dict[str, int]:
    rows = re.findall(r"^\| `(.+?)` \|.*\| (\d+) \|$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.M)
    return {message: int(status) for message, status in rows}


DOCUMENTED = _documented()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files of all kinds."""
    root = tmp_path_factory.mktemp("material")
    texts = {
        "good": (b"a b\nc\n", b"a\nb c\n"),
        "short": (b"a\nb\n", b"a\n"),
        "latin": (b"a\n\xe4\xf6\n", b"a\nb\n"),
        "binary": (bytes(range(256)), b"\xff" + bytes(range(256))),
        "empty": (b"", b""),
        "bom": (b"\xef\xbb\xbfa 1\n", b"a\n"),
    }
    for name, (source, target) in texts.items():
        (root / f"{name}.xx").write_bytes(source)
        (root / f"{name}.yy").write_bytes(target)
    (root / "twice").write_bytes(b"a 2\r\nb 1\r\na 1\r\n")
    (root / "long").write_bytes(b"a" * 100_000)
    (root / "omega.deep").write_text("".join(f"{i} 1.0\n" for i in [*range(1, 5), *range(1, 7)]))
    (root / "json").mkdir()
    (root / "json" / "other.json").write_text("[" * 100_000)
    write_toy_checkpoint(toy_model(), root / "toy.pt")
    (root / "cut.pt").write_bytes((root / "toy.pt").read_bytes()[:5000])
    torch.save(torch.ones(3), root / "tensor.pt")
    model = toy_model()
    model.encoder.layers[1].feed_forward.fc1.bias.data[3] = float("nan")
    write_toy_checkpoint(model, root / "nan.pt")
    write_toy_databin(root / "bin")
    for name in ("cutbin", "cutidx", "badidx", "notidx", "badids", "other"):
        shutil.copytree(root / "bin", root / name)
    index, data = (root / "cutidx/test.xx-yy.xx.idx", root / "cutbin/test.xx-yy.xx.bin")
    whole = index.read_bytes()
    index.write_bytes(whole[:-4])
    data.write_bytes(data.read_bytes()[:-2])
    (root / "badidx/test.xx-yy.xx.idx").write_bytes(whole[:26] + b"\xff\xff\xff\xff" + whole[30:])
    (root / "notidx/test.xx-yy.xx.idx").write_bytes(b"TNTIDX\0\0" + whole)
    bad = root / "badids/test.xx-yy.xx.bin"
    bad.write_bytes(b"\xff\xff" + bad.read_bytes()[2:])
    with open(root / "other/dict.xx.txt", "a") as handle:
        handle.write("another 1\n")
    return root


def _names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")} - {"out"}  # where checkpoints would have been


def _check(status: int, message: str, code: object, err: str) -> None:
    lines = [line for line in err.splitlines() if " | " not in line]  # log lines, which have a time
    assert code == status, err
    assert "Traceback" not in err
    prefix, _, said = lines[-1].partition("error: ")
    assert re.fullmatch(re.escape(message).replace(r"\*", ".*"), said), said
    assert len(lines) == 1 or (status == 2 and lines[0].startswith("usage: ")), err
    assert prefix == ("" if status == 1 else prefix)


@pytest.mark.parametrize("message", DOCUMENTED)
def test_documented(material, monkeypatch, capsys, message):
    [lines] = [lines for start, lines in CASES.items() if message.startswith(start)]
    monkeypatch.chdir(material)
    before = _names(material)
    for line in lines:
        if "PORT" in line:
            continue  # in processes of its own, below
        command, *argv = shlex.split(line)
        with pytest.raises(SystemExit) as exit_info:
            COMMANDS[command].main(argv)
        _check(DOCUMENTED[message], message, exit_info.value.code, capsys.readouterr().err)
        assert _names(material) == before, line


def test_every_case_is_documented():
    for start in CASES:
        assert [message for message in DOCUMENTED if message.startswith(start)], start


PROCESSES = ["* has * lines and", "checkpoint *: damaged", "--fp16 and --bf16", "process * cannot meet", "--out-dir *"]


@pytest.mark.parametrize("start", PROCESSES)
def test_as_processes(material, start):
    [message] = [message for message in DOCUMENTED if message.startswith(start)]
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
    _check(DOCUMENTED[message], message, result.returncode, result.stderr)
    assert _names(material) == before
