"""A training run from its configuration to its run folder."""

import math
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data import SPLIT_FILE, synchronize
from ..plots import plot_curves
from ..settings import UsageError
from .classes import check_classes
from .config import Config
from .log import Log, limit, summary
from .plan import plan
from .processes import build_accelerator, hold_folder, join_processes
from .resume import check_same_run, check_same_start, find_start
from .short_runs import scale_to_data
from .signals import WaitInterrupted, stop_signals
from .trainer import DAMAGED, Trainer, load, open_sources
from .waiting import Stalled, explain_worker_death

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
    asked = config
    config, notes = scale_to_data(config, len(sources.train.labels), accelerator.num_processes)
    with ExitStack() as stack:
        if folder.exists() and not dry_run:
            stack.enter_context(hold_folder(folder, accelerator))
        state, source, found = find_start(folder, resume)
        notes += found
        check_same_start(config, state)
        if state and state['position']['epoch'] >= config.epochs and not dry_run:
            return report_finished(state, config, folder, accelerator)
        if state:
            check_same_run([asked, config], state, source)
        counts = len(sources.train.labels), len(sources.val.labels)
        notes += check_classes(state, sources.train.classes, counts)
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
        if not folder.exists():
            stack.enter_context(hold_folder(folder, accelerator))
        log.begin(config, trainer.position.records)
        if sources.split and accelerator.is_main_process:
            sources.split.save(folder / SPLIT_FILE)
        try:
            return run_epochs(trainer, log)
        finally:
            trainer.close()
            accelerator.end_training()


def report_finished(state: dict[str, Any], config: Config, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Say that a run is finished, and return its last record; nothing is written."""
    done = state['position']['epoch']
    asked = f'{config.epochs} epochs' if done == config.epochs else f'{done} epochs, and {config.epochs} were asked for'
    Log(folder, accelerator).say(
        f'the run in {folder} is finished: {asked}. Nothing was changed; --epochs {done + 5} trains it for 5 more'
    )
    return state['position']['records'][-1]


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
    trainer.watch.say = log.say
    with log.live(trainer.total_steps, trainer.done), stop_signals() as trainer.signals, trainer.watch.active():
        while trainer.position.epoch < config.epochs:
            try:
                trainer.stop_if_asked()
                train_epoch(trainer, log)
                record = trainer.validate()
            except WaitInterrupted:
                trainer.stop()
            except Stalled as error:
                path = trainer.save() if trainer.accelerator.num_processes == 1 else trainer.folder
                raise Stalled(f'{error}; the state is saved in {path}') from None
            except RuntimeError as error:
                raise explain_worker_death(error) or error from None
            trainer.save()
            log.record(trainer.position.records)
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
    batches = trainer.watched(trainer.data.train, trainer.data.sources.train)
    for batch in batches.epoch(position.epoch, position.step):
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
