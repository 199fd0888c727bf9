"""Open models and images from what a user types, and prepare the images for each model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

from ..data import MAX_PIXELS, DataError, Preprocessing, convert_image, find_images, pixel_limit
from ..models.listing import build
from ..settings import UsageError, nearest
from ..trained import CARD, class_names, load_model, spoken_names

Size = int | tuple[int, int]
SEED = 0


@dataclass
class OpenModel:
    """A model in evaluation mode with its preprocessing and class names."""

    name: str  # short, for titles and file names
    weights: str  # 'random weights', 'pretrained', a file or a folder
    model: nn.Module
    preprocessing: Preprocessing
    classes: list[str]
    about: str = ''  # data and score, from the model card of a run


@dataclass
class Photo:
    """An image and its name."""

    name: str
    image: Any  # a PIL image, or as read (see `data.Raw`) for models of other numbers of channels than 1 and 3


def open_model(text: str, pretrained: bool = False, img_size: Size | None = None) -> OpenModel:
    """Open a model.

    Args:
        text: A run folder, hf-hub:USER/NAME, NAME=FILE with a file in any published layout, a timm name, or
            FILE.py:FUNCTION. The last two have random weights, always the same, unless `pretrained`.
        pretrained: Download timm's weights for a name.
        img_size: Image size in pixels, one number or height and width; by default the model's own.

    Raises:
        UsageError: if there is no such model, or no weights for it.
        CheckpointError: if the folder or file contains no model.
    """
    name, equals, file = text.partition('=')
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if equals or text.startswith('hf-hub:') or Path(text).is_dir():
        model, preprocessing, classes = load_model(file if equals else text, name if equals else None)
        if size is not None and hasattr(model, 'set_input_size'):
            model.set_input_size(size)  # type: ignore[operator]
        short = name if equals else folder_name(text.removeprefix('hf-hub:'))
        weights = file if equals else text
        opened = OpenModel(short, weights, model, preprocessing, spoken_names(classes), read_card(Path(text)))
    else:
        opened = _by_name(text, pretrained, size)
    if size is not None:
        opened.preprocessing = replace(opened.preprocessing, size=size)
    return opened


def folder_name(text: str) -> str:
    """Return the name of a run folder, with its parent for a run of a comparison, as t2t_vit_14/seed-0."""
    path = Path(text).absolute()
    return f'{path.parent.name}/{path.name}' if re.fullmatch(r'seed-\d+', path.name) else path.name


def read_card(folder: Path) -> str:
    """Read data and top-1 of a run from its model card; '' if it has none."""
    try:
        card = ModelCard.load(folder / CARD)
    except (OSError, ValueError):
        return ''
    data = re.search(r'^## Data\n+(.+)', card.text, re.MULTILINE)
    results = card.data.eval_results or []
    scores = [f'{result.metric_name} {100 * result.metric_value:.2f} % on {result.dataset_name}.' for result in results]
    return ' '.join([*([data[1]] if data else []), *scores])


def _by_name(text: str, pretrained: bool, size: tuple[int, int] | None) -> OpenModel:
    custom = '.py:' in text
    if not custom and not timm.models.is_model(text):
        raise UsageError(
            f'unknown model {text!r}{nearest(text, timm.list_models())}; expected a run folder, a timm name, '
            'NAME=FILE, hf-hub:USER/NAME or FILE.py:FUNCTION'
        )
    size = size or (224, 224) if custom else size or timm.get_pretrained_cfg(text).input_size[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            model = build(text, size, **(dict(pretrained=True) if pretrained and not custom else {}))
        except (RuntimeError, OSError) as error:
            if not pretrained:
                raise
            raise UsageError(f'no pretrained weights for {text}: {str(error).splitlines()[0]}') from None
    cfg = {**Preprocessing(size, 3, (0.5,) * 3, (0.5,) * 3).as_cfg(), **getattr(model, 'pretrained_cfg', {})}
    weights = 'custom weights' if custom else 'pretrained' if pretrained else 'random weights'
    names = spoken_names(class_names(model))
    return OpenModel(text.rpartition(':')[2], weights, model.eval(), Preprocessing.of(cfg), names)


def open_images(inputs: Sequence[str], limit: int | None = None, channels: int = 3) -> list[Photo]:
    """Open all images that `find_images` finds, or the first `limit`; with all bands if `channels` is not 1 or 3.

    Raises:
        DataError: naming all that do not exist or cannot be read.
    """
    found = find_images(inputs, channels)
    photos, damaged = [], []
    for index in range(len(found))[:limit]:
        try:
            with pixel_limit(MAX_PIXELS):
                image = found.open(index)
                photos.append(Photo(found.name(index), convert_image(image) if channels in (1, 3) else image))
        except Exception:  # decoders raise any type for damaged bytes
            damaged.append(found.name(index))
    if damaged:
        raise DataError(f'cannot read {", ".join(damaged)}')
    return photos


def prepare(photos: Sequence[Photo], preprocessing: Preprocessing) -> tuple[torch.Tensor, torch.Tensor]:
    """Preprocess photos: the model's inputs, (B, C, H, W), and the same crops as pictures, (B, H, W, 3), 0 to 1.

    Of images with other bands the pictures are of the first three, or of their mean if there are fewer, each stretched.

    Raises:
        ImageError: if a photo has other bands than the model.
    """
    images = [preprocessing.convert(photo.image) for photo in photos]
    transform, plain = preprocessing.transform(), preprocessing.transform(normalize=False)
    shown = torch.stack([torch.as_tensor(plain(image)) for image in images]).float()
    if preprocessing.displayable:
        shown = shown / 255
    else:
        shown = shown[:, :3] if shown.shape[1] > 2 else shown.mean(1, keepdim=True)
        low, high = shown.amin((2, 3), keepdim=True), shown.amax((2, 3), keepdim=True)
        shown = (shown - low) / (high - low).clamp(min=1e-12)
    return torch.stack([transform(image) for image in images]), shown.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
