"""What a training run is made of; every field can be set by a recipe, a YAML file, or --dotted.names."""

from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, Optional, Tuple, Union

import timm
import torch
import yaml
from timm.data import create_transform
from timm.models import is_model
from timm.optim import list_optimizers

from ..data import Augment
from ..models.t2t_vit import VARIANTS, T2TViT
from ..settings import nearest


@dataclass
class Data:
    """Where images come from.

    Args:
        root: `digits`, a folder with train/ and val/ of class folders, or a Parquet file or folder of them.
        img_size: Pixels, one number or [height, width]; the model's own by default.
        channels: 1 for grey, 3 for colour; by default grey for the digits, colour else.
        mean: Of each channel, in [0, 1]; the model's own by default.
        std: Of each channel; the model's own by default.
        crop_pct: Share of the resized image that the validation crop keeps; the model's own by default.
        memory: Hold the decoded set on the device; by default where it is of small images.
        workers: Processes that open images.
    """

    root: str = 'digits'
    img_size: Optional[Union[int, Tuple[int, int]]] = None
    channels: Optional[Literal[1, 3]] = None
    mean: Optional[Tuple[float, ...]] = None
    std: Optional[Tuple[float, ...]] = None
    crop_pct: Optional[float] = None
    memory: Optional[bool] = None
    workers: int = 2


@dataclass
class Optimizer:
    """What moves the weights; the schedule is a linear warm-up, a cosine, and a rest at the minimum.

    Args:
        name: Any optimizer of timm's.
        lr: Peak learning rate.
        weight_decay: On matrices; norms, biases and the class token have none.
        momentum: Where the optimizer has one.
        layer_decay: Factor on the learning rate from each layer to the one before; none by default.
        clip_grad: Largest norm of the gradient; none by default.
        warmup_epochs: Epochs from warmup_lr up to lr.
        warmup_lr: Where the warm-up begins.
        min_lr: Where the cosine ends.
        cooldown_epochs: Epochs at min_lr, after the others.
    """

    name: str = 'adamw'
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: Optional[float] = None
    clip_grad: Optional[float] = None
    warmup_epochs: int = 10
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    cooldown_epochs: int = 10


@dataclass
class Config:
    """One run from scratch, or from weights.

    Args:
        model: Any model of `t2t-vit models`.
        model_args: More arguments of T2TViT, as drop_path_rate.
        weights: A file to start from, in any published layout, or a run folder; from scratch by default.
        data: Where images come from.
        augment: What is done to them.
        optimizer: What moves the weights.
        epochs: Passes over the training images, cooldown not counted.
        batch_size: Images a step.
        ema_decay: Of the moving average of the weights, warmed up; 0 for none.
        precision: no (float32), bf16 or fp16.
        device: cpu, or auto for the best there is.
        threads: Of the CPU; torch's own choice by default. A small model on a busy machine is faster with one.
        seed: Of everything random.
        output: The run's folder; by default a new one in runs/.
    """

    model: str = 't2t_vit_7'
    model_args: Dict[str, Any] = field(default_factory=dict)
    weights: Optional[str] = None
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 300
    batch_size: int = 512
    ema_decay: float = 0.99996
    precision: Literal['no', 'bf16', 'fp16'] = 'no'
    device: Literal['auto', 'cpu'] = 'auto'
    threads: Optional[int] = None
    seed: int = 42
    output: Optional[str] = None

    @property
    def total_epochs(self) -> int:
        """With those of the cooldown."""
        return self.epochs + self.optimizer.cooldown_epochs

    @property
    def family(self) -> bool:
        """Whether the model is one of ours."""
        return self.model.partition('.')[0] in VARIANTS

    def problems(self) -> List[str]:
        """What is wrong with the values, each in a sentence; empty where nothing is."""
        a, o, d = self.augment, self.optimizer, self.data
        share = 'is at least 0 and at most 1'
        rules = [
            (is_model(self.model), f'unknown model {self.model!r}{nearest(self.model, VARIANTS)}; '
                                   '`t2t-vit models` lists ours, any other of timm will also do'),
            (self.seed >= 0, f'seed is at least 0, got {self.seed}'),
            (self.epochs >= 1, f'epochs is at least 1, got {self.epochs}'),
            (self.batch_size >= 1, f'batch_size is at least 1, got {self.batch_size}'),
            (self.batch_size % 2 == 0 or not (a.mixup or a.cutmix),
             f'mixup and cutmix need an even batch_size, got {self.batch_size}'),
            (0 <= self.ema_decay < 1, f'ema_decay is at least 0 and below 1, got {self.ema_decay}'),
            (self.threads is None or self.threads >= 1, f'threads is at least 1, got {self.threads}'),
            (d.workers >= 0, f'data.workers is at least 0, got {d.workers}'),
            (d.img_size is None or min((d.img_size,) if isinstance(d.img_size, int) else d.img_size) >= 1,
             f'data.img_size is at least 1, got {d.img_size}'),
            (d.crop_pct is None or 0 < d.crop_pct <= 1, f'data.crop_pct is above 0 and at most 1, got {d.crop_pct}'),
            (d.std is None or min(d.std) > 0, f'data.std is above 0, got {d.std}'),
            (o.name in list_optimizers(), f'unknown optimizer.name {o.name!r}{nearest(o.name, list_optimizers())}'),
            (o.lr > 0, f'optimizer.lr is above 0, got {o.lr}'),
            (o.min_lr <= o.lr, f'optimizer.min_lr {o.min_lr} is above optimizer.lr {o.lr}'),
            (o.weight_decay >= 0, f'optimizer.weight_decay is at least 0, got {o.weight_decay}'),
            (o.warmup_epochs >= 0, f'optimizer.warmup_epochs is at least 0, got {o.warmup_epochs}'),
            (o.warmup_epochs < self.epochs,
             f'optimizer.warmup_epochs {o.warmup_epochs} leaves nothing of {self.epochs} epochs'),
            (o.cooldown_epochs >= 0, f'optimizer.cooldown_epochs is at least 0, got {o.cooldown_epochs}'),
            (o.layer_decay is None or 0 < o.layer_decay <= 1,
             f'optimizer.layer_decay is above 0 and at most 1, got {o.layer_decay}'),
            (o.clip_grad is None or o.clip_grad > 0, f'optimizer.clip_grad is above 0, got {o.clip_grad}'),
            (0 < a.scale[0] <= a.scale[1] <= 1, f'augment.scale rises within (0, 1], got {a.scale}'),
            (0 < a.ratio[0] <= a.ratio[1], f'augment.ratio rises from above 0, got {a.ratio}'),
            (0 <= a.hflip <= 1, f'augment.hflip {share}, got {a.hflip}'),
            (0 <= a.erase <= 1, f'augment.erase {share}, got {a.erase}'),
            (0 <= a.switch <= 1, f'augment.switch {share}, got {a.switch}'),
            (a.rotate >= 0, f'augment.rotate is at least 0, got {a.rotate}'),
            (a.color_jitter >= 0, f'augment.color_jitter is at least 0, got {a.color_jitter}'),
            (0 <= a.smoothing < 1, f'augment.smoothing is at least 0 and below 1, got {a.smoothing}'),
            (a.mixup >= 0 and a.cutmix >= 0, f'augment.mixup and cutmix are at least 0, got {a.mixup}, {a.cutmix}'),
            (a.erase_mode in ('pixel', 'rand', 'const'), f'augment.erase_mode is pixel, rand or const, '
                                                         f'got {a.erase_mode}'),
            (a.interpolation in ('bilinear', 'bicubic', 'random'),
             f'augment.interpolation is bilinear, bicubic or random, got {a.interpolation}'),
            (self.weights is None or Path(self.weights).exists(), f'no weights at {self.weights}'),
            (self.weights is None or self.family, f'weights are for models of `t2t-vit models`, not {self.model!r}'),
        ]
        return [sentence for holds, sentence in rules if not holds] + self.refusals()

    def refusals(self) -> List[str]:
        """What timm and the model say against the values that are for them."""
        known = [name for name in signature(T2TViT).parameters if name not in ('img_size', 'in_chans', 'num_classes')]
        unknown = [name for name in self.model_args if name not in known] if self.family else []
        problems = [f'unknown option model_args.{name}{nearest(name, known)}' for name in unknown]
        policy = self.augment.auto_augment
        problems += refusal('augment.auto_augment', lambda: create_transform(32, is_training=True, auto_augment=policy))
        if is_model(self.model) and not unknown:
            with torch.device('meta' if self.family else 'cpu'):  # not every model of timm's can be built on meta
                problems += refusal('model and model_args', lambda: timm.create_model(self.model, **self.model_args))
        return problems

    def to_yaml(self) -> str:
        """As a file that the run can be repeated from."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def refusal(key: str, make: Callable[[], Any]) -> List[str]:
    """What is raised where something is made of a key's value, as a sentence; empty where it can be made."""
    try:
        make()
    except Exception as error:  # whatever it is, it is over the value
        return [f'{key}: {error}']
    return []


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
