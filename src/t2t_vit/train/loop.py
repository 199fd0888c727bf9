"""Training: load, step, save, validate. One process or many, the same lines."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from timm.utils import ModelEmaV3
from torch.nn.utils import get_total_norm

from .. import __version__
from ..data import (
    Batch,
    DataError,
    DiskBatches,
    Part,
    check_same_classes,
    derive,
    measure_input,
    open_batches,
    open_source,
    seed_all,
    synchronize,
)
from ..evaluate import Scores, score
from ..hub import Card, licence_of, public
from ..plots import plot_curves
from ..settings import UsageError, flatten
from ..trained import WEIGHTS, pick_device, save_folder
from .build import build_model, build_optimizer, build_schedule, freeze, parameter_groups, preprocess
from .config import Config
from .log import METRICS, Log, limit, summary
from .plan import plan
from .state import Position, git_revision, load_state, read_state, save_state, saved_states
from .tasks import make_task

# what processes of one run may see differently; what another value of does not make another run, as `epochs`
OF_A_HOST = (
    'output',
    'weights',
    'device',
    'threads',
    'data.root',
    'data.cache',
    'data.download',
    'data.workers',
    'objective.labels',
)
MAY_CHANGE = (*OF_A_HOST, 'epochs', 'accumulate', 'save_minutes', 'keep', 'max_skips', 'trackers')
DAMAGED = 'damaged.txt'  # a name a line
DRAW_SECONDS = 20  # between two drawings of the curves, which take one: short epochs go on meanwhile
RESTART = 75  # exit code of a run that was told to make room, and can go on: EX_TEMPFAIL


def meeting_place() -> dict[str, Any]:
    """For processes that torchrun has started again: a part of its store that those before them did not write into.

    It keeps the addresses of processes that are gone, and the new ones may find these (pytorch issue 135712). Machines
    may count restarts differently: on several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin a new store.
    """
    found = os.environ
    if not int(found.get('TORCHELASTIC_RESTART_COUNT', 0)) or found.get('LOCAL_WORLD_SIZE') != found.get('WORLD_SIZE'):
        return {}
    store, rank, size = next(torch.distributed.rendezvous('env://'))
    return dict(
        store=torch.distributed.PrefixStore(f'start-{found["TORCHELASTIC_RESTART_COUNT"]}', store),
        rank=rank,
        world_size=size,
    )


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved; `code` is the exit code that says why."""

    def __init__(self, code: int, path: Path, folder: Path) -> None:
        super().__init__(f'stopped, and saved in {path}; go on with --resume {folder}')
        self.code = code


class Diverged(FloatingPointError):
    """Loss or gradient were not finite for too many steps in a row."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While it lasts, Ctrl-C, SIGTERM and SIGUSR1 put their number into the list instead of ending the process.

    Signals are the main thread's: in another one it does nothing.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGUSR1', signal.SIGTERM))
    }
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def differences(one: str, other: str, but: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """The settings, but for those in `but`, in which two configurations differ, as YAML; with both values."""
    first, second = (
        {key: value for key, value in flatten(yaml.safe_load(text)) if value not in ({}, [])} for text in (one, other)
    )
    yield from (
        (key, first.get(key), second.get(key))
        for key in {**first, **second}
        if key not in but and first.get(key) != second.get(key)
    )


def check_same_run(config: Config, state: dict[str, Any], place: Path) -> None:
    """UsageError where a state is of a run that was configured otherwise; all differences in one message."""
    if changed := [
        f'{key} is {saved} in {place}, and cannot become {asked} there'
        for key, saved, asked in differences(state['config'], config.to_yaml(), MAY_CHANGE)
    ]:
        raise UsageError('\n'.join(changed))


def check_same_start(config: Config, state: dict[str, Any] | None) -> None:
    """UsageError, in all processes, where one of them begins elsewhere or is configured otherwise than the first."""
    where = state['position'] if state else asdict(Position())
    (first, step), *others = gather_object([(config.to_yaml(), (where['epoch'], where['step']))])
    for rank, (text, place) in enumerate(others, 1):
        if place != step:
            raise UsageError(
                f'processes find different states: the first begins in epoch {step[0] + 1}, step {step[1] + 1}, '
                f'process {rank} in epoch {place[0] + 1}, step {place[1] + 1}; '
                'output must be a folder that all hosts share'
            )
        for key, one, other in differences(first, text, OF_A_HOST):
            raise UsageError(f'processes are configured differently: {key} is {one}, and {other} in process {rank}')


def find_start(config: Config, folder: Path, resume: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """What a run begins with, and what there is to say of it.

    The first of these that is there: the last readable state of its own folder, the state file that is given, the
    weights that are given, scratch. The last two are `build_model`'s.

    Raises:
        UsageError: if the folder holds a run that was not asked for, or none that was; or a model that would be lost.
    """
    own = folder / 'checkpoints'
    held = bool(saved_states(own))
    if not resume and (held or (folder / WEIGHTS).exists()):
        raise UsageError(f'{folder} holds a run: go on with it by --resume {folder}, or choose another output')
    state, notes = load_state(own)
    metrics = folder / METRICS  # empty where a run was cut off between its first model and its first state
    if state is None and (folder / WEIGHTS).exists() and not (metrics.exists() and not metrics.stat().st_size):
        raise UsageError(
            f'{folder} holds a model, and no state of its run to go on from: choose another output, '
            f'with --weights {folder} to begin with that model'
        )
    if state is None and resume and resume != 'auto':
        if not Path(resume).is_file():
            raise UsageError(f'{resume} holds no state to resume from')
        state, own = read_state(Path(resume)), Path(resume)
    if state is not None:
        check_same_run(config, state, own)
    return state, [f'passed over: {note}' for note in notes]


class Run:
    """A run: its parts, and what is done with them. Loading is its constructor; then step, save, validate."""

    def __init__(self, config: Config, folder: Path, state: dict[str, Any] | None, accelerator: Accelerator) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        self.check_split(world)
        where = config.data
        with accelerator.local_main_process_first():  # which downloads what is missing, and makes indices of tars
            train, val = (open_source(where.root, split, where.cache, where.download) for split in ('train', 'val'))
        check_same_classes(train, val)
        if len(train.classes) < 2:
            raise DataError(f'{where.root} has one class, {train.classes[0]}; there is nothing to learn')
        if where.train_images:
            train = Part(train, where.train_images)
        if where.val_images:
            val = Part(val, where.val_images)
        self.classes = train.classes
        self.preprocessing = preprocess(config, channels=1 if config.data.root == 'digits' else 3)
        self.train_set, self.val_set = (
            open_batches(
                source,
                self.preprocessing,
                config.batch_size // world,
                augment,
                config.data.memory,
                config.data.workers,
                config.seed,
                accelerator.device,
                rank,
                world,
            )
            for source, augment in ((train, config.augment), (val, None))
        )
        if len(self.train_set) == 0:
            raise DataError(f'{len(train.labels)} training images make no batch of {config.batch_size}')
        self.counts = len(train.labels), len(val.labels)
        self.total_steps = len(self.train_set) * config.total_epochs

        seed_all(derive(config.seed))  # the same weights in every process
        # a resumed run's own configuration no longer says what it started from
        self.origin: dict[str, str | None] = (state or {}).get('origin') or dict(
            weights=config.weights and Path(config.weights).name, license=licence_of(config.weights)
        )
        self.net = build_model(config, self.preprocessing, self.classes, self.origin['license']).to(accelerator.device)
        freeze(self.net, config.optimizer.frozen)
        self.task = make_task(config, self.net, train.name).to(accelerator.device)
        self.groups = parameter_groups(config, self.task)
        optimizer = build_optimizer(config, self.groups)
        self.schedule = build_schedule(config, optimizer, len(self.train_set))
        # the decay after t steps is t / (t + 9) up to ema_decay: the average is over a ninth of the steps made
        self.ema = (
            ModelEmaV3(self.net, config.ema_decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
            if config.ema_decay
            else None
        )
        self.model, self.optimizer = accelerator.prepare(self.task, optimizer)
        self.parameters = [parameter for parameter in self.task.parameters() if parameter.requires_grad]

        # the schedule has no state: it is a function of the configuration and the step
        self.parts: dict[str, Any] = {'model': self.task, 'optimizer': self.optimizer}
        if self.ema:
            self.parts['ema'] = self.ema.module
        if accelerator.scaler:
            self.parts['scaler'] = accelerator.scaler
        self.position, self.seen = Position(), []
        self.input_alone: float | None = None  # images/s, measured
        self.stopped: list[int] = []  # by these signals
        self.told = self.due = False  # to stop, and a state to save; what the processes agreed on last
        self.saved = time.monotonic()
        if state is not None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.position, self.seen = Position(**state['position']), state.get('damaged', [])

    def check_split(self, world: int) -> None:
        """UsageError where a batch cannot be dealt out to processes and parts."""
        batch, parts, augment = self.config.batch_size, self.config.accumulate * world, self.config.augment
        if batch % parts:
            raise UsageError(
                f'batch_size {batch} is not a multiple of {parts}: {world} processes, '
                f'{self.config.accumulate} parts each'
            )
        if (augment.mixup or augment.cutmix) and batch // parts % 2:
            raise UsageError(
                f'mixup and cutmix need an even number of images in each part, got {batch // parts}: '
                f'batch_size {batch} in {parts} parts'
            )

    @property
    def done(self) -> int:
        """Steps made."""
        return self.position.epoch * len(self.train_set) + self.position.step

    @property
    def lr(self) -> float:
        """The learning rate of the head's group, the peak one under layer decay."""
        return max(group['lr'] for group in self.optimizer.param_groups)

    def rates(self) -> dict[str, float | None]:
        """Of this epoch so far: images/s in all, of the input and of the model alone, and the share of waiting."""
        position = self.position
        images = position.step * self.config.batch_size
        return dict(
            images_per_second=round(images / position.seconds, 1),
            input_alone=self.input_alone,
            model_alone=round(images / max(position.seconds - position.waited, 1e-9), 1),
            waited=round(position.waited / position.seconds, 3),
        )

    def measure_input(self, seconds: float = 2.0) -> None:
        """How fast the input side of all processes is by itself, in at most so much time, and one pass of the images.

        Not of a finished run, and not of a small set on disk, whose workers would take longer to start.
        """
        batches, epoch = self.train_set, self.position.epoch
        if epoch == self.config.total_epochs or (isinstance(batches, DiskBatches) and self.counts[0] < 1000):
            return
        few = batches.smaller() if isinstance(batches, DiskBatches) else batches
        try:
            rates = gather_object([measure_input(few, seconds, [epoch])])
        finally:
            few.close()
        self.input_alone = round(sum(rates), 1) if all(rates) else None

    def step(self, batch: Batch) -> float:
        """One step of the optimizer; gives the mean loss over all processes."""
        # each step's own random numbers, a function of its number, so that no generator's state needs saving
        seed_all(derive(self.config.seed, self.done, 3, self.accelerator.process_index))
        self.schedule.step_update(self.done)
        total = torch.zeros((), device=self.accelerator.device)
        count = self.config.accumulate
        for i, part in enumerate(zip(*(tensor.chunk(count) for tensor in batch))):
            last = i == count - 1  # gradients go round once a step
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.model(Batch(*part)) / count
                self.accelerator.backward(loss)
            total += loss.detach()
        value = self.agree(total)
        self.update(value)
        self.position.step += 1
        return value

    def agree(self, loss: torch.Tensor) -> float:
        """Mean loss of all processes; `told` and `due` where any of them is, since all must go the same way."""
        self.told, self.due = bool(self.stopped), time.monotonic() - self.saved >= 60 * self.config.save_minutes
        if self.accelerator.num_processes == 1:
            return loss.item()
        flags = torch.tensor([self.told, self.due], dtype=loss.dtype, device=loss.device)
        mean, told, due = self.accelerator.reduce(torch.cat([loss[None], flags]), reduction='mean').tolist()
        self.told, self.due = told > 0, due > 0
        return mean

    def stop_if_told(self, ask: bool = True) -> None:
        """Save and raise Interrupted where a process is told to stop; without `ask`, as the last step found."""
        if ask:
            self.agree(torch.zeros((), device=self.accelerator.device))
        if self.told:
            path = self.save()
            self.accelerator.wait_for_everyone()
            raise Interrupted(130 if signal.SIGINT in self.stopped else RESTART, path or self.folder, self.folder)

    def update(self, loss: float) -> None:
        """Move the weights and their average, unless loss or gradient are not finite: then leave out the step.

        Raises:
            Diverged: after `max_skips` such steps in a row.
        """
        clip, position = self.config.optimizer.clip_grad, self.position
        if clip:
            norm = self.accelerator.clip_grad_norm_(self.parameters, clip)
        else:
            self.accelerator.unscale_gradients()
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = math.isfinite(norm) and (math.isfinite(loss) or self.accelerator.scaler is not None)
        if finite or self.accelerator.scaler is not None:  # a scaler leaves the step out itself, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad()
        if finite:
            position.in_a_row = 0
            position.loss_sum += loss
            if self.ema:
                self.ema.update(self.net, self.done + 1)
            return
        position.skipped += 1
        position.in_a_row += 1
        position.skipped_here += 1
        if position.in_a_row >= self.config.max_skips:
            raise Diverged(
                f'loss or gradient were not finite in {position.in_a_row} steps in a row, the last of them step '
                f'{position.step + 1} of epoch {position.epoch + 1} (loss {loss}): try a lower optimizer.lr or '
                f'optimizer.clip_grad 1; the last good state is in {self.folder / "checkpoints"}'
            )

    def save(self) -> Path | None:
        """Write all that is needed to go on, by the main process; for all to call at the same step."""
        path, damaged = None, self.damaged()
        if self.accelerator.is_main_process:
            path = save_state(
                self.folder / 'checkpoints',
                {
                    **{name: part.state_dict() for name, part in self.parts.items()},
                    'damaged': damaged,
                    'position': asdict(self.position),
                    'config': self.config.to_yaml(),
                    'origin': self.origin,
                    'version': __version__,
                    'revision': git_revision(),
                    'processes': self.accelerator.num_processes,
                },
                self.done,
                self.config.keep,
            )
        self.saved = time.monotonic()
        return path

    def validate(self) -> dict[str, Any]:
        """Close the epoch: score the weights and their average, keep the better where it is the best so far.

        Where it is told to stop before that is done, the whole is for the resumed run to do.
        """
        position, candidates = self.position, {'': self.net, **({'_ema': self.ema.module} if self.ema else {})}
        made = position.step - position.skipped_here
        record: dict[str, Any] = dict(
            epoch=position.epoch,
            lr=self.lr,
            train_loss=position.loss_sum / made if made else math.nan,
            **self.rates(),
            skipped=position.skipped,
        )
        scores: dict[str, Scores] = {}
        for suffix, model in candidates.items():
            self.stop_if_told()
            scores[suffix] = score(model, self.val_set, len(self.classes))
        for suffix, result in scores.items():
            record.update(
                {f'val_loss{suffix}': result.loss, f'val_top1{suffix}': result.top1, f'val_top5{suffix}': result.top5}
            )
        damaged = self.damaged()
        record['damaged'] = len(damaged)
        if damaged and self.accelerator.is_main_process:
            (self.folder / DAMAGED).write_text('\n'.join(damaged) + '\n')
        best = max(scores, key=lambda suffix: scores[suffix].top1)
        if scores[best].top1 >= position.best and self.accelerator.is_main_process:
            card = self.card(scores[best], 'the moving average' if best else 'the weights')
            save_folder(candidates[best], self.folder, self.config.model_args, card.text(candidates[best]))
        self.position = Position(
            epoch=position.epoch + 1,
            best=max(position.best, scores[best].top1),
            skipped=position.skipped,
            in_a_row=position.in_a_row,
            records=[*position.records, record],
        )
        return record

    def card(self, scores: Scores, which: str) -> Card:
        """The model card of weights with these scores."""
        config, root = self.config, self.config.data.root
        name = Path(root).name if Path(root).expanduser().exists() else root
        return Card(
            data=f'{name}: {self.counts[0]:,} training and {self.counts[1]:,} validation images of '
            f'{len(self.classes)} classes: {", ".join(self.classes[:20])}{", …" * (len(self.classes) > 20)}.',
            dataset=name,
            recipe=yaml.safe_dump(public(flatten(yaml.safe_load(config.to_yaml()))), sort_keys=False),
            scores={'top-1': scores.top1, 'top-5': scores.top5, 'loss': scores.loss},
            note=f'Of {which} after epoch {self.position.epoch + 1} of {config.total_epochs}, on {scores.count:,} '
            'images. That epoch was chosen by this score, which flatters it a little.',
            **self.origin,
        )

    def damaged(self) -> list[str]:
        """Names of images that could not be read, by any process, since the run began."""
        return sorted(set(gather_object([*self.seen, *self.train_set.damaged, *self.val_set.damaged])))


def train(config: Config, resume: str | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Train a model and leave a run folder; gives the last epoch's record.

    Args:
        config: What to do.
        resume: A run's folder or one of its state files, to go on with it; `auto` for the output folder's own state
            where it has one, and a start from the beginning where not.
        dry_run: Say what would be done, and stop there; nothing is written.

    Raises:
        UsageError: for a configuration that cannot be run; all problems in one message.
        DataError: for data that cannot be used.
        Diverged: where loss or gradient stay not finite.
        OSError: where the state cannot be written, as on a full disk.
        Interrupted: after Ctrl-C, SIGTERM or SIGUSR1, when the state is saved.
    """
    if problems := config.problems():
        raise UsageError('\n'.join(problems))
    if resume == 'auto' and not config.output:
        raise UsageError('--resume auto needs --output, the folder to look into')
    if config.threads:
        torch.set_num_threads(config.threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # shared by all of a process: another run's precision
    cpu = pick_device(config.device).type == 'cpu'
    PartialState(cpu=cpu, **meeting_place())  # or it sees no other process
    of_a_folder = resume if resume and Path(resume).is_dir() else None
    if of_a_folder and config.output and Path(config.output).resolve() != Path(of_a_folder).resolve():
        raise UsageError(
            f'--resume {resume} goes on in that folder, and output is {config.output}: leave out output, '
            'or resume from one of the files in its checkpoints'
        )
    folder = Path(
        broadcast_object_list([of_a_folder or config.output or f'runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}'])[
            0
        ]
    )
    config = replace(config, output=str(folder))
    accelerator = Accelerator(
        mixed_precision=config.precision, cpu=cpu, log_with=config.trackers or None, project_dir=str(folder)
    )
    state, notes = find_start(config, folder, resume)
    check_same_start(config, state)
    if state and state['processes'] != accelerator.num_processes:
        notes.append(
            f'note      {accelerator.num_processes} processes go on with a state of {state["processes"]}: '
            'each draws its own mixup, dropout and drop path'
        )
    run = Run(config, folder, state, accelerator)
    run.measure_input()
    log = Log(folder, accelerator)
    log.say('\n'.join(plan(run) + notes))
    if dry_run:
        return {}
    log.begin(config, run.position.records)
    try:
        return follow(run, log)
    finally:
        run.train_set.close()
        run.val_set.close()
        accelerator.end_training()


def follow(run: Run, log: Log) -> dict[str, Any]:
    """All epochs of a run from where it is; gives the last record."""
    config, position, drawn = run.config, run.position, -math.inf
    with log.live(run.total_steps, run.done), stop_signals() as run.stopped:
        while run.position.epoch < config.total_epochs:
            run.stop_if_told()
            run.model.train()
            position, clock = run.position, time.monotonic()
            for batch in run.train_set.epoch(position.epoch, position.step):
                synchronize(run.accelerator.device)  # images made on it are waited for too
                position.waited += time.monotonic() - clock
                loss = run.step(batch)
                position.seconds += time.monotonic() - clock
                rates = run.rates()
                log.step(
                    run.done,
                    f'epoch {position.epoch + 1}/{config.total_epochs}  loss {loss:.3f}  '
                    f'lr {run.lr:.1e}  {rates["images_per_second"]:.0f} images/s',
                    limit(rates),
                )
                run.stop_if_told(ask=False)
                if run.due:
                    run.save()
                clock = time.monotonic()
            record = run.validate()
            run.save()
            log.record(record)
            log.say(summary(record, config.total_epochs))
            last = run.position.epoch == config.total_epochs
            if run.accelerator.is_main_process and (last or time.monotonic() - drawn >= DRAW_SECONDS):
                plot_curves(run.position.records, run.folder / 'curves.png')
                drawn = time.monotonic()
    if damaged := run.damaged():
        log.say(
            f'{len(damaged)} damaged images were left out: {", ".join(damaged[:5])}'
            f'{", …" * (len(damaged) > 5)}; all of them are named in {run.folder / DAMAGED}'
        )
    log.say(f'best top-1 {100 * run.position.best:.2f} %; weights, config, metrics and curves are in {run.folder}')
    return run.position.records[-1]
