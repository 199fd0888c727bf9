"""Training: load, step, save, validate."""

import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

from .. import __version__
from ..data import (
    Augment,
    DataError,
    MemoryBatches,
    Preprocessing,
    check_same_classes,
    derive,
    open_batches,
    open_source,
    seed_all,
)
from ..evaluate import score
from ..models.checkpoints import load_weights
from ..plots import plot_curves
from ..settings import UsageError, flatten
from ..trained import WEIGHTS, save_folder
from .config import Config
from .log import Log
from .state import Position, load_state, save_state

# what another value of does not make another run; `epochs` prolongs or shortens it
MAY_CHANGE = ('output', 'weights', 'device', 'epochs', 'threads', 'data.root', 'data.workers')


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved."""

    def __init__(self, path: Path, folder: Path) -> None:
        super().__init__(f'stopped, and saved in {path}; go on with --resume {folder}')


def build_model(config: Config, preprocessing: Preprocessing, classes: List[str]) -> nn.Module:
    """The model of the run, with its preprocessing and class names in its pretrained_cfg."""
    args: Dict[str, Any] = {**config.model_args, 'in_chans': preprocessing.channels}
    if config.family or timm.models.get_pretrained_cfg(config.model).fixed_input_size:
        args['img_size'] = preprocessing.size
    model = timm.create_model(config.model, num_classes=len(classes), **args)
    if config.weights:
        path = Path(config.weights)
        load_weights(model, str(path / WEIGHTS if path.is_dir() else path))
    model.pretrained_cfg.update(
        preprocessing.as_cfg(), num_classes=len(classes), label_names=classes, custom_load=False)
    return model


def preprocess(config: Config, channels: int) -> Preprocessing:
    """The model's own preprocessing, with what the configuration says otherwise."""
    own = Preprocessing.of(timm.models.get_pretrained_cfg(config.model).to_dict())
    data, size = config.data, config.data.img_size
    channels = data.channels or channels
    mean, std = data.mean or own.mean, data.std or own.std
    if channels == 1 and len(mean) == 3:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if len(mean) != channels or len(std) != channels:
        raise UsageError(f'data.mean and data.std have a value for each of {channels} channels, got {mean}, {std}')
    return replace(
        own, size=own.size if size is None else (size, size) if isinstance(size, int) else size,
        channels=channels, mean=tuple(mean), std=tuple(std), crop_pct=data.crop_pct or own.crop_pct)


def mixing(augment: Augment, num_classes: int) -> Tuple[Callable[..., Any], nn.Module]:
    """What is done to a batch on the device, (images, labels) -> (images, targets), and the loss that goes with it."""
    if augment.mixup or augment.cutmix:
        return Mixup(
            augment.mixup, augment.cutmix, switch_prob=augment.switch, label_smoothing=augment.smoothing,
            num_classes=num_classes), SoftTargetCrossEntropy()
    return lambda images, labels: (images, labels), nn.CrossEntropyLoss(label_smoothing=augment.smoothing)


def plan(run: 'Run') -> str:
    """What is about to be done, before it is."""
    config, count = run.config, sum(p.numel() for p in run.net.parameters())
    size = 'x'.join(map(str, (run.preprocessing.channels, *run.preprocessing.size)))
    start = f'epoch {run.position.epoch + 1}, step {run.position.step + 1}' if run.done else \
        config.weights or 'scratch'
    return '\n'.join((
        f'model     {config.model}, {count:,} learnable parameters, images of {size} '
        f'on {run.accelerator.device}',
        f'data      {config.data.root}: {run.counts[0]:,} training and {run.counts[1]:,} validation images, '
        f'{len(run.classes)} classes, {"in memory" if isinstance(run.train_set, MemoryBatches) else "from disk"}',
        f'schedule  {config.total_epochs} epochs of {len(run.train_set)} steps of {config.batch_size} images, '
        f'{config.optimizer.name}, lr {config.optimizer.lr:g}, from {start}',
        f'run       {run.folder}'))


def summary(record: Dict[str, Any], epochs: int) -> str:
    """A record as a line."""
    average = f', average of weights {100 * record["val_top1_ema"]:.2f} %' if 'val_top1_ema' in record else ''
    return (f'epoch {record["epoch"] + 1}/{epochs}  training loss {record["train_loss"]:.3f}  '
            f'validation loss {record["val_loss"]:.3f}  top-1 {100 * record["val_top1"]:.2f} %{average}  '
            f'{record["images_per_second"]:.0f} images/s')


@contextmanager
def stop_signals() -> Iterator[List[int]]:
    """While it lasts, Ctrl-C and SIGTERM put their number into the list instead of ending the process.

    Signals are the main thread's: in another one it does nothing.
    """
    caught: List[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    handlers = {number: signal.signal(number, lambda number, _: caught.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_same_run(config: Config, state: Dict[str, Any], folder: Path) -> None:
    """UsageError where a state is of a run that was configured otherwise; all differences in one message."""
    saved, asked = ({key: value for key, value in flatten(yaml.safe_load(text)) if value != {}}
                    for text in (state['config'], config.to_yaml()))
    changed = [key for key in {**saved, **asked} if key not in MAY_CHANGE and saved.get(key) != asked.get(key)]
    if changed:
        raise UsageError('\n'.join(
            f'{key} is {saved.get(key)} in {folder}, and cannot become {asked.get(key)} there' for key in changed))


class Run:
    """A run: its parts, and what is done with them. Loading is its constructor; then step, save, validate."""

    def __init__(self, config: Config, folder: Path, state: Optional[Dict[str, Any]]) -> None:
        self.config, self.folder = config, folder
        if config.threads:
            torch.set_num_threads(config.threads)
        AcceleratorState._reset_state(reset_partial_state=True)  # shared by all of a process: another run's precision
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=config.device == 'cpu')
        train, val = (open_source(config.data.root, split) for split in ('train', 'val'))
        check_same_classes(train, val)
        self.classes = train.classes
        self.preprocessing = preprocessing = preprocess(config, channels=1 if config.data.root == 'digits' else 3)
        self.train_set, self.val_set = (
            open_batches(source, preprocessing, config.batch_size, augment, config.data.memory, config.data.workers,
                         config.seed, self.accelerator.device)
            for source, augment in ((train, config.augment), (val, None)))
        if len(self.train_set) == 0:
            raise DataError(f'{len(train.labels)} training images make no batch of {config.batch_size}')
        self.counts = len(train.labels), len(val.labels)
        self.total_steps = len(self.train_set) * config.total_epochs

        seed_all(derive(config.seed))
        self.net = build_model(config, preprocessing, self.classes).to(self.accelerator.device)
        tuning = config.optimizer
        optimizer = create_optimizer_v2(
            self.net, tuning.name, tuning.lr, tuning.weight_decay, tuning.momentum, layer_decay=tuning.layer_decay)
        self.schedule, _ = create_scheduler_v2(
            optimizer, 'cosine', config.epochs, cooldown_epochs=tuning.cooldown_epochs,
            warmup_epochs=tuning.warmup_epochs, warmup_lr=tuning.warmup_lr, min_lr=tuning.min_lr,
            step_on_epochs=False, updates_per_epoch=len(self.train_set))
        self.ema = ModelEmaV3(self.net, config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.model, self.optimizer = self.accelerator.prepare(self.net, optimizer)
        self.mix, self.loss = mixing(config.augment, len(self.classes))

        self.parts: Dict[str, Any] = {'model': self.net, 'optimizer': self.optimizer}
        if self.ema:
            self.parts['ema'] = self.ema.module
        if self.accelerator.scaler:
            self.parts['scaler'] = self.accelerator.scaler
        self.position = Position()
        if state is not None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.position = Position(**state['position'])

    @property
    def done(self) -> int:
        """Steps made."""
        return self.position.epoch * len(self.train_set) + self.position.step

    @property
    def lr(self) -> float:
        """The learning rate of the head's group, the peak one under layer decay."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One step of the optimizer; gives the loss."""
        seed_all(derive(self.config.seed, self.done, 3))  # each step's own, so that no random state needs saving
        self.schedule.step_update(self.done)
        images, targets = self.mix(images, labels)
        with self.accelerator.autocast():
            loss = self.loss(self.model(images), targets)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f'the loss is {value} at epoch {self.position.epoch + 1}, step {self.position.step + 1}: try a lower '
                'optimizer.lr or optimizer.clip_grad 1' + (
                    f'; the state before this epoch is in {self.folder}' if self.position.epoch else ''))
        self.accelerator.backward(loss)
        if self.config.optimizer.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.net, self.done + 1)
        self.position.step += 1
        self.position.loss_sum += value
        return value

    def save(self) -> Path:
        """Write all that is needed to go on."""
        return save_state(self.folder / 'checkpoints', {
            **{name: part.state_dict() for name, part in self.parts.items()},
            'position': asdict(self.position), 'config': self.config.to_yaml(), 'version': __version__})

    def validate(self) -> Dict[str, Any]:
        """Close the epoch: score the weights and their average, keep the better where it is the best so far."""
        position, candidates = self.position, {'': self.net, **({'_ema': self.ema.module} if self.ema else {})}
        record: Dict[str, Any] = dict(
            epoch=position.epoch, lr=self.lr, train_loss=position.loss_sum / position.step,
            images_per_second=round(position.step * self.config.batch_size / position.seconds, 1))
        scores = {suffix: score(model, self.val_set, len(self.classes)) for suffix, model in candidates.items()}
        for suffix, result in scores.items():
            record.update({f'val_loss{suffix}': result.loss, f'val_top1{suffix}': result.top1,
                           f'val_top5{suffix}': result.top5})
        record['damaged'] = len({*self.train_set.damaged, *self.val_set.damaged})
        best = max(scores, key=lambda suffix: scores[suffix].top1)
        if scores[best].top1 >= position.best:
            save_folder(candidates[best], self.folder, self.config.model_args)
        self.position = Position(epoch=position.epoch + 1, best=max(position.best, scores[best].top1))
        return record


def train(config: Config, resume: Optional[str] = None) -> Dict[str, Any]:
    """Train a model and leave a run folder; gives the last epoch's record.

    A run starts from the first of these that is given: its own last state (`resume`), `config.weights`, scratch.

    Args:
        config: What to do.
        resume: The folder of a run with this configuration, to go on with it.

    Raises:
        UsageError: for a configuration that cannot be run; all problems in one message.
        DataError: for data that cannot be used.
        FloatingPointError: where the loss is no longer finite.
        Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    if problems := config.problems():
        raise UsageError('\n'.join(problems))
    folder = Path(resume or config.output or f'runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}')
    state = load_state(folder / 'checkpoints')
    if state is not None and not resume:
        raise UsageError(f'{folder} holds a run: go on with it by --resume {folder}, or choose another output')
    if (folder / WEIGHTS).exists() and not resume:
        raise UsageError(f'{folder} holds a trained model: choose another output')
    if resume:
        if state is None:
            raise UsageError(f'{folder} holds no state to resume from')
        check_same_run(config, state, folder)
    run = Run(config, folder, state)
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder)
    log.keep(run.position.epoch)
    if state is None:
        (folder / 'config.yaml').write_text(config.to_yaml())
    log.say(plan(run))

    begun, done_before = time.monotonic(), run.done
    with log.live(run.total_steps, run.done), stop_signals() as stopped:
        while run.position.epoch < config.total_epochs:
            run.model.train()
            clock = time.monotonic()
            for images, labels in run.train_set.epoch(run.position.epoch, run.position.step):
                loss = run.step(images, labels)
                run.position.seconds, clock = run.position.seconds + time.monotonic() - clock, time.monotonic()
                speed = run.position.step * config.batch_size / run.position.seconds
                left = (time.monotonic() - begun) / (run.done - done_before) * (run.total_steps - run.done)
                log.step(run.done, f'epoch {run.position.epoch + 1}/{config.total_epochs}  loss {loss:.3f}  '
                         f'lr {run.lr:.1e}  {speed:.0f} images/s', left)
                if stopped:
                    raise Interrupted(run.save(), folder)
            record = run.validate()
            log.record(record)
            log.say(summary(record, config.total_epochs))
            run.save()
    plot_curves(log.records(), folder / 'curves.png')
    if damaged := sorted({*run.train_set.damaged, *run.val_set.damaged}):
        log.say(f'{len(damaged)} damaged images were left out: {", ".join(damaged[:5])}')
    log.say(f'best top-1 {100 * run.position.best:.2f} %; weights, config, metrics and curves are in {folder}')
    return log.records()[-1]
