"""List the paper's comparisons, and scale its models to a small budget of parameters.

The budget is the number of trainable parameters of T2T-ViT-14. Every other model gets the budget times its published
ratio: the parameters that the paper prints for it over those of T2T-ViT-14. A design on ViT-S/16 gets ViT-S/16's
number times its ratio to that. Only widths change; depths, MLP ratios and the rest of the structure stay:

- ViT and T2T-ViT: the nearest even `embed_dim`, with the published number of heads, or the divisor of the width that is
  nearest to it, within a factor of 1.5. Token layers narrow by the same factor, to at least 16.
- dense: start width and growth rate together, about 2 : 1 as published, with the most heads that divide every width.
- ResNet: the widths of its four stages by one multiplier, to even numbers; the stem keeps its 64 channels.
- MobileNet: all widths, stem and head included, by one multiplier, to even numbers.
- Tokens lie on a grid `reduction` times coarser than the image, after the paper's three soft splits or one hard split.
  CNNs end at twice that, like 14² and 7² at 224 pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
from torch import nn

from ..models.listing import count_parameters
from ..models.t2t_vit import PAPER_SPLITS
from ..models.variants import SPLITS_16, SPLITS_64, VARIANTS
from ..settings import UsageError, nearest
from .mobilenet import even
from .structures import PRINTED

REFERENCE = 't2t_vit_14'
SPLITS = {4: SPLITS_16, 8: SPLITS_64, 16: PAPER_SPLITS}  # by image size over token grid size
MIN_TOKEN_DIM = 16
HEADS_FACTOR = 1.5
DENSE_CLOSE = 0.05  # difference from the budget within which more heads are preferred
FAR = 0.2  # difference from the budget beyond which the budget is too small

ARMS = [  # the models of the paper's comparisons, in the order of training
    't2t_vit_14',
    't2t_vit_14_no_t2t',
    't2t_vit_c_14',
    't2t_vit_t_14',
    'vit_s_16',
    'vit_s_16_deep_narrow',
    'vit_s_16_shallow_wide',
    't2t_vit_14_se',
    't2t_vit_dense',
    't2t_vit_16_ghost',
    'resnet50',
    't2t_vit_12',
    'mobilenetv2_140',
    't2t_vit_14_wide',
    't2t_vit_14_resnext',
    'vit_s_16_se',
    'vit_s_16_dense',
    'vit_s_16_ghost',
    'vit_s_16_resnext',
    't2t_vit_7',
    'mobilenetv1_100',
    't2t_vit_19',
    'resnet101',
    't2t_vit_24',
    'resnet152',
]


class Pair(NamedTuple):
    """Hold one comparison of the paper: `first` is better than `second` (>), worse (<), or as good (=)."""

    claim: str
    first: str
    relation: str
    second: str
    published: float  # difference in points of top-1 on ImageNet


PAIRS = [
    Pair('T2T > hard split', 't2t_vit_14', '>', 't2t_vit_14_no_t2t', 2.0),
    Pair('T2T-ViT > ViT at half the size', 't2t_vit_14', '>', 'vit_s_16', 3.4),
    Pair('T2T-ViT > ResNet at equal size', 't2t_vit_14', '>', 'resnet50', 2.4),
    Pair('T2T-ViT > ResNet at equal size', 't2t_vit_19', '>', 'resnet101', 2.0),
    Pair('T2T-ViT > ResNet at equal size', 't2t_vit_24', '>', 'resnet152', 1.5),
    Pair('T2T-ViT > MobileNet at equal size', 't2t_vit_12', '>', 'mobilenetv2_140', 0.9),
    Pair('T2T-ViT > MobileNet at equal size', 't2t_vit_7', '>', 'mobilenetv1_100', 0.9),
    Pair('deep-narrow > shallow-wide', 'vit_s_16_deep_narrow', '>', 'vit_s_16_shallow_wide', 9.1),
    Pair('deep-narrow > shallow-wide', 't2t_vit_14', '>', 't2t_vit_14_wide', 3.6),
    Pair('SE improves', 'vit_s_16_se', '>', 'vit_s_16', 0.3),
    Pair('SE improves', 't2t_vit_14_se', '>', 't2t_vit_14', 0.1),
    Pair('dense connection hurts', 'vit_s_16_dense', '<', 'vit_s_16', -1.3),
    Pair('dense connection hurts', 't2t_vit_dense', '<', 't2t_vit_14', -0.9),
    Pair('ResNeXt heads make no difference', 'vit_s_16_resnext', '=', 'vit_s_16', -0.1),
    Pair('ResNeXt heads make no difference', 't2t_vit_14_resnext', '=', 't2t_vit_14', 0.0),
    Pair('ghost hurts, but is smaller', 'vit_s_16_ghost', '<', 'vit_s_16', -4.4),
    Pair('ghost hurts, but is smaller', 't2t_vit_16_ghost', '<', 't2t_vit_14', -2.0),
    Pair('T2T > convolution > none', 't2t_vit_14', '>', 't2t_vit_c_14', 0.7),
    Pair('T2T > convolution > none', 't2t_vit_c_14', '>', 't2t_vit_14_no_t2t', 1.3),
    Pair('transformer and Performer tokens are as good', 't2t_vit_t_14', '=', 't2t_vit_14', 0.2),
]


class Inputs(NamedTuple):
    """Hold the image size and classes that a model is built for."""

    img_size: int
    reduction: int
    in_chans: int
    num_classes: int


class ScaledModel(NamedTuple):
    """Hold a model's name for `timm.create_model`, its arguments, and its number of trainable parameters."""

    model: str
    args: dict[str, Any]
    parameters: int


def unknown_arms(names: Sequence[str]) -> list[str]:
    """Return a sentence for each name that is not an arm."""
    return [f'unknown arm {name!r}{nearest(name, ARMS)}; arms: {", ".join(ARMS)}' for name in names if name not in ARMS]


def base_of(name: str) -> str:
    """Return the model that an arm's budget refers to."""
    return 'vit_s_16' if name.startswith('vit_s_16_') else REFERENCE


def published_ratio(name: str, base: str) -> float:
    """Return a model's parameters over those of another, as the paper prints them."""
    return PRINTED[name].params / PRINTED[base].params


def scale(name: str, budget: float, inputs: Inputs) -> ScaledModel:
    """Return the model at the width that is nearest to `budget` trainable parameters.

    Raises:
        UsageError: if the budget is too small.
    """

    def build(args: dict[str, Any]) -> ScaledModel:
        return ScaledModel(model, args, count_scaled(model, args, inputs))

    model = f'scaled_{name}' if name.startswith('mobilenet') else name
    if name in VARIANTS and VARIANTS[name].block == 'dense':
        return scale_dense(name, budget, inputs)
    if name in VARIANTS:
        row = VARIANTS[name]
        start = first_at_least(budget, lambda i: build(backbone(name, 2 * i, 1, inputs)).parameters)
        valid = [
            (2 * i, heads) for i in range(max(start - 8, 2), start + 8) if (heads := divisor_near(2 * i, row.num_heads))
        ]
        near = [
            *[pair for pair in valid if pair[0] < 2 * start][-1:],
            *[pair for pair in valid if pair[0] >= 2 * start][:1],
        ]
        found = [build(backbone(name, dim, heads, inputs)) for dim, heads in near]
    else:
        args = resnet if name.startswith('resnet') else mobilenet
        start = first_at_least(budget, lambda i: build(args(i, inputs)).parameters)
        found = [build(args(i, inputs)) for i in (start - 1, start) if i]
    best = min(found, key=lambda model: distance(model.parameters, budget), default=None)
    if best is None or distance(best.parameters, budget) > FAR:
        raise UsageError(
            f'{name} has no widths for {budget:,.0f} parameters'
            + (f', its nearest has {best.parameters:,}' if best else '')
            + '; choose larger --parameters'
        )
    return best


def distance(count: float, budget: float) -> float:
    """Return the distance of a count from the budget; 0.01 is one percent."""
    return abs(math.log(count / budget))


def backbone(name: str, dim: int, heads: int, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a ViT or T2T-ViT of a width."""
    row = VARIANTS[name]
    args: dict[str, Any] = dict(embed_dim=dim, num_heads=heads)
    if row.token_layer == 'none':
        return {**args, 'splits': [[inputs.reduction, inputs.reduction, 0]]}
    narrow = 2 * round(32 * dim / row.embed_dim)
    return {**args, 'token_dim': max(MIN_TOKEN_DIM, narrow), 'splits': [list(cut) for cut in SPLITS[inputs.reduction]]}


def resnet(thousandths: int, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a ResNet with the widths of its stages multiplied."""
    return dict(
        channels=[even(width * thousandths / 1000) for width in (64, 128, 256, 512)], output_stride=2 * inputs.reduction
    )


def mobilenet(thousandths: int, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a MobileNet with all widths multiplied."""
    return dict(multiplier=thousandths / 1000, output_stride=2 * inputs.reduction)


def first_at_least(budget: float, count: Callable[[int], int]) -> int:
    """Return the smallest n whose count reaches the budget; counts grow like squares, which saves most calls."""
    low, high = 0, 8
    while (reached := count(high)) < budget:
        low, high = high, max(math.ceil(1.05 * high * math.sqrt(budget / reached)), high + 1)
    while high - low > 1:
        guess = math.floor(high * math.sqrt(budget / reached))
        middle = min(max(guess, low + 1), high - 1)
        found = count(middle)
        low, high, reached = (low, middle, found) if found >= budget else (middle, high, reached)
    return high


def divisor_near(dim: int, heads: int) -> int | None:
    """Return the divisor of `dim` with the nearest ratio to `heads`; None if all are beyond HEADS_FACTOR."""
    near = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(math.log(n / heads)))
    return near if 1 / HEADS_FACTOR <= near / heads <= HEADS_FACTOR else None


def scale_dense(name: str, budget: float, inputs: Inputs) -> ScaledModel:
    """Return the dense model close to the budget with the most heads, then the ratio nearest to 2 : 1."""
    row = VARIANTS[name]
    assert not isinstance(row.depth, int)

    def build(dim: int, growth: int, heads: int) -> ScaledModel:
        args = {**backbone(name, dim, heads, inputs), 'growth_rate': growth}
        return ScaledModel(name, args, count_scaled(name, args, inputs))

    middle = first_at_least(budget, lambda growth: build(2 * growth, growth, 1).parameters)
    rows = [
        (heads, distance(dim, 2 * growth), dim, growth)
        for growth in range(max(middle - 3, 2), middle + 4)
        for dim in range(2 * (2 * growth // 3), 3 * growth + 1, 2)
        if (heads := common_heads(dim, growth, row.depth, row.num_heads))
    ]
    found = []
    for heads, _, dim, growth in sorted(rows, key=lambda row: (-row[0], row[1])):
        found.append(build(dim, growth, heads))
        if distance(found[-1].parameters, budget) <= DENSE_CLOSE:
            return found[-1]
    best = min(found, key=lambda model: distance(model.parameters, budget), default=None)
    if best is None or distance(best.parameters, budget) > FAR:
        raise UsageError(f'{name} has no widths for {budget:,.0f} parameters; choose larger --parameters')
    return best


def common_heads(dim: int, growth: int, groups: tuple[int, ...], most: int) -> int:
    """Return the most heads, up to `most`, that divide every width; 0 if a transition would halve an odd width."""
    common = growth
    for i, count in enumerate(groups):
        if i:
            if dim % 2:
                return 0
            dim //= 2
        common, dim = math.gcd(common, dim), dim + count * growth
    return max(n for n in range(1, most + 1) if common % n == 0)


def count_scaled(model: str, args: dict[str, Any], inputs: Inputs) -> int:
    """Count the trainable parameters of a scaled model."""
    return count_parameters(build_scaled(model, args, inputs))[1]


def build_scaled(model: str, args: dict[str, Any], inputs: Inputs) -> nn.Module:
    """Build a scaled model."""
    size = {'img_size': inputs.img_size} if model in VARIANTS else {}
    return timm.create_model(model, num_classes=inputs.num_classes, in_chans=inputs.in_chans, **args, **size)
