"""The paper's comparisons as a table: which models, at what widths, and what the paper says of each pair.

The scaling rule. One number, the budget, says how many parameters T2T-ViT-14 learns. Every other model gets that number
times its published share: the parameters that the paper prints for it over those it prints for T2T-ViT-14; a design on
ViT-S/16 gets ViT-S/16's number times its share of that. Depths, MLP ratios and all else of the structure stay; only
widths change:

- ViT and T2T-ViT: the even `embed_dim` that comes nearest, with the published number of heads, or the divisor of the
  width that is nearest to it, within a factor of 1.5. Token layers narrow by the same factor, to 16 at least.
- dense: start width and growth rate together, about 2 : 1 as published, with the most heads that divide every width.
- ResNet: the widths of its four stages, MobileNet: all widths, stem and head too; by one multiplier, to even numbers.
  The stem of ResNet stays, 64.
- Tokens lie on a grid `reduction` times coarser than the image, behind the paper's three soft splits or one hard one;
  CNNs end at twice that, as 14² and 7² are at 224 pixels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from torch import nn

from ..models.listing import count_parameters
from ..models.t2t_vit import PAPER_SPLITS, SPLITS_16, SPLITS_64, VARIANTS
from ..settings import UsageError, nearest
from .mobilenet import even
from .structures import PRINTED

REFERENCE = 't2t_vit_14'
SPLITS = {4: SPLITS_16, 8: SPLITS_64, 16: PAPER_SPLITS}  # by what they reduce the image
MIN_TOKEN_DIM = 16
HEADS_FACTOR = 1.5
DENSE_CLOSE = 0.05  # off the budget: within this, most heads go first
FAR = 0.2  # off the budget: beyond this, a budget is too small

ARMS = [  # what the paper compares, in the order they are trained
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
    """One comparison of the paper's: `first` is better than `second` (>), worse (<), or as good (=)."""

    claim: str
    first: str
    relation: str
    second: str
    published: float  # points of top-1 that the first is ahead, on ImageNet


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


class Place(NamedTuple):
    """What a small model is built for."""

    img_size: int
    reduction: int
    in_chans: int
    num_classes: int


class Small(NamedTuple):
    """A model at a budget: its name for `timm.create_model`, its arguments, and the parameters it learns."""

    model: str
    args: dict[str, Any]
    parameters: int


def check_arms(names: list[str]) -> None:
    """UsageError naming every arm that the paper has not."""
    if unknown := [name for name in names if name not in ARMS]:
        raise UsageError(
            '\n'.join(f'unknown arm {name!r}{nearest(name, ARMS)}; arms: {", ".join(ARMS)}' for name in unknown)
        )


def base_of(name: str) -> str:
    """The model whose small form an arm's budget is a share of."""
    return 'vit_s_16' if name.startswith('vit_s_16_') else REFERENCE


def published_share(name: str, base: str) -> float:
    """Parameters of a model over those of another, as the paper prints them."""
    return PRINTED[name].params / PRINTED[base].params


def shrink(name: str, budget: float, place: Place) -> Small:
    """The model `name` at the width that brings it nearest to `budget` learned parameters.

    Raises:
        UsageError: if the budget is too small for it.
    """

    def made(args: dict[str, Any]) -> Small:
        return Small(model, args, count_small(model, args, place))

    model = f'scaled_{name}' if name.startswith('mobilenet') else name
    if name in VARIANTS and VARIANTS[name].block == 'dense':
        return shrink_dense(name, budget, place)
    if name in VARIANTS:
        row = VARIANTS[name]
        start = first_at_least(budget, lambda i: made(backbone(name, 2 * i, 1, place)).parameters)
        valid = [
            (2 * i, heads) for i in range(max(start - 8, 2), start + 8) if (heads := divisor_near(2 * i, row.num_heads))
        ]
        near = [
            *[pair for pair in valid if pair[0] < 2 * start][-1:],
            *[pair for pair in valid if pair[0] >= 2 * start][:1],
        ]
        found = [made(backbone(name, dim, heads, place)) for dim, heads in near]
    else:
        args = resnet if name.startswith('resnet') else mobilenet
        start = first_at_least(budget, lambda i: made(args(i, place)).parameters)
        found = [made(args(i, place)) for i in (start - 1, start) if i]
    best = min(found, key=lambda small: off(small.parameters, budget), default=None)
    if best is None or off(best.parameters, budget) > FAR:
        raise UsageError(
            f'{name} has no widths for {budget:,.0f} parameters'
            + (f', its nearest has {best.parameters:,}' if best else '')
            + ': choose a larger budget'
        )
    return best


def off(count: float, budget: float) -> float:
    """How far a count is from the budget, 0.01 for one percent."""
    return abs(math.log(count / budget))


def backbone(name: str, dim: int, heads: int, place: Place) -> dict[str, Any]:
    """Arguments of a ViT or T2T-ViT of this width."""
    row = VARIANTS[name]
    args: dict[str, Any] = dict(embed_dim=dim, num_heads=heads)
    if row.token_layer == 'none':
        return {**args, 'splits': [[place.reduction, place.reduction, 0]]}
    narrow = 2 * round(32 * dim / row.embed_dim)
    return {**args, 'token_dim': max(MIN_TOKEN_DIM, narrow), 'splits': [list(cut) for cut in SPLITS[place.reduction]]}


def resnet(thousandths: int, place: Place) -> dict[str, Any]:
    """Arguments of a ResNet whose stages are multiplied in width."""
    return dict(
        channels=[even(width * thousandths / 1000) for width in (64, 128, 256, 512)], output_stride=2 * place.reduction
    )


def mobilenet(thousandths: int, place: Place) -> dict[str, Any]:
    """Arguments of a MobileNet whose widths are multiplied."""
    return dict(multiplier=thousandths / 1000, output_stride=2 * place.reduction)


def first_at_least(budget: float, count: Callable[[int], int]) -> int:
    """The first n whose count is at least the budget; counts grow about as squares, so few of them are asked for."""
    low, high = 0, 8
    while (held := count(high)) < budget:
        low, high = high, max(math.ceil(1.05 * high * math.sqrt(budget / held)), high + 1)
    while high - low > 1:
        guess = math.floor(high * math.sqrt(budget / held))
        middle = min(max(guess, low + 1), high - 1)
        found = count(middle)
        low, high, held = (low, middle, found) if found >= budget else (middle, high, held)
    return high


def divisor_near(dim: int, heads: int) -> int | None:
    """The divisor of `dim` that is nearest to `heads` by ratio; None where all are far."""
    near = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(math.log(n / heads)))
    return near if 1 / HEADS_FACTOR <= near / heads <= HEADS_FACTOR else None


def shrink_dense(name: str, budget: float, place: Place) -> Small:
    """Dense blocks: of start widths and growth rates close to the budget, those with most heads, then nearest 2 : 1."""
    row = VARIANTS[name]
    assert not isinstance(row.depth, int)

    def made(dim: int, growth: int, heads: int) -> Small:
        args = {**backbone(name, dim, heads, place), 'growth_rate': growth}
        return Small(name, args, count_small(name, args, place))

    middle = first_at_least(budget, lambda growth: made(2 * growth, growth, 1).parameters)
    rows = [
        (heads, off(dim, 2 * growth), dim, growth)
        for growth in range(max(middle - 3, 2), middle + 4)
        for dim in range(2 * (2 * growth // 3), 3 * growth + 1, 2)
        if (heads := common_heads(dim, growth, row.depth, row.num_heads))
    ]
    found = []
    for heads, _, dim, growth in sorted(rows, key=lambda row: (-row[0], row[1])):
        found.append(made(dim, growth, heads))
        if off(found[-1].parameters, budget) <= DENSE_CLOSE:
            return found[-1]
    best = min(found, key=lambda small: off(small.parameters, budget), default=None)
    if best is None or off(best.parameters, budget) > FAR:
        raise UsageError(f'{name} has no widths for {budget:,.0f} parameters: choose a larger budget')
    return best


def common_heads(dim: int, growth: int, groups: tuple[int, ...], most: int) -> int:
    """The most heads, up to `most`, that divide every width of dense groups; 0 where a transition cannot halve."""
    common = growth
    for i, count in enumerate(groups):
        if i:
            if dim % 2:
                return 0
            dim //= 2
        common, dim = math.gcd(common, dim), dim + count * growth
    return max(n for n in range(1, most + 1) if common % n == 0)


def count_small(model: str, args: dict[str, Any], place: Place) -> int:
    """Learned parameters of a small model."""
    return count_parameters(build_small(model, args, place))[1]


def build_small(model: str, args: dict[str, Any], place: Place) -> nn.Module:
    """A small model, as a run builds it."""
    size = {'img_size': place.img_size} if model in VARIANTS else {}
    return timm.create_model(model, num_classes=place.num_classes, in_chans=place.in_chans, **args, **size)
