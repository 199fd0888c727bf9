"""The plan of a run, printed before it starts: data, model, weights, schedule, time, memory, and warnings."""

import math
import shutil
import textwrap
from collections.abc import Iterable

import torch

from ..console import duration
from ..data import DataReport, MemoryBatches
from ..data.sources.names import counted
from .log import FIRST
from .measure import Measured
from .trainer import Trainer, TrainingData

INDENT = 10  # of what is said, after its name
FEW_STEPS = 300  # of a run from scratch
SLOWER = 1.2  # times as long as with one thread, from which on threads are warned of


def plan(trainer: Trainer, measured: Measured | None = None, report: DataReport | None = None) -> list[str]:
    """Return the lines of the plan, each a name and what there is to say about it.

    Args:
        trainer: The run.
        measured: Time and memory, if measured.
        report: Classes, images and what looks wrong, if they were looked at.
    """
    config, data, parts = trainer.config, trainer.data, trainer.parts
    steps, world = len(data.train), trainer.accelerator.num_processes
    count = sum(parameter.numel() for parameter in trainer.parameters)
    frozen = sum(parameter.numel() for parameter in parts.task.parameters()) - count
    size = 'x'.join(map(str, (data.preprocessing.channels, *data.preprocessing.size)))
    micro = config.batch_size // world // config.grad_accum_steps
    tuning = config.optimizer
    rule = f' = {tuning.lr:g} x {config.batch_size} / {tuning.lr_base_size}' if tuning.lr_base_size else ''
    validated = f'; validation every {config.val_interval} epochs' if config.val_interval > 1 else ''
    decayed = sum(p.numel() for group in parts.groups if group['weight_decay'] for p in group['params'])
    lines = [
        f'model     {config.model}, {count:,} trainable parameters{f", {frozen:,} frozen" if frozen else ""}, images '
        f'of {size} on {trainer.accelerator.device}',
        f'weights   {start(trainer)}',
        f'data      {config.data.root}: {len(data.sources.once.labels):,} training and {data.counts[1]:,} validation '
        f'images, {len(data.classes)} classes, {"in memory" if isinstance(data.train, MemoryBatches) else "from disk"}',
        *repeats(data),
        *(classes(report) if report else []),
        f'schedule  {config.epochs} epochs of {steps:,} steps, {trainer.total_steps:,} in all{smaller_images(trainer)}'
        f'{validated}',
        f'batch     {config.batch_size} images = {world} processes x {config.grad_accum_steps} micro-batches x {micro}',
        f'optimizer {tuning.name}, lr {config.lr:g}{rule}, weight decay {tuning.weight_decay:g} on {decayed:,} of them',
        *ema_lines(trainer, steps),
    ]
    if trainer.input_alone:
        lines.append(
            f'input     {input_need(trainer, trainer.input_alone, measured)}; see the speed after {FIRST} steps'
        )
    if measured:
        done, scored = trainer.position.epoch, measured.validation / config.val_interval
        work = trainer.small.work(done, config.epochs, config.epochs)
        left = measured.epoch * work + scored * (config.epochs - done)
        epoch = measured.epoch + scored
        first = f'{duration(trainer.small.cost * measured.epoch + scored)} to ' if trainer.small.scale < 1 else ''
        budget = f', within {config.minutes:g} minutes' if config.minutes else ''
        workers = f', and {measured.workers / 2**20:,.0f} MB for workers' if measured.workers else ''
        lines += [
            f'time      about {duration(left)}, {first}{duration(epoch)} an epoch, measured over {measured.steps} '
            f'steps{budget}',
            f'memory    about {measured.memory / 2**20:,.0f} MB for each process{workers}',
        ]
    lines.append(f'run       {trainer.folder}')
    if measured and measured.one_thread and measured.compute > SLOWER * measured.one_thread:
        ratio = measured.compute / measured.one_thread
        lines.append(
            f'warning   {torch.get_num_threads()} threads take {ratio:.1f} times as long as one: the model is small or '
            'other processes use the cores; --threads 1'
        )
    if report:
        lines += [f'warning   {text}' for text in report.warnings()]
    if not parts.report and trainer.total_steps < FEW_STEPS:
        lines.append(
            f'warning   {trainer.total_steps:,} steps are few for training from scratch: give more epochs, or '
            'fine-tune trained weights (t2t-vit finetune)'
        )
    return lines


def start(trainer: Trainer) -> str:
    """Say what the run starts from."""
    if trainer.done:
        return f'from epoch {trainer.position.epoch + 1}, step {trainer.position.step + 1}, of this run'
    adapters = f'; adapters of rank {trainer.config.lora} and the head are trained' if trainer.config.lora else ''
    return f'{trainer.parts.report or "from scratch"}{adapters}'


def smaller_images(trainer: Trainer) -> str:
    """Say how many steps are done on smaller images, if any are."""
    if not (until := math.ceil(trainer.small.until(trainer.total_steps))):
        return ''
    pixels = 'x'.join(str(trainer.small.side(side)) for side in trainer.data.preprocessing.size)
    return f', the first {until:,} of them on images of {pixels}'


def repeats(data: TrainingData) -> list[str]:
    """Return a line with how many images are repeated in an epoch, if any are."""
    more = len(data.sources.train.labels) - len(data.sources.once.labels)
    return [f'sampler   balanced: {more:,} of the training images of an epoch are repetitions'] if more else []


def input_need(trainer: Trainer, alone: float, measured: Measured | None) -> str:
    """Say how fast images are read by themselves, and how many cores would have to read them for this model.

    Args:
        trainer: The run.
        alone: Images per second of all processes that read.
        measured: The time of a step.
    """
    said, workers = f'{alone:,.0f} images/s by itself', trainer.config.data.workers
    if isinstance(trainer.data.train, MemoryBatches) or not measured or measured.compute <= 0:
        return said
    world = trainer.accelerator.num_processes
    wanted = trainer.config.batch_size / measured.compute
    cores = math.ceil(wanted / (alone / (max(workers, 1) * world)))
    needs = (
        f'{said} with {workers} workers{f" in each of {world} processes" if world > 1 else ""}; the model takes '
        f'{wanted:,.0f}, which needs about {cores} {"core" if cores == 1 else "cores"} for reading'
    )
    if cores > max(workers, 1) * world:
        needs += f': data.workers {math.ceil(cores / world)}'
    return needs


def classes(report: DataReport) -> list[str]:
    """Return a line with the images of each class, the files that were left out, and what is not known."""
    shown = 10
    each = [f'{name} {train:,}+{val:,}' for name, train, val in zip(report.classes, report.train, report.val)]
    more = f', and {len(each) - shown} more' if len(each) > shown else ''
    lines = [f'classes   training + validation images: {", ".join(each[:shown])}{more}']
    if report.skipped:
        lines.append(f'left out  {counted(report.skipped)}')
    return [*lines, *(f'unknown   {text}' for text in report.unknown)]


def ema_lines(trainer: Trainer, steps: int) -> list[str]:
    """Say how many steps the EMA weights average at the end, with a warning if `ema_decay` is not reached."""
    ema, decay = trainer.parts.ema, trainer.config.ema_decay
    if not ema:
        return []
    whole, last = (1 / (1 - value) for value in (decay, ema.get_decay(trainer.total_steps)))
    lines = [f'ema       averages the last {last:,.0f} steps at the end, {last / steps:.1f} epochs']
    if whole > trainer.total_steps:
        better = 1 - float(f'{10 / trainer.total_steps:.1g}')  # keeps the digits that count
        advice = f'; {better:.9g} averages a tenth of the run' if better > 0 else ''
        lines.append(
            f'warning   ema_decay {decay:g} averages {whole:,.0f} steps, more than the run has, and is not '
            f'reached{advice}'
        )
    return lines


def wrap(lines: Iterable[str]) -> str:
    """Wrap the lines of a plan at the width of the terminal, at most 100 columns, below the text after their names."""
    width = min(shutil.get_terminal_size().columns, 100)
    return '\n'.join(
        textwrap.fill(line, width, subsequent_indent=' ' * INDENT, break_long_words=False, break_on_hyphens=False)
        for line in lines
    )
