"""The web page and its JSON interface as an ASGI application.

``GET /api/models`` and ``POST /api/translate`` are described in docs/serve.md. An error is ``{"error": "..."}`` with
its status. What a request may cost is bounded by ``Limits``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairseq.errors import FairseqError, OutOfMemory
from fairseq.hub import TextHypothesis, TextTranslation, TransformerModel
from fairseq.interactive.worker import Abandoned, Busy, Worker

STATIC = Path(__file__).parent / "static"
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
AT_ONCE = 8  # sentences: CTranslate2's search goes on to its end though nobody waits for them any more


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    seconds: from its first byte to its answer, waiting included. bytes, characters, lines: of a request, of its text.
    waiting: requests in line. beam: the largest, unless the command line has a larger one. cells: source tokens times
    target tokens of an attention matrix.
    """

    seconds: float = 30.0
    bytes: int = 32 * 1024
    characters: int = 5000
    lines: int = 50
    waiting: int = 16
    beam: int = 10
    cells: int = 40_000


@dataclass(frozen=True)
class _Wanted:
    """A checked request to translate."""

    model: TransformerModel
    name: str
    lines: list[str]
    settings: dict[str, Any]


def make_app(
    models: Mapping[str, TransformerModel],
    settings: Mapping[str, Any],
    limits: Limits = Limits(),
    hosts: Sequence[str] | None = None,
) -> ASGIApp:
    """The application.

    models: by name, the first is the default. settings: of ``TransformerModel.generate`` where a request does not say
    otherwise. hosts: answer only requests that are addressed to these names (None: to any), so that a web site whose
    name suddenly points to this machine cannot read from it.
    """
    worker = Worker(limits.waiting)
    most_beam = max(limits.beam, settings["beam"])
    described = {
        "models": [_describe(name, model) for name, model in models.items()],
        "defaults": {name: settings[name] for name in ("beam", "nbest", "lenpen")},
        "limits": {"beam": most_beam, "characters": limits.characters, "lines": limits.lines},
    }

    async def list_models(request: Request) -> Response:
        return JSONResponse(described)

    async def translate(request: Request) -> Response:
        asked_at = time.monotonic()
        try:
            body = await asyncio.wait_for(_read(request, limits.bytes), limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {limits.seconds:g} s") from None
        wanted = _check(_parse(body), models, settings, limits, most_beam)
        job = worker.run(lambda abandoned: _translate(wanted, limits, abandoned))
        try:
            answer = await _unless_gone(job, request, asked_at + limits.seconds - time.monotonic())
        except Busy:
            message = f"{limits.waiting} requests are waiting already; try again later"
            raise HTTPException(503, message, {"Retry-After": "1"}) from None
        except asyncio.TimeoutError:
            raise HTTPException(504, f"no translation within {limits.seconds:g} s") from None
        except OutOfMemory as error:
            raise HTTPException(503, str(error)) from error
        except FairseqError as error:
            raise HTTPException(422, str(error)) from error
        return Response(answer, media_type="application/json")

    routes = [Route(path, _file(*file)) for path, file in PAGE.items()]
    routes += [Route("/api/models", list_models), Route("/api/translate", translate, methods=["POST"])]
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _unexpected_error}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)


class _Guard:
    """Checks the Host header, and adds ``HEADERS`` to every answer."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts is not None and name.lower() not in self.hosts:
            refusal = JSONResponse({"error": "this server does not answer to that host name"}, 421)
            await refusal(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)


def _file(name: str, media_type: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    content = (STATIC / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return answer


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "something went wrong here; the server's log says what"}, 500)


def _describe(name: str, model: TransformerModel) -> dict[str, Any]:
    described = {
        "name": name,
        "source_lang": model.source_lang,
        "target_lang": model.target_lang,
        "device": str(model.device),
    }
    if model.ctranslate2 is not None:
        return described | {"backend": "ctranslate2", "compute_type": model.ctranslate2.compute_type}
    cfg = model.models[0].cfg
    return described | {
        "backend": "native",
        "ensemble_size": len(model.models),
        "parameters": sum(parameter.numel() for part in model.models for parameter in part.parameters()),
        "encoder_layers": cfg.encoder_layers,
        "decoder_layers": cfg.decoder_layers,
        "embed_dim": cfg.encoder_embed_dim,
        "init_type": cfg.init_type,
        "pre_norm": cfg.encoder_normalize_before and cfg.decoder_normalize_before,
    }


async def _read(request: Request, most: int) -> bytes:
    """The body of a JSON request. Another type is refused: a browser sends it without asking from any web site."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    too_large = HTTPException(413, f"the request is larger than {most:,} bytes")
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
    except ClientDisconnect:
        raise HTTPException(400, "the request broke off") from None
    return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not valid JSON") from None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return asked


def _check(
    asked: dict[str, Any],
    models: Mapping[str, TransformerModel],
    settings: Mapping[str, Any],
    limits: Limits,
    most_beam: int,
) -> _Wanted:
    unknown = asked.keys() - {"text", "model", "beam", "nbest", "lenpen", "attention"}
    if unknown:
        raise HTTPException(400, f"there is no field {json.dumps(min(unknown))}")
    text = asked.get("text")
    if not isinstance(text, str):
        raise HTTPException(400, '"text" is missing, or no string')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise HTTPException(400, '"text" has half of a surrogate pair')
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if len(text) > limits.characters or len(lines) > limits.lines:
        raise HTTPException(413, f'"text" has more than {limits.characters:,} characters or {limits.lines} lines')
    name = asked.get("model", next(iter(models)))
    if not isinstance(name, str) or name not in models:
        raise HTTPException(404, f"there is no such model; choose from {', '.join(models)}")
    beam = _number(asked, "beam", settings["beam"], 1, most_beam, whole=True)
    nbest = _number(asked, "nbest", min(settings["nbest"], beam), 1, beam, whole=True)
    lenpen = _number(asked, "lenpen", settings["lenpen"], -10, 10)
    attention = asked.get("attention", False)
    if not isinstance(attention, bool):
        raise HTTPException(400, '"attention" is neither true nor false')
    chosen = {"beam": beam, "nbest": nbest, "lenpen": lenpen, "print_alignment": attention}
    return _Wanted(models[name], name, lines, dict(settings) | chosen)


def _number(asked: dict[str, Any], name: str, default: Any, least: float, most: float, whole: bool = False) -> Any:
    if name not in asked:
        return default
    value = asked[name]
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
        raise HTTPException(400, f'"{name}" is not a {"whole " if whole else ""}number from {least} to {most}')
    return value


async def _unless_gone(job: Coroutine[Any, Any, bytes], request: Request, seconds: float) -> bytes:
    """The job's result; it is cancelled when the client goes away, or after ``seconds`` (asyncio.TimeoutError)."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(job), asyncio.ensure_future(gone())
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if leaving in done:
            raise HTTPException(400, "the client has gone")  # nobody reads it
        raise asyncio.TimeoutError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _translate(wanted: _Wanted, limits: Limits, abandoned: Event) -> bytes:
    """The answer; in the worker's thread. Raises Abandoned, within a few steps, when nobody waits for it any more."""

    def check() -> None:
        if abandoned.is_set():
            raise Abandoned

    start = time.perf_counter()
    found: list[TextTranslation] = []
    for first in range(0, len(wanted.lines), AT_ONCE):
        check()
        lines = wanted.lines[first : first + AT_ONCE]
        ids = range(first + 1, first + 1 + len(lines))
        found += wanted.model.generate(lines, ids=ids, check=check, **wanted.settings)
    answer = {
        "model": wanted.name,
        "seconds": round(time.perf_counter() - start, 4),
        "translations": [
            {
                "source": line,
                "source_tokens": translation.source_tokens,
                "unknown": translation.unknown,
                "hypotheses": [_hypothesis(hypothesis, limits.cells) for hypothesis in translation.hypotheses],
            }
            for line, translation in zip(wanted.lines, found, strict=True)
        ],
    }
    return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _hypothesis(hypothesis: TextHypothesis, most_cells: int) -> dict[str, Any]:
    attention = hypothesis.attention
    if attention is not None and attention.numel() > most_cells:
        attention = None
    return {
        "text": hypothesis.text,
        "score": round(hypothesis.score, 4),
        "tokens": hypothesis.tokens,
        "token_scores": [round(score, 4) for score in hypothesis.token_scores],
        "attention": None if attention is None else [[round(w, 4) for w in row] for row in attention.T.tolist()],
    }
