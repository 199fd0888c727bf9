"""torchvision's sets: small ones, held decoded, and the files of Imagenette."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torchvision
from timm.data import create_dataset

from ...settings import nearest
from ..decode import Raw, read_image
from ..errors import DataError
from .base import Source
from .folder import Folder
from .labels import number_labels

IMAGENETTE = 'imagenette'
TORCH_SETS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', IMAGENETTE)


def open_torch_set(
    name: str,
    split: str,
    cache: Path,
    download: bool,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Open a split of torch/NAME, with the arguments of `open_source`.

    Raises:
        DataError: if there is no such set, or it is not downloaded.
    """
    if name not in TORCH_SETS:
        raise DataError(
            f'unknown set torch/{name}{nearest(name, TORCH_SETS)}; '
            f'there are {", ".join(f"torch/{known}" for known in TORCH_SETS)}'
        )
    try:
        if name == IMAGENETTE:
            return Imagenette(split, cache, download, channels, classes)
        return TorchSet(name, split, cache, download, classes)
    except (RuntimeError, OSError) as error:  # not there, or truncated; or there is no network
        hint = 'cannot download it' if download else '--data.download true fetches it, --data.cache says where to'
        raise DataError(f'no torch/{name} in {cache}: {hint} ({error})') from error


class Imagenette(Folder):
    """Ten classes of ImageNet, 13,394 photos with a shorter side of 160 pixels; torchvision checks the MD5 sum."""

    def __init__(
        self, split: str, cache: Path, download: bool, channels: int | None = None, classes: Sequence[str] | None = None
    ) -> None:
        part = 'train' if split == 'train' else 'val'
        found = torchvision.datasets.Imagenette(cache, part, '160px', download)
        super().__init__(cache / 'imagenette2-160' / part, channels)
        names = [found.classes[found.wnid_to_idx[wnid]][0] for wnid in self.classes]
        self.classes, self.labels = number_labels([*self.labels], names, self.root, 'folders', classes)


class TorchSet:
    """One of torchvision's small sets, opened by timm's create_dataset; nothing of it is left out."""

    def __init__(
        self, name: str, split: str, cache: Path, download: bool, classes: Sequence[str] | None = None
    ) -> None:
        self.images = create_dataset(
            f'torch/{name}', str(cache), 'train' if split == 'train' else 'validation', download=download
        )
        self.origin = f'torch/{name}/{split}'
        self.classes, self.labels = number_labels(
            [int(label) for label in self.images.targets], list(self.images.classes), self.origin, 'targets', classes
        )

    def open(self, index: int) -> Raw:
        return read_image(self.images[index][0])

    def content(self, index: int) -> bytes:
        return np.asarray(self.images.data[index]).tobytes()

    def content_sizes(self) -> Sequence[int]:
        return [len(self.content(0))] * len(self.labels)

    def name(self, index: int) -> str:
        return f'{self.origin}[{index}]'
