"""From what a user types to models and images, each image as its model sees it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import nn

from ..data import MAX_PIXELS, DataError, Preprocessing, convert_image, find_images, pixel_limit
from ..models.listing import build
from ..settings import UsageError, nearest
from ..trained import class_names, load_model, spoken_names

Size = int | tuple[int, int]
SEED = 0


@dataclass
class OpenModel:
    """A model in evaluation mode, what it expects, and what it is called."""

    name: str  # short, for titles and file names
    weights: str  # where they are from: 'random weights', 'pretrained', a file or a folder
    model: nn.Module
    preprocessing: Preprocessing
    classes: list[str]


@dataclass
class Photo:
    """An image and what a person finds it by."""

    name: str
    image: Image.Image


def open_model(text: str, pretrained: bool = False, img_size: Size | None = None) -> OpenModel:
    """A model by what a user calls it, for images of `img_size` (H, W), by default its own.

    Args:
        text: The folder of a run, hf-hub:USER/NAME, NAME=FILE with a file in any published layout, a name that timm
            knows, or FILE.py:FUNCTION. The last two have random weights, always the same, unless `pretrained`.
        pretrained: Fetch the weights that timm knows for a name.
        img_size: Pixels, one number or height and width.

    Raises:
        UsageError: if there is no such model, or no weights for it.
        CheckpointError: for a folder or file without a model.
    """
    name, equals, file = text.partition('=')
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if equals or text.startswith('hf-hub:') or Path(text).is_dir():
        model, preprocessing, classes = load_model(file if equals else text, name if equals else None)
        if size is not None and hasattr(model, 'set_input_size'):
            model.set_input_size(size)  # type: ignore[operator]
        short = name if equals else folder_name(text.removeprefix('hf-hub:'))
        opened = OpenModel(short, file if equals else text, model, preprocessing, spoken_names(classes))
    else:
        opened = _by_name(text, pretrained, size)
    if size is not None:
        opened.preprocessing = replace(opened.preprocessing, size=size)
    return opened


def folder_name(text: str) -> str:
    """What a run's folder is called; a run of a comparison by its arm too, as t2t_vit_14/seed-0."""
    path = Path(text).absolute()
    return f'{path.parent.name}/{path.name}' if re.fullmatch(r'seed-\d+', path.name) else path.name


def _by_name(text: str, pretrained: bool, size: tuple[int, int] | None) -> OpenModel:
    own = '.py:' in text
    if not own and not timm.models.is_model(text):
        raise UsageError(
            f'unknown model {text!r}{nearest(text, timm.list_models())}; expected a run folder, a name '
            'that timm knows, NAME=FILE, hf-hub:USER/NAME or FILE.py:FUNCTION'
        )
    size = size or (224, 224) if own else size or timm.get_pretrained_cfg(text).input_size[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            model = build(text, size, **(dict(pretrained=True) if pretrained and not own else {}))
        except (RuntimeError, OSError) as error:
            if not pretrained:
                raise
            raise UsageError(f'no pretrained weights for {text}: {str(error).splitlines()[0]}') from None
    cfg = {**Preprocessing(size, 3, (0.5,) * 3, (0.5,) * 3).as_cfg(), **getattr(model, 'pretrained_cfg', {})}
    weights = 'its own weights' if own else 'pretrained' if pretrained else 'random weights'
    names = spoken_names(class_names(model))
    return OpenModel(text.rpartition(':')[2], weights, model.eval(), Preprocessing.of(cfg), names)


def open_images(inputs: Sequence[str], most: int | None = None) -> list[Photo]:
    """All that `find_images` finds, or the first `most` of it.

    Raises:
        DataError: naming everything that is not there or cannot be read.
    """
    found = find_images(inputs)
    photos, damaged = [], []
    for index in range(len(found))[:most]:
        try:
            with pixel_limit(MAX_PIXELS):
                photos.append(Photo(found.name(index), convert_image(found.open(index))))
        except Exception:  # whatever a decoder may raise over damaged bytes
            damaged.append(found.name(index))
    if damaged:
        raise DataError(f'cannot be read: {", ".join(damaged)}')
    return photos


def prepare(photos: Sequence[Photo], preprocessing: Preprocessing) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as a model sees them, (B, C, H, W), and the same crops to be shown, (B, H, W, 3), 0 to 1."""
    images = [preprocessing.convert(photo.image) for photo in photos]
    seen, plain = preprocessing.transform(), preprocessing.transform(normalize=False)
    shown = torch.stack([torch.as_tensor(plain(image)) for image in images]).permute(0, 2, 3, 1) / 255
    return torch.stack([seen(image) for image in images]), shown.expand(-1, -1, -1, 3)
