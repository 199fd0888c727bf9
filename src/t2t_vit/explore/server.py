"""Serve the page: check every request before Gradio gets it, and close connections that send nothing."""

import asyncio
import ipaddress
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import h11
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..console import console
from ..settings import UsageError
from .uploads import Uploads

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
PORTS = range(7860, 7960)
SESSIONS = 64  # whose images are kept; the oldest makes room
CONNECTIONS = 256
HEAD_SECONDS = 10  # for the head of a request
SILENT_SECONDS = 30  # between two parts of a body
BODY_SECONDS = 300
FORM_BYTES = 65536  # of a form besides its file
SAFE_METHODS = ('GET', 'HEAD')
CLOSED = re.compile(  # Gradio's routes that keep or fetch something
    r'/+(gradio_api/)?(component_server|deep_link|proxy=|run-history|runs|stream|custom_component|monitoring|login|mcp)'
)
HEADERS = (
    (
        b'content-security-policy',
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    ),
    (b'x-content-type-options', b'nosniff'),
    (b'referrer-policy', b'no-referrer'),
)
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """Refuse requests of foreign pages, of unknown host names and of too many bytes, and add security headers.

    A page elsewhere that a browser shows could otherwise use this one: by a form that is sent here (its Origin is
    another), or by a name of its own that it lets resolve to this machine (DNS rebinding; the Host is another).
    """

    def __init__(self, app: Any, host: str, names: Sequence[str], max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.names = {name.lower() for name in (*LOOPBACK, host, *names)}
        self.any_address = host not in LOOPBACK  # rebinding needs a name

    def refusal(self, scope: dict[str, Any], headers: Headers) -> tuple[int, str] | None:
        """Return status and text if a request must be refused."""
        host, origin = headers.get('host', ''), headers.get('origin')
        if not self.knows(host):
            return 403, 'This page is not served under this host name. Start it with --names NAME to allow it.'
        foreign = headers.get('sec-fetch-site') in ('cross-site', 'same-site') and scope['method'] not in SAFE_METHODS
        if foreign or origin is not None and origin.partition('://')[2].lower() != host.lower():
            return 403, 'Requests from other pages are refused.'
        if CLOSED.match(scope['path']):
            return 404, 'There is nothing here.'
        length = headers.get('content-length', '0')
        if not length.isdecimal() or int(length) > self.max_bytes + FORM_BYTES or 'transfer-encoding' in headers:
            return 413, f'The limit is {self.max_bytes / 1e6:g} MB.'
        return None

    def knows(self, host: str) -> bool:
        """Return true if a Host header has one of the names of this page, or an address of this machine."""
        try:
            name = (urlsplit(f'//{host}').hostname or '').lower()
            return name in self.names or self.any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        """Answer one request."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        started = False

        async def answer(message: Any) -> None:
            nonlocal started
            if message['type'] == 'http.response.start':
                started = True
                message = {**message, 'headers': [*message.get('headers', ()), *HEADERS]}
            await send(message)

        if refusal := self.refusal(scope, Headers(scope=scope)):
            unread = 10 * self.max_bytes  # most clients read the answer only after they have sent everything
            while unread > 0 and (part := await receive()).get('more_body'):
                unread -= len(part.get('body', b''))
            response = PlainTextResponse(refusal[1], refusal[0], {'connection': 'close'})
            return await response(scope, receive, answer)
        try:
            await self.app(scope, receive, answer)
        except Exception:  # a server must survive any request
            report_error()
            if not started:
                await PlainTextResponse('The request could not be answered.', 500)(scope, receive, answer)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request does not arrive in time, or whose client has vanished."""

    timer: asyncio.TimerHandle | None = None
    body_end = 0.0

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        peer = transport.get_extra_info('socket')
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (('TCP_KEEPIDLE', 30), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        self.set_timer(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Allow more time for a body only, and only as long as parts of it arrive."""
        super().data_received(data)
        now = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            self.body_end = self.body_end or now + BODY_SECONDS
            self.set_timer(min(SILENT_SECONDS, self.body_end - now))
        else:
            self.body_end = 0.0
            if self.conn.their_state is not h11.IDLE:
                self.set_timer(None)
            elif self.timer is None:  # the head of a further request
                self.set_timer(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self.set_timer(None)
        super().connection_lost(exc)

    def set_timer(self, seconds: float | None) -> None:
        """Close the connection after so many seconds, or never."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


@lru_cache(64)
def print_once(text: str, minute: int) -> None:
    """Print a line, but the same line at most once a minute."""
    console().print(text, soft_wrap=True, markup=False, highlight=False)


def report_error(*args: Any, **kwargs: Any) -> None:
    """Print the current exception in one line, without paths; replaces `traceback.print_exc` in Gradio."""
    error = sys.exc_info()[1]
    text = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(error)).split())
    text = re.sub(r'(?:[\w.~-]*[/\\])+[\w.~-]+', '…', text)[:200]
    print_once(f'A request failed: {type(error).__name__}{f": {text}" if text else ""}', int(time.time() / 60))


async def keep_path(block: gr.blocks.Block, path: str) -> str:
    """Replace the step of Gradio's that copies or downloads every file, or address, that a request names."""
    return path


def listen(host: str, port: int | None) -> socket.socket:
    """Listen at a port, or at the first free one of PORTS.

    Raises:
        UsageError: if there is none.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    error: OSError | None = None
    for candidate in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, candidate), family=family, backlog=128)
        except OSError as caught:
            error = caught
    where = f'port {port}' if port else f'any port from {PORTS.start} to {PORTS.stop - 1}'
    raise UsageError(f'cannot listen at {host}, {where}: {error.strerror if error else ""}; choose another --port')


@contextmanager
def serve(
    blocks: gr.Blocks, uploads: Uploads, host: str, port: int | None, names: Sequence[str], max_bytes: int, css: str
) -> Iterator[str]:
    """Serve a page while the context lasts; yields its address.

    Raises:
        UsageError: if it cannot listen at the port.
    """
    quiet = ModuleType('traceback')
    quiet.__dict__.update({**traceback.__dict__, 'print_exc': report_error})
    for module in (gr.routes, gr.queueing, gr.route_utils, gr.utils):
        module.traceback = quiet
    gr.blocks.Block.async_move_resource_to_block_cache = keep_path
    blocks.state_session_capacity = SESSIONS
    routes: list[BaseRoute] = [
        Route('/gradio_api/upload', uploads.receive, methods=['POST']),
        Route('/gradio_api/file={token:path}', uploads.send),
    ]
    app = gr.mount_gradio_app(
        FastAPI(routes=routes, openapi_url=None),
        blocks,
        path='/',
        app_kwargs=dict(docs_url=None, redoc_url=None),
        allowed_paths=[],
        show_error=False,
        max_file_size=max_bytes,
        ssr_mode=False,
        run_history=False,
        footer_links=['api'],
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        css=css,
        theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']),
    )
    listener = listen(host, port)
    config = uvicorn.Config(
        Guard(app, host, [socket.gethostname(), *names], max_bytes),
        http=TimedProtocol,
        ws='none',
        lifespan='on',
        log_config=None,
        log_level='critical',
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    ended = threading.Event()
    threading.Thread(target=sweep_each_minute, args=(uploads, ended), daemon=True).start()
    try:
        shown = 'localhost' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host
        yield f'http://{shown}:{listener.getsockname()[1]}/'
    finally:
        ended.set()
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()


def sweep_each_minute(uploads: Uploads, ended: threading.Event) -> None:
    """Delete old uploads every minute."""
    while not ended.wait(60):
        uploads.sweep()
