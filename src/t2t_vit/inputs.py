"""Open the images that a classifier is given: paths, encoded bytes, PIL images and arrays, and the data of a run."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import yaml
from PIL import Image

from .data import (
    SPLIT_FILE,
    Images,
    Part,
    Source,
    Split,
    find_images,
    open_source,
    open_train_val,
    read_image,
    relative_names,
)
from .integrity import check_signed
from .models.safe_load import CheckpointError
from .settings import UsageError

ImageLike = Union[str, bytes, bytearray, memoryview, 'os.PathLike[str]', Image.Image, np.ndarray]

IN_MEMORY = (bytes, bytearray, memoryview, Image.Image, np.ndarray)
EXPECTED = 'a path, the bytes of a file, a PIL image, or an array (H, W, 3)'


class Held:
    """Images in memory, as a part of `data.Images`."""

    def __init__(self, images: Sequence[Any], first: int, channels: int) -> None:
        self.images, self.first, self.channels = images, first, channels

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the file's name if the image knows it, else its position."""
        return str(getattr(self.images[index], 'filename', '') or f'image {self.first + index}')

    def open(self, index: int) -> Any:
        """Return the image, upright."""
        return read_image(self.images[index], self.channels)


def open_all(images: ImageLike | Iterable[ImageLike], channels: int) -> Images:
    """Return images of all kinds as one list.

    Raises:
        UsageError: for anything that is not a path, the bytes of a file, a PIL image or an array.
        DataError: naming everything that is not there.
    """
    if isinstance(images, (str, os.PathLike, *IN_MEMORY)):
        items: list[Any] = [images]
    elif isinstance(images, Iterable):
        items = list(images)
    else:
        raise UsageError(f'images are a {type(images).__name__}; expected {EXPECTED}, or a list of these')
    parts: list[Any] = []
    skipped: Counter[str] = Counter()
    for position, item in enumerate(items):
        if isinstance(item, (str, os.PathLike)):
            found = find_images([os.fspath(item)], channels)
            parts += found.parts
            skipped += found.skipped
        elif isinstance(item, IN_MEMORY):
            parts.append(Held([item], position, channels))
        else:
            raise UsageError(f'image {position} is a {type(item).__name__}; expected {EXPECTED}')
    return Images(parts, skipped)


def run_folder(checkpoint: str) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None if it belongs to none."""
    path = Path(checkpoint.removeprefix('local-dir:'))
    folders = (path, path.parent, path.parent.parent) if path.suffix else (path,)
    return next((folder for folder in folders if (folder / 'config.yaml').is_file()), None)


def open_own(checkpoint: str, split: str, cache: str | None, channels: int) -> tuple[Source, str]:
    """Open the images that a run was trained or validated on, and return their name.

    Raises:
        UsageError: if the checkpoint belongs to no run.
        CheckpointError: if the run's configuration cannot be read.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        raise UsageError(f'{checkpoint} is not in a run folder, which would know its data: name the data with --data')
    saved = data_of(folder)
    root, count = str(saved['root']), saved.get(f'{split}_images')
    cache, division = cache or saved.get('cache'), folder / SPLIT_FILE
    if division.exists():
        train, val, _ = open_train_val(root, cache, channels=channels, split=Split.load(division))
        source = val if split == 'val' else train
    else:
        source = open_source(root, split, cache, channels=channels)
    return (Part(source, count) if count else source), root


def data_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a run's data.

    Raises:
        CheckpointError: if the run's configuration cannot be read.
    """
    try:
        saved = yaml.safe_load(check_signed((folder / 'config.yaml').read_text('utf-8')))['data']
        return {**saved, 'root': saved['root']}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f'{folder / "config.yaml"} cannot be read: {error}') from None


def trained_on(checkpoint: str, source: Source, root: str) -> list[str]:
    """Return a note if a source of the data of a run, which divided them itself, has images that it was trained on."""
    folder = run_folder(checkpoint)
    if folder is None or not (folder / SPLIT_FILE).exists():
        return []
    if Path(root).expanduser().resolve() != Path(data_of(folder)['root']).expanduser().resolve():
        return []
    names, trained = relative_names(source, root), {*Split.load(folder / SPLIT_FILE).train}
    if not (count := sum(name in trained for name in names)):
        return []
    return [
        f'the run was trained on {count:,} of these {len(names):,} images, so the scores are too good; without --data '
        'the others are scored'
    ]
