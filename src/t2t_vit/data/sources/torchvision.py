"""torchvision's small sets, held decoded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timm.data import create_dataset

from ...settings import nearest
from ..decode import Raw, read_image
from ..errors import DataError
from .labels import number_labels

TORCH_SETS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')


class TorchSet:
    """One of torchvision's small sets, opened by timm's create_dataset; nothing of it is left out.

    Raises:
        DataError: if there is no such set, or it is not downloaded.
    """

    def __init__(
        self, name: str, split: str, cache: Path, download: bool, classes: Sequence[str] | None = None
    ) -> None:
        if name not in TORCH_SETS:
            raise DataError(
                f'unknown set torch/{name}{nearest(name, TORCH_SETS)}; '
                f'there are {", ".join(f"torch/{known}" for known in TORCH_SETS)}'
            )
        try:
            self.images = create_dataset(
                f'torch/{name}', str(cache), 'train' if split == 'train' else 'validation', download=download
            )
        except (RuntimeError, OSError) as error:  # not there, or truncated; or there is no network
            hint = 'cannot download it' if download else '--data.download true fetches it, --data.cache says where to'
            raise DataError(f'no torch/{name} in {cache}: {hint} ({error})') from error
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
