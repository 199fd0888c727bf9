"""Folders of class folders."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..decode import Raw, image_suffixes, open_regular, read_image
from ..errors import DataError
from .labels import label_paths, number_labels
from .names import counted, file_sizes, scan, to_text
from .splits import select_split


class Folder:
    """A folder of class folders, each with its images at any depth.

    Args:
        root: The folder.
        channels: Of the images, see `read_image`.
        classes: Names and order of the classes, as of a training set; by default the folders' names, sorted.
        split: Keep only this split, where the images are in CLASS/SPLIT/ or SPLIT/CLASS/; by default keep all.

    Raises:
        DataError: if there are no images, or some outside of class folders.
    """

    def __init__(
        self, root: Path, channels: int | None = None, classes: Sequence[str] | None = None, split: str | None = None
    ) -> None:
        self.root, self.channels = str(root), channels
        self.skipped: Counter[str] = Counter()
        folders: list[str] = []
        paths = list(scan(self.root, image_suffixes(), self.skipped, folders))
        if not paths:
            left_out = f' (left out: {counted(self.skipped)})' if self.skipped else ''
            raise DataError(
                f'no images in {root}{left_out}; expected {root}/CLASS/IMAGE, with names that end in '
                f'{" ".join(image_suffixes())}'
            )
        shown = [to_text(path) for path in paths]  # without the name of the split
        if split is not None and (selected := select_split(shown, split)):
            indices, shown = selected
            paths, folders = [paths[i] for i in indices], []
        found = label_paths(shown, map(to_text, folders), self.root, classes)
        order = sorted(range(len(paths)), key=lambda i: (found.names[i], shown[i].split('/')))
        self.files = [paths[i] for i in order]
        self.classes, self.labels = number_labels(
            [found.names[i] for i in order], (), self.root, 'folders', classes, found.empty
        )

    def path(self, index: int) -> str:
        """Return the path of an image's file."""
        return os.path.join(self.root, self.files[index])

    def open(self, index: int) -> Raw:
        return read_image(self.path(index), self.channels)

    def name(self, index: int) -> str:
        return to_text(self.path(index))

    def content(self, index: int) -> bytes:
        with open_regular(self.path(index)) as file:
            return file.read()

    def content_sizes(self) -> Sequence[int]:
        return file_sizes([self.path(i) for i in range(len(self.files))])
