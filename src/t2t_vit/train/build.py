"""Build the parts of a run: model, preprocessing, parameter groups, optimizer, schedule."""

from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..data import Preprocessing
from ..models.listing import heads
from ..settings import UsageError, nearest
from .config import Config
from .muon import Muon
from .tasks import Task

MUON = ('muon', 'nmuon')  # timm's names; the second uses Nesterov's momentum


def preprocess(config: Config, channels: int) -> Preprocessing:
    """Return the model's preprocessing with the changes that the configuration asks for."""
    own = Preprocessing.of(timm.models.get_pretrained_cfg(config.model).to_dict())
    data, size = config.data, config.data.img_size
    channels = data.channels or channels
    mean, std = data.mean or own.mean, data.std or own.std
    if channels != len(own.mean):  # a grey or multi-band model starts from the means over the RGB statistics
        mean = data.mean or (sum(own.mean) / len(own.mean),) * channels
        std = data.std or (sum(own.std) / len(own.std),) * channels
    if len(mean) != channels or len(std) != channels:
        raise UsageError(f'data.mean and data.std need a value for each of {channels} channels, got {mean} and {std}')
    return replace(
        own,
        size=own.size if size is None else (size, size) if isinstance(size, int) else size,
        channels=channels,
        mean=tuple(mean),
        std=tuple(std),
        background=data.background,
        crop_pct=data.crop_pct or own.crop_pct,
    )


def build_model(
    config: Config, preprocessing: Preprocessing, classes: list[str], license: str | None = None
) -> nn.Module:
    """Build the model of the run, with preprocessing, class names and licence in its pretrained_cfg.

    Raises:
        UsageError: if the model does not accept its arguments.
    """
    args: dict[str, Any] = {**config.model_args, 'in_chans': preprocessing.channels}
    if config.family:
        args.setdefault('weight_init', config.weight_init)
    if config.family or timm.models.get_pretrained_cfg(config.model).fixed_input_size:
        args['img_size'] = preprocessing.size
    try:
        model = timm.create_model(config.model, num_classes=len(classes), **args)
    except Exception as error:  # whatever a model raises for arguments that do not fit it
        given = ', '.join(f'{key} {value}' for key, value in args.items())
        raise UsageError(f'{config.model} cannot be built with {given}: {error}') from error
    model.pretrained_cfg.update(
        preprocessing.as_cfg(),
        num_classes=len(classes),
        label_names=classes,
        custom_load=False,
        license=license,
        origin_url=None,
    )
    return model


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Take the parameters that match a pattern out of training, except those that match a pattern after a `!`.

    Raises:
        UsageError: naming every pattern that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    kept = [pattern[1:] for pattern in patterns if pattern.startswith('!')]
    patterns = [pattern for pattern in patterns if not pattern.startswith('!')]
    if idle := [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in names)]:
        raise UsageError(
            '\n'.join(f'optimizer.frozen: no parameter is named {pattern}{nearest(pattern, names)}' for pattern in idle)
        )
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in patterns) and not any(fnmatch(name, pattern) for pattern in kept):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            f'optimizer.frozen {" ".join(patterns)} leaves nothing to train: end it with the head, such as !head.*'
        )


def parameter_groups(config: Config, task: Task) -> list[dict[str, Any]]:
    """Put each trainable parameter into one group; norms, biases and the class token have no decay by default."""
    tuning = config.optimizer
    lists = dict(
        no_weight_decay_list=task.no_weight_decay(), fallback_list=not_for_muon(task) if tuning.name in MUON else []
    )
    if tuning.layer_decay is not None:
        groups = param_groups_layer_decay(task, tuning.weight_decay, layer_decay=tuning.layer_decay, **lists)
    else:
        groups = param_groups_weight_decay(task, tuning.weight_decay, **lists)
    if tuning.body_lr_scale is not None:
        body = {id(parameter) for parameter in task.net.parameters()} - head_parameters(task)
        groups = [
            {**group, 'params': chosen, 'lr_scale': scale}
            for group in groups
            for scale, inside in ((1.0, False), (tuning.body_lr_scale, True))
            if (chosen := [p for p in group['params'] if (id(p) in body) == inside])
        ]
    for group in groups:
        if tuning.decay_all:
            group['weight_decay'] = tuning.weight_decay
        if tuning.same_min_lr:  # timm's schedules scale their end by lr_scale too
            group['lr'] = config.lr * group.pop('lr_scale', 1.0)
    check_groups(task, groups)
    return groups


def not_for_muon(task: Task) -> list[str]:
    """Return the names of the parameters that Muon leaves to AdamW.

    These are vectors, the class token and learned positions, and everything outside the hidden layers: the head, and in
    a task the layers beside the model. Token layers and convolutions are hidden layers.
    """
    outside, positions = head_parameters(task), task.no_weight_decay()
    return [
        name
        for name, p in task.named_parameters()
        if p.dim() not in (2, 4) or min(p.shape[:2]) == 1 or id(p) in outside or name in positions
    ]


def head_parameters(task: Task) -> set[int]:
    """Return the ids of the parameters of a model's classifiers."""
    return {id(parameter) for head in heads(task.net) for parameter in head.parameters()}


def check_groups(task: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError if a trainable parameter is in no group, or in several."""
    held = [id(parameter) for group in groups for parameter in group['params']]
    wrong = [
        f'{name} in {held.count(id(parameter))}'
        for name, parameter in task.named_parameters()
        if held.count(id(parameter)) != int(parameter.requires_grad)
    ]
    if wrong:
        raise RuntimeError(f'every trainable parameter must be in one group: {", ".join(wrong[:5])}')


def build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build timm's optimizer of the configured name; `muon` and `nmuon` have a faster step of ours.

    Raises:
        UsageError: if the optimizer does not accept its arguments.
    """
    tuning = config.optimizer
    common = config.lr, tuning.weight_decay, tuning.momentum
    try:
        if tuning.name in MUON:
            return Muon(groups, *common, **{'nesterov': tuning.name == 'nmuon', **tuning.opt_kwargs})
        return create_optimizer_v2(groups, tuning.name, *common, **tuning.opt_kwargs)
    except Exception as error:  # whatever an optimizer raises for arguments that do not fit it
        raise UsageError(
            f'{tuning.name} cannot be built with optimizer.opt_kwargs {tuning.opt_kwargs}: {error}'
        ) from error


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """Build the schedule: a linear warm-up, a cosine, and a cooldown at the minimum, for epochs of `steps` steps."""
    tuning = config.optimizer
    schedule, _ = create_scheduler_v2(
        optimizer,
        'cosine',
        config.epochs - tuning.cooldown_epochs,
        cooldown_epochs=tuning.cooldown_epochs,
        warmup_epochs=tuning.warmup_epochs,
        warmup_lr=tuning.warmup_lr,
        min_lr=tuning.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return schedule
