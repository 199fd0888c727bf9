"""The configuration of a training run; recipes, YAML files and --dotted.options set its fields."""

from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from timm.data import create_transform
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

from ..data import Augment, SplitOptions, is_color
from ..models.listing import is_known
from ..models.timm_api import argument_names
from ..models.variants import VARIANTS
from ..settings import flatten, nearest
from .start_weights import NO_WEIGHTS, exists

REQUIRED = 'required'
RENAMED = {  # names of version 0.1, still accepted
    'augment.auto_augment': 'augment.aa',
    'augment.erase': 'augment.reprob',
    'augment.erase_mode': 'augment.remode',
    'augment.switch': 'augment.mixup_switch_prob',
    'optimizer.lr_batch': 'optimizer.lr_base_size',
    'optimizer.min_lr_alike': 'optimizer.same_min_lr',
    'optimizer.body_lr': 'optimizer.body_lr_scale',
    'accumulate': 'grad_accum_steps',
    'max_skips': 'max_skipped_steps',
}
TRACKERS = sorted(kind.value for kind in LoggerType if kind.value != 'all')


@dataclass
class Data:
    """Where images come from.

    Args:
        root: `digits`, torch/NAME, hfds/NAME, or a folder: with train/ and val/ of class folders, or with Parquet
            files, tars or .csv tables named after the splits. With val_fraction or fold, one folder of class folders or
            one such file.
        cache: Where torch/ and hfds/ sets are kept; by default ~/.cache/t2t-vit, and the Hub's own for hfds/.
        download: Download a torch/ set that is missing.
        img_size: Pixels, one number or [height, width]; by default the model's.
        channels: 1 for grey, 3 for RGB, any other number for the bands of multi-band TIFF and .npy files as they are
            stored; by default 1 for the digits and 3 otherwise.
        background: Colour that shows through transparent pixels, a name or #rrggbb.
        mean: Mean of each channel, in [0, 1]; by default the model's.
        std: Standard deviation of each channel; by default the model's.
        crop_pct: Fraction of the resized image that the validation crop keeps; by default the model's.
        start_scale: Start on smaller images, with sides of this fraction of img_size (progressive resizing); 1 for
            img_size from the start.
        start_share: Fraction of the steps that are done on smaller images.
        memory: Keep the decoded set on the device; by default only sets of small images.
        workers: Number of processes that open images.
        timeout: Seconds to wait for a batch of images before the run stops, as on a network folder that hangs.
        train_images: Use only so many training images, the first of every class, the same fraction of each.
        val_images: Use only so many validation images, chosen in the same way.
        sampler: `all` takes every training image once an epoch; `balanced` repeats those of small classes until every
            class has as many as the largest.
        val_fraction: Fraction of the images to validate on, the same of every class, for a folder of class folders (or
            a file) that is not split.
        split_seed: Of that split; the same seed and images give the same split.
        group_by: Keep images together that agree in a column of the data, or in what a regular expression finds in
            their paths (its first group, or the whole match).
        fold: Validate on this one of `folds` equal parts, from 0 on, instead of on val_fraction.
        folds: How many parts.
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
    start_scale: float = 1.0
    start_share: float = 0.6
    memory: bool | None = None
    workers: int = 2
    timeout: float = 600.0
    train_images: int | None = None
    val_images: int | None = None
    sampler: Literal['all', 'balanced'] = 'all'
    val_fraction: float | None = None
    split_seed: int = 0
    group_by: str | None = None
    fold: int | None = None
    folds: int = 5

    @property
    def split_options(self) -> SplitOptions:
        """Return how to divide images that are not split."""
        return SplitOptions(self.val_fraction, self.split_seed, self.group_by, self.fold, self.folds)


@dataclass
class Objective:
    """The loss of a training step.

    Args:
        kind: `labels` (cross-entropy), `distill` (cross-entropy and a teacher's scores) or `token_labels`
            (cross-entropy and a label for every token).
        teacher: A timm model with published weights, a run folder, hf-hub:USER/NAME, local-dir:FOLDER, or
            FILE.py:FUNCTION, a function of img_size that returns a model.
        teacher_size: Size of the teacher's images in pixels, one number or [height, width]; the student's images are
            resized to it. By default the student's size.
        temperature: Temperature by which both models' logits are divided (distill).
        hard: Learn the teacher's predicted class instead of its scores (distill).
        weight: Weight of the teacher's loss, from 0 to 1 (distill); weight of the tokens' loss, added to the image's
            (token_labels).
        labels: Folder of token labels, CLASS/IMAGE.pt for every training image; by default a teacher makes them.
        mixtoken: Alpha of MixToken, 0 to turn it off (token_labels, instead of mixup and cutmix).
        class_weights: `balanced` weights the loss of each image inversely to the number of images of its class (labels,
            distill).
    """

    kind: Literal['labels', 'distill', 'token_labels'] = 'labels'
    teacher: str | None = None
    teacher_size: int | tuple[int, int] | None = None
    temperature: float = 1.0
    hard: bool = False
    weight: float = 0.5
    labels: str | None = None
    mixtoken: float = 1.0
    class_weights: Literal['balanced'] | None = None

    def problems(self, augment: Augment) -> list[str]:
        """Return a sentence for every invalid value or combination."""
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
            (not dense or not self.class_weights, 'objective.class_weights are not for objective.kind token_labels'),
            (self.mixtoken >= 0, f'objective.mixtoken is at least 0, got {self.mixtoken}'),
        ]
        return [sentence for holds, sentence in rules if not holds]


@dataclass
class Optimizer:
    """Optimizer and schedule: a linear warm-up, a cosine, and a cooldown at the minimum.

    Args:
        name: Any timm optimizer but those that need second derivatives.
        lr: Peak learning rate.
        lr_base_size: Batch size that lr is meant for: the learning rate is lr * batch_size / lr_base_size. By default
            just lr.
        weight_decay: Weight decay of matrices; norms, biases and the class token have none, unless decay_all is set.
        decay_all: Apply weight decay to every parameter.
        momentum: Momentum, for optimizers that have one.
        opt_kwargs: Further arguments of timm's optimizer, such as betas; or, of muon, fallback_lr_scale, a factor on
            the learning rate of all that is no matrix of a hidden layer.
        layer_decay: Factor on the learning rate from each layer to the one before.
        body_lr_scale: Factor on the learning rate of everything but the head, for transfer.
        frozen: Patterns of parameters that are not trained, such as blocks.0.* or norm.*; those after a ! are trained
            nevertheless, such as '*' '!head.*'.
        clip_grad: Largest norm of the gradient.
        warmup_epochs: Epochs from warmup_lr up to lr.
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end of the cosine.
        same_min_lr: End at min_lr in every layer, also where layer_decay or body_lr_scale reduce the learning rate; by
            default they reduce its end too.
        cooldown_epochs: Epochs at min_lr, the last ones.
    """

    name: str = 'adamw'
    lr: float = 1e-3
    lr_base_size: int | None = None
    weight_decay: float = 0.05
    decay_all: bool = False
    momentum: float = 0.9
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    layer_decay: float | None = None
    body_lr_scale: float | None = None
    frozen: list[str] = field(default_factory=list)
    clip_grad: float | None = None
    warmup_epochs: int = 10
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    same_min_lr: bool = False
    cooldown_epochs: int = 10


@dataclass
class Config:
    """One training run, from scratch or from weights.

    Args:
        model: Any model of `t2t-vit models`, or another one of timm.
        model_args: More arguments of T2TViT, such as drop_path_rate.
        weight_init: Initial values of our models: published, or scaled by width and depth, which small models and short
            runs learn better from.
        weights: Weights to start from: a timm tag such as t2t_vit_14.in1k, a file in any published layout, a run
            folder, or hf-hub:USER/NAME; by default from scratch.
            `required` is for recipes that make no sense from scratch.
        lora: Train low-rank adapters of this rank and the head instead of all weights; they are merged into the saved
            model. Needs peft, and weights to start from.
        data: Where images come from.
        augment: How training images are augmented.
        objective: The loss.
        optimizer: Optimizer and schedule.
        epochs: Passes over the training images, warm-up and cooldown included.
        minutes: Time budget: the run has as many epochs, up to `epochs`, as fit into it, and ends inside it.
        val_interval: Epochs between two validations; the last epoch is always validated.
        patience: Stop early after so many epochs without a better validation score.
        batch_size: Images per step of the optimizer, over all processes.
        grad_accum_steps: Micro-batches per step in each process, to save memory.
        ema_decay: Decay of the EMA weights, warmed up; 0 for none.
        precision: no (float32), bf16, fp16, or auto for bf16 if the device is faster in it; the run records which.
        device: auto for the best one available, cpu, cuda, cuda:1 or mps; under torchrun auto or cpu.
        threads: CPU threads; by default torch's choice. A small model on a busy machine is faster with one.
        seed: Seed of everything random.
        output: Run folder; by default a new one in runs/.
        save_minutes: Minutes between two saved states, besides those after every validation; 0 for every step.
        keep: Number of states to keep.
        max_skipped_steps: Steps in a row without a finite gradient before the run stops.
        trackers: tensorboard, wandb, mlflow or another of accelerate's, besides metrics.jsonl and curves.png.
    """

    model: str = 't2t_vit_7'
    model_args: dict[str, Any] = field(default_factory=dict)
    weight_init: Literal['published', 'scaled'] = 'published'
    weights: str | None = None
    lora: int | None = None
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 310
    minutes: float | None = None
    val_interval: int = 1
    patience: int | None = None
    batch_size: int = 512
    grad_accum_steps: int = 1
    ema_decay: float = 0.99996
    precision: Literal['no', 'bf16', 'fp16', 'auto'] = 'no'
    device: str = 'auto'
    threads: int | None = None
    seed: int = 42
    output: str | None = None
    save_minutes: float = 10.0
    keep: int = 2
    max_skipped_steps: int = 20
    trackers: list[str] | str = field(default_factory=list)

    RENAMED: ClassVar[dict[str, str]] = RENAMED

    def __post_init__(self) -> None:
        if isinstance(self.trackers, str):  # one word of a command line
            self.trackers = [self.trackers]

    @property
    def lr(self) -> float:
        """Peak learning rate of this batch size, by the linear rule if `optimizer.lr_base_size` is set."""
        return self.optimizer.lr * self.batch_size / (self.optimizer.lr_base_size or max(self.batch_size, 1))

    @property
    def family(self) -> bool:
        """True if the model is one of this package."""
        return self.model.partition('.')[0] in VARIANTS

    def problems(self) -> list[str]:
        """Return a sentence for every invalid value or combination."""
        a, o, d = self.augment, self.optimizer, self.data
        share = 'is at least 0 and at most 1'
        rules = [
            (
                is_known(self.model),
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
            (self.minutes is None or self.minutes > 0, f'minutes is above 0, got {self.minutes}'),
            (self.val_interval >= 1, f'val_interval is at least 1, got {self.val_interval}'),
            (self.patience is None or self.patience >= 1, f'patience is at least 1, got {self.patience}'),
            (self.grad_accum_steps >= 1, f'grad_accum_steps is at least 1, got {self.grad_accum_steps}'),
            (self.save_minutes >= 0, f'save_minutes is at least 0, got {self.save_minutes}'),
            (self.keep >= 1, f'keep is at least 1, got {self.keep}'),
            (self.max_skipped_steps >= 1, f'max_skipped_steps is at least 1, got {self.max_skipped_steps}'),
            (0 <= self.ema_decay < 1, f'ema_decay is at least 0 and below 1, got {self.ema_decay}'),
            (self.lora is None or self.lora >= 1, f'lora is at least 1, got {self.lora}'),
            (
                not (self.lora and o.frozen),
                f'lora freezes everything but its adapters and the head: leave out optimizer.frozen, got {o.frozen}',
            ),
            (self.threads is None or self.threads >= 1, f'threads is at least 1, got {self.threads}'),
            (d.workers >= 0, f'data.workers is at least 0, got {d.workers}'),
            (d.timeout > 0, f'data.timeout is above 0, got {d.timeout}'),
            (
                min(d.train_images or 1, d.val_images or 1) >= 1,
                f'data.train_images and val_images are at least 1, got {d.train_images}, {d.val_images}',
            ),
            (
                d.img_size is None or min((d.img_size,) if isinstance(d.img_size, int) else d.img_size) >= 1,
                f'data.img_size is at least 1, got {d.img_size}',
            ),
            (d.crop_pct is None or 0 < d.crop_pct <= 1, f'data.crop_pct is above 0 and at most 1, got {d.crop_pct}'),
            (0 < d.start_scale <= 1, f'data.start_scale is above 0 and at most 1, got {d.start_scale}'),
            (0 < d.start_share < 1, f'data.start_share is above 0 and below 1, got {d.start_share}'),
            (
                d.start_scale == 1 or self.objective.kind != 'token_labels',
                'data.start_scale is not for objective.kind token_labels, whose labels belong to a token grid; '
                f'got {d.start_scale}',
            ),
            (d.channels is None or d.channels >= 1, f'data.channels must be at least 1, got {d.channels}'),
            (is_color(d.background), f'data.background must be a colour name or #rrggbb, got {d.background!r}'),
            (d.std is None or min(d.std) > 0, f'data.std is above 0, got {d.std}'),
            (o.name in list_optimizers(), f'unknown optimizer.name {o.name!r}{nearest(o.name, list_optimizers())}'),
            (o.lr > 0, f'optimizer.lr is above 0, got {o.lr}'),
            (
                o.lr_base_size is None or o.lr_base_size >= 1,
                f'optimizer.lr_base_size is at least 1, got {o.lr_base_size}',
            ),
            (o.min_lr >= 0, f'optimizer.min_lr is at least 0, got {o.min_lr}'),
            (
                o.body_lr_scale is None or o.body_lr_scale > 0,
                f'optimizer.body_lr_scale is above 0, got {o.body_lr_scale}',
            ),
            (
                not o.same_min_lr or o.min_lr <= self.lr * (o.body_lr_scale or 1),
                f'optimizer.min_lr {o.min_lr:g} is above the learning rate of the body, '
                f'{self.lr * (o.body_lr_scale or 1):g}',
            ),
            (
                o.body_lr_scale is None or o.layer_decay is None,
                'optimizer.body_lr_scale and layer_decay exclude each other',
            ),
            (o.weight_decay >= 0, f'optimizer.weight_decay is at least 0, got {o.weight_decay}'),
            (o.warmup_epochs >= 0, f'optimizer.warmup_epochs is at least 0, got {o.warmup_epochs}'),
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
            (0 <= a.reprob <= 1, f'augment.reprob {share}, got {a.reprob}'),
            (a.recount >= 1, f'augment.recount is at least 1, got {a.recount}'),
            (0 <= a.mixup_switch_prob <= 1, f'augment.mixup_switch_prob {share}, got {a.mixup_switch_prob}'),
            (a.rotate >= 0, f'augment.rotate is at least 0, got {a.rotate}'),
            (a.color_jitter >= 0, f'augment.color_jitter is at least 0, got {a.color_jitter}'),
            (0 <= a.smoothing < 1, f'augment.smoothing is at least 0 and below 1, got {a.smoothing}'),
            (a.mixup >= 0 and a.cutmix >= 0, f'augment.mixup and cutmix are at least 0, got {a.mixup}, {a.cutmix}'),
            (a.remode in ('pixel', 'rand', 'const'), f'augment.remode is pixel, rand or const, got {a.remode}'),
            (
                a.interpolation in ('bilinear', 'bicubic', 'random'),
                f'augment.interpolation is bilinear, bicubic or random, got {a.interpolation}',
            ),
            (
                self.weights != REQUIRED,
                'this recipe starts from trained weights: give them with --weights FILE, '
                'or --weights null to start from scratch anyway',
            ),
            (self.weights in (None, REQUIRED) or exists(str(self.weights)), NO_WEIGHTS.format(self.weights)),
        ]
        problems = [sentence for holds, sentence in rules if not holds] + d.split_options.problems()
        return problems + self.objective.problems(a) + self.library_problems()

    def library_problems(self) -> list[str]:
        """Return what timm, accelerate and the model do not accept of the values meant for them."""
        known = [name for name in argument_names() if name not in ('img_size', 'in_chans', 'num_classes')]
        unknown = [name for name in self.model_args if name not in known] if self.family else []
        problems = [f'unknown option model_args.{name}{nearest(name, known)}' for name in unknown]
        installed = [kind.value for kind in get_available_trackers()]
        for name in self.trackers:
            if name not in TRACKERS:
                problems.append(
                    f'unknown tracker {name!r}{nearest(name, TRACKERS)}; accelerate has {", ".join(TRACKERS)}'
                )
            elif name not in installed:
                problems.append(f'trackers: {name} is not installed')
        if self.optimizer.name in list_optimizers():
            if get_optimizer_info(self.optimizer.name).second_order:
                problems.append(
                    f'optimizer.name {self.optimizer.name} needs second derivatives, which training does not compute'
                )
            taken = [*signature(get_optimizer_class(self.optimizer.name, bind_defaults=False).__init__).parameters][2:]
            problems += [
                f'optimizer.opt_kwargs: {self.optimizer.name} takes no {name}{nearest(name, taken)}'
                for name in self.optimizer.opt_kwargs
                if name not in taken
            ]
        try:
            create_transform(32, is_training=True, auto_augment=self.augment.aa)
        except Exception as error:  # timm's parsers raise many kinds
            problems.append(f'augment.aa: {error}')
        return problems

    def flat(self) -> dict[str, Any]:
        """Return all settings by dotted name, as plain values."""
        return {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in flatten(_plain(asdict(self)))
        }

    def to_yaml(self) -> str:
        """Return the configuration as a YAML file that repeats the run."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def _plain(value: Any) -> Any:
    """Turn tuples into lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
