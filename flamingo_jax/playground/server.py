"""Serves the page: on this machine alone unless told otherwise, without a request to any other,
and with no file outside one temporary folder.
"""

import contextlib
import os
import pathlib
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from flamingo_jax.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")
SHUTDOWN_SECONDS = 2
"""How long open connections may take to end; a page keeps one open as long as it is shown."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self'"
    " 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self'"
    " data:; connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none';"
    " base-uri 'self'; form-action 'self'; object-src 'none'"
)
"""Content-Security-Policy: the browser asks no other machine for anything, whatever Gradio's
page says. Gradio needs inline scripts and makes functions of templates.
"""
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


@contextlib.contextmanager
def private_folder() -> Iterator[pathlib.Path]:
    """Makes the temporary folder of uploads and of all that Gradio writes, and removes it at the
    end, also after SIGTERM. Gradio must not have been imported yet: it reads its settings then.
    """
    with tempfile.TemporaryDirectory(prefix="playground_", ignore_cleanup_errors=True) as name:
        os.environ |= {
            "GRADIO_TEMP_DIR": name,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_MCP_SERVER": "False",
            "GRADIO_SSR_MODE": "False",
            "GRADIO_RUN_HISTORY": "False",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        before = tempfile.tempdir
        tempfile.tempdir = name
        handler = signal.signal(signal.SIGTERM, _leave)
        try:
            yield pathlib.Path(name)
        finally:
            signal.signal(signal.SIGTERM, handler)
            tempfile.tempdir = before


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket, before a model is loaded.

    port: 0 for any that is free.

    Raises: UserError where the port is taken, or the host is not one of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host={host} --port={port} cannot be used ({why}): name another port, or 0 for any"
            " that is free"
        ) from error
    return listening


def serve(page: Any, theme: Any, style: str, listening: socket.socket, *, megabytes: int) -> None:
    """Serves a Gradio page until the process is told to end.

    megabytes: of an upload at most.
    """
    import fastapi
    import gradio
    import uvicorn

    host, port = listening.getsockname()[:2]
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=True,
        max_file_size=megabytes << 20,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=style,
    )
    hosts = (*LOOPBACK, host) if host in LOOPBACK else None
    config = uvicorn.Config(
        guarded(app, hosts),
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listening])


def guarded(app: Callable[..., Any], hosts: tuple[str, ...] | None) -> Callable[..., Any]:
    """Wraps an ASGI application: adds `HEADERS` to its answers, and refuses requests for other
    host names, by which a foreign web page could reach a server on this machine (DNS rebinding).

    hosts: names by which the server may be asked; None for any.
    """

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if hosts is not None and asked not in hosts:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"unknown host name\n"})
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message["headers"] if pair[0].lower() not in HEADERS]
                message = message | {"headers": [*kept, *HEADERS.items()]}
            await send(message)

        await app(scope, receive, send_guarded)

    return answer
