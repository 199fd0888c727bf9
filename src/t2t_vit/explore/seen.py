"""What a person brings to the page, read within limits, and what models make of it."""

import copy
import ctypes
import hashlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from ..data import DataError, pixel_limit
from ..look.features import LayerMeasure, measure
from ..look.opened import SEED, OpenModel, Photo, prepare
from ..look.trace import Trace, trace
from ..settings import UsageError

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM')
SIDE = 1024  # pixels: what is kept of an image, for as long as a person looks at it
SLIM = 16  # longer side over shorter side
KEPT = 6  # passes of models over images


class TimeUp(RuntimeError):
    """A request took longer than it may."""


@dataclass(frozen=True)
class Limits:
    """Bounds on one request."""

    megabytes: float = 20.0
    megapixels: float = 50.0
    seconds: float = 60.0


def read_photo(file: Path, limits: Limits) -> Photo:
    """An uploaded image, upright, without transparency, at most SIDE pixels a side.

    Raises:
        DataError: with a sentence for the person who uploaded it.
    """
    name = file.name
    try:
        size = file.stat().st_size
    except OSError:
        raise DataError('The upload did not arrive. Please try again.') from None
    if size > limits.megabytes * 1e6:
        raise DataError(f'{name} is too large: {size / 1e6:.1f} MB, at most {limits.megabytes:g} MB are taken.')
    Image.init()  # or PIL knows some of the formats only
    try:
        with pixel_limit(int(limits.megapixels * 1e6)), Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > SLIM * min(width, height):
                raise DataError(
                    f'{name} is too narrow: {width}×{height} pixels, its longer side may be at most {SLIM} '
                    'times the shorter one.'
                )
            image.draft('RGB', (SIDE, SIDE))  # a JPEG is decoded at the size it is needed in
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (DataError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f'{name} is too large: it has more than {limits.megapixels:g} million pixels.') from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f'{name} is not an image that can be read here; JPEG, PNG, WebP, GIF, BMP and TIFF can.'
        ) from None
    except Exception:  # whatever a decoder may raise over damaged bytes
        raise DataError(f'{name} is damaged: it begins as an image and cannot be read to its end.') from None
    if upright.mode in ('RGBA', 'LA', 'PA') or 'transparency' in upright.info:
        layer = upright.convert('RGBA')
        upright = Image.alpha_composite(Image.new('RGBA', layer.size, 'white'), layer)
    elif upright.mode.startswith('I;16'):  # which PIL cuts off at 255
        upright = upright.convert('I').point(lambda value: value / 256).convert('L')
    shown = upright.convert('RGB')
    shown.thumbnail((SIDE, SIDE))
    return Photo(name, shown)


def fingerprint(image: Image.Image) -> str:
    """The same for the same pixels."""
    return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()


def give_back() -> None:
    """Free memory to the system: glibc keeps what images and tensors leave between them, more with each request."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'malloc_trim'):
        libc.malloc_trim(0)


class Seen(NamedTuple):
    """One model's pass over one image."""

    one: OpenModel
    images: torch.Tensor  # (1, C, H, W), as the model sees it
    shown: torch.Tensor  # (H, W, 3), 0 to 1: the same crop for people
    trace: Trace
    measures: list[LayerMeasure]


class Explorer:
    """Models by name, opened when they are first asked for, and the last passes they made.

    One pass at a time: what it holds is bounded by KEPT passes and by the models that were offered.
    """

    def __init__(self, openers: dict[str, Callable[[], OpenModel]], device: torch.device, limits: Limits) -> None:
        self.openers, self.device, self.limits = openers, device, limits
        self.opened: dict[str, OpenModel] = {}
        self.passes: OrderedDict[tuple[str, str], Seen] = OrderedDict()
        self.lock = Lock()
        self.clock = local()

    def open(self, name: str) -> OpenModel:
        """A model that was offered.

        Raises:
            UsageError: for any other name.
        """
        if name not in list(self.openers):  # a list: it may be anything, as a browser sent it
            raise UsageError(f'There is no model {name!r} on this page; there are {", ".join(self.openers)}.')
        if name not in self.opened:
            one = self.openers[name]()
            one.name = name
            one.model.to(self.device)
            for module in one.model.modules():  # a pass is left between two modules when its time is up
                module.register_forward_pre_hook(lambda module, args: self.check())
            self.opened[name] = one
        return self.opened[name]

    @contextmanager
    def request(self) -> Iterator[None]:
        """While it lasts, this thread has the models for itself, and `Limits.seconds` from the time it got them."""
        with self.lock:
            self.clock.end = time.monotonic() + self.limits.seconds
            try:
                yield
            finally:
                self.clock.end = float('inf')
                give_back()

    def check(self) -> None:
        """Raises TimeUp if this thread's request has taken too long."""
        if time.monotonic() > getattr(self.clock, 'end', float('inf')):
            raise TimeUp(f'This took longer than {self.limits.seconds:g} seconds and was stopped.')

    def see(self, name: str, photo: Photo) -> Seen:
        """A model's pass over an image, from memory if it is one of the last."""
        one = self.open(name)
        key = (name, fingerprint(photo.image))
        if key not in self.passes:
            images, shown = prepare([photo], one.preprocessing)
            images = images.to(self.device)
            found = trace(one.model, images)
            if not found.maps:
                raise UsageError(f'{name} gives no maps of an image.')
            self.check()
            self.passes[key] = Seen(one, images, shown[0], found, measure(found, images))
            while len(self.passes) > KEPT:
                self.passes.popitem(last=False)
        self.passes.move_to_end(key)
        self.check()
        return self.passes[key]


def untrained(one: OpenModel) -> OpenModel:
    """The same architecture with random weights, always the same ones, to see what training has made."""
    model: Any = copy.deepcopy(one.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for module in model.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        if hasattr(model, 'init_weights'):
            model.init_weights()
    return OpenModel(one.name, 'random weights', model.eval(), one.preprocessing, one.classes)


def sentence(error: BaseException, limits: Limits) -> str:
    """What a person is told of an error; '' for one that is nobody's mistake but the program's."""
    text = str(error).splitlines()[0] if str(error) else ''
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or 'not enough memory' in text or "can't alloc" in text:
        return 'There was not enough memory for this. A smaller model, or one model at a time, may do.'
    if isinstance(error, (DataError, UsageError, TimeUp)):
        return str(error)
    return ''
