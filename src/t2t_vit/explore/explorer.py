"""Read uploaded images within limits, and run models on them."""

import copy
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local
from typing import Any, NamedTuple

import numpy as np
import torch

from ..allocator import trim_memory
from ..data import DataError, ImageError, decode_image, pixel_limit, read_image
from ..look.features import LayerMeasure, measure
from ..look.opened import SEED, OpenModel, Photo, bands, prepare
from ..look.trace import Trace, trace
from ..settings import UsageError

SIDE = 1024  # pixels: an image is reduced to this before it is kept
MAX_ASPECT = 16  # longer side over shorter side
MAX_PASSES = 6  # forward passes that are kept


class TimeUp(RuntimeError):
    """A request took longer than allowed."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    megabytes: float = 20.0
    megapixels: float = 50.0
    seconds: float = 60.0


def read_photo(file: Path, limits: Limits, channels: int = 3) -> Photo:
    """Decode an uploaded image, upright, in 8 bits, reduced to at most SIDE pixels a side.

    With `channels` other than 1 and 3, all its bands are read, and it is not reduced.

    Raises:
        DataError: if it is too large, no image, or damaged, in a sentence for the person who uploaded it.
    """
    name = file.name
    try:
        size = file.stat().st_size
        if size > limits.megabytes * 1e6:
            raise DataError(f'{name} is too large: {size / 1e6:.1f} MB, the limit is {limits.megabytes:g} MB.')
        with pixel_limit(int(limits.megapixels * 1e6)):
            if channels in (1, 3):
                return Photo(name, decode_image(file, background=None, max_side=SIDE, max_aspect=MAX_ASPECT))
            return Photo(name, read_image(file, channels, max_aspect=MAX_ASPECT))
    except ImageError as error:
        raise DataError(f'{name} cannot be read: {str(error).replace(str(file.parent), "…")}.') from None
    except OSError:
        raise DataError('The upload did not arrive. Please try again.') from None


def fingerprint(image: Any) -> str:
    """Return a hash of the pixels of a photo's image."""
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(f'{pixels.shape} {pixels.dtype}'.encode() + pixels.tobytes()).hexdigest()


class Seen(NamedTuple):
    """One model's forward pass over one image."""

    one: OpenModel
    images: torch.Tensor  # (1, C, H, W), the model's input
    shown: torch.Tensor  # (H, W, 3), 0 to 1: the same crop as a picture
    trace: Trace
    measures: list[LayerMeasure]

    def ranking(self, count: int) -> list[tuple[int, str, float]]:
        """Return index, name and probability of the most probable classes."""
        probabilities = self.trace.logits[0].float().softmax(-1).cpu()
        values, indices = probabilities.topk(min(count, len(probabilities)))
        return [(i, self.class_name(i), p) for i, p in zip(indices.tolist(), values.tolist())]

    def class_name(self, index: int) -> str:
        """Return the name of a class, or its index if it has none."""
        return self.one.classes[index] if index < len(self.one.classes) else str(index)


class Explorer:
    """Models by name, opened on first use, and their last forward passes.

    One request at a time computes; memory is bounded by MAX_PASSES and by the number of models.
    """

    def __init__(
        self,
        openers: dict[str, Callable[[], OpenModel]],
        device: torch.device,
        limits: Limits,
        half: torch.dtype | None = None,
    ) -> None:
        self.openers, self.device, self.limits, self.half = openers, device, limits, half
        self.opened: dict[str, OpenModel] = {}
        self.passes: OrderedDict[tuple[str, str], Seen] = OrderedDict()
        self.lock = Lock()
        self.clock = local()

    @property
    def names(self) -> list[str]:
        """The names of the models, the default first."""
        return list(self.openers)

    def open(self, name: str) -> OpenModel:
        """Open a model by name.

        Raises:
            UsageError: if there is no such model on the page.
        """
        if name not in self.names:  # a list: the name may be of any type, as a browser sent it
            raise UsageError(f'There is no model {name!r} on this page; choose {" or ".join(self.names)}.')
        if name not in self.opened:
            one = self.openers[name]()
            one.name = name
            one.model.to(self.device)
            for module in one.model.modules():  # a forward pass is stopped between two modules when its time is up
                module.register_forward_pre_hook(lambda module, args: self.check_time())
            self.opened[name] = one
        return self.opened[name]

    def read(self, file: Path, *names: str) -> Photo:
        """Decode an uploaded image for the models of these names; see `read_photo`."""
        return read_photo(file, self.limits, bands([self.open(name) for name in names if name in self.names]))

    @contextmanager
    def request(self) -> Iterator[None]:
        """Give this thread sole use of the models, for at most `limits.seconds`."""
        with self.lock:
            self.clock.end = time.monotonic() + self.limits.seconds
            try:
                yield
            finally:
                self.clock.end = float('inf')
                trim_memory()

    def check_time(self) -> None:
        """Raise TimeUp if this thread's request has taken too long."""
        if time.monotonic() > getattr(self.clock, 'end', float('inf')):
            raise TimeUp(f'This took longer than {self.limits.seconds:g} seconds and was stopped.')

    def see(self, name: str, photo: Photo) -> Seen:
        """Run a model on an image, or return the kept forward pass."""
        one = self.open(name)
        key = (name, fingerprint(photo.image))
        if key not in self.passes:
            images, shown = prepare([photo], one.preprocessing)
            images = images.to(self.device)
            with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
                found = trace(one.model, images)
            if not found.maps:
                raise UsageError(f'{name} has no feature maps to show.')
            self.check_time()
            self.passes[key] = Seen(one, images, shown[0], found, measure(found, images))
            while len(self.passes) > MAX_PASSES:
                self.passes.popitem(last=False)
        self.passes.move_to_end(key)
        self.check_time()
        return self.passes[key]


def untrained(one: OpenModel) -> OpenModel:
    """Return a copy of a model with random weights, always the same."""
    model: Any = copy.deepcopy(one.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for module in model.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        if hasattr(model, 'init_weights'):
            model.init_weights()
        head = getattr(model, 'head', None)
        if isinstance(head, torch.nn.Linear) and not head.weight.any():  # as weight_init 'scaled' leaves it
            head.reset_parameters()  # a zero head has no evidence to show
    return OpenModel(one.name, 'random weights', model.eval(), one.preprocessing, one.classes)


def explain(error: BaseException) -> str:
    """Explain an error to the person who uses the page; '' for a defect of the program."""
    text = str(error).splitlines()[0] if str(error) else ''
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or 'not enough memory' in text or "can't alloc" in text:
        return 'There was not enough memory for this. Try a smaller model, or one model at a time.'
    return str(error) if isinstance(error, (DataError, UsageError, TimeUp)) else ''


def check_numbers(values: dict[str, Any]) -> None:
    """Check that controls have numbers.

    Raises:
        DataError: naming all that have none.
    """
    wrong = [name for name, value in values.items() if not _is_number(value)]
    if wrong:
        raise DataError(f'A number is missing: {", ".join(wrong)}.')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e9  # neither NaN nor infinite


def names_of(models: Sequence[OpenModel]) -> str:
    """Join the names of models with the origin of their weights."""
    return ', '.join(f'{one.name}: {one.weights}' for one in models)
