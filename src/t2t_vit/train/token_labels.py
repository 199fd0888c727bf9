"""Labels of tokens: the token grid, label files on disk, and MixToken.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., NeurIPS 2021,
arXiv 2104.10858. Letters: B images, C classes, (h, w) the token grid, (r, c) the grid of a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torch import nn
from torchvision.ops import roi_align

from ..data import Batch, DataError
from ..models.checks import token_grids
from ..settings import UsageError

Grid = tuple[int, int]
DenseLabels = Callable[[Batch, Grid], torch.Tensor]  # class probabilities for every token, (B, C, h, w)


def token_grid(net: nn.Module, height: int, width: int) -> Grid:
    """Return the (h, w) of a model's token grid for images of this size.

    Raises:
        UsageError: if the model has no token grid.
    """
    cutter: Any
    if (cutter := getattr(net, 'tokens_to_token', None)) is not None:
        return token_grids(cutter.splits, height, width)[-1]
    if (cutter := getattr(net, 'patch_embed', None)) is not None and hasattr(cutter, 'dynamic_feat_size'):
        return cutter.dynamic_feat_size((height, width))
    raise UsageError(f'{type(net).__name__} has no token grid; expected a model of `t2t-vit models` or a ViT')


class LabelFiles:
    """Dense labels in the public TokenLabeling layout, one file for every training image.

    The image ROOT/train/CLASS/IMAGE.JPEG has FOLDER/CLASS/IMAGE.pt, a tensor (2, k, r, c): the teacher's k highest
    logits at each position of the whole image, and their classes. Logits that are not stored count as 0. The softmax
    follows the resampling of the crop, as in the published training: averaging probabilities would flatten them at
    every border. The training process reads the files, and executes nothing in them.

    Args:
        folder: FOLDER.
        root: ROOT, data.root.
        name: Returns the path of an image by its index.
        num_classes: C.

    Raises:
        DataError: if the first image's file does not fit; when it is called, for any other file.
    """

    def __init__(self, folder: Path, root: Path, name: Callable[[int], str], num_classes: int) -> None:
        self.folder, self.root, self.name, self.num_classes = folder, root, name, num_classes
        self.shape = self.read(0).shape

    def file(self, index: int) -> Path:
        """Return the path of an image's labels."""
        image = Path(self.name(index))
        parts = image.relative_to(self.root).parts if image.is_relative_to(self.root) else ()
        if len(parts) < 3:
            raise DataError(
                f'token labels need images at {self.root}/train/CLASS/IMAGE, got {image}; an objective.teacher labels '
                'images from anywhere'
            )
        return self.folder.joinpath(*parts[1:]).with_suffix('.pt')

    def read(self, index: int) -> torch.Tensor:
        """Return an image's logits and their classes, (2, k, r, c)."""
        file = self.file(index)
        try:
            labels = torch.load(file, map_location='cpu', weights_only=True)
        except FileNotFoundError:
            raise DataError(f'no token labels of {self.name(index)}: expected {file}') from None
        except Exception as error:  # damaged files raise many kinds
            raise DataError(f'{file} cannot be read as token labels: {" ".join(str(error).split())[:200]}') from None
        if problem := self.problem(labels):
            raise DataError(f'{file} {problem}')
        return labels.float()

    def problem(self, labels: Any) -> str:
        """Return what is wrong with the content of a file; an empty string if nothing is."""
        if not isinstance(labels, torch.Tensor) or labels.ndim != 4 or len(labels) != 2 or labels.numel() == 0:
            found = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            return f'holds {found}; expected a tensor (2, k, rows, columns) of logits and their classes'
        if labels.shape != getattr(self, 'shape', labels.shape):
            return f'holds {tuple(labels.shape)}, the others {tuple(self.shape)}'
        scores, classes = labels.float()
        if not scores.isfinite().all():
            return 'holds logits that are not finite'
        if ((classes < 0) | (classes >= self.num_classes) | (classes != classes.round())).any():
            return (
                f'holds the classes {classes.min().item():g} to {classes.max().item():g}; '
                f'expected whole numbers from 0 to {self.num_classes - 1}'
            )
        if scores.min() >= 0 and scores.sum(0).max() <= 1.01:
            return 'holds values that add up to at most 1, as probabilities do; expected logits'
        return ''

    def __call__(self, batch: Batch, grid: Grid) -> torch.Tensor:
        """Return class probabilities of the region that each image of the batch shows, (B, C, h, w)."""
        labels = torch.stack([self.read(index) for index in batch.indices.tolist()]).to(batch.images.device)
        scores = labels.new_zeros(len(labels), self.num_classes, *self.shape[-2:])  # (B, C, r, c)
        scores.scatter_(1, labels[:, 1].long(), labels[:, 0])
        return crop_maps(scores, batch.boxes, grid).softmax(1)


def crop_maps(maps: torch.Tensor, boxes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Crop each map, (B, C, r, c), to its box, (B, 5) as in `Batch`, and mirror it if the box says so: (B, C, h, w).

    The value at a position is that of the middle of its cell, bilinear between them.
    """
    rows, cols = maps.shape[-2:]
    top, left, height, width, mirrored = boxes.to(maps).unbind(1)
    corners = [torch.arange(len(maps)).to(maps), left * cols, top * rows, (left + width) * cols, (top + height) * rows]
    regions = roi_align(maps, torch.stack(corners, 1), grid, aligned=True)
    return torch.where(mirrored.bool().view(-1, 1, 1, 1), regions.flip(-1), regions)


def mix_tokens(
    images: torch.Tensor, dense: torch.Tensor, alpha: float, stride: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Replace a random box of whole tokens, pixels and labels, by that of the batch's mirror partner (MixToken).

    Args:
        images: (B, C, H, W).
        dense: The tokens' labels, (B, C, h, w).
        alpha: Parameter of the beta distribution of the box's area.
        stride: Pixels from token to token.

    Returns:
        Mixed copies of both, and the fraction of tokens that stayed.
    """
    (h, w), (height, width) = dense.shape[-2:], images.shape[-2:]
    (top, bottom, left, right), share = cutmix_bbox_and_lam((h, w), np.random.beta(alpha, alpha))
    rows = slice(top * stride, height if bottom == h else bottom * stride)
    cols = slice(left * stride, width if right == w else right * stride)
    images, dense = images.clone(), dense.clone()
    images[..., rows, cols] = images[..., rows, cols].flip(0)
    dense[..., top:bottom, left:right] = dense[..., top:bottom, left:right].flip(0)
    return images, dense, float(share)
