"""Runs the web page on uvicorn: one address, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn

from fairseq.errors import FairseqError
from fairseq.hub import TransformerModel
from fairseq.interactive.app import Limits, make_app

logger = logging.getLogger(__name__)
DEFAULT_PORT = 8000
MOST_CONNECTIONS = 100
SECONDS_TO_FINISH = 3  # what requests have when the server is told to stop


@contextlib.contextmanager
def bind(address: str) -> Iterator[socket.socket]:
    """A socket at ``HOST:PORT``, ``HOST``, ``[IPv6]:PORT`` or ``PORT``, not listening yet; port 0 is any free one.

    Raises FairseqError when the address cannot be had.
    """
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^:\s\[\]]*?))(?:(?:^|:)(\d{1,5}))?", address)
    if match is None or not any(match.groups()) or int(match[3] or 0) >= 2**16 or address.startswith(":"):
        raise FairseqError(f"--serve {address}: not HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}")
    host, port = match[1] or match[2] or "127.0.0.1", int(match[3] or DEFAULT_PORT)
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            sock = stack.enter_context(socket.socket(family, kind, protocol))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a restart waits for old connections
            sock.bind(where)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FairseqError(f"--serve {address}: {reason}; give another HOST:PORT") from error
        yield sock


def run(
    sock: socket.socket, models: Mapping[str, TransformerModel], settings: Mapping[str, Any], timeout: float
) -> None:
    """Serve until Ctrl-C or SIGTERM. timeout: longest a request may take, in seconds."""
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    is_loopback = ipaddress.ip_address(host).is_loopback
    hosts = ["localhost", "127.0.0.1", "[::1]", shown] if is_loopback else None
    config = uvicorn.Config(
        make_app(models, settings, Limits(seconds=timeout), hosts),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
        lifespan="off",
        ws="none",
    )
    sock.listen()  # from here on requests wait for their answer
    logger.info(f"serving {', '.join(models)} on http://{shown}:{port}; Ctrl-C stops")
    if not is_loopback:
        logger.warning("anyone who reaches this address can use it: there is no password and no encryption")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
        uvicorn.Server(config).run(sockets=[sock])
    logger.info("stopped")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for a translation that nobody wants any more
