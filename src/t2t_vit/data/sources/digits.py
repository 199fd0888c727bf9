"""scikit-learn's handwritten digits, which need no download."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .labels import number_labels


class Digits:
    """The handwritten digits: 1,797 scans of 8×8 grey pixels, in a fixed stratified split of 80 to 20 %."""

    def __init__(self, split: str, classes: Sequence[str] | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        chosen = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)[
            split != 'train'
        ]
        self.indices = np.sort(chosen)
        names = [str(digit) for digit in range(10)]
        self.classes, self.labels = number_labels(
            digits.target[self.indices].tolist(), names, 'digits', 'target', classes
        )
        self.pixels = np.rint(digits.images[self.indices] * (255 / 16)).astype(np.uint8)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def content_sizes(self) -> Sequence[int]:
        return [self.pixels[0].nbytes] * len(self.pixels)

    def name(self, index: int) -> str:
        return f'digits/{self.indices[index]}'
