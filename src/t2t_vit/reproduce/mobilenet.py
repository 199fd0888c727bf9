"""Register MobileNetV1 and V2 of any width with timm, for comparisons at a small budget.

timm's models have a width multiplier too. Below 1 they keep V2's head of 1280 channels, which at 0.1 million
parameters is most of the network, and they round to multiples of 8. Here all widths, the head included, are the
published ones times the multiplier, rounded to even numbers; at 1 the networks are timm's.
"""

import warnings
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import EfficientNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def  # no public name
from torch import nn

Stage = tuple[str, int, int, int]  # kind of block, repeats, stride, channels
V1: list[Stage] = [('dsa', 1, 1, 64), ('dsa', 2, 2, 128), ('dsa', 2, 2, 256), ('dsa', 6, 2, 512), ('dsa', 2, 2, 1024)]
V2: list[Stage] = [
    ('ds', 1, 1, 16),
    ('ir', 2, 2, 24),
    ('ir', 3, 2, 32),
    ('ir', 4, 2, 64),
    ('ir', 3, 1, 96),
    ('ir', 3, 2, 160),
    ('ir', 1, 1, 320),
]

default_cfgs = generate_default_cfgs(
    {  # timm looks up the configuration of its models here
        f'scaled_{name}': dict(
            input_size=(3, 224, 224),
            crop_pct=0.875,
            interpolation='bicubic',
            classifier='classifier',
            first_conv='conv_stem',
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
        for name in ('mobilenetv1_100', 'mobilenetv2_140')
    }
)


def even(channels: float) -> int:
    """Return the nearest even number of channels, at least 2."""
    return max(2, 2 * round(channels / 2))


def _build(name: str, stages: list[Stage], head: int, multiplier: float, pretrained: bool, **kwargs: Any) -> nn.Module:
    rows = [
        [f'{kind}_r{repeats}_k3_s{stride}' + ('_e6' if kind == 'ir' else '') + f'_c{channels}']
        for kind, repeats, stride, channels in stages
    ]
    return build_model_with_cfg(
        EfficientNet,
        name,
        pretrained,
        block_args=decode_arch_def(rows),
        stem_size=32,
        round_chs_fn=lambda channels: even(channels * multiplier),
        num_features=even(head * multiplier) if head else 0,
        act_layer=nn.ReLU6,
        **kwargs,
    )


def scaled_mobilenetv1_100(pretrained: bool = False, multiplier: float = 1.0, **kwargs: Any) -> nn.Module:
    """Build MobileNetV1 with all widths multiplied."""
    return _build('scaled_mobilenetv1_100', V1, 0, multiplier, pretrained, **kwargs)


def scaled_mobilenetv2_140(pretrained: bool = False, multiplier: float = 1.0, **kwargs: Any) -> nn.Module:
    """Build MobileNetV2 with all widths multiplied."""
    return _build('scaled_mobilenetv2_140', V2, 1280, multiplier, pretrained, **kwargs)


with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # tests import this module again, and timm warns of the second registration
    register_model(scaled_mobilenetv1_100)
    register_model(scaled_mobilenetv2_140)
