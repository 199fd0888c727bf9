"""What a training run is made of; every field can be set by a recipe, a YAML file, or --dotted.names."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from timm.data import create_transform
from timm.models import is_model
from timm.optim import list_optimizers

from ..data import Augment, is_color
from ..models.t2t_vit import VARIANTS, T2TViT
from ..settings import flatten, nearest

REQUIRED = 'required'
TRACKERS = sorted(kind.value for kind in LoggerType if kind.value != 'all')


@dataclass
class Data:
    """Where images come from.

    Args:
        root: `digits`, torch/NAME, hfds/NAME, or a folder: with train/ and val/ of class folders, with train*.parquet
            and val*.parquet, or with train*.tar and val*.tar.
        cache: Where torch/ and hfds/ sets are kept; by default ~/.cache/t2t-vit, and the Hub's own for hfds/.
        download: Fetch a torch/ set that is not there.
        img_size: Pixels, one number or [height, width]; the model's own by default.
        channels: 1 for grey, 3 for RGB, any other number for the bands of multi-band TIFF and .npy files as they are
            stored; by default 1 for the digits and 3 otherwise.
        background: The colour that shows through transparent pixels, a name or #rrggbb.
        mean: Mean of each channel, in [0, 1]; the model's own by default.
        std: Standard deviation of each channel; the model's own by default.
        crop_pct: Share of the resized image that the validation crop keeps; the model's own by default.
        memory: Hold the decoded set on the device; by default where it is of small images.
        workers: Processes that open images.
        train_images: Train on so many of them only, the first of every class, the same share of each; all by default.
        val_images: Score on so many only, likewise.
    """

    root: str = 'digits'
    cache: str | None = None
    download: bool = False
    img_size: int | tuple[int, int] | None = None
    channels: int | None = None
    background: str = 'white'
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    memory: bool | None = None
    workers: int = 2
    train_images: int | None = None
    val_images: int | None = None


@dataclass
class Objective:
    """What a step minimises.

    Args:
        kind: `labels` (their cross-entropy), `distill` (a teacher's scores too) or `token_labels` (a label for every
            token too).
        teacher: A name of timm's with published weights, a run folder, hf-hub:USER/NAME, local-dir:FOLDER, or
            FILE.py:FUNCTION, a function of img_size that gives a model.
        teacher_size: Pixels of the images that the teacher gets, resized from the student's, one number or
            [height, width]; by default it gets them as they are.
        temperature: That both models' scores are divided by (distill).
        hard: Learn the teacher's choice, not its scores (distill).
        weight: The teacher's share of the loss, 1 for nothing else (distill); what the tokens' labels count beside
            the image's, which counts 1 (token_labels).
        labels: Folder of token labels, CLASS/IMAGE.pt for every training image; a teacher makes them otherwise.
        mixtoken: Alpha of MixToken, 0 for none (token_labels, instead of mixup and cutmix).
    """

    kind: Literal['labels', 'distill', 'token_labels'] = 'labels'
    teacher: str | None = None
    teacher_size: int | tuple[int, int] | None = None
    temperature: float = 1.0
    hard: bool = False
    weight: float = 0.5
    labels: str | None = None
    mixtoken: float = 1.0

    def problems(self, augment: Augment) -> list[str]:
        """What is wrong with the values, alone and beside the augmentation's."""
        dense, size = self.kind == 'token_labels', self.teacher_size
        rules = [
            (self.kind != 'distill' or bool(self.teacher), 'objective.kind distill needs an objective.teacher'),
            (
                not dense or bool(self.teacher) != bool(self.labels),
                'objective.kind token_labels needs an objective.teacher or a folder, objective.labels; '
                f'got {"both" if self.labels else "neither"}',
            ),
            (
                self.kind != 'labels' or not self.teacher,
                'objective.teacher is for objective.kind distill or token_labels, not labels',
            ),
            (dense or not self.labels, f'objective.labels is for objective.kind token_labels, not {self.kind}'),
            (
                not self.labels or Path(self.labels).expanduser().is_dir(),
                f'objective.labels: no folder at {self.labels}',
            ),
            (
                not (dense and self.labels) or not augment.rotate,
                'objective.labels follow crops and mirrors only: set augment.rotate to 0',
            ),
            (
                not dense or not (augment.mixup or augment.cutmix),
                'token labels are mixed by objective.mixtoken: set augment.mixup and augment.cutmix to 0',
            ),
            (
                size is None or min((size,) if isinstance(size, int) else size) >= 1,
                f'objective.teacher_size is at least 1, got {size}',
            ),
            (self.temperature > 0, f'objective.temperature is above 0, got {self.temperature}'),
            (
                self.weight >= 0 and (dense or self.weight <= 1),
                f'objective.weight is at least 0{"" if dense else " and at most 1"}, got {self.weight}',
            ),
            (self.mixtoken >= 0, f'objective.mixtoken is at least 0, got {self.mixtoken}'),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass
class Optimizer:
    """What moves the weights; the schedule is a linear warm-up, a cosine, and a rest at the minimum.

    Args:
        name: Any optimizer of timm's.
        lr: Peak learning rate.
        lr_batch: The batch size that lr is for: the rate used is lr * batch_size / lr_batch; by default just lr.
        weight_decay: On matrices; norms, biases and the class token have none, but where decay_all says so.
        decay_all: Weight decay on every parameter.
        momentum: Where the optimizer has one.
        layer_decay: Factor on the learning rate from each layer to the one before; none by default.
        body_lr: Factor on the learning rate of all but the head, for transfer; none by default.
        frozen: Patterns of parameters that stay as they are, as blocks.0.* or norm.*.
        clip_grad: Largest norm of the gradient; none by default.
        warmup_epochs: Epochs from warmup_lr up to lr.
        warmup_lr: Where the warm-up begins.
        min_lr: Where the cosine ends.
        min_lr_alike: End at min_lr itself also where layer_decay or body_lr make the rate smaller; by default they make
            the end smaller too.
        cooldown_epochs: Epochs at min_lr, after the others.
    """

    name: str = 'adamw'
    lr: float = 1e-3
    lr_batch: int | None = None
    weight_decay: float = 0.05
    decay_all: bool = False
    momentum: float = 0.9
    layer_decay: float | None = None
    body_lr: float | None = None
    frozen: list[str] = field(default_factory=list)
    clip_grad: float | None = None
    warmup_epochs: int = 10
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    min_lr_alike: bool = False
    cooldown_epochs: int = 10


@dataclass
class Config:
    """One run from scratch, or from weights.

    Args:
        model: Any model of `t2t-vit models`.
        model_args: More arguments of T2TViT, as drop_path_rate.
        weights: A file to start from, in any published layout, or a run folder; from scratch by default. `required`
            is for recipes that make no sense from scratch: it asks for one.
        data: Where images come from.
        augment: What is done to them.
        objective: What a step minimises.
        optimizer: What moves the weights.
        epochs: Passes over the training images, cooldown not counted.
        batch_size: Images a step of the optimizer, over all processes.
        accumulate: Parts that each process makes its share of a batch in, for less memory.
        ema_decay: Of the moving average of the weights, warmed up; 0 for none.
        precision: no (float32), bf16 or fp16.
        device: cpu, or auto for the best there is.
        threads: Of the CPU; torch's own choice by default. A small model on a busy machine is faster with one.
        seed: Of everything random.
        output: The run's folder; by default a new one in runs/.
        save_minutes: How often the state is saved, besides after every epoch; 0 for every step.
        keep: How many of the last states are kept.
        max_skips: Steps in a row without a finite gradient before the run stops.
        trackers: tensorboard, wandb, mlflow or another of accelerate's, besides metrics.jsonl and curves.png.
    """

    model: str = 't2t_vit_7'
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 300
    batch_size: int = 512
    accumulate: int = 1
    ema_decay: float = 0.99996
    precision: Literal['no', 'bf16', 'fp16'] = 'no'
    device: Literal['auto', 'cpu'] = 'auto'
    threads: int | None = None
    seed: int = 42
    output: str | None = None
    save_minutes: float = 10.0
    keep: int = 2
    max_skips: int = 20
    trackers: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.trackers, str):  # one word of a command line
            self.trackers = [self.trackers]

    @property
    def lr(self) -> float:
        """The peak learning rate of this batch size, by the paper's linear rule where `optimizer.lr_batch` is set."""
        return self.optimizer.lr * self.batch_size / (self.optimizer.lr_batch or max(self.batch_size, 1))

    @property
    def total_epochs(self) -> int:
        """With those of the cooldown."""
        return self.epochs + self.optimizer.cooldown_epochs

    @property
    def family(self) -> bool:
        """Whether the model is one of ours."""
        return self.model.partition('.')[0] in VARIANTS

    def problems(self) -> list[str]:
        """What is wrong with the values, each in a sentence; empty where nothing is."""
        a, o, d = self.augment, self.optimizer, self.data
        share = 'is at least 0 and at most 1'
        rules = [
            (
                is_model(self.model),
                f'unknown model {self.model!r}{nearest(self.model, VARIANTS)}; '
                '`t2t-vit models` lists ours, any other of timm will also do',
            ),
            (self.seed >= 0, f'seed is at least 0, got {self.seed}'),
            (self.epochs >= 1, f'epochs is at least 1, got {self.epochs}'),
            (self.batch_size >= 1, f'batch_size is at least 1, got {self.batch_size}'),
            (
                self.batch_size % 2 == 0 or not (a.mixup or a.cutmix),
                f'mixup and cutmix need an even batch_size, got {self.batch_size}',
            ),
            (self.accumulate >= 1, f'accumulate is at least 1, got {self.accumulate}'),
            (self.save_minutes >= 0, f'save_minutes is at least 0, got {self.save_minutes}'),
            (self.keep >= 1, f'keep is at least 1, got {self.keep}'),
            (self.max_skips >= 1, f'max_skips is at least 1, got {self.max_skips}'),
            (0 <= self.ema_decay < 1, f'ema_decay is at least 0 and below 1, got {self.ema_decay}'),
            (self.threads is None or self.threads >= 1, f'threads is at least 1, got {self.threads}'),
            (d.workers >= 0, f'data.workers is at least 0, got {d.workers}'),
            (
                min(d.train_images or 1, d.val_images or 1) >= 1,
                f'data.train_images and val_images are at least 1, got {d.train_images}, {d.val_images}',
            ),
            (
                d.img_size is None or min((d.img_size,) if isinstance(d.img_size, int) else d.img_size) >= 1,
                f'data.img_size is at least 1, got {d.img_size}',
            ),
            (d.crop_pct is None or 0 < d.crop_pct <= 1, f'data.crop_pct is above 0 and at most 1, got {d.crop_pct}'),
            (d.channels is None or d.channels >= 1, f'data.channels must be at least 1, got {d.channels}'),
            (is_color(d.background), f'data.background must be a colour name or #rrggbb, got {d.background!r}'),
            (d.std is None or min(d.std) > 0, f'data.std is above 0, got {d.std}'),
            (o.name in list_optimizers(), f'unknown optimizer.name {o.name!r}{nearest(o.name, list_optimizers())}'),
            (o.lr > 0, f'optimizer.lr is above 0, got {o.lr}'),
            (o.lr_batch is None or o.lr_batch >= 1, f'optimizer.lr_batch is at least 1, got {o.lr_batch}'),
            (o.min_lr <= self.lr, f'optimizer.min_lr {o.min_lr:g} is above the learning rate {self.lr:g}'),
            (o.body_lr is None or o.body_lr > 0, f'optimizer.body_lr is above 0, got {o.body_lr}'),
            (
                not o.min_lr_alike or o.min_lr <= self.lr * (o.body_lr or 1),
                f'optimizer.min_lr {o.min_lr:g} is above the learning rate of the body, {self.lr * (o.body_lr or 1):g}',
            ),
            (o.body_lr is None or o.layer_decay is None, 'optimizer.body_lr and layer_decay exclude each other'),
            (o.weight_decay >= 0, f'optimizer.weight_decay is at least 0, got {o.weight_decay}'),
            (o.warmup_epochs >= 0, f'optimizer.warmup_epochs is at least 0, got {o.warmup_epochs}'),
            (
                o.warmup_epochs < self.epochs,
                f'optimizer.warmup_epochs {o.warmup_epochs} leaves nothing of {self.epochs} epochs',
            ),
            (o.cooldown_epochs >= 0, f'optimizer.cooldown_epochs is at least 0, got {o.cooldown_epochs}'),
            (
                o.layer_decay is None or 0 < o.layer_decay <= 1,
                f'optimizer.layer_decay is above 0 and at most 1, got {o.layer_decay}',
            ),
            (o.clip_grad is None or o.clip_grad > 0, f'optimizer.clip_grad is above 0, got {o.clip_grad}'),
            (0 < a.scale[0] <= a.scale[1] <= 1, f'augment.scale rises within (0, 1], got {a.scale}'),
            (0 < a.ratio[0] <= a.ratio[1], f'augment.ratio rises from above 0, got {a.ratio}'),
            (a.pad >= 0, f'augment.pad is at least 0, got {a.pad}'),
            (0 <= a.hflip <= 1, f'augment.hflip {share}, got {a.hflip}'),
            (0 <= a.erase <= 1, f'augment.erase {share}, got {a.erase}'),
            (0 <= a.switch <= 1, f'augment.switch {share}, got {a.switch}'),
            (a.rotate >= 0, f'augment.rotate is at least 0, got {a.rotate}'),
            (a.color_jitter >= 0, f'augment.color_jitter is at least 0, got {a.color_jitter}'),
            (0 <= a.smoothing < 1, f'augment.smoothing is at least 0 and below 1, got {a.smoothing}'),
            (a.mixup >= 0 and a.cutmix >= 0, f'augment.mixup and cutmix are at least 0, got {a.mixup}, {a.cutmix}'),
            (
                a.erase_mode in ('pixel', 'rand', 'const'),
                f'augment.erase_mode is pixel, rand or const, got {a.erase_mode}',
            ),
            (
                a.interpolation in ('bilinear', 'bicubic', 'random'),
                f'augment.interpolation is bilinear, bicubic or random, got {a.interpolation}',
            ),
            (
                self.weights != REQUIRED,
                'this recipe goes on from trained weights: say which with --weights FILE, '
                'or --weights null to begin from scratch all the same',
            ),
            (self.weights in (None, REQUIRED) or Path(str(self.weights)).exists(), f'no weights at {self.weights}'),
            (self.weights is None or self.family, f'weights are for models of `t2t-vit models`, not {self.model!r}'),
        ]
        return [sentence for holds, sentence in rules if not holds] + self.objective.problems(a) + self.refusals()

    def refusals(self) -> list[str]:
        """What timm and the model say against the values that are for them."""
        known = [name for name in signature(T2TViT).parameters if name not in ('img_size', 'in_chans', 'num_classes')]
        unknown = [name for name in self.model_args if name not in known] if self.family else []
        problems = [f'unknown option model_args.{name}{nearest(name, known)}' for name in unknown]
        problems += [
            f'unknown tracker {name!r}{nearest(name, TRACKERS)}; those of accelerate: {", ".join(TRACKERS)}'
            for name in self.trackers
            if name not in TRACKERS
        ]
        installed = [kind.value for kind in get_available_trackers()]
        problems += [
            f'trackers: {name} is not installed' for name in self.trackers if name in TRACKERS and name not in installed
        ]
        policy = self.augment.auto_augment
        problems += refusal('augment.auto_augment', lambda: create_transform(32, is_training=True, auto_augment=policy))
        if is_model(self.model) and not unknown:
            with torch.device('meta' if self.family else 'cpu'):  # not every model of timm's can be built on meta
                problems += refusal('model and model_args', lambda: timm.create_model(self.model, **self.model_args))
        return problems

    def flat(self) -> dict[str, Any]:
        """Dotted names and plain values."""
        return {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in flatten(_plain(asdict(self)))
        }

    def to_yaml(self) -> str:
        """As a file that the run can be repeated from."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def refusal(key: str, make: Callable[[], Any]) -> list[str]:
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
