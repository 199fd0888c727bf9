"""Choose settings that a user left open from the data and the machine, each with its reason."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from timm.models import create_model, get_pretrained_cfg, is_model
from torch import nn

from ..data import Augment, DataError, Source, SplitOptions, image_size, open_source
from ..data.augment import in_batches
from ..models.precision import choose_precision
from ..models.variants import VARIANTS
from ..settings import Setting, UsageError, convert, option_types, read_settings, recipes
from ..trained import pick_device
from .build import MUON
from .config import Config, Optimizer
from .resume import saved_settings
from .start_weights import StartModel, describe_weights
from .state import saved_states

MODELS: dict[str, dict[int, str]] = {  # by device and pixels
    'cpu': {16: 't2t_vit_4_16', 32: 't2t_vit_r_4_32', 64: 't2t_vit_r_4_64'},
    'cuda': {16: 't2t_vit_4_16', 32: 't2t_vit_7_32', 64: 't2t_vit_7_64', 128: 't2t_vit_7', 224: 't2t_vit_7'},
}
FINETUNING = ('finetune', 'finetune-head')  # recipes
STEPS = {'cpu': 5_000, 'cuda': 20_000}  # of a run, roughly
START_SCALE, START_PIXELS, START_PASSES = 0.75, 64, 25  # smaller images first; where they pay (docs/few-images.md)
START_MORE = 1.3  # steps in the same time
EPOCHS: dict[str, tuple[int, int]] = {'cpu': (10, 100), 'cuda': (20, 300)}  # fewest and most
SPEED = {'cpu': 200, 'cuda': 3_000}  # images/s, roughly, to guess how many epochs a time budget has
FEW_PASSES, MANY_PASSES = 15, 60  # of every image: shifted and mirrored only; cropped, too; all of the recipe
MEMORY = 1 << 30  # bytes of decoded images that a run on a CPU keeps
LARGE = 512  # pixels of the shorter side, above which decoding all of them would keep the run from starting
BATCH = {'cpu': 32, 'cuda': 128}
STEPS_AN_EPOCH = 8  # at least
VAL_FRACTION = 0.2
VAL_COST = 0.7  # time of a validation image over that of a training image: a third, for the weights and their average
VAL_SHARE = 0.3  # of the time of training that validations may take
VALIDATIONS = 10  # of a run, at least
LORA_LR = 5e-3
CNN_LR, CNN_WEIGHT_DECAY = 2e-2, 0.15  # of Muon, for a ResNet (docs/few-images.md)
LOOKED_AT = 32  # images whose size is looked at
LOPSIDED = 10  # images of the largest class for each of the smallest, beyond which classes are weighted


class Facts(NamedTuple):
    """What the choices depend on."""

    images: int
    val_images: int
    classes: int
    imbalance: float
    pixels: int  # median of the shorter sides
    divided: bool  # training and validation images are apart
    device: str  # cpu or cuda


def choose_settings(
    given: Sequence[Setting], recipe: str | None = None, resume: bool = False
) -> tuple[list[Setting], list[str]]:
    """Return settings for a run of which only `given` is known, and a line for each choice.

    Settings in `given` are not chosen. The digits have a recipe of their own.

    Args:
        given: What the user said.
        recipe: The recipe that the choices start from, one of those that fine-tune; by default finetune if weights are
            given, and small-images if not.
        resume: If the output folder holds a run, return its settings and choose nothing.

    Raises:
        DataError: if the data cannot be opened.
        UsageError: if weights to fine-tune are missing or do not name their model.
    """
    types = option_types(Config)
    values = {setting.key: convert(types.get(setting.key, Any), setting.value) for setting in given}
    output = Path(str(values.get('output') or 'runs'))
    if resume and 'output' in values and saved_states(output / 'checkpoints'):
        return saved_settings(output), []
    reasons: dict[str, list[str]] = {} if recipe else {'no other is given': ['recipe small-images']}
    if not recipe and values.get('weights'):
        recipe, reasons = 'finetune', {'training starts from weights': ['recipe finetune']}
    root = values.get('data.root', 'digits')
    if root == 'digits' and not recipe:
        return read_settings(recipes()['digits']), ['recipe digits: its data is chosen']
    start = describe_start(values) if recipe else None
    facts = look_at(root, values)
    chosen = []
    for key, value, reason in choices(facts, values, start):
        if key not in values:
            of_weights = key.startswith('model_args.')  # read from the folder of the weights, so not trusted
            source = f'{key} in {values.get("weights")}' if of_weights else f'{key} chosen'
            chosen.append(Setting(source, key, value, from_file=of_weights))
            reasons.setdefault(reason, []).append(f'{key} {value}')
    lines = [f'{", ".join(what)}: {reason}' for reason, what in reasons.items()]
    return [*read_settings(recipes()[recipe or 'small-images']), *chosen], lines


def describe_start(values: dict[str, Any]) -> StartModel:
    """Return the model of the weights to fine-tune.

    Raises:
        UsageError: if there are no weights, or they do not say what model they are for.
    """
    weights = values.get('weights')
    if not weights:
        raise UsageError(
            'fine-tuning starts from trained weights: give them with --weights, a timm tag such as t2t_vit_14.in1k, '
            't2t_vit_r_4_64.imagenette of this package, a file, a run folder, or hf-hub:USER/NAME'
        )
    start = describe_weights(weights)
    if start is None and not values.get('model'):
        raise UsageError(f'{weights} does not say what model it is for: name it with --model NAME')
    return start or StartModel(values['model'], {}, get_pretrained_cfg(values['model']).to_dict())


def look_at(root: str, values: dict[str, Any]) -> Facts:
    """Open the data and look at the sizes of some images."""
    source, val_images = open_for_choice(root, values)
    divided = val_images is not None
    counts = torch.bincount(torch.tensor(source.labels), minlength=len(source.classes))
    sides = []
    for i in range(0, len(source.labels), max(1, len(source.labels) // LOOKED_AT)):
        try:
            sides.append(min(image_size(source.open(i))))
        except Exception:  # damaged: counted when it is trained on
            continue
    device = 'cpu' if pick_device(values.get('device', 'auto')).type == 'cpu' else 'cuda'
    count = images = len(source.labels)
    if val_images is None:
        share = values.get('data.val_fraction') or VAL_FRACTION
        if values.get('data.fold') is not None:
            share = 1 / values.get('data.folds', SplitOptions.folds)
        val_images = int(share * count)
        images -= val_images
    images = min(images, values.get('data.train_images') or images)
    val_images = min(val_images, values.get('data.val_images') or val_images)
    if values.get('data.sampler') == 'balanced':
        images = round(images * counts.max().item() * len(counts) / count)
    imbalance = counts.max().item() / max(counts.min().item(), 1)
    return Facts(images, val_images, len(source.classes), imbalance, int(median(sides or [224])), divided, device)


def open_for_choice(root: str, values: dict[str, Any]) -> tuple[Source, int | None]:
    """Open the training images and count the validation images; or, if they are not divided, open all: None."""
    options = values.get('data.cache'), values.get('data.download', False), values.get('data.channels')
    if any(values.get(f'data.{key}') is not None for key in ('val_fraction', 'fold')):
        return open_source(root, 'all', *options), None
    try:
        source = open_source(root, 'train', *options)
        return source, len(open_source(root, 'val', *options).labels)
    except DataError as error:
        try:
            return open_source(root, 'all', *options), None
        except DataError:
            raise error from None


def choices(facts: Facts, values: dict[str, Any], start: StartModel | None = None) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, reason) for all settings that depend on data, machine, weights and given settings."""
    on = 'a CPU' if facts.device == 'cpu' else 'a GPU'
    if not facts.divided and values.get('data.fold') is None:
        yield 'data.val_fraction', VAL_FRACTION, 'the images are not divided; split.json keeps the division'
    of_model = [*(model_of_weights(start) if start else small_model(facts, values, on))]
    yield from of_model
    largest = 2 ** int(math.log2(max(facts.images // STEPS_AN_EPOCH, 8)))
    batch = min(BATCH[facts.device] // (2 if start else 1), largest)
    few = batch == largest and batch > 8
    yield 'batch_size', batch, f'at least {STEPS_AN_EPOCH} steps an epoch' if few else f'for {on}'
    batch = values.get('batch_size', batch)
    steps = max(facts.images // max(batch, 1), 1)
    fewest, most = EPOCHS[facts.device]
    epochs = min(max(round(STEPS[facts.device] / steps), fewest), most)
    epochs = math.ceil(epochs / 4) if start else epochs  # trained weights need fewer
    minutes = values.get('minutes')
    in_time = None if minutes is None else minutes * 60 * SPEED[facts.device] / max(facts.images, 1)
    passes = values.get('epochs', epochs) if in_time is None else in_time
    if not start and starts_small(facts, {**{key: value for key, value, _ in of_model}, **values}, passes):
        yield 'data.start_scale', START_SCALE, 'smaller images first, for more epochs in the time'
        epochs, passes = min(round(START_MORE * epochs), most), START_MORE * passes
    if in_time is not None:
        epochs = 1000
        yield 'epochs', epochs, 'as many as fit into the minutes, at most'
    else:
        yield 'epochs', epochs, f'{epochs * steps:,} steps on {on}'
    epochs = values.get('epochs', epochs)
    passes = epochs if in_time is None else passes
    if not start:
        yield from augmentation(passes)
    interval = math.ceil(VAL_COST * facts.val_images / (VAL_SHARE * max(facts.images, 1)))
    interval = min(interval, int(passes / VALIDATIONS))
    if interval > 1:
        yield 'val_interval', interval, f'{facts.val_images:,} validation images to {facts.images:,} training images'
    optimizer = values.get('optimizer.name')
    if not start and optimizer not in (None, *MUON):  # the recipe's values are Muon's
        yield 'optimizer.lr', Optimizer.lr, f'the default, for {optimizer}'
        yield 'optimizer.weight_decay', Optimizer.weight_decay, f'the default, for {optimizer}'
    elif not start and is_convolutional(values.get('model', '')):
        yield 'optimizer.lr', CNN_LR, 'for a convolutional network'
        yield 'optimizer.weight_decay', CNN_WEIGHT_DECAY, 'for a convolutional network'
    if batch > 64:
        yield 'optimizer.lr_base_size', 64, 'the learning rate follows the batch size'
    if values.get('lora') is not None:
        yield 'optimizer.lr', LORA_LR, 'for adapters'
        yield 'optimizer.layer_decay', None, 'for adapters'
    if not start:
        decay = round(min(max(1 - 10 / (steps * min(epochs, passes)), 0.5), 0.999), 4)
        yield 'ema_decay', decay, 'averages a tenth of the run, at most 1,000 steps'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = min(8, cores) if facts.device == 'cuda' else min(2, max(cores - 1, 1))
    yield 'data.workers', workers, f'{cores} cores'
    precision, reason = choose_precision(torch.device(facts.device))
    if precision != 'no':
        yield 'precision', precision, reason
    weighted = values.get('data.sampler') != 'balanced' and values.get('objective.kind') != 'token_labels'
    if facts.imbalance > LOPSIDED and weighted:
        reason = f'the largest class has {facts.imbalance:.0f} times the images of the smallest'
        yield 'objective.class_weights', 'balanced', reason


def augmentation(passes: float) -> Iterator[tuple[str, Any, str]]:
    """Yield a lighter augmentation than the recipe's for runs that see each image so many times, if they are few."""
    if passes > MANY_PASSES:
        return
    few = passes <= FEW_PASSES
    reason = f'each image is seen about {max(round(passes), 1)} times'
    light = dict(aa=None, reprob=0.0, mixup=0.0, cutmix=0.0, ratio=[1.0, 1.0] if few else [0.75, 1.3333])
    light.update(scale=[1.0, 1.0], pad=4) if few else light.update(scale=[0.5, 1.0])
    for key, value in light.items():
        yield f'augment.{key}', value, reason


def starts_small(facts: Facts, values: dict[str, Any], passes: float) -> bool:
    """Return true where smaller images first pay: in short runs of our models on a CPU, at 64 pixels or more."""
    model, size = values['model'], shorter(values.get('data.img_size'))
    if 'data.start_scale' in values or values.get('objective.kind') == 'token_labels' or passes > START_PASSES:
        return False
    if facts.device != 'cpu' or model.partition('.')[0] not in VARIANTS:
        return False
    return (size or get_pretrained_cfg(model).input_size[-1]) >= START_PIXELS


def is_convolutional(name: str) -> bool:
    """Return true if convolutions hold most weights of a timm model."""
    if not is_model(name):
        return False
    with torch.device('meta'):
        model = create_model(name)
    kernels = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return 2 * kernels > sum(p.numel() for p in model.parameters())


def small_model(facts: Facts, values: dict[str, Any], on: str) -> Iterator[tuple[str, Any, str]]:
    """Yield the choice of a model to train from scratch, and its size."""
    if 'model' in values:
        return
    models = MODELS[facts.device]
    pixels = max((size for size in models if size <= facts.pixels), default=min(models))
    asked = shorter(values.get('data.img_size'))
    if asked:
        models = {**MODELS['cuda'], **models}
        pixels = max((size for size in models if size <= asked), default=min(models))
    yield 'model', models[pixels], f'a small model for {pixels} pixels, for {facts.images:,} images on {on}'
    yield 'data.img_size', pixels, f'half of the images have {facts.pixels} pixels or more, on {on}'
    augment = Augment(aa=values.get('augment.aa', Augment.aa), recount=values.get('augment.recount', 1))
    rgb = values.get('data.channels') is None
    fits = rgb and 3 * pixels**2 * facts.images < MEMORY and facts.pixels <= LARGE
    if facts.device == 'cpu' and fits and not asked and in_batches(augment):
        yield 'data.memory', True, 'decoded once, so that the cores can train'


def model_of_weights(start: StartModel) -> Iterator[tuple[str, Any, str]]:
    """Yield the settings that weights to fine-tune ask for."""
    yield 'model', start.model, 'of the weights'
    for key, value in start.model_args.items():
        yield f'model_args.{key}', value, 'of the weights'
    channels, height, width = start.cfg.get('input_size', (3, 224, 224))
    yield 'data.img_size', height if height == width else [height, width], 'of the weights'
    if channels != 3:
        yield 'data.channels', channels, 'of the weights'
    for key in ('mean', 'std'):
        if key in start.cfg:
            yield f'data.{key}', list(start.cfg[key]), 'of the weights'


def shorter(size: int | tuple[int, int] | None) -> int | None:
    """Return the shorter side of an image size; None if none is given."""
    return size if size is None or isinstance(size, int) else min(size)
