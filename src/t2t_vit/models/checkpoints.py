"""Checkpoints: read safely, whatever published them, and fitted to a model's classes, channels and size.

Letters: O output channels, C channels, k·k the window of the first soft split, n = C·k·k, N = h·w tokens, D the width.
"""

import argparse
import hashlib
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, Union, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from .tokens import TokensToToken

PathLike = Union[str, 'os.PathLike[str]']

# what the release's files hold beside tensors, numbers, strings and containers: the script's arguments
SAFE_TYPES: list[Any] = [argparse.Namespace]

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

# the layer that sees the image, by token layer; in the first two behind a LayerNorm over the window
FIRST_LAYERS = {
    'performer': 'tokens_to_token.attention1.kqv',
    'transformer': 'tokens_to_token.attention1.attn.qkv',
    'convolution': 'tokens_to_token.attention1.conv',
    'none': 'tokens_to_token.project',
}
FIRST_NORM = ('tokens_to_token.attention1.norm1.weight', 'tokens_to_token.attention1.norm1.bias')

HEAD = ('head.weight', 'head.bias')

GROWTH, SMALL_FILE = 10, 100 << 20  # what a file may take in memory: so many times its size, or so many bytes


class CheckpointError(ValueError):
    """A file or a state dict that cannot be used; the message says what was found and what was expected."""


def read_checkpoint(path: PathLike) -> Mapping[str, Any]:
    """What a checkpoint file holds, on the CPU; its content tells its kind, not its name.

    Nothing in the file is executed: a pickle may ask for tensors, plain containers and `SAFE_TYPES`, no more.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for anything but a whole safetensors or `torch.save` file with a mapping in it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no checkpoint file {path}')
    with open(path, 'rb') as file:
        start = file.read(512)
    if start[8:9] == b'{':  # behind the eight bytes of the header's length
        return read_safetensors(path)
    if start.startswith((b'PK\x03\x04', b'\x80')):  # torch's zip archive, and the plain pickle of before
        return read_pickle(path)
    raise CheckpointError(
        f'{path} is {kind_of_file(start)}; expected a checkpoint, written by torch.save or as safetensors'
    )


def kind_of_file(start: bytes) -> str:
    """What a file that is no checkpoint is, judged by its first bytes."""
    if not start:
        return 'empty'
    if start.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'<'):
        return 'a web page: the download was answered with HTML'
    if start[257:262] == b'ustar':
        return 'a tar archive (published .pth.tar files are none, they only have the name)'
    return f'of an unknown kind, starting with {start[:16]!r}'


def read_safetensors(path: PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} is a damaged or truncated safetensors file of {os.path.getsize(path)} bytes: {error}'
        ) from error


def read_pickle(path: PathLike) -> Mapping[str, Any]:
    """What torch.save wrote, if it is of `SAFE_TYPES` only."""
    try:
        check_growth(path, unpacked_size(path))
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        check_growth(path, claimed_size(checkpoint))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        wanted = re.findall(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else []
        raise CheckpointError(
            f'{path} asks for {wanted[0]} when it is read; expected tensors, plain containers and '
            f'argparse.Namespace. It was refused, and nothing in it was executed'
            if wanted
            else f'{path} is damaged or truncated: its {os.path.getsize(path)} bytes are not a whole torch.save file'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}; expected a dict of tensors by name')
    return checkpoint


def unpacked_size(path: PathLike) -> int:
    """Bytes of a zip archive's records, as its directory has them; 0 for another file. torch.save compresses none."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist())


def claimed_size(checkpoint: Any) -> int:
    """Bytes of all tensors in a dict and the dicts in it, by their shapes: strides of 0 make few values many."""
    if isinstance(checkpoint, torch.Tensor):
        return checkpoint.numel() * checkpoint.element_size()
    return sum(map(claimed_size, checkpoint.values())) if isinstance(checkpoint, dict) else 0


def check_growth(path: PathLike, size: int) -> None:
    """CheckpointError for what a file would take in memory, where that is out of proportion to the file."""
    here = os.path.getsize(path)
    if size > max(GROWTH * here, SMALL_FILE):
        raise CheckpointError(f'{path} has {here:,} bytes and would take {size:,} in memory; such a file is refused')


def verify_file(path: PathLike, size: int | None = None, sha256: str | None = None) -> None:
    """Check a downloaded file against its recorded size in bytes and SHA-256, each where it is known.

    Raises:
        CheckpointError: if it is another file.
    """
    found_size = os.path.getsize(path)
    if size is not None and found_size != size:
        raise CheckpointError(f'{path} has {found_size} bytes; expected {size}')
    if sha256 is None:
        return
    if (found := hash_file(path)) != sha256.lower():
        raise CheckpointError(f'{path} has SHA-256 {found}; expected {sha256}')


def hash_file(path: PathLike) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def save_weights(
    state_dict: Mapping[str, torch.Tensor], path: PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file. It appears whole or not at all: written beside its place, then renamed."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    beside = f'{os.fspath(path)}.{os.getpid()}.part'
    try:
        save_file(tensors, beside, {'format': 'pt', **(metadata or {})})
        os.replace(beside, path)
    except SafetensorError as error:  # of the file system
        raise OSError(f'cannot write {os.fspath(path)}: {error}') from error
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def few(names: Iterable[str], count: int = 4) -> str:
    """The first of many names, for a message."""
    names = [name if len(name) <= 80 else f'{name[:80]}…' for name in names]
    return ', '.join(names[:count]) + (', …' if len(names) > count else '')


def select_weights(checkpoint: Mapping[str, Any], ema: bool) -> Mapping[str, torch.Tensor]:
    """The state dict in a checkpoint: the averaged weights where there are some and `ema`, else the raw ones."""
    entries = EMA_ENTRIES + RAW_ENTRIES if ema else RAW_ENTRIES
    weights = next((checkpoint[name] for name in entries if isinstance(checkpoint.get(name), Mapping)), checkpoint)
    if not weights or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise CheckpointError(
            f'found no weights under {few(map(str, weights)) or "an empty dict"}; '
            f'expected tensors by name, or such a dict as {" or ".join(entries)}'
        )
    if odd := [name for name, tensor in weights.items() if is_odd(tensor)]:
        raise CheckpointError(f'found sparse or quantized tensors, or such without values: {few(odd)}')
    return weights


def is_odd(tensor: torch.Tensor) -> bool:
    """Whether a tensor is anything but plain numbers in memory."""
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested


def rename(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the release's names, free of wrappers' prefixes and of mmpretrain's names."""
    state_dict = {WRAPPERS.sub('', name): tensor for name, tensor in weights.items()}
    if not any(name.startswith('backbone.') for name in state_dict):
        return state_dict
    renamed = {}
    for name, tensor in state_dict.items():
        for theirs, ours in MMPRETRAIN_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int], square: bool = False) -> torch.Tensor:
    """A position table for h×w tokens, (1, 1 + M, D) -> (1, 1 + N, D), from a square one where M is not N.

    Where M = N it is taken to be of this grid, unless it is known to be of a `square` one.
    """
    count = pos_embed.shape[1] - 1
    side = math.isqrt(max(count, 0))
    if count == grid[0] * grid[1] and not (square and side**2 == count and side != grid[0]):
        return pos_embed
    if count < 1 or side**2 != count:
        raise CheckpointError(
            f'found a position table for {count} tokens, which are no square grid; '
            f'expected a square, or {grid[0] * grid[1]} tokens for {grid[0]}×{grid[1]}'
        )
    return resample_abs_pos_embed(pos_embed, list(grid), [side, side])


def adapt_channels(weight: torch.Tensor, in_chans: int, kernel: int) -> torch.Tensor:
    """RGB to `in_chans` channels: a convolution's (O, 3, k, k), or a Linear's over windows, (O, 3·k·k) -> (O, n)."""
    adapted = adapt_input_conv(in_chans, weight.reshape(-1, 3, kernel, kernel))
    return adapted if weight.ndim == 4 else adapted.flatten(1)


def adapt_normed_channels(
    weight: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, in_chans: int, kernel: int
) -> torch.Tensor:
    """`adapt_channels` of a Linear behind a LayerNorm with gamma and beta, for gamma = beta = 1: (O, n).

    What meets the image is W·diag(gamma), so that is adapted; W·beta, which does not, is kept. Normalised values sum
    to zero over a window, so the mean of a row adds nothing to its product with them and is free to carry the rest:
    with beta = 1 a row adds its sum. This is exact also where q, k, v have no bias that could take W·beta.
    """
    scaled = adapt_channels(weight.float() * norm_weight.float(), in_chans, kernel)
    shift = weight.float() @ norm_bias.float()
    row_mean = shift / scaled.shape[1]
    return (scaled - scaled.mean(1, keepdim=True) + row_mean.unsqueeze(1)).to(weight.dtype)


def adapt_first_layer(state_dict: Mapping[str, torch.Tensor], in_chans: int, kernel: int) -> dict[str, torch.Tensor]:
    """The tensors that see the image, from RGB to `in_chans` channels, as timm adapts a first convolution.

    One channel: the sum over R, G, B, so that a grey image gives what it gave in all three. More: repeated, scaled.
    Empty where there is nothing of three channels.
    """
    name = next((f'{layer}.weight' for layer in FIRST_LAYERS.values() if f'{layer}.weight' in state_dict), None)
    if in_chans == 3 or name is None or state_dict[name].shape[1:].numel() != 3 * kernel**2:
        return {}
    weight = state_dict[name]
    norm = [state_dict[key] for key in FIRST_NORM if key in state_dict]
    if [tensor.shape for tensor in norm] != [weight.shape[1:]] * 2 or weight.ndim != 2:  # no LayerNorm in front
        return {name: adapt_channels(weight, in_chans, kernel)}
    adapted = adapt_normed_channels(weight, norm[0], norm[1], in_chans, kernel)
    if name.startswith(FIRST_LAYERS['transformer']):  # scales q·k by n^-1/2, and n has changed
        adapted[: len(adapted) // 3] *= (in_chans / 3) ** 0.5  # q
    ones = norm[0].new_ones(in_chans * kernel**2)
    return {name: adapted, FIRST_NORM[0]: ones, FIRST_NORM[1]: ones.clone()}


def saved_by_mmpretrain_1x(checkpoint: Mapping[str, Any]) -> bool:
    """Whether mmpretrain 1.x made the file, by the note of mmengine that it carries; mmcls 0.x left another."""
    meta = checkpoint.get('meta')
    return isinstance(meta, Mapping) and 'mmengine_version' in meta


def fold_inverted_scale(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The q, k, v of a model whose products were multiplied by d^1/2, for one that multiplies by its own scale.

    mmpretrain 1.x divides q·k by d^-1/2 where a scale is given, as T2T-ViT's layers do (since its pull request 1434
    of March 2023). Its published T2T-ViT weights are older, and were trained with the release's scale; weights trained
    by 1.x itself only work with that one. The scale of every layer here is (input width of a head)^-1/2.
    """
    folded, modules = {}, dict(model.named_modules())
    for name, weight in state_dict.items():
        if name.endswith('.attn.qkv.weight') and weight.ndim == 2:
            heads = getattr(modules.get(name[: -len('.qkv.weight')]), 'num_heads', 1)
            rows = len(weight) // 3
            folded[name] = weight.clone()
            folded[name][:rows] *= math.sqrt(rows / heads * weight.shape[1] / heads)
    return folded


def describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    """What a state dict is of, as far as its names and shapes tell."""
    layers = [layer for layer, name in FIRST_LAYERS.items() if f'{name}.weight' in state_dict]
    if not layers or 'cls_token' not in state_dict or state_dict['cls_token'].ndim == 0:
        return f'{len(state_dict)} tensors ({few(state_dict)})'
    depth = len({name.split('.')[1] for name in state_dict if name.startswith('blocks.')})
    width = state_dict['cls_token'].shape[-1]
    return f'a T2T-ViT of depth {depth} and width {width}, token layer {layers[0]!r}'


def check_fit(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """CheckpointError unless names and shapes are the expected ones; the head may be missing."""
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
            ('of another shape', other),
            ('of another kind', kinds),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f'found {describe(state_dict)}; expected {describe(expected)}; ' + '; '.join(problems))


def convert_state_dict(
    checkpoint: Mapping[str, Any], model: nn.Module, ema: bool = True, mmpretrain_1x: bool | None = None
) -> dict[str, torch.Tensor]:
    """The weights of any published checkpoint, under this package's names, fitted to a `T2TViT`.

    The position table is resized to the model's grid, the first layer adapted to its channels, and a head for another
    number of classes left out. Neither argument is changed, nothing is loaded.

    Args:
        checkpoint: What a file holds: a state dict, or a dict with one in it.
        model: Asked for its names, shapes, grid and first split.
        ema: Prefer the averaged weights where the checkpoint has them.
        mmpretrain_1x: Whether mmpretrain 1.x trained it, which scales attention otherwise (see
            `fold_inverted_scale`); by default as the file says.

    Raises:
        CheckpointError: if there are no weights in it, or those of another model.
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
        state_dict['pos_embed'] = resize_pos_embed(
            pos_embed, cast(tuple[int, int], model.grid_size), square=weights is not checkpoint
        )  # the release's are

    classes = expected['head.weight'].shape[:1] if 'head.weight' in expected else None
    if 'head.weight' in state_dict and state_dict['head.weight'].shape[:1] != classes:
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in HEAD}

    check_fit(state_dict, expected)
    return state_dict


def count_classes(checkpoint: Mapping[str, Any], ema: bool = True) -> int:
    """Classes of the head in a checkpoint; 0 where it has none."""
    head = rename(select_weights(checkpoint, ema)).get('head.weight')
    return len(head) if head is not None and head.ndim else 0


def load_weights(model: nn.Module, path: PathLike, ema: bool = True, mmpretrain_1x: bool | None = None) -> list[str]:
    """Load any published file into a `T2TViT`, see `convert_state_dict`; the names that keep their initial values.

    Those are none, or the head's. A file that does not fit leaves the model as it was.

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
