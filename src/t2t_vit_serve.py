"""Serve predictions of an exported ONNX file over HTTP, without torch: onnxruntime, Pillow and FastAPI.

Run it as `t2t-vit serve photos.onnx`, or copy this file and run `python t2t_vit_serve.py photos.onnx`: it imports
nothing of the package, which would import torch. The ONNX file has to carry its preprocessing: `t2t-vit export --pixels
image`.

    curl -F image=@a.jpg http://127.0.0.1:8000/predict

answers {"label": …, "probability": …, "top_k": [{"label": …, "probability": …}, …]}. The page of `t2t-vit explore` uses
the same `Guard`.
"""

import argparse
import asyncio
import io
import ipaddress
import json
import re
import socket
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import h11
import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

KEY = 't2t_vit'  # of the model's description in the file
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM', 'AVIF')
MAX_BYTES, MAX_PIXELS, MAX_WAITING, CONNECTIONS = 20_000_000, 50_000_000, 8, 100

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
SAFE_METHODS = ('GET', 'HEAD')
FORM_BYTES = 65536  # of a form besides its file
HEAD_SECONDS = 10  # for the head of a request
SILENT_SECONDS = 30  # between two parts of a body
BODY_SECONDS = 300
NO_SNIFFING = (b'x-content-type-options', b'nosniff')


class Model:
    """An ONNX file with its own preprocessing and its class names."""

    def __init__(self, path: str, threads: int = 0) -> None:
        """Load the file.

        Raises:
            ValueError: if it is not such a file.
        """
        import onnxruntime  # the page does not need it

        Image.init()  # loads Pillow's decoders
        if not Path(path).is_file():
            raise ValueError(f'there is no file {path}')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        except Exception as error:  # of many kinds
            raise ValueError(f'{path} is damaged, or no ONNX file: {str(error).splitlines()[0]}') from None
        about = json.loads(self.session.get_modelmeta().custom_metadata_map.get(KEY, '{}'))
        if about.get('pixels') != 'image':
            raise ValueError(f'{path} has no preprocessing of its own: export it with --pixels image')
        self.classes: list[str] = about['class_names']
        self.mode = {1: 'L', 3: 'RGB'}[about['pretrained_cfg']['input_size'][0]]

    def decode(self, content: bytes) -> np.ndarray:
        """Return the pixels of an image file, uint8 (1, H, W, C), upright and on white.

        Raises:
            ValueError: if it is not an image, or too large.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                image: Image.Image = Image.open(
                    io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]
                )
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f'{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded')
            kind, image = image.format, ImageOps.exif_transpose(image)
            if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
                image = reduce_depth(image, kind)
            if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or 'transparency' in image.info:
                layer = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', layer.size, 'white'), layer)
            pixels = np.asarray(image.convert(self.mode))
        except ValueError:
            raise
        except Exception:  # decoders raise nearly anything on damaged bytes
            raise ValueError('not an image, or a damaged one') from None
        return pixels.reshape(1, *pixels.shape[:2], -1)

    def predict(self, content: bytes, top_k: int) -> dict[str, Any]:
        """Return the most probable classes of an image file; see `decode` for errors."""
        logits = self.session.run(['logits'], {'images': self.decode(content)})[0][0]
        if not np.isfinite(logits).all():
            raise ValueError('the model computed NaN or infinity for this image')
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = [
            {'label': self.classes[i], 'probability': round(float(scores[i]), 6)}
            for i in np.argsort(-scores)[: min(top_k, len(scores))]
        ]
        return {**best[0], 'top_k': best}


def reduce_depth(image: Image.Image, kind: str | None) -> Image.Image:
    """Return a grey image of 16 or 32 bits in 8, as the package does: by the narrowest usual range that holds it.

    Raises:
        ValueError: if its values are in none of these ranges.
    """
    values, key = np.asarray(image), image.info.get('transparency')
    deep = image.mode != 'F' and (image.mode != 'I' or kind in ('PNG', 'PPM'))  # which store 16 bits, read as 32
    top = 65535 if deep else values.max()
    if not top <= 65535:
        raise ValueError(f'values up to {top:g}; expected the range 0 to 1, to 255 or to 65535')
    shades = values.clip(0, 65535)
    if top > 255:
        shades = shades // 256
    elif image.mode == 'F' and top <= 1:
        shades = shades * 255
    grey = Image.fromarray(np.rint(shades).astype(np.uint8))
    if not isinstance(key, int):
        return grey
    return Image.merge('LA', (grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))


def create_app(model: Model) -> FastAPI:
    """Make the application: POST /predict with an image, GET /classes, GET /health."""
    app = FastAPI(title='t2t-vit')
    waiting, lock = threading.BoundedSemaphore(MAX_WAITING), threading.Lock()

    def classify(content: bytes, top_k: int) -> dict[str, Any]:
        with lock:  # one image at a time: memory stays bounded, and onnxruntime uses all threads for it
            return model.predict(content, top_k)

    @app.get('/health')
    def health() -> dict[str, str]:
        """Answer while the server runs."""
        return {'status': 'ok'}

    @app.get('/classes')
    def classes() -> list[str]:
        """Return the class names in the order of the model's outputs."""
        return model.classes

    @app.post('/predict')
    async def predict(request: Request, top_k: int = 5) -> dict[str, Any]:
        """Classify the image in the body, or in the field `image` of a form."""
        if top_k < 1:
            raise HTTPException(422, 'top_k must be at least 1')
        if not waiting.acquire(blocking=False):
            raise HTTPException(503, 'too many images are waiting; try again', {'Retry-After': '1'})
        try:
            content = await read_image(request)
            return await run_in_threadpool(classify, content, top_k)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        finally:
            waiting.release()

    return app


async def read_image(request: Request) -> bytes:
    """Return the bytes of the image in a request.

    Raises:
        HTTPException: with 413 for more than MAX_BYTES, 422 without an image.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f'at most {MAX_BYTES:,} bytes are read')
    if not request.headers.get('content-type', '').startswith('multipart/form-data'):
        return bytes(body)

    async def again() -> Any:
        return {'type': 'http.request', 'body': bytes(body), 'more_body': False}

    async with Request(request.scope, again).form(max_files=1, max_fields=1) as form:
        image = form.get('image')
        if image is None or isinstance(image, str):
            raise HTTPException(422, 'expected the image in the field image')
        return await image.read()


def report_error() -> None:
    """Print the kind of the current exception, without its message, which may quote a request."""
    print(f'A request failed: {type(sys.exc_info()[1]).__name__}', file=sys.stderr, flush=True)


class Guard:
    """Refuse requests of foreign pages, of unknown host names and of too many bytes, and add security headers.

    A page elsewhere that a browser shows could otherwise use this one: by a form that is sent here (its Origin is
    another), or by a name of its own that it lets resolve to this machine (DNS rebinding; the Host is another).

    Args:
        app: The application to protect.
        host: The address that it listens at.
        names: Host names under which it may be asked, besides localhost and addresses.
        max_bytes: Of a body, besides the rest of a form.
        closed: Paths that are not served.
        headers: To add to every answer.
        report: Called while an exception of the application is handled.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        names: Sequence[str],
        max_bytes: int,
        closed: re.Pattern[str] | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (NO_SNIFFING,),
        report: Callable[[], None] = report_error,
    ) -> None:
        self.app, self.max_bytes, self.closed = app, max_bytes, closed
        self.headers, self.report = tuple(headers), report
        self.names = {name.lower() for name in (*LOOPBACK, host, *names)}
        self.any_address = host not in LOOPBACK  # rebinding needs a name

    def refusal(self, scope: dict[str, Any], headers: Headers) -> tuple[int, str] | None:
        """Return status and text if a request must be refused."""
        host, origin = headers.get('host', ''), headers.get('origin')
        if not self.knows(host):
            return 403, 'Nothing is served under this host name. Start the server with --names NAME to allow it.'
        foreign = headers.get('sec-fetch-site') in ('cross-site', 'same-site') and scope['method'] not in SAFE_METHODS
        if foreign or origin is not None and origin.partition('://')[2].lower() != host.lower():
            return 403, 'Requests from other pages are refused.'
        if self.closed and self.closed.match(scope['path']):
            return 404, 'There is nothing here.'
        length = headers.get('content-length', '0')
        if 'transfer-encoding' in headers:
            return 411, 'Send the number of bytes in Content-Length: requests in chunks are not read.'
        if not length.isdecimal() or int(length) > self.max_bytes + FORM_BYTES:
            return 413, f'The limit is {self.max_bytes / 1e6:g} MB.'
        return None

    def knows(self, host: str) -> bool:
        """Return true if a Host header has one of the names of this server, or an address of this machine."""
        try:
            name = (urlsplit(f'//{host}').hostname or '').lower()
            return name in self.names or self.any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Answer one request."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        started = False

        async def answer(message: Any) -> None:
            nonlocal started
            if message['type'] == 'http.response.start':
                started = True
                message = {**message, 'headers': [*message.get('headers', ()), *self.headers]}
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
            self.report()
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


class Parser(argparse.ArgumentParser):
    """Parser of the command line that raises ValueError for mistakes."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake."""
        raise ValueError(message)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server until it is interrupted.

    Raises:
        ValueError: for a mistake in the arguments, or a file that cannot be served.
    """
    parser = Parser(prog='t2t-vit serve', description=str(__doc__).splitlines()[0])
    parser.add_argument('file', help='written by t2t-vit export --pixels image')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at (default: this machine only)')
    parser.add_argument('--port', type=int, default=8000)
    parser.add_argument('--names', nargs='+', default=[], help='host names to answer to, besides localhost')
    parser.add_argument('--threads', type=int, default=0, help='of onnxruntime; 0 for its own choice')
    given = parser.parse_args(argv)
    if not 0 < given.port < 65536:
        raise ValueError(f'port must be from 1 to 65535, got {given.port}')
    model = Model(given.file, given.threads)
    family = socket.AF_INET6 if ':' in given.host else socket.AF_INET
    try:
        listener = socket.create_server((given.host, given.port), family=family, backlog=128)
    except OSError as error:
        raise ValueError(
            f'cannot listen at {given.host}, port {given.port}: {error.strerror}; choose another --port'
        ) from None
    config = uvicorn.Config(
        Guard(create_app(model), given.host, [socket.gethostname(), *given.names], MAX_BYTES),
        http=TimedProtocol,
        ws='none',
        log_level='warning',
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
    )
    shown = f'[{given.host}]' if family == socket.AF_INET6 else given.host
    print(f'Predictions at http://{shown}:{given.port}/predict (stop with Ctrl-C)', flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == '__main__':
    try:
        main()
    except ValueError as mistake:
        sys.exit(f'{Path(__file__).name}: {mistake}')
