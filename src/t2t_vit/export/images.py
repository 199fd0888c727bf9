"""Real images, labelled or not, to compare models on and to calibrate int8 with."""

from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from ..data import DataError, Preprocessing, Source, decode, find_images, list_images, open_source


class Samples:
    """Windows of scikit-learn's two photographs, at several places and sizes; unlabelled."""

    count = 64

    def __init__(self) -> None:
        photos, chance = find_images(['samples']), np.random.default_rng(0)
        self.photos = [photos.open(i) for i in range(len(photos))]
        self.windows: List[Tuple[int, int, int, int]] = []
        for i in range(self.count):
            width, height = self.photos[i % 2].size
            side = int(chance.integers(64, min(width, height)))
            left, top = int(chance.integers(width - side)), int(chance.integers(height - side))
            self.windows.append((left, top, left + side, top + side))
        self.labels: Sequence[int] = []
        self.classes: List[str] = []

    def __len__(self) -> int:
        return self.count

    def open(self, index: int) -> Image.Image:
        """The window, as an image."""
        return self.photos[index % 2].crop(self.windows[index])

    def name(self, index: int) -> str:
        """Which photograph and which window."""
        return f'samples/{index % 2}{self.windows[index]}'


class Unlabelled:
    """The images of a folder, at any depth."""

    def __init__(self, folder: Path) -> None:
        self.files, self.classes = list_images(folder), []  # type: List[Path], List[str]
        self.labels: Sequence[int] = []
        if not self.files:
            raise DataError(f'no images in {folder}')

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        """The decoded image."""
        return decode(self.files[index])

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.files[index])


def open_images(data: str, split: str, cache: Optional[str] = None) -> Source:
    """Images to compare on or to calibrate with: `samples`, a folder of images, or what `open_source` takes."""
    if data == 'samples':
        return Samples()
    if Path(data).is_dir() and not any(child.is_dir() or child.suffix in ('.parquet', '.tar')
                                       for child in Path(data).iterdir() if not child.name.startswith('.')):
        return Unlabelled(Path(data))
    return open_source(data, split, cache)


class Images(NamedTuple):
    """Images of one size, normalised, (B, C, H, W), and their labels, (B,), where they have some."""

    images: torch.Tensor
    labels: Optional[torch.Tensor]


def batches(
        source: Source, preprocessing: Preprocessing, batch_size: int, limit: Optional[int], damaged: List[str],
) -> Iterator[Images]:
    """At most `limit` images of a source, evenly spread over it; the names of damaged ones go to `damaged`.

    Raises:
        DataError: if not one image can be read.
    """
    labels, transform, seen = source.labels, preprocessing.transform(), 0
    count = len(labels) or len(source)  # type: ignore[arg-type]  # unlabelled ones have a length
    kept = min(count, limit or count)
    places = [i * count // kept for i in range(kept)]
    for start in range(0, kept, batch_size):
        found: List[Tuple[torch.Tensor, int]] = []
        for i in places[start:start + batch_size]:
            try:
                found.append((transform(preprocessing.convert(source.open(i))), labels[i] if labels else -1))
            except Exception:  # whatever a decoder may raise over damaged bytes
                damaged.append(source.name(i))
        seen += len(found)
        if found:
            images, truths = zip(*found)
            yield Images(torch.stack(images), torch.tensor(truths) if labels else None)
    if not seen:
        raise DataError(f'not one of {count} images can be read: {", ".join(damaged[:5])}')
