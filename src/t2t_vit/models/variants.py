"""The variants of the paper in one table, and their registration with timm."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import is_scriptable
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ..custom import check_source
from ..fast import optimize
from .checkpoints import convert_state_dict
from .published import PUBLISHED, RELEASE, RELEASE_LICENCE
from .shipped import shipped_cfgs
from .t2t_vit import PAPER_SPLITS
from .timm_api import Pyramid, TimmT2TViT


class Variant(NamedTuple):
    """A row of the table: the arguments that differ from the defaults of `T2TViT`."""

    token_layer: str
    depth: int | tuple[int, ...]
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    block: str = 'plain'
    img_size: int = 224
    splits: tuple[tuple[int, int, int], ...] = PAPER_SPLITS
    token_dim: int = 64


HARD_SPLIT = ((16, 16, 0),)  # a ViT's patches
HARD_SPLIT_64 = ((8, 8, 0),)  # 64² becomes 8²
SPLITS_16 = ((3, 2, 1), (3, 2, 1), (3, 1, 1))  # for small images: 16² becomes 8², 4², 4²
SPLITS_32 = ((3, 1, 1), (3, 2, 1), (3, 2, 1))  # 32², 16², 8²
SPLITS_64 = ((3, 2, 1), (3, 2, 1), (3, 2, 1))  # 32², 16², 8²
OVERLAPPING_64 = ((7, 2, 3), (3, 2, 1), (3, 2, 1))  # the same grids with the paper's first kernel

VARIANTS: dict[str, Variant] = {
    # Table 1: the family, Performer tokens, then transformer tokens (_t)
    't2t_vit_7': Variant('performer', 7, 256, 4, 2),
    't2t_vit_10': Variant('performer', 10, 256, 4, 2),
    't2t_vit_12': Variant('performer', 12, 256, 4, 2),
    't2t_vit_14': Variant('performer', 14, 384, 6, 3),
    't2t_vit_19': Variant('performer', 19, 448, 7, 3),
    't2t_vit_24': Variant('performer', 24, 512, 8, 3),
    't2t_vit_t_14': Variant('transformer', 14, 384, 6, 3),
    't2t_vit_t_19': Variant('transformer', 19, 448, 7, 3),
    't2t_vit_t_24': Variant('transformer', 24, 512, 8, 3),
    # Table 3, the designs from CNNs on T2T-ViT-14, as the release builds them
    't2t_vit_14_wide': Variant('performer', 4, 768, 12, 3),
    't2t_vit_dense': Variant('performer', (3, 6, 6, 4), 128, 8, 2, block='dense'),
    't2t_vit_14_se': Variant('performer', 14, 384, 6, 3, block='se'),
    't2t_vit_14_resnext': Variant('performer', 14, 384, 32, 3),
    't2t_vit_16_ghost': Variant('performer', 16, 384, 6, 3, block='ghost'),
    # Table 3, on ViT-S/16. Values that the paper does not print are inferred from its parameter counts:
    # the shallow-wide MLP ratio (47.9 M) and the dense groups and ratio (128 to 736 wide, 46.7 M)
    'vit_s_16': Variant('none', 8, 768, 8, 3, splits=HARD_SPLIT),
    'vit_s_16_deep_narrow': Variant('none', 16, 384, 6, 3, splits=HARD_SPLIT),
    'vit_s_16_shallow_wide': Variant('none', 4, 1024, 8, 3.5, splits=HARD_SPLIT),
    'vit_s_16_dense': Variant('none', (6, 7, 6), 128, 8, 4, block='dense', splits=HARD_SPLIT),
    'vit_s_16_se': Variant('none', 8, 768, 8, 3, block='se', splits=HARD_SPLIT),
    'vit_s_16_resnext': Variant('none', 8, 768, 32, 3, splits=HARD_SPLIT),
    'vit_s_16_ghost': Variant('none', 8, 768, 8, 3, block='ghost', splits=HARD_SPLIT),
    # Table 4: without the tokens-to-token module, and with convolutions
    't2t_vit_14_no_t2t': Variant('none', 14, 384, 6, 3, splits=HARD_SPLIT),
    't2t_vit_c_14': Variant('convolution', 14, 384, 6, 3),
    # Ours, for small images: strides that leave enough tokens, and with 4 or 6 blocks small enough to train on a CPU
    't2t_vit_4_16': Variant('performer', 4, 128, 4, 2, img_size=16, splits=SPLITS_16),
    't2t_vit_7_32': Variant('performer', 7, 256, 4, 2, img_size=32, splits=SPLITS_32),
    't2t_vit_14_32': Variant('performer', 14, 384, 6, 3, img_size=32, splits=SPLITS_32),
    't2t_vit_c_6_32': Variant('convolution', 6, 96, 4, 2, img_size=32, splits=SPLITS_32, token_dim=32),
    't2t_vit_c_6_64': Variant('convolution', 6, 96, 4, 2, img_size=64, splits=OVERLAPPING_64, token_dim=32),
    't2t_vit_r_4_32': Variant('residual', 4, 96, 4, 2, img_size=32, splits=SPLITS_32),
    't2t_vit_r_4_64': Variant('residual', 4, 96, 4, 2, img_size=64, splits=OVERLAPPING_64),
    't2t_vit_6_64': Variant('performer', 6, 96, 4, 2, img_size=64, splits=OVERLAPPING_64, token_dim=32),
    'vit_6_64': Variant('none', 6, 100, 4, 2, img_size=64, splits=HARD_SPLIT_64),
    't2t_vit_7_64': Variant('performer', 7, 256, 4, 2, img_size=64, splits=SPLITS_64),
    't2t_vit_14_64': Variant('performer', 14, 384, 6, 3, img_size=64, splits=SPLITS_64),
}


def pretrained_cfgs() -> dict[str, Any]:
    """Return timm's configuration of every variant and every file of weights, `model` and `model.tag`."""
    cfgs: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        shared = dict(
            classifier='head',
            first_conv=(),  # convert_state_dict adapts it, timm cannot
            license=RELEASE_LICENCE,
            origin_url='https://github.com/yitu-opensource/T2T-ViT',
            paper_ids='arXiv:2101.11986',
        )
        published = {key: row for key, row in PUBLISHED.items() if key.split('.')[0] == name}
        for key, row in published.items():
            cfgs[key] = dict(
                shared,
                url=RELEASE + row.file,
                custom_load=True,  # by load_pretrained, which knows all layouts
                input_size=(3, row.img_size, row.img_size),
                crop_pct=row.crop_pct,
                num_classes=row.num_classes,
                interpolation=row.interpolation,
                mean=row.mean,
                std=row.std,
            )
        ours = {key: dict(cfg, classifier='head', first_conv=()) for key, cfg in shipped_cfgs(name).items()}
        cfgs.update(ours)
        if not published and not ours:
            cfgs[name] = dict(
                shared,
                input_size=(3, variant.img_size, variant.img_size),
                crop_pct=0.9,
                interpolation='bicubic',
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            )
    return cfgs


default_cfgs = generate_default_cfgs(pretrained_cfgs())  # timm looks for this name


def fit_pretrained(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """Convert the weights of a model's `pretrained_cfg` for it; timm calls this before it loads them."""
    trained = getattr(model, 'pretrained_model_args', {})  # of a folder or the Hub; older timm has none
    img_size = trained.get('img_size') or model.pretrained_cfg['input_size'][-2:]
    return convert_state_dict(state_dict, model, img_size=img_size)


def build(name: str, pretrained: bool, fast: bool = True, **kwargs: Any) -> nn.Module:
    """Build the registered model `name` for `timm.create_model`; `kwargs` override the table's row.

    With `fast=False`, and if timm is to build scriptable models, every layer has its plain form.
    """
    check_source(kwargs.get('pretrained_cfg'), kwargs)
    cfg = resolve_pretrained_cfg(
        name, pretrained_cfg=kwargs.get('pretrained_cfg'), pretrained_cfg_overlay=kwargs.get('pretrained_cfg_overlay')
    )
    args = {**VARIANTS[name]._asdict(), 'img_size': tuple(cfg.input_size[-2:]), **kwargs}
    stages = len(args['splits']) - 1
    pyramid = dict(feature_cls=Pyramid, out_indices=stages + 1)
    model = build_model_with_cfg(
        TimmT2TViT,
        name,
        pretrained,
        pretrained_filter_fn=fit_pretrained,
        feature_cfg=pyramid if stages else dict(feature_cls='getter', out_indices=3),
        **args,
    )
    return optimize(model) if fast and not is_scriptable() else model


def register(name: str) -> Callable[..., nn.Module]:
    """Make timm's entry point for one row of the table; warn if timm has a model of that name."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{name}, see VARIANTS; arguments are T2TViT's."
    if is_model(name) and model_entrypoint(name).__module__ != __name__:
        warnings.warn(
            f'timm has a model named {name} of its own ({model_entrypoint(name).__module__}); '
            f'from here on timm.create_model({name!r}) builds the one of {__name__}',
            stacklevel=3,
        )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of timm, about the same
        return register_model(entrypoint)


ENTRYPOINTS = {name: register(name) for name in VARIANTS}
