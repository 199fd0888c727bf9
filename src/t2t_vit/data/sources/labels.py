"""Derive class names and labels from paths, numbers or text; the same rules for every format."""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .base import Source

IMAGE_COLUMNS = ('image', 'img', 'jpg', 'jpeg', 'png', 'webp')
LABEL_COLUMNS = ('label', 'labels', 'fine_label', 'cls', 'class', 'target', 'category')
MAX_LABEL = 1 << 20  # bytes of a label, or of a file that holds one


class Labels(NamedTuple):
    """Class names, and for every image the index of its class."""

    classes: list[str]
    labels: Sequence[int]


def number_labels(
    values: Sequence[Any],
    names: Sequence[str] = (),
    origin: str = '',
    column: str = 'label',
    classes: 'Sequence[str] | None' = None,
    empty: Sequence[Any] = (),
) -> Labels:
    """Turn text or numbers into labels.

    Args:
        values: The label of each image, all text or all whole numbers.
        names: What numbers mean: 0 is the first name. Without names a number is its own name.
        origin: Where the labels are from, for messages.
        column: Which column they are from, for messages.
        classes: Names and order of the classes, as of a training set or a model; by default those found, sorted.
        empty: Names of classes without images.

    Raises:
        DataError: if labels are empty, or not all text or all whole numbers, if a number has no name, or if a label is
            not one of the classes given.
    """
    kinds = {type(value) for value in values}
    if kinds not in ({str}, {int}, {bool}):
        raise DataError(
            f'{origin} has no integer or text label for every image: {column} holds '
            f'{", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"}'
        )
    if blank := sum(isinstance(value, str) and not value.strip() for value in values):
        raise DataError(f'{origin} has empty labels for {blank} of {len(values)} images: {column} must name each one')
    found = {*values}
    order = list(range(len(names))) if names and kinds != {str} else sorted(found | {*empty})
    spoken = list(names) if names and kinds != {str} else [str(value) for value in order]
    if outside := sorted(found - {*order}):
        raise DataError(f'{origin} names {len(names)} classes, and has the labels {outside[:5]}')
    if repeated := [name for name, count in Counter(spoken).items() if count > 1]:
        raise DataError(f'{origin} has several classes of the same name: {", ".join(repeated[:5])}')
    if classes is not None:
        strange = [name for value, name in zip(order, spoken) if value in found and name not in {*classes}]
        if strange:
            raise DataError(f'{origin} {strange_classes(strange, classes)}')
    index = {name: i for i, name in enumerate(spoken if classes is None else classes)}
    table = {value: index.get(name, -1) for value, name in zip(order, spoken)}
    return Labels(list(index), [table[value] for value in values])


def strange_classes(strange: Sequence[str], classes: Sequence[str]) -> str:
    """Say which classes of a set are not among those expected."""
    more = f' and {len(strange) - 5} more' if len(strange) > 5 else ''
    known = ', '.join(classes[:5]) + (', …' if len(classes) > 5 else '')
    forms = {unicodedata.normalize('NFC', name) for name in classes}
    same = any(unicodedata.normalize('NFC', name) in forms for name in strange)
    note = '; some differ only in how Unicode writes accents, as file names from macOS do: rename them' if same else ''
    return f'has images of {", ".join(strange[:5])}{more}; expected only the {len(classes)} classes {known}{note}'


class PathLabels(NamedTuple):
    """The class of each path, the classes without a path, and the folder of the class folders ('' if at the top)."""

    names: list[str]
    empty: list[str]
    prefix: str


def label_paths(
    paths: Sequence[str], folders: Iterable[str] = (), origin: str = '', classes: Collection[str] | None = None
) -> PathLabels:
    """Read classes from paths: an image belongs to the class of the first folder on its path.

    Folders that hold everything, as `photos` in photos/cat/1.jpg and photos/dog/2.jpg, are passed over.

    Args:
        paths: Relative paths with `/`.
        folders: Relative paths of folders, where empty ones are known too.
        origin: Where the paths are from, for messages.
        classes: Names that are known to be classes.

    Raises:
        DataError: if an image is outside of all class folders.
    """
    parts = [path.split('/')[:-1] for path in paths]
    every = [*parts, *(folder.split('/') for folder in folders)]
    depth = class_depth(parts, every, classes or ())
    if bare := [path for path, part in zip(paths, parts) if len(part) <= depth]:
        raise DataError(
            f'{origin} has {len(bare)} of {len(paths)} images outside of class folders, as {bare[0]}; '
            'expected CLASS/IMAGE'
        )
    names = [part[depth] for part in parts]
    empty = sorted({part[depth] for part in every if len(part) > depth} - {*names})
    return PathLabels(names, empty, '/'.join(parts[0][:depth]) if parts else '')


def class_depth(parts: list[list[str]], every: list[list[str]], classes: Collection[str]) -> int:
    """Return the level of the class folders: the first with several folders, after levels with only one."""
    shallowest = min(map(len, parts), default=0)
    for depth in range(shallowest):
        names = {part[depth] for part in every if len(part) > depth}
        if len(names) > 1 or names & {*classes}:
            return depth
    return 0


def check_training_classes(train: Source) -> None:
    """Check that there are at least two classes, and images of each.

    Raises:
        DataError: naming the classes without images.
    """
    if len(train.classes) < 2:
        raise DataError(f'the training images are of one class, {train.classes[0]}; a classifier needs at least two')
    counts = Counter(train.labels)
    if empty := [name for i, name in enumerate(train.classes) if not counts[i]]:
        more = f' and {len(empty) - 5} more' if len(empty) > 5 else ''
        raise DataError(
            f'no training images of {", ".join(empty[:5])}{more}: add images, or remove the class folders or names'
        )


def find_columns(columns: Sequence[str], origin: str) -> tuple[str, str]:
    """Return the names of the columns of images and of labels.

    Raises:
        DataError: if a table has none of the usual names.
    """
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        raise DataError(
            f'{origin} has the columns {list(columns)}; expected one of images ({", ".join(IMAGE_COLUMNS)}) and '
            f'one of labels ({", ".join(LABEL_COLUMNS)})'
        )
    return image, label


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file in UTF-8.

    Raises:
        DataError: if it is not text in UTF-8.
    """
    try:
        return file.read_text(encoding='utf-8-sig').splitlines()
    except ValueError:
        raise DataError(f'{file} is not text in UTF-8') from None
