"""Report on the images of a run before it starts: classes, counts, what was left out, and what looks wrong."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .sources import Source, printable

MAX_IMBALANCE = 10  # images of the largest class for each of the smallest
FEW_IMAGES = 10  # of a class
SHOWN = 5  # names in a line
MAX_COMPARED = 200_000  # images whose sizes are looked up to find duplicates
MAX_READ = 1 << 31  # bytes of images that are read to find duplicates


@dataclass
class DataReport:
    """Facts about the training and validation images of a run.

    Args:
        classes: Names in order.
        train: Training images of each class.
        val: Validation images of each class.
        skipped: Files left out of both, by reason, as 'files ending in .txt'.
        duplicates: Pairs of a training and a validation image with the same content, by name; None if it was not
            checked, because there are too many images or the source cannot say.
    """

    classes: list[str]
    train: list[int]
    val: list[int]
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] | None = None

    @property
    def imbalance(self) -> float:
        """Return the training images of the largest class divided by those of the smallest."""
        return max(self.train) / max(min(self.train), 1)

    def lines(self) -> list[str]:
        """Return the report as lines of text: classes, images of each, and what was left out."""
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
            lines.append('left out: ' + ', '.join(f'{n:,} {reason}' for reason, n in sorted(self.skipped.items())))
        return lines

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
    skipped = Counter(getattr(train, 'skipped', {}))
    if getattr(val, 'source', val) is not getattr(train, 'source', train):  # not two parts of one source
        skipped.update(getattr(val, 'skipped', {}))
    counts = [Counter(source.labels) for source in (train, val)]
    trained, validated = ([count[i] for i in range(len(train.classes))] for count in counts)
    return DataReport(list(train.classes), trained, validated, dict(skipped), find_duplicates(train, val))


def find_duplicates(train: Source, val: Source) -> 'list[tuple[str, str]] | None':
    """Find the validation images whose files have the same content as a training image's.

    Only images of a size that occurs in both sets are read. None if a source cannot say the size of its files, if there
    are more than MAX_COMPARED images, or if more than MAX_READ bytes would be read.
    """
    if len(train.labels) + len(val.labels) > MAX_COMPARED:
        return None
    try:
        sizes = [[source.content_size(i) for i in range(len(source.labels))] for source in (train, val)]  # type: ignore
    except (AttributeError, OSError):
        return None
    common = {*sizes[0]} & {*sizes[1]}
    if sum(size for found in sizes for size in found if size in common) > MAX_READ:
        return None
    known = {_digest(train, i): i for i, size in enumerate(sizes[0]) if size in common}
    found = ((_digest(val, i), i) for i, size in enumerate(sizes[1]) if size in common)
    return [(train.name(known[digest]), val.name(i)) for digest, i in found if digest in known]


def _digest(source: Source, index: int) -> bytes:
    """Hash the content of an image's file; of one that cannot be read, its name."""
    try:
        content = source.content(index)  # type: ignore[attr-defined]
    except Exception:  # damaged, and reported when it is opened
        content = source.name(index).encode('utf-8', 'surrogateescape')
    return hashlib.blake2b(content, digest_size=16).digest()
