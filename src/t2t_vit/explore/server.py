"""Serve the page: check every request before Gradio gets it, and close connections that send nothing."""

import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from t2t_vit_serve import NO_SNIFFING, Guard, TimedProtocol

from ..console import console
from ..settings import UsageError
from .uploads import Uploads

PORTS = range(7860, 7960)
SESSIONS = 64  # whose images are kept; the oldest makes room
CONNECTIONS = 256
CLOSED = re.compile(  # Gradio's routes that keep or fetch something
    r'/+(gradio_api/)?(component_server|deep_link|proxy=|run-history|runs|stream|custom_component|monitoring|login|mcp)'
)
HEADERS = (
    (
        b'content-security-policy',
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    ),
    NO_SNIFFING,
    (b'referrer-policy', b'no-referrer'),
)


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
        Guard(app, host, [socket.gethostname(), *names], max_bytes, CLOSED, HEADERS, report_error),
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
