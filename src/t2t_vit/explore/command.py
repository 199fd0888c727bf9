"""`t2t-vit explore`: the page that looks inside models, on this machine."""

import os
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..console import console
from ..data import convert_image, open_source
from ..look.opened import OpenModel, Photo, open_images, open_model
from ..look.visualize import unique
from ..settings import UsageError, read_settings, recipes, require, resolve
from ..train.config import Config
from ..train.run import train
from ..trained import CONFIG, WEIGHTS, pick_device
from .seen import Explorer, Limits, untrained

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
SESSIONS = 64  # whose images are held; the oldest makes room
TRAINED = 'digits-explore'  # the run that is made where there is none
CLOSED = ('component_server', 'deep_link', 'proxy=', 'run-history', 'runs')  # routes of Gradio's, by which something
# is kept or fetched
HEADERS = (
    (
        b'content-security-policy',
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    ),
    (b'x-content-type-options', b'nosniff'),
    (b'referrer-policy', b'no-referrer'),
)


def explore(
    checkpoint: str | None = None,
    model: str | None = None,
    compare: Sequence[str] = (),
    runs: str = 'runs',
    pretrained: bool = False,
    host: str = '127.0.0.1',
    port: int | None = None,
    device: str = 'auto',
    max_megabytes: float = 20.0,
    max_megapixels: float = 50.0,
    max_seconds: float = 60.0,
    browser: bool = False,
) -> None:
    """Open a page to look inside a model: what it answers, and what it sees on the way.

    Args:
        checkpoint: A run's folder, hf-hub:USER/NAME, a name that timm knows, or a file in any published layout (then
            with --model). By default the last run under --runs; where there is none, one is trained on the embedded
            digits first, some minutes long.
        model: The registered name of the model in a file.
        compare: More models, to be seen beside it.
        runs: Where runs stand.
        pretrained: Fetch the weights that timm knows for models given by name, instead of random ones.
        host: The address to listen at; other machines reach the page only at one that is not 127.0.0.1.
        port: By default the first free one from 7860 on.
        device: cpu, cuda, mps or auto.
        max_megabytes: Of an uploaded image.
        max_megapixels: Of an uploaded image.
        max_seconds: For one request.
        browser: Open the page in the browser.
    """
    require(
        (
            (port is None or 0 < port < 65536, f'port is from 1 to 65535, got {port}'),
            (max_megabytes > 0, f'max_megabytes is more than 0, got {max_megabytes:g}'),
            (max_megapixels > 0, f'max_megapixels is more than 0, got {max_megapixels:g}'),
            (max_seconds > 0, f'max_seconds is more than 0, got {max_seconds:g}'),
        )
    )
    target = pick_device(device)
    check_gradio()
    text = checkpoint or str(last_run(Path(runs)) or train_digits(Path(runs) / TRAINED))
    text = f'{model}={text}' if model is not None else text
    explorer = Explorer(offer([text, *compare], pretrained), target, Limits(max_megabytes, max_megapixels, max_seconds))
    with serving(explorer, host, port, browser) as address:
        console().print(f'The page is at {address} (Ctrl-C ends it)', soft_wrap=True)
        if host not in LOOPBACK:
            console().print('It has no password, and whoever reaches this address can use it.', soft_wrap=True)
        wait()


def check_gradio() -> None:
    """Raises UsageError if Gradio is not there."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UsageError("the page needs Gradio: pip install 't2t-vit[explore]'") from None


def last_run(folder: Path) -> Path | None:
    """The run under a folder whose model was saved last."""
    found = [file.parent for file in folder.glob(f'*/{WEIGHTS}') if (file.parent / CONFIG).is_file()]
    return max(found, key=lambda run: (run / WEIGHTS).stat().st_mtime, default=None)


def train_digits(folder: Path) -> Path:
    """Train the quick start's model into a folder; gives it."""
    console().print(
        f'There is no run yet: training on the embedded digits into {folder}, some minutes.', soft_wrap=True
    )
    train(resolve(Config, [*read_settings(recipes()['digits']), ('--output', 'output', str(folder))]), 'auto')
    return folder


def offer(texts: Sequence[str], pretrained: bool = False) -> dict[str, Callable[[], OpenModel]]:
    """How to open each model that a person may choose, by name; the first is opened here, to fail early.

    A trained one has itself untrained beside it.
    """
    first = open_model(texts[0], pretrained)
    others = [partial(open_model, text, pretrained) for text in texts[1:]]
    openers: list[Callable[[], OpenModel]] = [lambda: first, *others]
    names = unique([Path(text.partition('=')[0].removeprefix('hf-hub:')).name for text in texts])
    found: dict[str, Callable[[], OpenModel]] = dict(zip(names, openers))
    if first.weights != 'random weights':
        found[f'{names[0]}, untrained'] = lambda: untrained(first)
    return found


@contextmanager
def serving(
    explorer: Explorer, host: str = '127.0.0.1', port: int | None = None, browser: bool = False
) -> Iterator[str]:
    """The page at an address, for as long as the block lasts; all its files stand in a folder that goes with it.

    Raises:
        OSError: if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix='t2t-vit-explore-', ignore_cleanup_errors=True) as folder:
        os.environ.update(GRADIO_TEMP_DIR=f'{folder}/files', GRADIO_ANALYTICS_ENABLED='False')
        import gradio
        from starlette.middleware import Middleware
        from starlette.routing import Route

        from .page import CSS, build, fetch_nothing
        from .uploads import Uploads

        gradio.processing_utils.async_ssrf_protected_download = fetch_nothing
        uploads = Uploads(Path(folder, 'files', 'uploads'))  # what Gradio opens and serves lies in its own folder
        uploads.folder.mkdir(parents=True)
        photos = examples()
        first = explorer.open(next(iter(explorer.openers)))
        grey = first.preprocessing.channels == 1
        blocks = build(explorer, photos, len(photos) - 1 if grey else 1, uploads)
        size = int(explorer.limits.megabytes * 1e6)
        plain = gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
        ended = threading.Event()
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                inbrowser=browser,
                quiet=True,
                prevent_thread_lock=True,
                share=False,
                show_error=True,
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                max_file_size=size,
                state_session_capacity=SESSIONS,
                allowed_paths=[],
                css=CSS,
                theme=plain,
                enable_monitoring=False,
                pwa=False,
                mcp_server=False,
                app_kwargs=dict(
                    middleware=[Middleware(Bounds, size=size)],
                    docs_url=None,
                    redoc_url=None,
                    routes=[
                        Route('/gradio_api/upload', uploads.receive, methods=['POST']),  # before Gradio's own
                        Route('/gradio_api/upload_progress', uploads.progress),
                    ],
                ),
            )
            threading.Thread(target=each_minute, args=(uploads.sweep, ended), daemon=True).start()
            yield address
        finally:
            ended.set()
            blocks.close(verbose=False)


def each_minute(work: Callable[[], None], ended: threading.Event) -> None:
    """Until `ended` is set."""
    while not ended.wait(60):
        work()


def examples() -> list[Photo]:
    """scikit-learn's two photos, and a test image of each digit, large enough to be looked at."""
    digits = open_source('digits', 'val')
    found = open_images(['samples'])
    for label, name in enumerate(digits.classes):
        image = convert_image(digits.open(list(digits.labels).index(label)), 1)
        found.append(Photo(f'digit {name}', image.resize((96, 96), Image.Resampling.BICUBIC)))
    return found


class Bounds:
    """Refuses bodies of more than `size` bytes, and a few more for the form, and Gradio's routes that are not needed;
    tells browsers to fetch nothing from elsewhere, to take no file for what it is not, and to frame the page nowhere.

    Gradio itself bounds files only, and those once they have been written.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], size: int) -> None:
        self.app, self.most = app, size + 65536

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """One request."""
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)

        async def answer(message: Any) -> None:
            if message['type'] == 'http.response.start':
                message = {**message, 'headers': [*message.get('headers', ()), *HEADERS]}
            await send(message)

        path, headers = scope['path'].strip('/').removeprefix('gradio_api/'), dict(scope['headers'])
        if path.startswith(CLOSED):
            return await self.refuse(answer, 404, 'There is nothing here.')
        length = headers.get(b'content-length', b'0')
        if (
            not length.isdigit()
            or int(length) > self.most
            or (b'chunked' in headers.get(b'transfer-encoding', b'').lower())
        ):
            left = 10 * self.most  # most clients send all before they listen
            while left > 0 and (part := await receive()).get('more_body'):
                left -= len(part.get('body', b''))
            return await self.refuse(answer, 413, f'At most {(self.most - 65536) / 1e6:g} MB are taken.')
        await self.app(scope, receive, answer)

    async def refuse(self, send: Callable[[Any], Awaitable[None]], status: int, text: str) -> None:
        """Answer without the app."""
        headers = [(b'content-type', b'text/plain; charset=utf-8'), (b'connection', b'close')]
        await send({'type': 'http.response.start', 'status': status, 'headers': headers})
        await send({'type': 'http.response.body', 'body': text.encode()})


def wait() -> None:
    """Until Ctrl-C, or until the process is asked to end."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended.wait(1):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
