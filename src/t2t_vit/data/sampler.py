"""Balance the classes of a training set by repeating images."""

import numpy as np

from .sources import Source, Subset


class Balanced(Subset):
    """The images of a source, those of smaller classes repeated until every class has as many as the largest.

    The images themselves come first, so their order and augmentation follow the same random numbers as without
    repetition. Each repetition is augmented on its own. Like any source it has a length and an order, so steps,
    processes and a resumed run need nothing more.
    """

    def __init__(self, source: Source) -> None:
        labels = np.asarray(source.labels)
        members = [np.flatnonzero(labels == label) for label in range(len(source.classes))]
        largest = max(map(len, members))
        repeated = [np.resize(found, largest - len(found)) for found in members if len(found)]  # which cycles
        super().__init__(source, np.concatenate([np.arange(len(labels)), *repeated]).tolist())
