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

from ..classes import read_classes
from ..data import MAX_PIXELS, DataError, Images, Preprocessing, Raw, convert_image, find_images, pixel_limit
from ..models.listing import build, is_known
from ..models.shipped import locate
from ..settings import UsageError, nearest
from ..trained import CARD, WEIGHTS, class_names, load_trained, note_on_names, spoken_names

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
    note: str = ''  # if the class names are assumed


@dataclass
class Photo:
    """An image and its name."""

    name: str
    image: Any  # a PIL image L, RGB or RGBA; as read (see `data.Raw`) for models of other numbers of bands


def open_model(
    text: str, pretrained: bool = False, img_size: Size | None = None, classes: str | None = None, ema: bool = True
) -> OpenModel:
    """Open a model.

    Args:
        text: A run folder, its model.safetensors, a training state (checkpoints/step-*.pt), hf-hub:USER/NAME, NAME=FILE
            with a file in any published layout, a timm name, or FILE.py:FUNCTION. The last two have random weights,
            always the same, unless `pretrained`.
        pretrained: Download timm's weights for a name.
        img_size: Image size in pixels, one number or height and width; by default the model's own.
        classes: A file with the class names in the order of the outputs, for checkpoints that name none.
        ema: Take the EMA weights of a training state, else the raw ones.

    Raises:
        UsageError: if there is no such model, or no weights for it.
        CheckpointError: if the folder or file contains no model.
    """
    name, equals, file = text.partition('=')
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    path = Path(locate(text).removeprefix('local-dir:'))
    if equals or text.startswith('hf-hub:') or path.exists():
        model, preprocessing, outputs, named, _ = load_trained(file if equals else text, name if equals else None, ema)
        if size is not None and hasattr(model, 'set_input_size'):
            model.set_input_size(size)  # type: ignore[operator]
        given = read_classes(classes, len(outputs)) if classes and not named else None
        names = given or spoken_names(outputs)
        opened = OpenModel(
            name if equals else short_name(text),
            file if equals else text,
            model,
            preprocessing,
            names,
            read_card(path.parent if path.name == WEIGHTS else path),
            note_on_names(named or given is not None, names, outputs),
        )
    else:
        opened = _by_name(text, pretrained, size)
    if size is not None:
        opened.preprocessing = replace(opened.preprocessing, size=size)
    return opened


def short_name(text: str) -> str:
    """Return the name of a model by its run folder, its Hub name, or a file in a run folder."""
    path = Path(text.removeprefix('hf-hub:').removeprefix('local-dir:'))
    if path.parent.name == 'checkpoints':
        return f'{folder_name(str(path.parent.parent))}/{path.stem}'
    return folder_name(str(path.parent if path.name == WEIGHTS else path))


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
    if not custom and not is_known(text):
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


def bands(models: Sequence[OpenModel]) -> int:
    """Return the number of channels that images are to be read with for these models; 3 for grey and RGB."""
    return next((one.preprocessing.channels for one in models if not one.preprocessing.displayable), 3)


def as_photo(name: str, image: Raw, channels: int = 3) -> Photo:
    """Return a read image as a photo; its transparency stays, since each model has its own background."""
    return Photo(name, convert_image(image, background=None) if channels in (1, 3) else image)


def open_images(inputs: Sequence[str] | Images, limit: int | None = None, channels: int = 3) -> list[Photo]:
    """Open all images that `find_images` finds, or the first `limit`; with all bands if `channels` is not 1 or 3.

    Raises:
        DataError: naming all that do not exist or cannot be read.
    """
    found = inputs if isinstance(inputs, Images) else find_images(inputs, channels)
    photos, damaged = [], []
    for index in range(len(found))[:limit]:
        try:
            with pixel_limit(MAX_PIXELS):
                photos.append(as_photo(found.name(index), found.open(index), channels))
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
