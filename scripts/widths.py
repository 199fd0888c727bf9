"""T2T-ViT-14 at other widths, to compare with ViTs of the same width: `t2t-vit bench scripts/widths.py:width_768`."""

import timm
from torch import nn

import t2t_vit  # noqa: F401  (registers the models)


def width_192(img_size: int | tuple[int, int]) -> nn.Module:
    """Build it as wide as vit_tiny_patch16_224."""
    return timm.create_model('t2t_vit_14', img_size=img_size, embed_dim=192, num_heads=3)


def width_384(img_size: int | tuple[int, int]) -> nn.Module:
    """Build it as wide as vit_small_patch16_224, which is its own width."""
    return timm.create_model('t2t_vit_14', img_size=img_size)


def width_768(img_size: int | tuple[int, int]) -> nn.Module:
    """Build it as wide as vit_base_patch16_224."""
    return timm.create_model('t2t_vit_14', img_size=img_size, embed_dim=768, num_heads=12)
