"""Divide one set of images into training and validation images, and keep the division as lists of names."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..integrity import check_seal, seal, write_text
from .errors import DataError
from .sources import Source, Subset, check_training_classes, open_source, printable

SPLIT_FILE = 'split.json'  # in a run folder
ORDERED = 10_000  # groups that are put in order, in all orders together
PASSES = 3  # over each order
FAR = 0.03  # difference of a fraction from the one asked for, from which on it is said


@dataclass(frozen=True)
class SplitOptions:
    """How to divide images.

    Args:
        val_fraction: Fraction of the images to validate on; ignored if a fold is given.
        seed: Of the shuffling; the same seed and images give the same split.
        group_by: Keep images together that agree in this: a column of a table, or a regular expression on the image's
            path, of which the first group counts (or the whole match).
        fold: Validate on this part of `folds` equal parts, from 0 on.
        folds: How many parts.
    """

    val_fraction: float | None = None
    seed: int = 0
    group_by: str | None = None
    fold: int | None = None
    folds: int = 5

    @property
    def wanted(self) -> bool:
        """Return true if images are to be divided at all."""
        return self.val_fraction is not None or self.fold is not None

    def problems(self) -> list[str]:
        """Return what is wrong with the values, a sentence each."""
        fraction = self.val_fraction
        rules = [
            (fraction is None or 0 < fraction < 1, f'data.val_fraction must be above 0 and below 1, got {fraction}'),
            (self.folds >= 2, f'data.folds must be at least 2, got {self.folds}'),
            (
                self.fold is None or 0 <= self.fold < self.folds,
                f'data.fold must be from 0 to {self.folds - 1} (data.folds is {self.folds}), got {self.fold}',
            ),
            (self.seed >= 0, f'data.split_seed must be at least 0, got {self.seed}'),
            (
                self.group_by is None or self.wanted,
                f'data.group_by {self.group_by!r} needs data.val_fraction or data.fold',
            ),
        ]
        try:
            re.compile(self.group_by or '')
        except re.error as error:
            rules.append((False, f'data.group_by {self.group_by!r} is not a regular expression: {error}'))
        return [sentence for holds, sentence in rules if not holds]

    def describe(self, split: 'Split') -> str:
        """Say what fraction a split has, if groups made it another one than was asked for; else an empty string."""
        taken = len(split.val) / max(len(split.train) + len(split.val), 1)
        if self.group_by is None or self.fold is not None or abs(taken - (self.val_fraction or taken)) <= FAR:
            return ''
        return (
            f'{taken:.0%} of the images are validated on, not {self.val_fraction:.0%}: the groups by '
            f'{self.group_by!r} allow nothing closer'
        )


@dataclass(frozen=True)
class Split:
    """The names of training and validation images, relative to the data's root."""

    train: list[str]
    val: list[str]

    def save(self, file: Path) -> None:
        """Write the names as JSON, a name a line; `load` reads them back, whatever bytes they have."""
        write_text(file, json.dumps(seal({'train': self.train, 'val': self.val}), indent=0) + '\n')

    @classmethod
    def load(cls, file: Path) -> 'Split':
        """Read names from a file.

        Raises:
            DataError: if it is not a file of `save`, or is damaged.
        """
        try:
            found = json.loads(file.read_text(encoding='utf-8'))
            check_seal(found)
            lists = found['train'], found['val']
            if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
                raise ValueError('expected lists of names')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f'{file} is not a split: {error}') from None
        return cls(*lists)

    def apply(self, source: Source, root: str) -> tuple[Subset, Subset]:
        """Return the training and the validation images of a source that has at least these images.

        Raises:
            DataError: naming images that are no longer there.
        """
        index = {name: i for i, name in enumerate(relative_names(source, root))}
        if missing := [name for name in (*self.train, *self.val) if name not in index]:
            raise DataError(f'{len(missing)} images of the split are not in {root}, as {printable(missing[0])}')
        train, val = ([index[name] for name in names] for names in (self.train, self.val))
        return Subset(source, train), Subset(source, val)


def relative_names(source: Source, root: str) -> list[str]:
    """Return the names of all images, relative to the root if they are paths in it."""
    prefix = f'{str(Path(root).expanduser()).rstrip("/")}/'
    return [source.name(i).removeprefix(prefix) for i in range(len(source.labels))]


def split_source(source: Source, root: str, options: SplitOptions) -> Split:
    """Divide the images of a source, with the same fraction of every class in both parts (stratified).

    The result depends on the names and classes of the images and on the options, and not on the order of the source.

    Raises:
        DataError: if a class or a group has too few images to be divided.
    """
    from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

    names = relative_names(source, root)
    if len({*names}) < len(names):
        double = Counter(names).most_common(1)[0][0]
        raise DataError(f'several images have the name {printable(double)}; a split needs different names')
    order = sorted(range(len(names)), key=lambda i: names[i].encode('utf-8', 'surrogateescape'))
    labels = np.array([source.labels[i] for i in order])
    groups = group_names(source, names, options.group_by) if options.group_by else None
    fraction = options.val_fraction or 1 / options.folds
    check_countable(source, labels, groups, order, options, fraction)
    keys: Any = None if groups is None else np.unique([groups[i] for i in order], return_inverse=True)[1]
    parts: Any
    if options.fold is not None:
        if groups is not None and len({*groups}) < options.folds:
            raise DataError(
                f'data.group_by {options.group_by!r} finds {len({*groups})} groups, as {printable(groups[0])!r}; '
                f'{options.folds} or more are needed to validate on 1/{options.folds} of the images'
            )
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        parts = kind(options.folds, shuffle=True, random_state=options.seed)
    elif keys is None:
        parts = StratifiedShuffleSplit(1, test_size=fraction, random_state=options.seed)
    else:
        parts = LeaveOneGroupOut()  # of the groups that are chosen and those that are not
        keys = ~np.isin(keys, choose_groups(labels, keys, fraction, options.seed))
    try:
        divided = list(parts.split(np.zeros(len(order)), labels, keys))
    except ValueError as error:  # fewer images or groups than parts
        raise DataError(f'the images cannot be divided: {error}') from None
    train, val = ([names[order[i]] for i in sorted(part)] for part in divided[options.fold or 0])
    return Split(train, val)


def choose_groups(labels: np.ndarray, keys: np.ndarray, fraction: float, seed: int) -> list[int]:
    """Choose groups that together have a fraction of the images, and of those of each class, as closely as they can.

    In a random order, each group is taken, and in later passes left out again, where that brings the fractions closer;
    of many orders the best is kept. scikit-learn's splitter makes folds of groups, not fractions.

    Args:
        labels: The class of each image.
        keys: The group of each image, from 0 on.
        fraction: Of the images.
        seed: Of the orders.
    """
    counts = np.zeros((keys.max() + 1, labels.max() + 1))
    np.add.at(counts, (keys, labels), 1)
    shares = counts / counts.sum(0)
    shares = np.column_stack([shares / np.sqrt(shares.shape[1]), 2 * counts.sum(1) / len(keys)])  # all images: most
    best: tuple[float, list[int]] = (np.inf, [])
    chance = np.random.default_rng(seed)
    for _ in range(min(max(ORDERED // len(shares), 3), 100)):
        order = chance.permutation(len(shares)).tolist()
        chosen = {order[0]}
        missing = fraction * shares.sum(0) - shares[order[0]]
        for group in PASSES * order:
            change = -1 if group in chosen else 1
            after = missing - change * shares[group]
            if after @ after < missing @ missing and 0 < len(chosen) + change < len(shares):
                chosen ^= {group}
                missing = after
        best = min(best, (float(missing @ missing), sorted(chosen)))
    return best[1]


def check_countable(
    source: Source,
    labels: np.ndarray,
    groups: 'Sequence[str] | None',
    order: Sequence[int],
    options: SplitOptions,
    fraction: float,
) -> None:
    """Check that every class has enough images, or groups of them, to be in both parts.

    Raises:
        DataError: naming the classes that have not.
    """
    needed = options.folds if options.fold is not None else 2
    members: dict[int, set[Any]] = {i: set() for i in range(len(source.classes))}
    for position, label in enumerate(labels.tolist()):
        members[label].add(position if groups is None else groups[order[position]])
    few = [f'{source.classes[i]} ({len(found)})' for i, found in members.items() if len(found) < needed]
    kind = 'images' if groups is None else 'groups'
    if few:
        raise DataError(f'each class needs at least {needed} {kind} to be divided: {", ".join(few[:5])}')
    if groups is None and options.fold is None and min(fraction, 1 - fraction) * len(labels) < len(source.classes):
        raise DataError(
            f'a fraction of {fraction:g} of {len(labels)} images is less than one image for each of '
            f'{len(source.classes)} classes'
        )


def group_names(source: Source, names: Sequence[str], group_by: str) -> list[str]:
    """Return the group of each image: a value of a column, or what a regular expression finds in its name.

    Raises:
        DataError: if the expression is not found in a name.
    """
    column = getattr(source, 'column', None)
    if column is not None and group_by.isidentifier():
        return [str(value) for value in column(group_by)]
    found = [re.search(group_by, name) for name in names]
    if missing := [name for name, match in zip(names, found) if match is None]:
        raise DataError(
            f'data.group_by {group_by!r} is not found in {len(missing)} of {len(names)} names, as '
            f'{printable(missing[0])}'
        )
    return [match.group(1 if match.re.groups else 0) or '' for match in found if match]


def open_train_val(
    root: str,
    cache: str | None = None,
    download: bool = False,
    channels: int | None = None,
    options: SplitOptions = SplitOptions(),
    split: 'Split | None' = None,
) -> 'tuple[Source, Source, Split | None]':
    """Open training and validation images of one set of classes, dividing the images if the options say so.

    Args:
        root: As in `open_source`; with a split wanted, a folder of class folders, or a tar, Parquet file or .csv, or
            data with a training split, of which only that is used.
        cache: As in `open_source`.
        download: As in `open_source`.
        channels: As in `open_source`.
        options: How to divide the images; by default they are divided already.
        split: A division that was made before, as of the run that is resumed; it is used instead of a new one.

    Returns:
        Training images, validation images, and the split, to be saved with the run; None if nothing was divided.

    Raises:
        DataError: if there are no such images, a class has no training images, or validation images are of a class
            that the training images are not of.
    """
    if not options.wanted and split is None:
        train = open_source(root, 'train', cache, download, channels)
        check_training_classes(train)
        return train, open_source(root, 'val', cache, download, channels, train.classes), None
    whole = open_source(root, 'all', cache, download, channels)
    split = split or split_source(whole, root, options)
    parts = split.apply(whole, root)
    check_training_classes(parts[0])
    return *parts, split
