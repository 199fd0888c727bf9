"""Report on the images of a run before it starts: classes, counts, what was left out, and what looks wrong."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import DataError
from .sources import Source, printable
from .sources.names import counted

MAX_IMBALANCE = 10  # images of the largest class for each of the smallest
FEW_IMAGES = 10  # of a class
SHOWN = 5  # names in a line
MAX_READ = 1 << 31  # bytes of images that are read to find duplicates


@dataclass
class DataReport:
    """Facts about the training and validation images of a run.

    Args:
        classes: Names in order.
        train: Training images of each class.
        val: Validation images of each class.
        skipped: Files left out of both, by reason, as 'files ending in .txt'.
        duplicates: Pairs of a training and a validation image with the same content, by name.
        unknown: Sentences about what was not counted or not checked, and why.
    """

    classes: list[str]
    train: list[int]
    val: list[int]
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def imbalance(self) -> float:
        """Return the training images of the largest class divided by those of the smallest."""
        return max(self.train) / max(min(self.train), 1)

    def lines(self) -> list[str]:
        """Return the report as lines of text: classes, images of each, what was left out, and what is not known."""
        total, validated = sum(self.train), sum(self.val)
        lines = [f'{len(self.classes)} classes, {total:,} images to train on, {validated:,} to validate on']
        shown = self.classes if len(self.classes) <= 20 else self.classes[:10]
        width = min(max(map(len, map(printable, shown))), 40)
        lines += [
            f'  {printable(name)[:40]:{width}}  {self.train[i]:>8,}  {self.val[i]:>8,}' for i, name in enumerate(shown)
        ]
        if len(shown) < len(self.classes):
            smallest, largest = min(self.train), max(self.train)
            lines.append(
                f'  … and {len(self.classes) - len(shown)} more classes, of {smallest:,} to {largest:,} images each'
            )
        if self.skipped:
            lines.append(f'left out: {counted(self.skipped)}')
        return [*lines, *self.unknown]

    def warnings(self) -> list[str]:
        """Return what looks wrong, a sentence each; empty if nothing does."""
        found = []
        if self.imbalance > MAX_IMBALANCE:
            most, least = (self.classes[self.train.index(pick(self.train))] for pick in (max, min))
            found.append(
                f'classes are unbalanced: {max(self.train):,} training images of {printable(most)}, '
                f'{min(self.train):,} of {printable(least)}'
            )
        few = [f'{printable(name)} ({n})' for name, n in zip(self.classes, self.train) if n < FEW_IMAGES]
        if few:
            found.append(f'fewer than {FEW_IMAGES} training images: {listed(few)}')
        missing = [printable(name) for name, n in zip(self.classes, self.val) if not n]
        if missing and sum(self.val):
            found.append(f'no validation images: {listed(missing)}; scores say nothing about them')
        if self.duplicates:
            train, val = self.duplicates[0]
            count = len(self.duplicates)
            found.append(
                f'{count} validation image{" is a training image" if count == 1 else "s are training images"} too, as '
                f'{printable(val)} and {printable(train)}: scores are too high'
            )
        return found


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def report_data(train: Source, val: Source) -> DataReport:
    """Count the images of each class, what was left out, and images that are in both sets."""
    left_out = [getattr(source, 'skipped', {}) for source in (train, val)]
    one = left_out[0] is left_out[1]  # of two parts of a source, or two splits of a set of the Hub
    skipped = Counter(left_out[0]) + Counter({} if one else left_out[1])
    counts = [Counter(source.labels) for source in (train, val)]
    trained, validated = ([count[i] for i in range(len(train.classes))] for count in counts)
    duplicates, unchecked = find_duplicates(train, val)
    unknown = {text for source in (train, val) if (text := getattr(source, 'uncounted', ''))}
    return DataReport(
        list(train.classes), trained, validated, dict(skipped), duplicates, [*sorted(unknown), *unchecked]
    )


def find_duplicates(train: Source, val: Source) -> tuple[list[tuple[str, str]], list[str]]:
    """Find the validation images whose files have the same content as a training image's.

    Only images of a size that occurs in both sets are read. If these have more than MAX_READ bytes, fewer validation
    images are checked, evenly spread.

    Returns:
        Pairs of a training and a validation image, by name, and a sentence if not all validation images were checked.
    """
    unchecked = 'not checked for duplicates between training and validation images'
    try:
        sizes, val_sizes = (np.asarray(source.content_sizes()) for source in (train, val))  # type: ignore[attr-defined]
    except AttributeError:
        return [], [f'{unchecked}: the data cannot be compared by their bytes']
    except (DataError, OSError) as error:
        return [], [f'{unchecked}: {error}']
    for step in (2**i for i in itertools.count()):
        chosen = np.arange(0, len(val_sizes), step)
        common = np.intersect1d(sizes, val_sizes[chosen])
        trained, chosen = np.flatnonzero(np.isin(sizes, common)), chosen[np.isin(val_sizes[chosen], common)]
        total = int(sizes[trained].sum() + val_sizes[chosen].sum())
        if total <= MAX_READ:
            break
        if step >= len(val_sizes):
            return [], [f'{unchecked}: {total / 1e6:,.0f} MB would have to be read']
    known = {_digest(train, i): i for i in trained.tolist()}
    found = [(known[digest], i) for i in chosen.tolist() if (digest := _digest(val, i)) in known]
    checked = len(range(0, len(val_sizes), step))
    part = f'only {checked:,} of {len(val_sizes):,} validation images are checked for being training images too'
    return [(train.name(i), val.name(j)) for i, j in found], [part] if step > 1 else []


def _digest(source: Source, index: int) -> bytes:
    """Hash the content of an image's file; of one that cannot be read, its name."""
    try:
        content = source.content(index)  # type: ignore[attr-defined]
    except Exception:  # damaged, and reported when it is opened
        content = source.name(index).encode('utf-8', 'surrogateescape')
    return hashlib.blake2b(content, digest_size=16).digest()
