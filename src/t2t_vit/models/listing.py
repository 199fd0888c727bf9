"""Models by name: build them, list them, and convert published checkpoints to safetensors."""

import difflib
import fnmatch
import inspect
from json import dumps
from typing import Any

import timm
import torch
from rich.table import Column, Table
from torch import nn

from ..console import console
from ..custom import load_code
from .checkpoints import convert_state_dict, count_classes
from .published import PUBLISHED
from .safe_load import CheckpointError, PathLike, read_checkpoint, save_weights
from .shipped import shipped
from .variants import VARIANTS

KEYS = ('model', 'img_size', 'parameters', 'trainable', 'published_weights')


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters in a model's checkpoint, fixed tables included, and of trainable ones."""
    return sum(t.numel() for t in model.state_dict().values()), sum(p.numel() for p in model.parameters())


def heads(model: Any) -> list[nn.Module]:
    """Return the classifiers of a model of ours or of timm; those with a distillation token have two."""
    found = model.get_classifier()
    return list(found) if isinstance(found, tuple) else [found]


def check_name(model: str) -> None:
    """Raise ValueError unless it is the name of a model, or a name and a tag."""
    name, _, tag = model.partition('.')
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)
        raise ValueError(
            f'unknown model {model!r}' + (f', did you mean {near[0]}?' if near else '') + '; `t2t-vit models` lists all'
        )
    known = [*PUBLISHED, *shipped()]
    if tag and model not in known:
        tags = [key.partition('.')[2] for key in known if key.split('.')[0] == name]
        raise ValueError(f'{name} has no tag {tag!r}; tags: {", ".join(tags) or "none"}')


def is_known(name: str) -> bool:
    """Tell if timm knows a model by this name and, if it ends in one, the tag of its weights."""
    try:
        return timm.models.is_model(name) and timm.get_pretrained_cfg(name) is not None
    except RuntimeError:  # no such tag
        return False


def build_from_file(
    name: str,
    path: PathLike,
    ema: bool = True,
    mmpretrain_1x: bool | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, list[str]]:
    """Build a registered model with the weights of a published file; also return the names that stay initialised.

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
    """Build a model for this image size: any name that timm knows, or FILE.py:FUNCTION, called with `img_size`.

    `kwargs`, as `pretrained`, are passed to timm only.

    Raises:
        ValueError: if there is no such model.
    """
    if '.py:' in name:
        function = load_code(name)
        try:
            inspect.signature(function).bind(img_size=img_size)
        except TypeError:
            found = f'one of {inspect.signature(function)}' if callable(function) else type(function).__name__
            raise ValueError(f'{name} must be a function of img_size that returns a model, got {found}') from None
        model = function(img_size=img_size)
        if not isinstance(model, nn.Module):
            raise ValueError(f'{name} must return a model, a torch.nn.Module, got {type(model).__name__}')
        return model
    if not name.startswith(('hf-hub:', 'local-dir:')) and not is_known(name):
        raise ValueError(
            f'unknown model {name!r}; expected a name timm knows, hf-hub:USER/NAME, local-dir:FOLDER, '
            'or FILE.py:FUNCTION'
        )
    try:
        return timm.create_model(name, img_size=img_size, **kwargs)
    except TypeError:  # convolutional networks have no img_size
        return timm.create_model(name, **kwargs)


def models(pattern: str = '*', json: bool = False) -> dict[str, tuple[int, int]]:
    """List the models: image size, parameters with 1000 classes, and the tags of published weights.

    Args:
        pattern: Only names that match, as t2t_vit_t_*.
        json: Print JSON.
    """
    table = Table(Column('model', no_wrap=True), 'image', 'parameters', 'trainable', 'published weights')
    counts = {}
    rows = []
    for name in fnmatch.filter(VARIANTS, pattern):
        with torch.device('meta'):
            model = timm.create_model(name, num_classes=1000)
        counts[name] = count_parameters(model)
        tags = [key.split('.')[1] for key in (*PUBLISHED, *shipped()) if key.split('.')[0] == name]
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
        ema: Take the EMA weights if the file has them.
        mmpretrain_1x: If mmpretrain 1.x trained it, which scales attention differently; by default as the file says.
        num_classes: Another number of classes (with a new head); by default the file's own.
        in_chans: Adapt the first layer to another number of channels.
        img_size: Resize the position table for another image size; by default the model's own.
    """
    size = {'img_size': img_size} if img_size else {}
    net, new = build_from_file(model, file, ema, mmpretrain_1x, num_classes, in_chans=in_chans, **size)
    save_weights(net.state_dict(), output, {'model': model})
    total, learned = count_parameters(net)
    print(
        f'{output}: {model}, {total:,} parameters, {learned:,} trainable' + (f'; new: {", ".join(new)}' if new else '')
    )
