"""``fairseq-interactive --serve``: real requests to a real server process."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

import fairseq.interactive
from fairseq.cli.export import main as export
from fairseq.cli.interactive import main
from fairseq.models import TransformerModel
from tests.toys import toy_model, write_toy_checkpoint, write_toy_databin

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A data-bin ``bin``, and two models."""
    directory = tmp_path_factory.mktemp("serve")
    write_toy_databin(directory / "bin")
    for number in (1, 2):
        write_toy_checkpoint(toy_model(number), directory / f"model{number}.pt")
    return directory


@contextlib.contextmanager
def process(*argv: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server process and the port it says it has."""
    server = subprocess.Popen([sys.executable, *argv], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "serving" in line or "error" in line)
        match = re.search(r"http://\S+:(\d+)", line)
        assert match, line
        yield int(match[1]), server
    finally:
        server.kill()
        server.wait()


def command(directory: Path, *flags: str) -> list[str]:
    return ["-m", "fairseq.cli.interactive", str(directory / "bin"), "--cpu", "--max-len-b", "9", *flags]


@pytest.fixture(scope="module")
def port(directory) -> Iterator[int]:
    one, two = directory / "model1.pt", directory / "model2.pt"
    flags = ("--model", f"One={one}", "--model", f"Both={one}:{two}", "--serve", "127.0.0.1:0", "--nbest", "2")
    with process(*command(directory, *flags)) as (port, _):
        yield port


def ask(port: int, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer. body: JSON, or bytes as they are."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {} if content is None else {"Content-Type": "application/json"}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, kind | names)
    response = connection.getresponse()
    answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return answer


def translate(port: int, **request: object) -> tuple[int, dict]:
    status, _, content = ask(port, "POST", "/api/translate", request)
    return status, json.loads(content)


def test_models(port):
    status, headers, content = ask(port, "GET", "/api/models")
    answer = json.loads(content)
    assert status == 200 and headers["content-type"] == "application/json"
    assert [(m["name"], m["ensemble_size"], m["source_lang"], m["target_lang"]) for m in answer["models"]] == [
        ("One", 1, "xx", "yy"),
        ("Both", 2, "xx", "yy"),
    ]
    assert answer["defaults"] == {"beam": 5, "nbest": 2, "lenpen": 1.0}


def test_translations_are_those_of_the_python_interface(port, directory):
    for name, paths in (("One", "model1.pt"), ("Both", "model1.pt:model2.pt")):
        model = TransformerModel.from_pretrained(directory, paths, "bin")
        expected = model.generate(["a b ?", "", "c"], 4, nbest=3, lenpen=0.5, max_len_b=9, print_alignment=True)
        text = "a b ?\r\n\nc"
        status, answer = translate(port, model=name, text=text, beam=4, nbest=3, lenpen=0.5, attention=True)
        assert status == 200 and answer["model"] == name
        assert [t["source"] for t in answer["translations"]] == ["a b ?", "", "c"]
        for found, wanted in zip(answer["translations"], expected, strict=True):
            assert (found["source_tokens"], found["unknown"]) == (wanted.source_tokens, wanted.unknown)
            assert [h["text"] for h in found["hypotheses"]] == [h.text for h in wanted.hypotheses]
            for got, right in zip(found["hypotheses"], wanted.hypotheses, strict=True):
                assert got["score"] == pytest.approx(right.score, abs=1e-4)
                assert got["tokens"] == right.tokens and len(got["token_scores"]) == len(right.tokens)
                assert [len(row) for row in got["attention"]] == [len(found["source_tokens"])] * len(got["tokens"])
                assert all(math.isclose(sum(row), 1, abs_tol=1e-3) for row in got["attention"])
                assert right.attention is not None
                assert got["attention"][0] == pytest.approx(right.attention[:, 0].tolist(), abs=1e-4)


def test_defaults_are_the_command_lines(port):
    _, answer = translate(port, text="a b")
    assert answer["model"] == "One" and len(answer["translations"][0]["hypotheses"]) == 2
    assert answer["translations"][0]["hypotheses"][0]["attention"] is None
    assert len(translate(port, text="a b", beam=1)[1]["translations"][0]["hypotheses"]) == 1


@pytest.mark.parametrize(
    ("status", "message", "request_"),
    [
        (400, "not valid JSON", b"{"),
        (400, "not valid JSON", b"\xff\xfe\xfd"),
        (400, "not valid JSON", b"[" * 20000),
        (400, "no JSON object|not a JSON object", b"[]"),
        (400, '"text" is missing', {}),
        (400, '"text" is missing', {"text": ["a"]}),
        (400, "surrogate", b'{"text": "\\ud800"}'),
        (400, 'no field "sampling"', {"text": "a", "sampling": True}),
        (400, '"beam" is not a whole number from 1 to 10', {"text": "a", "beam": 11}),
        (400, '"beam" is not', {"text": "a", "beam": True}),
        (400, '"nbest" is not a whole number from 1 to 2', {"text": "a", "beam": 2, "nbest": 3}),
        (400, '"lenpen" is not', b'{"text": "a", "lenpen": NaN}'),
        (400, '"attention" is neither', {"text": "a", "attention": 1}),
        (404, "no such model; choose from One, Both", {"text": "a", "model": "Two"}),
        (404, "no such model", {"text": "a", "model": ["One"]}),
        (413, "larger than 32,768 bytes", {"text": "a" * 40000}),
        (413, "more than 5,000 characters or 50 lines", {"text": "a" * 5001}),
        (413, "more than 5,000 characters or 50 lines", {"text": "a\n" * 50}),
        (422, "sentence 10: 1,025 tokens, and the model reads at most 1,024", {"text": "a\n" * 9 + "b " * 1024}),
    ],
)
def test_bad_requests(port, status, message, request_):
    got, headers, content = ask(port, "POST", "/api/translate", request_)
    assert (got, headers["content-type"]) == (status, "application/json")
    assert re.search(message, json.loads(content)["error"])


def test_other_errors_are_json_too(port):
    for method, path, status in (
        ("GET", "/nowhere", 404), ("GET", "/../app.py", 404), ("GET", "/api/translate", 405), ("POST", "/", 405),
    ):  # fmt: skip
        got, _, content = ask(port, method, path)
        assert got == status and json.loads(content)["error"]
    assert ask(port, "POST", "/api/translate", b'{"text": "a"}', Content_Type="text/plain")[0] == 415
    chunked = b"x" * 9000
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/api/translate", iter([chunked] * 5), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413  # no Content-Length says so in advance
    connection.close()


def test_only_local_names_are_answered_and_nothing_is_shared(port):
    for host, status in (
        ("evil.example", 421),
        (f"evil.example:{port}", 421),
        ("localhost", 200),
        (f"[::1]:{port}", 200),
    ):
        got, headers, _ = ask(port, "GET", "/api/models", Host=host, Origin="http://evil.example")
        assert got == status
        assert not any(name.startswith("access-control") for name in headers)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_page_is_complete_and_its_own(port):
    status, headers, page = ask(port, "GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    for name in re.findall(rb'(?:src|href)="([^"]+)"', page):
        assert ask(port, "GET", "/" + name.decode())[0] == 200
    everything = page + ask(port, "GET", "/page.js")[2] + ask(port, "GET", "/page.css")[2]
    assert not re.search(
        rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://|@import", everything
    )


# -- load: a server whose model is slow, with small limits

POST = "POST /api/translate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
SLOW = """
    import sys, threading, time
    from fairseq.errors import out_of_memory_ends
    from fairseq.interactive import app, server
    from fairseq.models import TransformerModel
    import logging; logging.basicConfig(level="INFO")
    started = []
    class Slow(TransformerModel):
        def generate(self, sentences, *arguments, **settings):
            started.append(sentences)
            print("started", sentences[0], file=sys.stderr, flush=True)
            if sentences[0] == "broken":
                raise ZeroDivisionError
            if sentences[0] == "large":
                with out_of_memory_ends("translating", "lower --max-tokens"):
                    raise MemoryError
            if sentences[0].startswith("slow"):
                time.sleep(2)
            while sentences[0] == "endless":
                settings["check"]()
                time.sleep(0.05)
            return super().generate(sentences, *arguments, **settings)
    model = Slow.from_pretrained(sys.argv[1], "model1.pt", "bin")
    app.Limits.__init__.__defaults__ = (float(sys.argv[2]), *app.Limits.__init__.__defaults__[1:4], 2, 10, 40000)
    settings = {"beam": 2, "nbest": 1, "lenpen": 1.0, "max_len_b": 9}
    with server.bind("127.0.0.1:0") as sock:
        server.run(sock, {"slow": model}, settings, float(sys.argv[2]))
"""


@contextlib.contextmanager
def slow_server(directory: Path, timeout: float) -> Iterator[tuple[int, list[str]]]:
    with process("-c", textwrap.dedent(SLOW), str(directory), str(timeout)) as (port, server):
        lines: list[str] = []
        assert server.stderr is not None
        threading.Thread(target=lines.extend, args=(server.stderr,), daemon=True).start()
        yield port, lines


def post_and_leave(port: int, text: str) -> socket.socket:
    """A connection with a request whose answer nobody reads yet."""
    body = json.dumps({"text": text})
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(f"{POST}{len(body)}\r\n\r\n{body}".encode())
    return sock


def wait_for(lines: list[str], text: str) -> None:
    end = time.monotonic() + 30
    while not any(text in line for line in lines):
        assert time.monotonic() < end, lines
        time.sleep(0.02)


def test_full_line_stays_responsive_and_forgets_who_left(directory):
    with slow_server(directory, 30) as (port, lines):
        running = post_and_leave(port, "slow a")
        wait_for(lines, "started slow a")
        waiting = [post_and_leave(port, f"slow {name}") for name in "bc"]
        status, headers, content = 0, {}, b""
        while status != 503:  # once both have arrived
            status, headers, content = ask(port, "POST", "/api/translate", {"text": "slow d"})
        assert headers["retry-after"] == "1" and "2 requests are waiting already" in json.loads(content)["error"]
        assert ask(port, "GET", "/api/models")[0] == 200  # though the model is busy
        for sock in waiting:
            sock.close()
        assert translate(port, text="a")[0] == 200
        assert not any("started slow b" in line or "started slow c" in line for line in lines)
        running.close()


def test_what_nobody_waits_for_is_stopped(directory):
    with slow_server(directory, 1) as (port, lines):
        assert translate(port, text="endless")[0] == 504  # and it takes no part of the next one's second
        assert translate(port, text="a")[0] == 200
    with slow_server(directory, 60) as (port, lines):
        running = post_and_leave(port, "endless")
        wait_for(lines, "started endless")
        running.close()
        assert translate(port, text="a")[0] == 200


def test_too_slow_and_broken(directory):
    with slow_server(directory, 0.5) as (port, lines):
        status, answer = translate(port, text="slow a")
        assert (status, answer["error"]) == (504, "no translation within 0.5 s")
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(f"{POST}9\r\n\r\n{{".encode())
        assert b" 408 " in sock.recv(100)
        sock.close()
        time.sleep(2)
        assert translate(port, text="a")[0] == 200
        status, answer = translate(port, text="broken")
        assert status == 500 and "log" in answer["error"]
        wait_for(lines, "ZeroDivisionError")
        status, answer = translate(port, text="large")
        assert (status, answer["error"]) == (503, "out of memory: translating; lower --max-tokens")


# -- the other backend


def test_ctranslate2(directory, tmp_path):
    pytest.importorskip("ctranslate2", reason="pip install -e .[export]")
    flags = ["--data", str(directory / "bin"), "--format", "ctranslate2", "--output", str(tmp_path / "out")]
    export([str(directory / "model1.pt"), *flags])
    argv = command(directory, "--backend", "ctranslate2", "--model", f"CT2={tmp_path / 'out'}", "--serve", "0")
    with process(*argv) as (port, _):
        [described] = json.loads(ask(port, "GET", "/api/models")[2])["models"]
        assert (described["name"], described["backend"], described["source_lang"]) == ("CT2", "ctranslate2", "xx")
        status, answer = translate(port, text="a b\n\nc ?", beam=4, nbest=2, attention=True)
        assert translate(port, text="b " * 1024)[0] == 422
    model = TransformerModel.from_pretrained(directory, "model1.pt", "bin")
    expected = model.generate(["a b", "", "c ?"], 4, nbest=2, max_len_b=9, print_alignment=True)
    assert status == 200 and [t["source"] for t in answer["translations"]] == ["a b", "", "c ?"]
    for found, wanted in zip(answer["translations"], expected, strict=True):
        assert found["unknown"] == wanted.unknown
        for got, right in zip(found["hypotheses"], wanted.hypotheses, strict=True):
            assert got["text"] == right.text and got["token_scores"] == pytest.approx(right.token_scores, abs=2e-4)
            assert right.attention is not None
            assert np.array(got["attention"]) == pytest.approx(right.attention.T.numpy(), abs=1e-3)


# -- the process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ends_cleanly(directory, name):
    with process(*command(directory, "--path", str(directory / "model1.pt"), "--serve", "0")) as (port, server):
        open_connection = HTTPConnection("127.0.0.1", port)
        open_connection.request("GET", "/api/models")
        assert json.loads(open_connection.getresponse().read())["models"][0]["name"] == "model1.pt"
        server.send_signal(getattr(signal, name))
        assert server.stderr is not None
        rest = server.stderr.read()
        assert server.wait(20) == 0 and "stopped" in rest and "Traceback" not in rest


def assert_fails(capsys, status: int, message: str, *argv: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*argv, "--cpu"])
    printed = capsys.readouterr().err
    assert exit_info.value.code == status
    assert message in printed and "Traceback" not in printed


def test_addresses(directory, capsys):
    arguments = [str(directory / "bin"), "--path", str(directory / "model1.pt"), "--serve"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert_fails(capsys, 1, f"--serve {address}: Address already in use", *arguments, address)
    for address in ("", ":80", "127.0.0.1:", "127.0.0.1:99999", "a:b", "::1", "127.0.0.1:80:80", "[::1"):
        assert_fails(capsys, 1, f"--serve {address}: not HOST:PORT", *arguments, address)
    assert_fails(capsys, 1, "--serve nowhere.invalid:80: ", *arguments, "nowhere.invalid:80")


def test_flags(directory, capsys, monkeypatch):
    databin, path = str(directory / "bin"), str(directory / "model1.pt")
    assert_fails(capsys, 2, "--model does nothing without --serve", databin, "--model", f"a={path}")
    assert_fails(capsys, 2, "--serve-timeout does nothing", databin, "--path", path, "--serve-timeout", "3")
    assert_fails(capsys, 2, "--serve reads no lines", databin, "--path", path, "--serve", "0", "--input", "x")
    assert_fails(capsys, 2, f"--model {path}: not NAME=FILE", databin, "--serve", "0", "--model", path)
    same = ["--model", f"a={path}"] * 2
    assert_fails(capsys, 2, "there is a model of this name already", databin, "--serve", "0", *same)
    assert_fails(capsys, 2, "--path FILE is missing", databin, "--serve", "0")
    assert_fails(capsys, 1, "none.pt: no such file", databin, "--serve", "0", "--model", "a=none.pt")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "fairseq.interactive.server", raising=False)
    monkeypatch.delattr(fairseq.interactive, "server", raising=False)
    assert_fails(capsys, 1, "pip install 'transformer-clinic[serve]'", databin, "--path", path, "--serve", "0")
