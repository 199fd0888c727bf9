"""A training run from its configuration to its run folder."""

import math
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data import SPLIT_FILE, synchronize
from ..plots import plot_curves
from ..settings import UsageError
from .config import Config
from .log import Log, limit, summary
from .plan import plan
from .processes import build_accelerator, join_processes
from .resume import check_same_start, find_start
from .short_runs import scale_to_data
from .signals import stop_signals
from .trainer import DAMAGED, Trainer, load, open_sources

DRAW_SECONDS = 20  # between two drawings of the curves, which take about one: short epochs do not wait for it


def train(config: Config, resume: str | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Train a model and write a run folder.

    Args:
        config: What to do.
        resume: A run folder or one of its state files, to continue; `auto` continues the run in the output folder if
            there is one, and starts a new one if not.
        dry_run: Print the plan and stop; nothing is written.

    Returns:
        The record of the last epoch; empty after a dry run.

    Raises:
        UsageError: for a configuration that cannot be run; all problems in one message.
        DataError: for data that cannot be used.
        Diverged: if loss or gradient stay not finite.
        OSError: if the state cannot be written, as on a full disk.
        Interrupted: after Ctrl-C, SIGTERM or SIGUSR1, when the state is saved.
    """
    if problems := config.problems():
        raise UsageError('\n'.join(problems))
    if config.threads:
        torch.set_num_threads(config.threads)
    join_processes(config)
    folder = choose_folder(config, resume)
    config = replace(config, output=str(folder))
    accelerator = build_accelerator(config, folder)
    sources = open_sources(config, accelerator)
    config, notes = scale_to_data(config, len(sources.train.labels), accelerator.num_processes)
    state, skipped = find_start(config, folder, resume)
    notes += skipped
    check_same_start(config, state)
    if state and state['processes'] != accelerator.num_processes:
        notes.append(
            f'note      {accelerator.num_processes} processes continue a state of {state["processes"]}: '
            'each draws its own mixup, dropout and drop path'
        )
    trainer = load(config, folder, state, accelerator, sources)
    trainer.measure_input()
    log = Log(folder, accelerator)
    log.say('\n'.join(plan(trainer) + notes))
    if dry_run:
        return {}
    log.begin(config, trainer.position.records)
    if sources.split and accelerator.is_main_process:
        sources.split.save(folder / SPLIT_FILE)
    try:
        return run_epochs(trainer, log)
    finally:
        trainer.close()
        accelerator.end_training()


def choose_folder(config: Config, resume: str | None) -> Path:
    """Return the run folder, the same in all processes.

    Raises:
        UsageError: if `resume` and `output` contradict each other.
    """
    if resume == 'auto' and not config.output:
        raise UsageError('--resume auto needs --output, the folder to look into')
    resumed = resume if resume and Path(resume).is_dir() else None
    if resumed and config.output and Path(config.output).resolve() != Path(resumed).resolve():
        raise UsageError(
            f'--resume {resume} continues the run in that folder, but output is {config.output}: leave out output, '
            'or resume from one of the files in its checkpoints'
        )
    new = f'runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}'
    return Path(broadcast_object_list([resumed or config.output or new])[0])


def run_epochs(trainer: Trainer, log: Log) -> dict[str, Any]:
    """Train from where the run is to its end; return the last record."""
    config, drawn = trainer.config, -math.inf
    with log.live(trainer.total_steps, trainer.done), stop_signals() as trainer.signals:
        while trainer.position.epoch < config.epochs:
            trainer.stop_if_asked()
            train_epoch(trainer, log)
            record = trainer.validate()
            trainer.save()
            log.record(record)
            log.say(summary(record, config.epochs))
            last = trainer.position.epoch == config.epochs
            if trainer.accelerator.is_main_process and (last or time.monotonic() - drawn >= DRAW_SECONDS):
                plot_curves(trainer.position.records, trainer.folder / 'curves.png')
                drawn = time.monotonic()
    if damaged := trainer.damaged():
        log.say(
            f'{len(damaged)} damaged images were left out: {", ".join(damaged[:5])}'
            f'{", …" * (len(damaged) > 5)}; all of them are named in {trainer.folder / DAMAGED}'
        )
    log.say(
        f'best top-1 {100 * trainer.position.best:.2f} %; weights, config, metrics and curves are in {trainer.folder}'
    )
    return trainer.position.records[-1]


def train_epoch(trainer: Trainer, log: Log) -> None:
    """Do the remaining steps of an epoch; save when it is time, stop when a signal asks for it."""
    trainer.parts.model.train()
    position, clock = trainer.position, time.monotonic()
    for batch in trainer.data.train.epoch(position.epoch, position.step):
        synchronize(trainer.accelerator.device)  # transfers count as waiting
        position.waited += time.monotonic() - clock
        outcome = trainer.step(batch)
        position.seconds += time.monotonic() - clock
        rates = trainer.rates()
        log.step(
            trainer.done,
            f'epoch {position.epoch + 1}/{trainer.config.epochs}  loss {outcome.loss:.3f}  '
            f'lr {trainer.lr:.1e}  {rates["images_per_second"]:.0f} images/s',
            limit(rates),
        )
        if outcome.stop:
            trainer.stop()
        if outcome.save:
            trainer.save()
        clock = time.monotonic()
