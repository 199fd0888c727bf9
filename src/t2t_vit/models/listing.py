"""Models by name: their list with sizes, any model a user can name, and published checkpoints as safetensors."""

import difflib
import fnmatch
from json import dumps
from typing import Any

import timm
import torch
from rich.table import Column, Table
from torch import nn

from ..console import console
from .checkpoints import CheckpointError, PathLike, convert_state_dict, count_classes, read_checkpoint, save_weights
from .own import load_own
from .t2t_vit import PUBLISHED, VARIANTS

KEYS = ('model', 'img_size', 'parameters', 'trainable', 'published_weights')


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of a model: all that its checkpoint holds, fixed tables included, and those that are learned."""
    return sum(t.numel() for t in model.state_dict().values()), sum(p.numel() for p in model.parameters())


def check_name(model: str) -> None:
    """ValueError unless it is the name of a model, or such a name and a tag."""
    name, _, tag = model.partition('.')
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        raise ValueError(
            f'unknown model {model!r}' + (f', did you mean {near[0]}?' if near else '') + '; `t2t-vit models` lists all'
        )
    if tag and model not in PUBLISHED:
        tags = [key.partition('.')[2] for key in PUBLISHED if key.split('.')[0] == name]
        raise ValueError(f'{name} has no tag {tag!r}; tags: {", ".join(tags) or "none"}')


def build_from_file(
    name: str,
    path: PathLike,
    ema: bool = True,
    mmpretrain_1x: bool | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, list[str]]:
    """A registered model with the weights of any published file, and the names that keep their initial values.

    It has the classes of the file's head unless `num_classes` says otherwise; `kwargs` are timm's and the model's.
    Nothing is allocated before the file is known to fit.

    Raises:
        ValueError: if no model has this name.
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be used.
    """
    check_name(name)
    checkpoint = read_checkpoint(path)
    try:
        classes = count_classes(checkpoint, ema) if num_classes is None else num_classes
        with torch.device('meta'):
            draft = timm.create_model(name, num_classes=classes, **kwargs)
        weights = convert_state_dict(checkpoint, draft, ema, mmpretrain_1x)
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from None
    net = timm.create_model(name, num_classes=classes, **kwargs)
    return net, list(net.load_state_dict(weights, strict=False).missing_keys)


def build(name: str, img_size: int | tuple[int, int], **kwargs: Any) -> nn.Module:
    """A model for this image size: any that `timm.create_model` knows, or FILE.py:FUNCTION, called with `img_size`.

    `kwargs`, as `pretrained`, are for timm's alone.

    Raises:
        ValueError: if there is no such model.
    """
    if '.py:' in name:
        return load_own(name)(img_size=img_size)
    if not name.startswith(('hf-hub:', 'local-dir:')) and not timm.models.is_model(name):
        raise ValueError(
            f'unknown model {name!r}; expected a name timm knows, hf-hub:USER/NAME, local-dir:FOLDER, '
            'or FILE.py:FUNCTION'
        )
    try:
        return timm.create_model(name, img_size=img_size, **kwargs)
    except TypeError:  # convolutional networks take any size as they are
        return timm.create_model(name, **kwargs)


def models(pattern: str = '*', json: bool = False) -> dict[str, tuple[int, int]]:
    """List the models: image size, parameters, and the tags of published weights.

    Args:
        pattern: Only names that match, as t2t_vit_t_*.
        json: Print JSON.
    """
    table = Table(Column('model', no_wrap=True), 'image', 'parameters', 'learned', 'published weights')
    counts = {}
    rows = []
    for name in fnmatch.filter(VARIANTS, pattern):
        with torch.device('meta'):
            model = timm.create_model(name)
        counts[name] = count_parameters(model)
        tags = [key.split('.')[1] for key in PUBLISHED if key.split('.')[0] == name]
        rows.append((name, model.img_size[0], *counts[name], tags))
        table.add_row(name, str(model.img_size[0]), *(f'{n:,}' for n in counts[name]), ', '.join(tags))
    if not counts:
        raise ValueError(f'no model matches {pattern!r}; `t2t-vit models` lists all')
    if json:
        print(dumps([dict(zip(KEYS, row)) for row in rows], indent=2))
    else:
        console().print(table)
    return counts


def convert(
    file: str,
    model: str,
    output: str,
    ema: bool = True,
    mmpretrain_1x: bool | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
) -> None:
    """Turn a published checkpoint into safetensors, fitted to a model.

    Args:
        file: A checkpoint in any published layout.
        model: The registered name of its model.
        output: The safetensors file to write.
        ema: Take the averaged weights where the file has them.
        mmpretrain_1x: Whether mmpretrain 1.x trained it, which scales attention otherwise; by default as the file says.
        num_classes: Leave room for another number of classes (the head is then new); by default the file's own.
        in_chans: Adapt the first layer to another number of channels.
        img_size: Resize the position table for another image size; by default the model's own.
    """
    size = {'img_size': img_size} if img_size else {}
    net, new = build_from_file(model, file, ema, mmpretrain_1x, num_classes, in_chans=in_chans, **size)
    save_weights(net.state_dict(), output, {'model': model})
    total, learned = count_parameters(net)
    print(f'{output}: {model}, {total:,} parameters, {learned:,} learned' + (f'; new: {", ".join(new)}' if new else ''))
