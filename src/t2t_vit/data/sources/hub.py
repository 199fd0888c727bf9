"""Data sets of the Hugging Face Hub."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pyarrow.compute as pc
from timm.data import create_dataset

from ..decode import Raw, read_image
from ..errors import DataError
from .labels import find_columns, number_labels
from .names import reason_to_skip
from .parquet import byte_counts
from .splits import SPLITS

DESCRIPTIONS = ('README.md', '.gitattributes', 'dataset_infos.json')  # of a set, without images


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
            builder = load_dataset_builder(name, cache_dir=folder)
        except Exception as error:  # the package has error classes of its own, which differ between versions
            raise DataError(f'cannot open hfds/{name}: {error}') from error
        info = builder.info
        files = getattr(getattr(builder, 'config', None), 'data_files', None) or {}
        found = [str(name) for name in info.splits or files or SPLITS[split]]
        chosen = next((known for known in SPLITS[split] if known in found), None)
        if chosen is None:
            raise DataError(
                f'hfds/{name} has the splits {", ".join(found)}; expected one of {", ".join(SPLITS[split])}'
            )
        image, label = find_columns(list(info.features or ('image', 'label')), f'hfds/{name}')
        self.reader = create_dataset(f'hfds/{name}', folder, chosen, input_key=image, target_key=label).reader
        numbers = self.reader.class_to_idx  # empty where the labels are bare numbers or text
        self.origin, self.channels, self.image = f'hfds/{name}/{chosen}', channels, image
        self.skipped, self.uncounted = count_unused(
            str(getattr(builder, 'base_path', '')), frozenset(str(file) for part in files.values() for file in part)
        )
        self.classes, self.labels = number_labels(
            list(self.reader.dataset[label]), sorted(numbers, key=numbers.get), f'hfds/{name}', label, classes
        )

    def open(self, index: int) -> Raw:
        with self.reader[index][0] as file:
            return read_image(file, self.channels)

    def content(self, index: int) -> bytes:
        with self.reader[index][0] as file:
            return file.read()

    def content_sizes(self) -> Sequence[int]:
        cells = self.reader.dataset.with_format('arrow')[self.image]  # a chunked array, or a column of it
        cells = cells[:] if not hasattr(cells, 'type') else cells
        paths = pc.struct_field(cells, 'path').to_pylist()
        sizes = byte_counts(cells).to_pylist()
        return [size or (os.path.getsize(path) if path else 0) for size, path in zip(sizes, paths)]

    def name(self, index: int) -> str:
        return f'{self.origin}[{index}]'


@lru_cache(maxsize=4)
def count_unused(folder: str, used: frozenset[str]) -> tuple[Counter[str], str]:
    """Count the files of a set that the package `datasets` leaves out, by reason.

    Args:
        folder: The set's folder or address.
        used: The files of all splits.

    Returns:
        The counts, the same object for all splits of a set, and a sentence if the files are not known.
    """
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(folder)
        names = [path.removeprefix(root).strip('/') for path in system.find(root)]
        read = {system._strip_protocol(path).removeprefix(root).strip('/') for path in used}
    except Exception:  # no listing without a network; file systems have many kinds of errors
        names, read = [], set()
    if not read or not read <= {*names}:
        return Counter(), 'what the package datasets leaves out is not counted'
    unused = (name.rpartition('/')[2] for name in names if name not in read and name not in DESCRIPTIONS)
    return Counter(map(reason_to_skip, unused)), ''
