"""Weights to start from: a timm tag, a file, a folder or a model on the Hub; and a report of what was loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, load_model_config_from_hf
from torch import nn

from ..models.checkpoints import convert_state_dict, select_weights
from ..models.listing import is_known
from ..models.published import PUBLISHED, RELEASE_LICENCE
from ..models.safe_load import CheckpointError, read_checkpoint
from ..models.shipped import locate
from ..settings import UsageError
from ..trained import CONFIG, WEIGHTS, from_pretrained, read_config, read_weights

SHOWN = 3  # names in a line
NO_WEIGHTS = (
    'no weights at {}; expected a file, a run folder, hf-hub:USER/NAME, a timm tag such as t2t_vit_14.in1k, or one of '
    'the package such as t2t_vit_r_4_64.imagenette'
)


def is_tag(weights: str) -> bool:
    """Tell if this names a model of timm with weights to download, such as t2t_vit_14.in1k."""
    return is_known(weights) and bool(get_pretrained_cfg(weights).has_weights)


def exists(weights: str) -> bool:
    """Tell if weights can be looked for under this name."""
    return weights.startswith('hf-hub:') or is_tag(weights) or Path(locate(weights).removeprefix('local-dir:')).exists()


@dataclass
class StartModel:
    """The model that weights are for.

    Args:
        model: Its name; with the tag, if it has one.
        model_args: Arguments that it was built with.
        cfg: Its pretrained_cfg: size, mean, std, class names; empty if unknown.
    """

    model: str
    model_args: dict[str, Any]
    cfg: dict[str, Any]


def describe_weights(weights: str) -> StartModel | None:
    """Return the model that weights are for; None for a file that does not say.

    Raises:
        UsageError: if there are no such weights.
    """
    if not exists(weights):
        raise UsageError(NO_WEIGHTS.format(weights))
    if weights.startswith('hf-hub:'):
        cfg, model, args = load_model_config_from_hf(weights.removeprefix('hf-hub:'))
        return StartModel(model, without_sizes(args or {}), cfg)
    if is_tag(weights) and not Path(weights).exists():
        return StartModel(weights, {}, get_pretrained_cfg(weights).to_dict())
    config = find_config(Path(locate(weights).removeprefix('local-dir:')))
    if config is None:
        return None
    content = read_config(config)
    names = content.get('label_names') or content['pretrained_cfg'].get('label_names')
    cfg = {**content['pretrained_cfg'], 'label_names': names}
    return StartModel(content['architecture'], without_sizes(content.get('model_args', {})), cfg)


def without_sizes(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's arguments without those that follow from the images."""
    return {key: value for key, value in model_args.items() if key not in ('num_classes', 'in_chans', 'img_size')}


def find_config(path: Path) -> Path | None:
    """Return the config.json that describes a run folder, its weights file or a state in it; None if there is none."""
    folders = [path] if path.is_dir() else [path.parent, *([path.parent.parent] if path.suffix == '.pt' else [])]
    if not path.is_dir() and path.name != WEIGHTS and path.suffix != '.pt':
        return None
    return next((folder / CONFIG for folder in folders if (folder / CONFIG).exists()), None)


def describe_origin(weights: str | None) -> dict[str, str | None]:
    """Return name and licence of initial weights, for the model card; None for what is unknown.

    The name is that of a tag or of a model on the Hub, or the last part of a path; the licence what their
    configuration says, or the release's for its files.

    Raises:
        UsageError: if there are no such weights.
    """
    if weights is None:
        return dict(weights=None, license=None)
    start, name = describe_weights(weights), weights if weights.startswith('hf-hub:') else Path(weights).name
    published = RELEASE_LICENCE if name in {row.file for row in PUBLISHED.values()} else None
    return dict(weights=name.removeprefix('local-dir:'), license=start.cfg.get('license') if start else published)


@dataclass
class LoadReport:
    """Names of a model's tensors by what happened to them when weights were loaded."""

    source: str
    loaded: list[str]
    new: list[str]
    resized: list[str]

    def __str__(self) -> str:
        parts = [f'{len(self.loaded)} tensors loaded']
        for what, names in (('new', self.new), ('resized', self.resized)):
            if names:
                more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
                parts.append(f'{len(names)} {what} ({", ".join(names[:SHOWN])}{more})')
        return f'{self.source}: {", ".join(parts)}'


def load_start_weights(model: nn.Module, weights: str, classes: Sequence[str]) -> LoadReport:
    """Load weights into a model; the head only if it is for the same classes in the same order.

    Args:
        model: The model, which keeps its initial values where the weights have none.
        weights: See `describe_weights`.
        classes: The class names of the model.

    Raises:
        CheckpointError: if the weights do not fit the model.
    """
    start = describe_weights(weights)
    found = read_source(weights)
    expected = model.state_dict()
    names = start.cfg.get('label_names') if start else None
    if names is not None and list(names) != list(classes):
        heads = head_names(model)
        found = {name: tensor for name, tensor in found.items() if not name.startswith(heads)}
    if hasattr(model, 'tokens_to_token'):
        try:
            size = start.cfg.get('input_size') if start else None
            fitted = convert_state_dict(found, model, img_size=size[-2:] if size else None)
        except CheckpointError as error:
            raise CheckpointError(f'{weights}: {error}') from None
    else:
        fitted = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
        if not fitted:
            raise CheckpointError(f'{weights}: no tensor fits {type(model).__name__}')
    model.load_state_dict(fitted, strict=False)
    original = dict(select_weights(found, True)) if hasattr(model, 'tokens_to_token') else found
    resized = [k for k in fitted if k in original and original[k].shape != expected[k].shape]
    return LoadReport(
        weights,
        [name for name in expected if name in fitted and name not in resized],
        [name for name in expected if name not in fitted],
        resized,
    )


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of a classifier's weights begin, as `head.` or, of a ResNet, `fc.`."""
    cfg: Any = getattr(model, 'pretrained_cfg', {})
    names = cfg.get('classifier') or 'head'
    return tuple(f'{name}.' for name in ([names] if isinstance(names, str) else names))


def read_source(weights: str) -> Mapping[str, Any]:
    """Read weights as a state dict, or as the checkpoint that holds one."""
    path = Path(locate(weights).removeprefix('local-dir:'))
    if weights.startswith('hf-hub:'):
        return from_pretrained(weights).state_dict()
    if is_tag(weights) and not path.exists():
        with torch.random.fork_rng():
            return timm.create_model(weights, pretrained=True).state_dict()
    if path.is_dir():
        return read_weights(path / WEIGHTS, ema=True)
    checkpoint = read_checkpoint(path)
    return read_weights(path, ema=True) if 'position' in checkpoint else checkpoint
