"""Some of the images of a source."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..decode import Raw
from .base import Source


class Subset:
    """The images of a source at some indices, with all of its classes."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.classes, self.indices = source, source.classes, [int(i) for i in indices]
        self.labels: Sequence[int] = [source.labels[i] for i in self.indices]
        self.skipped: Counter[str] = getattr(source, 'skipped', None) or Counter()
        self.uncounted: str = getattr(source, 'uncounted', '')

    def open(self, index: int) -> Raw:
        return self.source.open(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def __getattr__(self, name: str) -> Any:
        if name not in ('content', 'content_sizes'):
            raise AttributeError(name)
        found = getattr(self.source, name)  # AttributeError if the source cannot say
        if name == 'content':
            return lambda index: found(self.indices[index])

        def content_sizes() -> Sequence[int]:
            sizes = found()
            return [sizes[i] for i in self.indices]

        return content_sizes


class Part(Subset):
    """The first images of every class of a source, the same fraction of each class, `count` in all."""

    def __init__(self, source: Source, count: int) -> None:
        labels, seen = np.asarray(source.labels), Counter[int]()
        fractions = np.empty(len(labels))
        sizes = np.bincount(labels, minlength=len(source.classes))
        for i, label in enumerate(labels.tolist()):
            fractions[i] = seen[label] / sizes[label]
            seen[label] += 1
        super().__init__(source, np.sort(np.argsort(fractions, kind='stable')[:count]).tolist())
