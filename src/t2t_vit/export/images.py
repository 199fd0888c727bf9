"""Open images, labelled or not, to compare models on and to calibrate int8 with."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data import DataError, Images, Opener, Preprocessing, Source, convert_image, find_images, left_out, open_source


class Samples:
    """Crops of scikit-learn's two photographs, at several positions and sizes; unlabelled."""

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
        """Return a crop."""
        return self.photos[index % 2].crop(self.windows[index])

    def name(self, index: int) -> str:
        """Return the number of the photograph and the corners of the crop."""
        return f'samples/{index % 2}{self.windows[index]}'


class Pictures(NamedTuple):
    """Images, how many they are, and the model's output of each one's class; no labels if none are known."""

    source: Source | Images
    total: int
    labels: Sequence[int] = ()
    notes: Sequence[str] = ()


Outputs = Callable[[Source, str], tuple[list[int], str]]  # the model's output of each of a source's classes


def open_images(data: str, split: str, cache: str | None = None, match: Outputs | None = None) -> Pictures:
    """Open images to compare on or to calibrate with: `samples`, a folder of images, or what `open_source` takes.

    Args:
        data: Where the images are.
        split: val or train, of labelled images.
        cache: Folder of torch/ and hfds/ sets.
        match: `Classifier.match` of the model, to read the labels; None to ignore them.

    Raises:
        UsageError: if the labels are read, and the classes are not the model's.
        DataError: if there are no such images.
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
        return Pictures(found, len(found), (), left_out(found, data))
    source = open_source(data, split, cache)
    notes = left_out(source, data)
    if match is None:
        return Pictures(source, len(source.labels), (), notes)
    outputs, note = match(source, data)
    notes = [*([note] if note else []), *notes]
    return Pictures(source, len(source.labels), [outputs[label] for label in source.labels], notes)


class Batch(NamedTuple):
    """Normalised images of one size, (B, C, H, W), the model's outputs of their classes, (B,), and the decoded images.

    Labels are None if they are not known; a decoded image is uint8, (H, W, C).
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    decoded: list[np.ndarray]


def batches(
    pictures: Pictures, preprocessing: Preprocessing, batch_size: int, limit: int | None, damaged: list[str]
) -> Iterator[Batch]:
    """Yield at most `limit` of the images, evenly spread over them; the names of damaged ones are added to `damaged`.

    Raises:
        DataError: if not one image can be read.
    """
    source, count, labels, _ = pictures
    opener, seen = Opener(source, preprocessing), 0
    kept = min(count, limit or count)
    places = [i * count // kept for i in range(kept)]
    for start in range(0, kept, batch_size):
        found: list[tuple[torch.Tensor, int, np.ndarray]] = []
        for i in places[start : start + batch_size]:
            try:
                image = opener.show(i)
                pixels = np.asarray(image)
                pixels = pixels[..., None] if pixels.ndim == 2 else pixels
                found.append((opener.preprocessing.evaluate(image), labels[i] if labels else -1, pixels))
            except Exception:  # whatever a decoder may raise over damaged bytes
                damaged.append(source.name(i))
        seen += len(found)
        if found:
            images, truths, decoded = zip(*found)
            yield Batch(
                preprocessing.normalize(torch.stack(images)), torch.tensor(truths) if labels else None, [*decoded]
            )
    if not seen:
        raise DataError(f'not one of {count} images can be read: {", ".join(damaged[:5])}')
