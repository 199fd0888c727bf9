"""A training run from its configuration to its run folder."""

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..allocator import keep_freed_memory
from ..console import duration
from ..data import SPLIT_FILE, printable, report_data, synchronize
from ..data.waiting import Stalled, explain_worker_death
from ..models.precision import choose_precision, describe_precision
from ..plots import plot_curves
from ..settings import UsageError
from ..trained import pick_device
from .classes import check_classes
from .config import Config
from .log import Log, limit, table_head, table_row, write_config
from .measure import ENDING, RESERVE, Measured, affordable_epochs, measure
from .plan import plan, wrap
from .processes import build_accelerator, hold_folder, join_processes
from .resume import check_same_run, check_same_start, find_split, find_start
from .short_runs import scale_to_data
from .signals import WaitInterrupted, answer_at_once, stop_signals
from .trainer import DAMAGED, Trainer, load, open_sources

BEFORE_THE_FIRST_STEP = 'stopped before the first step, nothing is lost: the same command starts again'
RECENT = 30  # seconds of training, at least, by which its speed is judged: a disturbed epoch may be a short one
DRAW_SECONDS = 20  # between two drawings of the curves, which take about one: short epochs do not wait for it


def train(
    config: Config,
    resume: str | None = None,
    dry_run: bool = False,
    choices: Sequence[str] = (),
    began: float | None = None,
) -> dict[str, Any]:
    """Train a model and write a run folder.

    Args:
        config: What to do.
        resume: A run folder or one of its state files, to continue; `auto` continues the run in the output folder if
            there is one, and starts a new one if not.
        dry_run: Print the plan and stop; nothing is written.
        choices: What was chosen for the user, to be printed with the plan, a line each.
        began: When the time of `config.minutes` began, by time.monotonic(); by default now.

    Returns:
        The record of the last epoch; empty after a dry run.

    Raises:
        UsageError: for a configuration that cannot be run; all problems in one message.
        DataError: for data that cannot be used.
        Diverged: if loss or gradient stay not finite.
        OSError: if the state cannot be written, as on a full disk.
        Interrupted: after Ctrl-C, SIGTERM or SIGUSR1, when the state is saved or nothing was done yet.
    """
    if problems := config.problems():
        raise UsageError('\n'.join(problems))
    began = time.monotonic() if began is None else began
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(flushed_denormals())
        signals = stack.enter_context(stop_signals())
        with answer_at_once(signals, BEFORE_THE_FIRST_STEP):
            join_processes(config)
            folder = choose_folder(config, resume)
            config, said = choose_config_precision(replace(config, output=str(folder)))
            accelerator = build_accelerator(config, folder)
            division = find_split(folder, resume)
            sources = open_sources(config, accelerator, division)
            asked, images, world = config, len(sources.train.labels), accelerator.num_processes
            config, notes = scale_to_data(asked, images, world)
            # one answer, since the first process creates the folder
            existed = broadcast_object_list([folder.exists()])[0]
            if existed and not dry_run:
                stack.enter_context(hold_folder(folder, accelerator))
            state, source, found = find_start(folder, resume)
            notes += found + said
            check_same_start(config, state)
            if state and is_finished(state['position'], config) and not dry_run:
                return report_finished(state, config, folder, accelerator)
            if config.lora and not (config.weights or state):
                raise UsageError('lora adapts trained weights: give them with --weights')
            if state:
                then = replace(asked, epochs=state['settings'].get('epochs', asked.epochs))  # as the run reduced it
                check_same_run([asked, scale_to_data(then, images, world)[0], config], state, source)
            if sources.split and (taken := config.data.split_options.describe(sources.split)):
                notes.append(f'note      {taken}')
            divided_anew = bool(sources.split) and not division.exists()
            notes += check_classes(state, sources.train.classes, (images, len(sources.val.labels)), divided_anew)
            if state and state['processes'] != world:
                notes.append(
                    f'note      {world} processes continue a state of {state["processes"]}: '
                    'each draws its own mixup, dropout and drop path'
                )
            trainer = load(config, folder, state, accelerator, sources, signals)
            trainer.asked = asked
            stack.callback(trainer.close)
            stack.enter_context(trainer.watch.active())
            trainer.measure_input()
            measured = measure(trainer)
            trainer.validation_seconds = measured.validation
            most = trainer.config.epochs
            if config.minutes:
                notes += [note for note in fit_budget(trainer, measured, began) if note not in notes]
            log = Log(folder, accelerator)
            trainer.watch.say = log.say
            chosen = [f'chosen    {line}' for line in choices]
            report = report_data(sources.once, sources.val) if accelerator.is_main_process else None
            log.say(wrap([*chosen, *plan(trainer, measured, report), *notes]))
            if dry_run:
                return {}
            if not existed:
                stack.enter_context(hold_folder(folder, accelerator))
            log.begin(trainer.config, trainer.position.records)
            if sources.split and accelerator.is_main_process:
                sources.split.save(folder / SPLIT_FILE)
        stack.callback(accelerator.end_training)
        return run_epochs(trainer, log, began, most)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Let the CPU take denormal numbers (below 1.2e-38 in float32) as 0.

    Many processors compute with them ten to a hundred times slower. A channel that no image activates any more leaves
    them behind in the optimizer's moving averages. Threads that torch has started before are left as they are.
    """
    before = (torch.full((1,), 1e-39) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def choose_config_precision(config: Config) -> tuple[Config, list[str]]:
    """Return a configuration with the precision that `auto` stands for, the same in all processes, and a line on it."""
    if config.precision != 'auto':
        return config, []
    precision, reason = broadcast_object_list([choose_precision(pick_device(config.device))])[0]
    return replace(config, precision=precision), [describe_precision(precision, reason)]


def fit_budget(trainer: Trainer, measured: Measured, began: float) -> list[str]:
    """Reduce the number of epochs to what fits into `config.minutes`.

    Returns:
        A note for each setting that is reduced for so few epochs.

    Raises:
        UsageError: if not one epoch fits.
    """
    minutes, done = trainer.config.minutes or 0.0, trainer.position.epoch
    spent = time.monotonic() - began
    left, interval = 60 * minutes - spent, trainer.config.val_interval
    work = partial(work_of_more, trainer, done)
    most = trainer.config.epochs - done
    fitting = affordable_epochs(left, measured.epoch, measured.validation, interval, work, most)
    epochs = broadcast_object_list([fitting])[0]
    if epochs < 1:
        epoch = work(1) * measured.epoch + measured.validation
        least = (spent + ENDING + RESERVE * epoch) / 60
        raise UsageError(
            f'an epoch takes about {duration(epoch)}, which does not fit into '
            f'{minutes:g} minutes: give --minutes {math.ceil(10 * least) / 10:g} or more, or fewer images with '
            '--data.train_images'
        )
    return trainer.set_epochs(done + epochs) if done + epochs < trainer.config.epochs else []


def work_of_more(trainer: Trainer, done: int, epochs: int) -> float:
    """Return the work of so many epochs after `done`, in epochs on images of full size, if the run ends with them."""
    return trainer.small.work(done, done + epochs, done + epochs)


def refit_budget(trainer: Trainer, began: float, most: int) -> None:
    """Change the number of epochs to what fits into `config.minutes`, at most `most`, by the time of the last ones.

    Called between the steps of an epoch and its validation.
    """
    config, done, now = trainer.config, trainer.position.epoch + 1, time.monotonic()
    if not config.minutes or trainer.done == trainer.epoch_start:  # an epoch that was trained before
        return
    work_done = trainer.small.work(trainer.epoch_start, trainer.done, trainer.total_steps) / len(trainer.data.train)
    trainer.epoch_seconds.append((now - trainer.epoch_began) / work_done)
    totals = list(accumulate(reversed(trainer.epoch_seconds)))
    count = bisect_left(totals[:-1], RECENT) + 1  # of the last epochs, which took so long together
    left = 60 * config.minutes - (now - began) - RESERVE * trainer.validation_seconds
    training, interval = totals[count - 1] / count, config.val_interval
    work = partial(work_of_more, trainer, done)
    fitting = affordable_epochs(left, training, trainer.validation_seconds, interval, work, most - done)
    epochs = broadcast_object_list([fitting])[0]
    epochs = done + max(epochs, 0)
    if epochs != config.epochs:
        trainer.set_epochs(epochs)
        if trainer.accelerator.is_main_process:
            write_config(trainer.folder, trainer.config)


def is_finished(position: dict[str, Any], config: Config) -> bool:
    """Tell if a run at this position has nothing left to do: all its epochs are done, or it stops early."""
    patience = config.patience
    return position['epoch'] >= config.epochs or bool(patience and position.get('since_best', 0) >= patience)


def report_finished(state: dict[str, Any], config: Config, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Say that a run is finished, and return its last record; nothing is written."""
    done = state['position']['epoch']
    if done < config.epochs:
        Log(folder, accelerator).say(
            f'the run in {folder} stopped early, after {done} of {config.epochs} epochs: no better score in '
            f'{config.patience}. Nothing was changed; a larger --patience trains on'
        )
        return state['position']['records'][-1]
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


def run_epochs(trainer: Trainer, log: Log, began: float, most: int) -> dict[str, Any]:
    """Train from where the run is to its end, and return the last record.

    Args:
        trainer: The run.
        log: Where it is reported.
        began: When the command began, for `config.minutes`.
        most: Number of epochs, if they fit into them.
    """
    drawn = -math.inf
    log.say(table_head(trainer.parts.ema is not None))
    with log.live(trainer.total_steps, trainer.done, trainer.small.work), saving_when_cut_short(trainer):
        while not is_finished(asdict(trainer.position), trainer.config):
            trainer.epoch_began, trainer.epoch_start = time.monotonic(), trainer.done
            trainer.stop_if_asked()
            train_epoch(trainer, log)
            refit_budget(trainer, began, most)
            log.shown.total = trainer.total_steps
            validated = trainer.validates
            record = trainer.finish_epoch()
            log.record(trainer.position.records)
            if not validated:
                continue
            trainer.save()
            log.say(table_row(record, best=trainer.position.since_best == 0))
            last = is_finished(asdict(trainer.position), trainer.config)
            if trainer.accelerator.is_main_process and (last or time.monotonic() - drawn >= DRAW_SECONDS):
                plot_curves(trainer.position.records, trainer.folder / 'curves.png')
                drawn = time.monotonic()
    if trainer.position.epoch < trainer.config.epochs:
        log.say(f'stopped early: no better score in {trainer.config.patience} epochs')
    if skipped := trainer.position.skipped:
        log.say(f'{skipped} steps were skipped: loss or gradient were not finite')
    if damaged := trainer.damaged():
        log.say(
            f'{len(damaged)} damaged images were left out: {", ".join(map(printable, damaged[:5]))}'
            f'{", …" * (len(damaged) > 5)}; all of them are named in {trainer.folder / DAMAGED}'
        )
    log.say(f'speed: {limit(trainer.position.records[-1])}')
    log.say(f'best top-1 {100 * trainer.position.best:.2f} %; the run is in {trainer.folder}')
    return trainer.position.records[-1]


@contextmanager
def saving_when_cut_short(trainer: Trainer) -> Iterator[None]:
    """Save the state where training cannot reach the next point at which all processes agree to stop.

    That is while one waits for images that do not come, or when another one has ended. The state of the last complete
    step is the same in all processes, so the main process saves it by itself.
    """
    try:
        yield
    except WaitInterrupted:
        trainer.stop(alone=True)
    except Stalled as error:
        if trainer.signals:
            trainer.stop(alone=True)
        path = trainer.save(alone=True)
        state = f'the state is saved in {path}' if path else f'the last saved state is in {trainer.folder}'
        raise Stalled(f'{error}; {state}') from None
    except RuntimeError as error:  # a process that opens images was killed, or another one of the training has ended
        if trainer.signals:
            trainer.stop(alone=True)
        raise explain_worker_death(error) or error from None


def train_epoch(trainer: Trainer, log: Log) -> None:
    """Do the remaining steps of an epoch; save when it is time, stop when a signal asks for it."""
    trainer.parts.model.train()
    position, clock = trainer.position, time.monotonic()
    batches = trainer.watched(trainer.data.train, position.epoch, position.step)
    for batch in batches:
        synchronize(trainer.accelerator.device)  # transfers count as waiting
        position.waited += time.monotonic() - clock
        outcome = trainer.step(batch)
        position.seconds += time.monotonic() - clock
        rates = trainer.rates()
        log.step(
            trainer.done,
            f'epoch {position.epoch + 1}/{trainer.config.epochs}  loss {outcome.loss:.3f}  '
            f'{rates["images_per_second"]:.0f} images/s',
            limit(rates),
        )
        if outcome.stop:
            trainer.stop()
        if outcome.save:
            trainer.save()
        clock = time.monotonic()
