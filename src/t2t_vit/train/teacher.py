"""A trained model that a student learns from."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, is_model
from torch import nn

from ..data import Batch, Preprocessing
from ..models.listing import build
from ..settings import UsageError
from .token_labels import Grid, token_grid


class Teacher:
    """A frozen model in evaluation mode, which gets the student's images with its own mean and std.

    It is not a module, so a module that holds it neither saves, trains, averages nor synchronises it. It moves to the
    device of the images.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes). Mean and std are those of its `pretrained_cfg`, or else
            the student's. A model for colour gets a grey image in all channels.
        student: The preprocessing of the student's images.
        size: (H, W) that images are resized to; by default the student's.
    """

    def __init__(self, model: nn.Module, student: Preprocessing, size: tuple[int, int] | None = None) -> None:
        self.model, self.size = model.eval().requires_grad_(False), size or student.size
        own: dict[str, Any] = {**student.as_cfg(), **getattr(model, 'pretrained_cfg', {})}
        mean, std, own_mean, own_std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (student.mean, student.std, own['mean'], own['std'])
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def see(self, images: torch.Tensor) -> torch.Tensor:
        """Return the student's images, (B, C, H, W), with the teacher's mean, std and size."""
        if self.scale.device != images.device:
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
            self.model.to(images.device)
        images = images * self.scale + self.shift
        if images.shape[-2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode='bicubic', antialias=True, align_corners=False)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits of the student's images: (B, C, H, W) -> (B, classes)."""
        return self.model(self.see(images)).float()

    @torch.no_grad()
    def score_places(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of each position of the last feature map, put through the head: (B, classes, h, w)."""
        images = self.see(images)
        features = self.model.forward_features(images)  # type: ignore[operator]
        if features.ndim == 4:  # (B, D, h, w): each position as an image of one pixel
            (h, w), rows = features.shape[-2:], features.permute(0, 2, 3, 1).flatten(0, 2)[..., None, None]
        else:  # (B, prefix + N, D): each token as an image of its own, as its class token and as its only other token
            h, w = token_grid(self.model, images.shape[-2], images.shape[-1])
            prefix = getattr(self.model, 'num_prefix_tokens', 1)
            rows = features[:, prefix:].flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
        scores = self.model.forward_head(rows)  # type: ignore[operator]
        return scores.float().view(len(images), h, w, -1).permute(0, 3, 1, 2)

    def label_tokens(self, batch: Batch, grid: Grid) -> torch.Tensor:
        """Return class probabilities for every token of a student's grid: (B, classes, h, w)."""
        return F.interpolate(self.score_places(batch.images), grid, mode='bilinear', align_corners=False).softmax(1)


def load_teacher(
    name: str, cfg: dict[str, Any], size: int | tuple[int, int] | None = None, dense: bool = False
) -> Teacher:
    """Load a teacher, and try it on an image of the student's size.

    Args:
        name: A timm model with published weights, a run folder, hf-hub:USER/NAME, local-dir:FOLDER, or
            FILE.py:FUNCTION, which is called with img_size.
        cfg: The student's pretrained_cfg, with preprocessing, number and perhaps names of classes.
        size: Image size in pixels; by default the student's.
        dense: Set to true if it has to label positions.

    Raises:
        UsageError: if it cannot be loaded, or does not fit the student.
    """
    student, size = Preprocessing.of(cfg), (size, size) if isinstance(size, int) else size
    try:
        if is_model(name) and not get_pretrained_cfg(name).has_weights:  # timm would return random weights
            raise ValueError('no weights of it are published')
        model = build(f'local-dir:{name}' if Path(name).is_dir() else name, size or student.size, pretrained=True)
    except Exception as error:  # raised by the file, the Hub, or a checkpoint that does not fit
        raise UsageError(f'no teacher {name!r}: {error}') from error
    teacher = Teacher(model, student, size)
    image = torch.zeros(1, student.channels, *student.size)
    try:
        count = (teacher.score_places(image) if dense else teacher(image)).shape[1]
    except Exception as error:  # the model may raise anything
        raise UsageError(
            f'the teacher {name!r} cannot {"label positions of" if dense else "score"} images of '
            f'{"x".join(map(str, image.shape[1:]))}: {error}'
        ) from error
    if count != cfg['num_classes']:
        raise UsageError(f'the teacher {name!r} knows {count} classes, the student {cfg["num_classes"]}')
    theirs, ours = getattr(model, 'pretrained_cfg', {}).get('label_names'), cfg.get('label_names')
    if theirs and ours and list(theirs) != list(ours):
        raise UsageError(
            f'the teacher {name!r} and the student have different classes, or another order of them: '
            f'{", ".join(theirs[:5])}, … and {", ".join(ours[:5])}, …'
        )
    return teacher
