"""Data sets of the Hugging Face Hub."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from timm.data import create_dataset

from ..decode import Raw, read_image
from ..errors import DataError
from .labels import find_columns, number_labels
from .splits import SPLITS


class HubSet:
    """A data set of the Hub, opened by timm's reader and the package `datasets`.

    Raises:
        DataError: if there is no such set or split, or it has no columns of images and labels.
    """

    def __init__(
        self,
        name: str,
        split: str,
        cache: str | None,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if find_spec('datasets') is None:
            raise DataError(f'hfds/{name} needs the package datasets: pip install datasets')
        from datasets import load_dataset_builder

        folder = str(Path(cache).expanduser()) if cache else None
        try:
            info = load_dataset_builder(name, cache_dir=folder).info
        except Exception as error:  # the package has error classes of its own, which differ between versions
            raise DataError(f'cannot open hfds/{name}: {error}') from error
        found = list(info.splits or SPLITS[split])
        chosen = next((known for known in SPLITS[split] if known in found), None)
        if chosen is None:
            raise DataError(
                f'hfds/{name} has the splits {", ".join(found)}; expected one of {", ".join(SPLITS[split])}'
            )
        image, label = find_columns(list(info.features or ('image', 'label')), f'hfds/{name}')
        self.reader = create_dataset(f'hfds/{name}', folder, chosen, input_key=image, target_key=label).reader
        numbers = self.reader.class_to_idx  # empty where the labels are bare numbers or text
        self.origin, self.channels = f'hfds/{name}/{chosen}', channels
        self.classes, self.labels = number_labels(
            list(self.reader.dataset[label]), sorted(numbers, key=numbers.get), f'hfds/{name}', label, classes
        )

    def open(self, index: int) -> Raw:
        with self.reader[index][0] as file:
            return read_image(file, self.channels)

    def name(self, index: int) -> str:
        return f'{self.origin}[{index}]'
