"""`t2t-vit explore`: a page that looks inside models, on this machine."""

import os
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..classifier import DTYPES, Precision
from ..console import console
from ..data import Source, open_source
from ..inputs import open_own
from ..look.opened import OpenModel, Photo, as_photo, open_images, open_model, short_name
from ..look.visualize import unique
from ..models.precision import choose_precision, describe_precision
from ..models.shipped import compared
from ..settings import UsageError, require
from ..trained import CONFIG, WEIGHTS, pick_device
from .explorer import Explorer, Limits, untrained

MAX_EXAMPLES = 10


def explore(
    checkpoint: str | None = None,
    model: str | None = None,
    compare: Sequence[str] = (),
    classes: str | None = None,
    ema: bool = True,
    runs: str = 'runs',
    pretrained: bool = False,
    host: str = '127.0.0.1',
    port: int | None = None,
    names: Sequence[str] = (),
    device: str = 'auto',
    precision: Precision = 'no',
    max_megabytes: float = 20.0,
    max_megapixels: float = 50.0,
    max_seconds: float = 60.0,
    max_waiting: float = 200.0,
    browser: bool = False,
) -> None:
    """Open a page that shows what a model answers to an image, and what its layers see.

    Args:
        checkpoint: A run folder, its model.safetensors, a training state (checkpoints/step-*.pt), hf-hub:USER/NAME, a
            timm name, or a file in any published layout (with --model). By default the last run under --runs, or a
            small T2T-ViT, ViT and ResNet that come with the package, trained on photos.
        model: Name of the model in a file.
        compare: Further models to choose from.
        classes: A file with the class names in the order of the outputs, one a line, for models without names.
        ema: Take the EMA weights of training states, else the raw ones.
        runs: Folder of the runs.
        pretrained: Download timm's weights for models given by name, which are random otherwise.
        host: Address to listen at; other machines can reach the page only if this is not 127.0.0.1.
        port: Port to listen at; by default the first free one from 7860.
        names: Host names under which browsers may ask for the page, besides localhost and addresses.
        device: cpu, cuda, mps or auto.
        precision: no (float32), bf16, fp16, or auto for bf16 if the device is faster in it.
        max_megabytes: Limit of an uploaded image.
        max_megapixels: Limit of an uploaded image.
        max_seconds: Limit of one request.
        max_waiting: Limit of all uploads that wait together, in megabytes.
        browser: Open the page in the browser.
    """
    require(
        (
            (port is None or 0 < port < 65536, f'port must be from 1 to 65535, got {port}'),
            (max_megabytes > 0, f'max_megabytes must be greater than 0, got {max_megabytes:g}'),
            (max_megapixels > 0, f'max_megapixels must be greater than 0, got {max_megapixels:g}'),
            (max_seconds > 0, f'max_seconds must be greater than 0, got {max_seconds:g}'),
            (max_waiting >= max_megabytes, f'max_waiting must be at least max_megabytes, got {max_waiting:g}'),
        )
    )
    target = pick_device(device)
    check_gradio()
    if precision == 'auto':
        precision, reason = choose_precision(target)
        console().print(f'note: {describe_precision(precision, reason)}', soft_wrap=True)
    text = checkpoint or str(last_run(Path(runs)) or '')
    if not text:
        console().print(f'No run under {runs}: showing small models of photos from the package', soft_wrap=True)
        text, *others = reversed(compared())
        compare = [*compare, *others]
    choose = partial(open_model, pretrained=pretrained, classes=classes, ema=ema)
    opened = choose(f'{model}={text}' if model is not None else text)
    if opened.note:
        console().print(f'note: {opened.note}', soft_wrap=True)
    openers = offer(opened, compare, choose)
    explorer = Explorer(openers, target, Limits(max_megabytes, max_megapixels, max_seconds), DTYPES.get(precision))
    photos = examples(opened, text, bool(compare))
    with tempfile.TemporaryDirectory(prefix='t2t-vit-explore-', ignore_cleanup_errors=True) as folder:
        os.environ.update(GRADIO_TEMP_DIR=f'{folder}/gradio', GRADIO_ANALYTICS_ENABLED='False')
        from t2t_vit_serve import LOOPBACK

        from .page import CSS, build
        from .server import serve
        from .uploads import Uploads

        uploads = Uploads(Path(folder, 'uploads'), max_waiting * 1e6)
        blocks = build(explorer, photos, uploads)
        limit = int(max_megabytes * 1e6)
        with stop_signals() as stopped, serve(blocks, uploads, host, port, names, limit, CSS) as address:
            console().print(f'The page is at {address} (stop with Ctrl-C)', soft_wrap=True)
            if host not in LOOPBACK:
                console().print('It has no password: everyone who reaches this address can use it.', soft_wrap=True)
            if browser:
                webbrowser.open(address)
            while not stopped.wait(1):  # a wait without a timeout would not notice signals
                pass


def check_gradio() -> None:
    """Check that Gradio is installed.

    Raises:
        UsageError: if it is not.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UsageError("the page needs Gradio: pip install 't2t-vit[explore]'") from None


def last_run(folder: Path) -> Path | None:
    """Return the run under a folder whose model was saved last, None if there is no run."""
    found = [file.parent for file in folder.glob(f'*/{WEIGHTS}') if (file.parent / CONFIG).is_file()]
    return max(found, key=lambda run: (run / WEIGHTS).stat().st_mtime, default=None)


def offer(
    first: OpenModel, texts: Sequence[str], choose: Callable[[str], OpenModel] = open_model
) -> dict[str, Callable[[], OpenModel]]:
    """Return functions that open the models of the page, by name: the first, the others, and the first untrained."""
    others = [partial(choose, text) for text in texts]
    names = unique([first.name, *(short_name(text.partition('=')[0]) for text in texts)])
    openers: dict[str, Callable[[], OpenModel]] = dict(zip(names, [lambda: first, *others]))
    if first.weights != 'random weights':
        openers[f'{names[0]}, untrained'] = lambda: untrained(first)
    return openers


def examples(model: OpenModel, checkpoint: str, compared: bool) -> list[Photo]:
    """Return images that fit the model: validation images of its run, else digits or scikit-learn's two photos.

    With models to compare the two photos are among them. A model of other bands than grey or RGB has only its own.
    """
    channels = model.preprocessing.channels
    try:
        found = class_images(*open_own(checkpoint, 'val', None, channels), channels)
    except (OSError, ValueError):  # of no run, or its data are not available
        found = class_images(open_source('digits', 'val'), 'digits') if channels == 1 else []
    photos = open_images(['samples']) if channels in (1, 3) and (compared or not found) else []
    return [*found, *photos]


def class_images(source: Source, root: str, channels: int = 3) -> list[Photo]:
    """Return one image of each class, of at most MAX_EXAMPLES classes that are evenly spaced."""
    labels, count = list(source.labels), len(source.classes)
    chosen = sorted({round(i * (count - 1) / max(MAX_EXAMPLES - 1, 1)) for i in range(MAX_EXAMPLES)})
    chosen = list(range(count)) if count <= MAX_EXAMPLES else chosen
    name = 'digit' if root == 'digits' else 'validation image,'
    return [
        as_photo(f'{name} {source.classes[label]}', source.open(labels.index(label)), channels)
        for label in chosen
        if label in labels
    ]


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set while the context lasts."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
