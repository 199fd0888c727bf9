"""Real images, labelled or not, to compare models on and to calibrate int8 with."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data import DataError, Images, Opener, Preprocessing, Source, convert_image, find_images, open_source
from ..trained import other_classes


class Samples:
    """Windows of scikit-learn's two photographs, at several places and sizes; unlabelled."""

    count = 64

    def __init__(self) -> None:
        photos, chance = find_images(['samples']), np.random.default_rng(0)
        self.photos = [convert_image(photos.open(i)) for i in range(len(photos))]
        self.windows: list[tuple[int, int, int, int]] = []
        for i in range(self.count):
            width, height = self.photos[i % 2].size
            side = int(chance.integers(64, min(width, height)))
            left, top = int(chance.integers(width - side)), int(chance.integers(height - side))
            self.windows.append((left, top, left + side, top + side))
        self.labels: Sequence[int] = []
        self.classes: list[str] = []

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Image.Image:
        """The window, as an image."""
        return self.photos[index % 2].crop(self.windows[index])

    def name(self, index: int) -> str:
        """Which photograph and which window."""
        return f'samples/{index % 2}{self.windows[index]}'


class Pictures(NamedTuple):
    """So many images, and the class of each; no labels where none are known, and why."""

    source: Source | Images
    total: int
    labels: Sequence[int] = ()
    note: str = ''


def open_images(data: str, split: str, cache: str | None = None, model: nn.Module | None = None) -> Pictures:
    """Images to compare on or to calibrate with: `samples`, a folder of images, or what `open_source` takes.

    Labels of other classes than the model's are not read.
    """
    if data == 'samples' and not Path(data).exists():
        samples = Samples()
        return Pictures(samples, len(samples))
    if Path(data).is_dir() and not any(
        child.is_dir() or child.suffix in ('.parquet', '.tar')
        for child in Path(data).iterdir()
        if not child.name.startswith('.')
    ):
        found = find_images([data])
        return Pictures(found, len(found))
    source = open_source(data, split, cache)
    if model is not None and (problem := other_classes(model, source.classes, data)):
        return Pictures(source, len(source.labels), note=f'{problem}: its labels are not read')
    return Pictures(source, len(source.labels), source.labels)


class Batch(NamedTuple):
    """Images of one size, normalised, (B, C, H, W), and their labels, (B,), where they have some."""

    images: torch.Tensor
    labels: torch.Tensor | None


def batches(
    pictures: Pictures, preprocessing: Preprocessing, batch_size: int, limit: int | None, damaged: list[str]
) -> Iterator[Batch]:
    """At most `limit` of the images, evenly spread over them; the names of damaged ones go to `damaged`.

    Raises:
        DataError: if not one image can be read.
    """
    source, count, labels, _ = pictures
    opener, seen = Opener(source, preprocessing), 0
    kept = min(count, limit or count)
    places = [i * count // kept for i in range(kept)]
    for start in range(0, kept, batch_size):
        found: list[tuple[torch.Tensor, int]] = []
        for i in places[start : start + batch_size]:
            try:
                found.append((opener.transform(opener.show(i)), labels[i] if labels else -1))
            except Exception:  # whatever a decoder may raise over damaged bytes
                damaged.append(source.name(i))
        seen += len(found)
        if found:
            images, truths = zip(*found)
            yield Batch(torch.stack(images), torch.tensor(truths) if labels else None)
    if not seen:
        raise DataError(f'not one of {count} images can be read: {", ".join(damaged[:5])}')
