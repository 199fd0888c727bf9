"""Initial values of the weights."""

from typing import Any

from timm.layers import trunc_normal_
from timm.models import named_apply
from torch import nn


def init_weights(module: nn.Module, name: str = '') -> None:
    """Give one module its published initial values: Linear weights std 0.02, biases 0; other modules keep torch's.

    Random features (`draw_features`) are drawn anew.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif draw := getattr(module, 'draw_features', None):
        draw()


def init_model(model: Any) -> None:
    """Give every weight of a `T2TViT` its published initial distribution; nothing on the meta device."""
    if not model.cls_token.is_meta:
        named_apply(init_weights, model)
        trunc_normal_(model.cls_token, std=0.02)
