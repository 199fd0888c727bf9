"""Train the first part of a run on smaller images, which take less time (progressive resizing)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class SmallImages:
    """The part of a run on smaller images.

    Args:
        scale: Their sides as a fraction of the model's image size; 1 for a run without them.
        share: Fraction of the steps, from the first on.
        cost: Time of a step on them as a fraction of that of a step on images of full size; by default that of their
            pixels.
    """

    scale: float
    share: float
    cost: float = 0.0

    def __post_init__(self) -> None:
        self.cost = self.cost or self.scale**2

    def until(self, total: float) -> float:
        """Return the step from which on images have their full size, of so many in all."""
        return self.share * total if self.scale < 1 else 0.0

    def side(self, pixels: int) -> int:
        """Return a side of the smaller images."""
        return max(1, round(self.scale * pixels))

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images: (B, C, H, W) -> (B, C, h, w)."""
        size = self.side(images.shape[2]), self.side(images.shape[3])
        images = F.interpolate(images, size, mode='bilinear', antialias=True, align_corners=False)
        return images.contiguous(memory_format=torch.channels_last)

    def work(self, start: float, end: float, total: float) -> float:
        """Return the work of a part of a run, in steps (or epochs) at full size.

        Args:
            start: Steps (or epochs) before it.
            end: Steps before its end.
            total: Steps of the run.
        """
        until = self.until(total)
        return end - start - (1 - self.cost) * (min(end, until) - min(start, until))
