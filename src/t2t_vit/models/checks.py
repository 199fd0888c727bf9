"""Clear errors for arguments and images that a model cannot take."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..custom import load_code
from .init import WEIGHT_INITS


def choose(kind: str, value: Any, table: Mapping[str, Any]) -> Any:
    """Return the entry of `table` named `value`, or a custom class: `value` itself if callable, or FILE.py:CLASS.

    Raises:
        ValueError: for an unknown name; the message lists the choices.
    """
    if callable(value):
        return value
    if '.py:' in str(value):
        return load_code(value)
    if value in table:
        return table[value]
    near = difflib.get_close_matches(str(value), table, n=1)
    raise ValueError(
        f'unknown {kind} {value!r}'
        + (f', did you mean {near[0]!r}?' if near else '')
        + f' (choices: {", ".join(map(repr, table))}, a callable, or FILE.py:CLASS)'
    )


def as_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) from one integer or two.

    Raises:
        ValueError: for anything else.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f'img_size is one whole number or two, (H, W), got {img_size!r}')
    return sides


def token_grids(splits: Sequence[Any], height: int, width: int) -> list[tuple[int, int]]:
    """Return the grid (h, w) after each split of an H×W image.

    Raises:
        ValueError: if the image is too small for one token.
    """
    grids = [(height, width)]
    for split in splits:
        grids.append(split.grid(*grids[-1]))
        if min(grids[-1]) < 1:
            raise ValueError(
                f'an image of {height}×{width} is too small: no token is left after the splits '
                f'(kernel, stride, padding) {", ".join(str(tuple(split)) for split in splits)}'
            )
    return grids[1:]


def check_arguments(
    img_size: Any,
    splits: Sequence[Sequence[int]],
    token_layer: Any,
    embed_dim: int,
    num_heads: int,
    depth: int | Sequence[int],
    mlp_ratio: float,
    num_classes: int,
    weight_init: str,
    **others: Any,
) -> None:
    """Check the arguments of `T2TViT` together; `others` hold widths (`…_dim`, `in_chans`) and rates (`…_rate`).

    Raises:
        ValueError: one message with every problem found.
    """
    sides = as_size(img_size)
    complete = [split for split in splits if len(split) == 3]
    depths = [depth] if isinstance(depth, int) else [*depth]
    widths = dict(embed_dim=embed_dim, num_heads=num_heads, token_dim=others['token_dim'], in_chans=others['in_chans'])
    rates = {name: value for name, value in others.items() if name.endswith('drop_rate') or name == 'drop_path_rate'}
    rules = [
        *((isinstance(n, int) and n >= 1, f'{name} is a whole number from 1, got {n!r}') for name, n in widths.items()),
        *((0 <= rate < 1, f'{name} is at least 0 and below 1, got {rate}') for name, rate in rates.items()),
        (len(complete) == len(splits) > 0, f'splits are (kernel, stride, padding), at least one, got {list(splits)}'),
        (
            all(kernel >= 1 and stride >= 1 and padding >= 0 for kernel, stride, padding in complete),
            f'kernel and stride are at least 1, padding at least 0, got splits={list(splits)}',
        ),
        (
            token_layer != 'none' or len(complete) <= 1,
            f"token_layer='none' takes a single split, as ((16, 16, 0),), got {len(complete)}",
        ),
        (
            num_heads < 1 or embed_dim % num_heads == 0,
            f'embed_dim {embed_dim} is not a multiple of num_heads {num_heads}',
        ),
        (embed_dim % 2 == 0, f'embed_dim must be even, got {embed_dim}'),
        (
            token_layer != 'performer' or widths['token_dim'] != 1,
            'token_dim is at least 2 with Performer tokens, got 1',
        ),
        (min(depths, default=0) >= 1 and sum(depths) <= 1000, f'depth is at least 1 and at most 1000, got {depth}'),
        (mlp_ratio > 0, f'mlp_ratio is above 0, got {mlp_ratio}'),
        (all(1 <= side <= 32768 for side in sides), f'img_size is at least 1 and at most 32768, got {img_size}'),
        (num_classes >= 0, f'num_classes is at least 0, got {num_classes}'),
        (weight_init in WEIGHT_INITS, f'weight_init is one of {WEIGHT_INITS}, got {weight_init!r}'),
    ]
    if problems := [sentence for holds, sentence in rules if not holds]:
        raise ValueError('T2TViT cannot be built: ' + '; '.join(problems))


def check_images(x: torch.Tensor, in_chans: int, splits: list[tuple[int, int, int]]) -> None:
    """Check that images have shape (B, in_chans, H, W) and leave at least one token.

    Raises:
        ValueError: if not.
    """
    if torch.jit.is_scripting() or torch.jit.is_tracing():  # without sizes in Python; soft_split raises there
        return
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f'expected images of shape (B, {in_chans}, H, W), got {tuple(x.shape)}; '
            'the number of channels is set by in_chans'
        )
    token_grids(splits, x.shape[2], x.shape[3])
