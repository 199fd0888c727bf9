"""The interface of a source of labelled images."""

from collections.abc import Sequence
from typing import Any, Protocol

from ..decode import Raw


class Source(Protocol):
    """Labelled images, each opened when it is needed.

    A source may also have `skipped`, counts of files that were left out, by reason; `uncounted`, a sentence about files
    whose number is not known; `content(index)`, the bytes of an image as they are stored, and `content_sizes()`, the
    numbers of these bytes, or DataError if finding them would take long; and `column(name)`, a further value of each
    image.
    """

    classes: list[str]
    labels: Sequence[int]

    def open(self, index: int) -> Raw:
        """Read an image; raises ImageError if it is damaged."""

    def name(self, index: int) -> str:
        """Return the name that a person finds the image by."""


def read_channels(source: Any, channels: int) -> None:
    """Make a source, and those that it is made of, read images for a model of this number of channels.

    Only multi-band images are read differently; see `read_image`.
    """
    if hasattr(source, 'channels'):
        source.channels = channels
    for part in (*getattr(source, 'parts', ()), *([source.source] if hasattr(source, 'source') else [])):
        read_channels(part, channels)
