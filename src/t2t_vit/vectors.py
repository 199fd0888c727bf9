"""Compute what a model says of a batch of images: its most probable classes, or vectors that represent them."""

from typing import Any, Literal, Protocol

import numpy as np
import torch

from .export import ExportedModel
from .settings import UsageError

Kind = Literal['features', 'class_token', 'pooled', 'pyramid']


class Head(Protocol):
    """A function of a batch of images."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return columns, (B, n) each, of images (B, C, H, W)."""


class TopK:
    """The k most probable classes: columns `classes` (outputs of the model) and `probabilities`, in falling order."""

    def __init__(self, net: Any, k: int) -> None:
        self.net, self.k = net, k

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the columns, (B, k) each, of images (B, C, H, W)."""
        values, classes = self.net(images).float().softmax(-1).topk(self.k)
        return {'classes': classes, 'probabilities': values}


class Embedding:
    """A vector for each image: column `embedding`.

    Of kind `features`, the head's input; `class_token`, the first token after the last norm; `pooled`, the mean of all
    other tokens, or of a convolutional network's last map; `pyramid`, the means over the maps of every stride (4, 8 and
    16 in T2T-ViT), concatenated, of `levels` numbers each.

    Raises:
        UsageError: if the model has no such vectors.
    """

    def __init__(self, net: Any, kind: Kind, probe: torch.Tensor) -> None:
        self.net, self.kind = net, kind
        if isinstance(net, ExportedModel) and kind != 'features':
            raise UsageError(f'an exported file returns the input of its head only: --kind features, not {kind}')
        if kind == 'class_token' and not getattr(net, 'num_prefix_tokens', 0):
            raise UsageError(f'{type(net).__name__} has no class token: use --kind pooled')
        if kind == 'pyramid':
            if not hasattr(net, 'forward_intermediates'):
                raise UsageError(f'{type(net).__name__} returns no maps of several strides: use --kind pooled')
            strides = {level['reduction']: i for i, level in enumerate(net.feature_info)}  # the last of each
            self.indices = sorted(strides.values())
        with torch.inference_mode():
            vectors = self.parts(probe)
        self.levels = [part.shape[1] for part in vectors]

    def parts(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of the vectors, each (B, d)."""
        if self.kind == 'pyramid':
            maps = self.net.forward_intermediates(
                images, indices=self.indices, intermediates_only=True, output_fmt='NCHW'
            )
            return [level.float().mean((2, 3)) for level in maps]
        if isinstance(self.net, ExportedModel):
            return [self.net.features(images)]
        tokens = self.net.forward_features(images)
        if self.kind == 'features':
            return [self.net.forward_head(tokens, pre_logits=True).float()]
        tokens = tokens.float()
        if self.kind == 'class_token':
            return [tokens[:, 0]]
        if tokens.ndim == 4:  # the maps of Swin and similar models have their channels last
            return [tokens.mean((1, 2) if getattr(self.net, 'output_fmt', 'NCHW') == 'NHWC' else (2, 3))]
        return [tokens[:, getattr(self.net, 'num_prefix_tokens', 0) :].mean(1)]

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the column, (B, sum of levels), of images (B, C, H, W)."""
        return {'embedding': torch.cat(self.parts(images), 1)}


def finite_rows(columns: dict[str, torch.Tensor]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return which rows hold finite numbers only, (B,), and the columns as arrays."""
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    good = [np.isfinite(array).all(1) for array in arrays.values()]
    return np.logical_and.reduce(good), arrays
