"""The model as a backbone: one map a soft split, for decoders that expect strides 4, 8, 16 and so on."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import nn


class Pyramid(nn.Module):
    """What `timm.create_model(…, features_only=True)` gives: images (B, C, H, W) -> a list of maps (B, D, h, w).

    `out_indices` counts levels, as decoders do: the map behind each token layer, then that behind the last block, so
    0, 1, 2 are strides 4, 8, 16 of the paper's models. One more level, of half the last one's size, is pooled from it
    (maximum of 2×2, as in the pyramid of ViTDet), for decoders that want a stride of 32. With
    `feature_cls='getter'` timm counts layers instead, see `T2TViT.forward_intermediates`.

    Args:
        model: A `T2TViT`; what stands behind the last level asked for is dropped.
        out_indices: Levels to give, negative ones from the last of the model's own; or how many of these.
        norm: Put the last norm on the map of the last block.

    Raises:
        ValueError: for levels that are not there.
    """

    def __init__(self, model: Any, out_indices: int | Sequence[int], norm: bool = False) -> None:
        layers: list[dict[str, Any]] = model.feature_info
        tokens = len(model.tokens_to_token) - 1
        own = [*range(tokens), len(layers) - 1]  # the layer of each level
        wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
        wrong = [i for i in wanted if not -len(own) <= i <= len(own)]
        if wrong or not wanted:
            raise ValueError(f'levels are counted from {-len(own)} to {len(own)}, got {list(wanted)}')
        levels = sorted({i + len(own) if i < 0 else i for i in wanted})
        last = {**layers[-1], 'reduction': 2 * layers[-1]['reduction'], 'module': 'pool'}
        info = [{**entry, 'index': i} for i, entry in enumerate([*(layers[i] for i in own), last])]

        super().__init__()
        wanted_layers = sorted({own[min(i, len(own) - 1)] for i in levels})
        self.layers: list[int] = model.prune_intermediate_layers(wanted_layers, prune_norm=not norm)
        self.model, self.norm = model, norm
        self.feature_info = FeatureInfo(info, tuple(levels))
        self.pooled, self.unpooled = len(own) in levels, len(own) - 1 in levels

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The maps of the levels asked for, the largest first."""
        maps: list[torch.Tensor] = self.model.forward_intermediates(
            x, indices=self.layers, norm=self.norm, intermediates_only=True
        )
        if self.pooled:
            maps.append(F.max_pool2d(maps[-1], 2, ceil_mode=True))
        return maps if self.unpooled or not self.pooled else [*maps[:-2], maps[-1]]
