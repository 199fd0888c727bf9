"""A state dict in, a state dict out: every published layout, fitted to a model's classes, channels and size.

Shapes: O output channels, C channels, k·k the window of the first soft split, n = C·k·k, N = h·w tokens, D the width.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from timm.models import adapt_input_conv
from torch import nn

from .checks import as_size, token_grids
from .positions import grid_table, resample_positions
from .safe_load import CheckpointError, PathLike, read_checkpoint
from .t2t_vit import TokensToToken

EMA_ENTRIES = ('state_dict_ema', 'model_ema')
RAW_ENTRIES = ('state_dict', 'model', 'net')  # `net`: the release's CIFAR files

WRAPPERS = re.compile(r'^(module\.|_orig_mod\.)+')  # DataParallel, torch.compile

MMPRETRAIN_NAMES = (
    ('backbone.', ''),
    ('encoder.', 'blocks.'),
    ('.ln1.', '.norm1.'),
    ('.ln2.', '.norm2.'),
    ('.ffn.layers.0.0.', '.mlp.fc1.'),
    ('.ffn.layers.1.', '.mlp.fc2.'),
    ('head.layers.head.', 'head.'),
)

# the first layer of each kind of token layer; in the first two kinds after a LayerNorm over the window
FIRST_LAYERS = {
    'performer': 'tokens_to_token.attention1.kqv',
    'transformer': 'tokens_to_token.attention1.attn.qkv',
    'convolution': 'tokens_to_token.attention1.conv',
    'residual': 'tokens_to_token.attention1.conv1',
    'none': 'tokens_to_token.project',
}
FIRST_NORM = ('tokens_to_token.attention1.norm1.weight', 'tokens_to_token.attention1.norm1.bias')

HEAD = ('head.weight', 'head.bias')
ROUNDING = 1e-2  # of a position table in half precision, whose values differ by more between any two grids


def few(names: Iterable[str], count: int = 4) -> str:
    """Return the first few names, for a message."""
    names = [name if len(name) <= 80 else f'{name[:80]}…' for name in names]
    return ', '.join(names[:count]) + (', …' if len(names) > count else '')


def select_weights(checkpoint: Mapping[str, Any], ema: bool) -> Mapping[str, torch.Tensor]:
    """Return the state dict in a checkpoint: the EMA weights if it has some and `ema` is true, else the raw ones."""
    entries = EMA_ENTRIES + RAW_ENTRIES if ema else RAW_ENTRIES
    weights = next((checkpoint[name] for name in entries if isinstance(checkpoint.get(name), Mapping)), checkpoint)
    if not weights or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise CheckpointError(
            f'found no weights under {few(map(str, weights)) or "an empty dict"}; '
            f'expected tensors by name, or such a dict as {" or ".join(entries)}'
        )
    if odd := [name for name, tensor in weights.items() if is_odd(tensor)]:
        raise CheckpointError(f'found sparse or quantized tensors, or tensors without values: {few(odd)}')
    return weights


def is_odd(tensor: torch.Tensor) -> bool:
    """Return True unless a tensor is plain numbers in memory."""
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested


def rename(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors to the release's names: without prefixes of wrappers, and from mmpretrain's names.

    A training framework such as Lightning saves the model under the name of an attribute, and beside it the tensors of
    the loss and the metrics: where one prefix has a class token, only the tensors with this prefix count.
    """
    state_dict = {WRAPPERS.sub('', name): tensor for name, tensor in weights.items()}
    prefixes = {name.removesuffix('cls_token') for name in state_dict if f'.{name}'.endswith('.cls_token')}
    prefix = prefixes.pop().removesuffix('backbone.') if len(prefixes) == 1 else ''
    if prefix:
        state_dict = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if not any(name.startswith('backbone.') for name in state_dict):
        return state_dict
    renamed = {}
    for name, tensor in state_dict.items():
        for theirs, ours in MMPRETRAIN_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def find_grid(table: torch.Tensor) -> tuple[int, int] | None:
    """Return the grid (h, w) of a position table (1, 1 + h·w, D) that holds the values of `grid_table`, else None."""
    count, dim = table.shape[1] - 1, table.shape[2]
    if count < 1 or dim < 8 or not table.is_floating_point():
        return None
    values = table[0, 1:].detach().float().cpu()
    rows = values[:, : dim // 4 * 2]  # the same for all tokens of a row
    width = int(((rows - rows[0]).abs() < ROUNDING).all(1).long().cumprod(0).sum())
    if width == 0 or count % width:  # 0: NaN
        return None
    grid = count // width, width
    return grid if (values - grid_table(*grid, dim)[0]).abs().max() < ROUNDING else None


def resize_pos_embed(
    pos_embed: torch.Tensor, grid: tuple[int, int], square: bool = False, trained: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resize a position table to h×w tokens, (1, 1 + M, D) -> (1, 1 + N, D).

    A table does not say which grid its M tokens are on. It is, in this order: that of its values, if they are
    `grid_table`'s; `trained`, if this has M tokens; `grid` if M = N, unless the table is known to be for a `square`
    one; a square.
    """
    count = pos_embed.shape[1] - 1
    side = math.isqrt(max(count, 0))
    old = find_grid(pos_embed)
    if old is None and trained is not None and math.prod(trained) == count:
        old = trained
    if old is None and count == math.prod(grid) and not (square and side**2 == count):
        old = grid
    if old is None and (count < 1 or side**2 != count):
        raise CheckpointError(
            f'found a position table for {count} tokens, which is no square grid; '
            f'expected a square, or {math.prod(grid)} tokens for {grid[0]}×{grid[1]}'
        )
    return resample_positions(pos_embed, *grid, *(old or (side, side)))


def adapt_channels(weight: torch.Tensor, in_chans: int, kernel: int) -> torch.Tensor:
    """Adapt weights from RGB to `in_chans` channels: (O, 3, k, k) of a convolution, (O, 3·k·k) of a Linear."""
    adapted = adapt_input_conv(in_chans, weight.reshape(-1, 3, kernel, kernel))
    return adapted if weight.ndim == 4 else adapted.flatten(1)


def adapt_normed_channels(
    weight: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, in_chans: int, kernel: int
) -> torch.Tensor:
    """Adapt the channels of a Linear after a LayerNorm with gamma and beta, so that gamma = beta = 1: (O, n).

    W·diag(gamma) is applied to the image, so it is adapted; W·beta is not, and is kept. Normalised values sum to zero
    over a window, so the mean of a row contributes nothing to its product with them and can carry W·beta: with beta = 1
    a row adds its sum. This is exact even if q, k, v have no bias.
    """
    scaled = adapt_channels(weight.float() * norm_weight.float(), in_chans, kernel)
    shift = weight.float() @ norm_bias.float()
    row_mean = shift / scaled.shape[1]
    return (scaled - scaled.mean(1, keepdim=True) + row_mean.unsqueeze(1)).to(weight.dtype)


def adapt_first_layer(state_dict: Mapping[str, torch.Tensor], in_chans: int, kernel: int) -> dict[str, torch.Tensor]:
    """Adapt the tensors of the first layer from RGB to `in_chans` channels, as timm adapts a first convolution.

    One channel: the sum over R, G, B, so a grey image gives the same as in all three. More: repeated, scaled.
    The result is empty if nothing has three channels.
    """
    name = next((f'{layer}.weight' for layer in FIRST_LAYERS.values() if f'{layer}.weight' in state_dict), None)
    if in_chans == 3 or name is None or state_dict[name].shape[1:].numel() != 3 * kernel**2:
        return {}
    weight = state_dict[name]
    norm = [state_dict[key] for key in FIRST_NORM if key in state_dict]
    if [tensor.shape for tensor in norm] != [weight.shape[1:]] * 2 or weight.ndim != 2:  # no LayerNorm before it
        return {name: adapt_channels(weight, in_chans, kernel)}
    adapted = adapt_normed_channels(weight, norm[0], norm[1], in_chans, kernel)
    if name.startswith(FIRST_LAYERS['transformer']):  # scales q·k by n^-1/2, and n has changed
        adapted[: len(adapted) // 3] *= (in_chans / 3) ** 0.5  # q
    ones = norm[0].new_ones(in_chans * kernel**2)
    return {name: adapted, FIRST_NORM[0]: ones, FIRST_NORM[1]: ones.clone()}


def saved_by_mmpretrain_1x(checkpoint: Mapping[str, Any]) -> bool:
    """Return True if mmpretrain 1.x wrote the file, by mmengine's note in it; mmcls 0.x left another one."""
    meta = checkpoint.get('meta')
    return isinstance(meta, Mapping) and 'mmengine_version' in meta


def fold_inverted_scale(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert the q, k, v of a model that scaled attention by d^1/2 for one that applies its own scale.

    mmpretrain 1.x divides q·k by d^-1/2 where a scale is given, as T2T-ViT's layers do (since its pull request 1434
    of March 2023). Its published T2T-ViT weights are older, and were trained with the release's scale; weights trained
    by 1.x itself only work with that one. The scale of every layer here is (input width of a head)^-1/2.
    """
    folded, modules = {}, dict(model.named_modules())
    for name, weight in state_dict.items():
        if name.endswith('.attn.qkv.weight') and weight.ndim == 2 and weight.is_floating_point():
            heads = getattr(modules.get(name[: -len('.qkv.weight')]), 'num_heads', 1)
            rows = len(weight) // 3
            folded[name] = weight.float() if weight.element_size() == 1 else weight.clone()  # float8 has no product
            folded[name][:rows] *= math.sqrt(rows / heads * weight.shape[1] / heads)
    return folded


def describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Describe the model of a state dict by its names and shapes."""
    layers = [layer for layer, name in FIRST_LAYERS.items() if f'{name}.weight' in state_dict]
    if not layers or 'cls_token' not in state_dict or state_dict['cls_token'].ndim == 0:
        return f'{len(state_dict)} tensors ({few(state_dict)})'
    depth = len({name.split('.')[1] for name in state_dict if name.startswith('blocks.')})
    width = state_dict['cls_token'].shape[-1]
    return f'a T2T-ViT of depth {depth} and width {width}, token layer {layers[0]!r}'


def check_fit(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless names and shapes are the expected ones; the head may be missing."""
    missing = [name for name in expected if name not in state_dict and name not in HEAD]
    kinds = [
        f'{name} {str(tensor.dtype)[6:]} instead of {str(expected[name].dtype)[6:]}'
        for name, tensor in state_dict.items()
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point()
    ]
    unexpected = [name for name in state_dict if name not in expected]
    other = [
        f'{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}'
        for name, tensor in state_dict.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = [
        f'{len(names)} {kind}: {few(names)}'
        for kind, names in (
            ('missing', missing),
            ('unexpected', unexpected),
            ('with another shape', other),
            ('with another kind of number', kinds),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f'found {describe(state_dict)}; expected {describe(expected)}; ' + '; '.join(problems))


def convert_state_dict(
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    ema: bool = True,
    mmpretrain_1x: bool | None = None,
    img_size: int | Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Convert the weights of any published checkpoint to this package's names, fitted to a `T2TViT`.

    The position table is resized to the model's grid, the first layer adapted to its channels, and a head for another
    number of classes left out. Neither argument is changed, nothing is loaded.

    Args:
        checkpoint: A state dict, or a dict that contains one.
        model: The model to fit; only its names, shapes, grid and first split are read.
        ema: Prefer the EMA weights if the checkpoint has them.
        mmpretrain_1x: Whether mmpretrain 1.x trained it, which scales attention otherwise (see
            `fold_inverted_scale`); by default as the file says.
        img_size: Image size that the weights were trained at, if it is known. It says which grid the position table
            is for, where the table of one grid has as many tokens as that of another (8×8 and 4×16); without it, see
            `resize_pos_embed`.

    Raises:
        CheckpointError: if it has no weights, or those of another model.
    """
    expected = model.state_dict()
    tokens = cast(TokensToToken, model.tokens_to_token)
    weights = select_weights(checkpoint, ema)
    state_dict = rename(weights)

    if mmpretrain_1x if mmpretrain_1x is not None else saved_by_mmpretrain_1x(checkpoint):
        state_dict.update(fold_inverted_scale(state_dict, model))
    state_dict.update(adapt_first_layer(state_dict, tokens.in_chans, tokens.splits[0].kernel))

    pos_embed = state_dict.get('pos_embed')
    if pos_embed is not None and pos_embed.shape[::2] == expected['pos_embed'].shape[::2]:  # of the same width
        trained = token_grids(tokens.splits, *as_size(img_size))[-1] if img_size else None
        square = weights is not checkpoint  # the release's are
        state_dict['pos_embed'] = resize_pos_embed(pos_embed, cast(tuple[int, int], model.grid_size), square, trained)

    classes = expected['head.weight'].shape[:1] if 'head.weight' in expected else None
    if 'head.weight' in state_dict and state_dict['head.weight'].shape[:1] != classes:
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in HEAD}

    check_fit(state_dict, expected)
    return state_dict


def count_classes(checkpoint: Mapping[str, Any], ema: bool = True) -> int:
    """Return the number of classes of the head in a checkpoint; 0 if it has none."""
    head = rename(select_weights(checkpoint, ema)).get('head.weight')
    return len(head) if head is not None and head.ndim else 0


def load_weights(model: nn.Module, path: PathLike, ema: bool = True, mmpretrain_1x: bool | None = None) -> list[str]:
    """Load any published file into a `T2TViT` and return the names that keep their initial values.

    These are the head's, or none. A file that does not fit leaves the model unchanged. See `convert_state_dict`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be used.
    """
    checkpoint = read_checkpoint(path)
    try:
        state_dict = convert_state_dict(checkpoint, model, ema, mmpretrain_1x)
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from None
    return list(model.load_state_dict(state_dict, strict=False).missing_keys)
