"""Training: load, step, save, validate. The same code for one process and for many."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import get_total_norm

from .. import __version__
from ..data import (
    SPLIT_FILE,
    Balanced,
    Batch,
    DataError,
    DiskBatches,
    MemoryBatches,
    Part,
    Preprocessing,
    Split,
    derive,
    measure_input,
    open_batches,
    open_train_val,
    seed_all,
)
from ..data.waiting import DataWatch, shorten_names
from ..hub import Card, public
from ..integrity import write_text
from ..models.lora import add_adapters, merged_model
from ..results import portable_name
from ..scoring import Scores, score
from ..settings import UsageError, flatten
from ..trained import save_folder
from .build import build_model, build_optimizer, build_schedule, freeze, parameter_groups, preprocess
from .config import Config
from .short_runs import scale_to_data
from .signals import RESTART, Interrupted, StopSignals
from .small_images import SmallImages
from .start_weights import LoadReport, describe_origin, load_start_weights
from .state import Position, git_revision, save_state
from .tasks import Task, make_task

DAMAGED = 'damaged.txt'  # a name a line, as `portable_name` writes it


class Diverged(FloatingPointError):
    """Raised when loss or gradient were not finite for too many steps in a row."""


class Sources(NamedTuple):
    """The labelled images of a run, not yet in batches."""

    train: Any  # of an epoch; with data.sampler balanced, images of small classes are in it several times
    val: Any
    split: Split | None  # how one set of images was divided, None if it came in splits
    once: Any  # the training images without repetition


@dataclass
class TrainingData:
    """The opened data of a run: batches of this process, class names, number of images, preprocessing."""

    train: DiskBatches | MemoryBatches
    val: DiskBatches | MemoryBatches
    sources: Sources
    classes: list[str]
    counts: tuple[int, int]
    preprocessing: Preprocessing


@dataclass
class Parts:
    """What a run trains, and what it trains with."""

    net: Any  # the model: saved, averaged and validated
    report: LoadReport | None  # of the weights that it started from
    task: Task  # model and loss, with all trainable parameters
    model: nn.Module  # the task as accelerate prepared it
    groups: list[dict[str, Any]]
    optimizer: Any
    schedule: Scheduler
    ema: ModelEmaV3 | None

    def stateful(self, scaler: Any) -> dict[str, Any]:
        """Return the parts whose state is saved, by name; the schedule is a function of configuration and step."""
        return {
            'model': self.task,
            'optimizer': self.optimizer,
            **({'ema': self.ema.module} if self.ema else {}),
            **({'scaler': scaler} if scaler else {}),
        }


class Outcome(NamedTuple):
    """The mean loss of a step, and what any process asks all of them to do after it."""

    loss: float
    stop: bool
    save: bool


def check_split(config: Config, world: int) -> None:
    """Check that a batch can be divided among processes and micro-batches.

    Raises:
        UsageError: if it cannot.
    """
    batch, micro, augment = config.batch_size, config.grad_accum_steps * world, config.augment
    if batch % micro:
        raise UsageError(
            f'batch_size {batch} is not a multiple of {micro}: {world} processes with {config.grad_accum_steps} '
            'micro-batches each'
        )
    if (augment.mixup or augment.cutmix) and batch // micro % 2:
        raise UsageError(
            f'mixup and cutmix need an even number of images in each micro-batch, got {batch // micro}: '
            f'batch_size {batch} in {micro} micro-batches'
        )


def open_sources(config: Config, accelerator: Accelerator, division: Path) -> Sources:
    """Open the images and labels of a run, divided as a file says, if there is one.

    Raises:
        DataError: if they cannot be used.
    """
    data = config.data
    with accelerator.local_main_process_first():  # which downloads what is missing, and indexes tars
        train, val, split = open_train_val(
            data.root,
            data.cache,
            data.download,
            data.channels,
            data.split_options,
            Split.load(division) if data.split_options.wanted and division.exists() else None,
        )
    if data.train_images:
        train = Part(train, data.train_images)
    if data.val_images:
        val = Part(val, data.val_images)
    return Sources(Balanced(train) if data.sampler == 'balanced' else train, val, split, train)


def watch_data(config: Config, accelerator: Accelerator, signals: StopSignals) -> DataWatch:
    """Return the watch over waits for images: it ends them after `data.timeout`, and soon after a signal."""
    return DataWatch(
        config.data.timeout,
        option='data.timeout',
        # one process stops at once; several first try to agree on a step, for a few seconds
        around=signals.interrupt_waiting if accelerator.num_processes == 1 else nullcontext,
        asked=lambda: signals.code,
        fatal=True,
    )


def build_batches(config: Config, sources: Sources, accelerator: Accelerator, watch: DataWatch) -> TrainingData:
    """Make batches of the images for this process.

    Raises:
        DataError: if there are too few images.
        UsageError: if a batch cannot be divided among the processes.
    """
    world, data, (train, val) = accelerator.num_processes, config.data, sources[:2]
    check_split(config, world)
    preprocessing = preprocess(config, channels=1 if data.root == 'digits' else 3)
    train_batches, val_batches = (
        open_batches(
            source,
            preprocessing,
            config.batch_size // world,
            augment,
            data.memory,
            data.workers,
            config.seed,
            accelerator.device,
            accelerator.process_index,
            world,
            watch,
        )
        for source, augment in ((train, config.augment), (val, None))
    )
    if len(train_batches) == 0:
        raise DataError(f'{len(train.labels)} training images do not fill a batch of {config.batch_size}')
    return TrainingData(
        train_batches, val_batches, sources, train.classes, (len(train.labels), len(val.labels)), preprocessing
    )


def build_parts(config: Config, data: TrainingData, accelerator: Accelerator, license: str | None) -> Parts:
    """Build model, loss, optimizer, schedule and EMA; equal in every process.

    Raises:
        UsageError: if they cannot be built as configured.
    """
    seed_all(derive(config.seed))
    net = build_model(config, data.preprocessing, data.classes, license)
    report = load_start_weights(net, config.weights, data.classes) if config.weights else None
    if config.lora:
        add_adapters(net, config.lora)
    net = net.to(accelerator.device)
    freeze(net, config.optimizer.frozen)
    task = make_task(config, net, data.sources.train.name, data.sources.train.labels).to(accelerator.device)
    groups = parameter_groups(config, task)
    optimizer = build_optimizer(config, groups)
    schedule = build_schedule(config, optimizer, len(data.train))
    # the decay after t steps is t / (t + 9), up to ema_decay: EMA weights average the last ninth of the steps
    ema = (
        ModelEmaV3(net, config.ema_decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
        if config.ema_decay
        else None
    )
    model, optimizer = accelerator.prepare(task, optimizer)
    return Parts(net, report, task, model, groups, optimizer, schedule, ema)


def load(
    config: Config,
    folder: Path,
    state: dict[str, Any] | None,
    accelerator: Accelerator,
    sources: Sources | None = None,
    signals: StopSignals | None = None,
) -> 'Trainer':
    """Open the data, unless it is given, build the parts, and restore a state if there is one.

    A signal in `signals` stops the training; by default none ever comes.
    """
    signals = StopSignals() if signals is None else signals
    watch = watch_data(config, accelerator, signals)
    data = build_batches(config, sources or open_sources(config, accelerator, folder / SPLIT_FILE), accelerator, watch)
    # from the state: a resumed run's own configuration no longer names the weights that it started from
    origin = (state or {}).get('origin') or describe_origin(config.weights)
    parts = build_parts(config, data, accelerator, origin['license'])
    trainer = Trainer(config, folder, accelerator, data, parts, origin, signals, watch)
    if state is not None:
        trainer.restore(state)
    return trainer


class Trainer:
    """A run under way.

    Args:
        config: What to do.
        folder: The run folder.
        accelerator: Device, precision and processes.
        data: The opened data.
        parts: Model, loss, optimizer, schedule and EMA.
        origin: Name and licence of the weights that the run started from.
        signals: Received so far.
        watch: Limits the time that images are waited for.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        accelerator: Accelerator,
        data: TrainingData,
        parts: Parts,
        origin: dict[str, str | None],
        signals: StopSignals,
        watch: DataWatch,
    ) -> None:
        self.config, self.folder, self.accelerator = config, folder, accelerator
        self.asked = config  # before anything was reduced for a short run
        self.data, self.parts, self.origin = data, parts, origin
        self.parameters = [parameter for parameter in parts.task.parameters() if parameter.requires_grad]
        self.total_steps = len(data.train) * config.epochs
        self.small = SmallImages(config.data.start_scale, config.data.start_share)
        self.position, self.damaged_before = Position(), list[str]()
        self.input_alone: float | None = None  # images/s, measured
        self.signals, self.watch = signals, watch
        self.whole = True  # false while a step changes the weights
        self.last_save = self.epoch_began = time.monotonic()
        self.epoch_start = 0  # the first step of this epoch that this process does
        self.epoch_seconds: list[float] = []  # of the epochs of this process under a time budget, as at full image size
        self.validation_seconds = 0.0  # of the last one; before it, as measured

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        for name, part in self.parts.stateful(self.accelerator.scaler).items():
            part.load_state_dict(state[name])
        self.position, self.damaged_before = Position(**state['position']), state.get('damaged', [])

    @property
    def done(self) -> int:
        """Number of steps done."""
        return self.position.epoch * len(self.data.train) + self.position.step

    @property
    def lr(self) -> float:
        """Learning rate of the head, which is the peak one under layer decay."""
        return max(group['lr'] for group in self.parts.optimizer.param_groups)

    def set_epochs(self, epochs: int) -> list[str]:
        """Change how many epochs the run has; the schedule follows from the next step on.

        Returns:
            A note for each setting that is reduced for so few epochs.
        """
        images, processes = self.data.counts[0], self.accelerator.num_processes
        self.config, notes = scale_to_data(replace(self.asked, epochs=epochs), images, processes)
        self.total_steps = len(self.data.train) * epochs
        self.parts.schedule = build_schedule(self.config, self.parts.optimizer, len(self.data.train))
        return notes

    def watched(self, batches: 'DiskBatches | MemoryBatches', epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step `start` on; a wait ends on a signal and after data.timeout."""
        source = self.data.sources.train if batches.steps.training else self.data.sources.val

        def names(step: int) -> str:
            samples = [sample for part in batches.steps.epoch(epoch, step)[:1] for sample in part.tolist()]
            return shorten_names([source.name(i) for i in samples])

        return self.watch.each(batches.epoch(epoch, start), names, start)

    def rates(self) -> dict[str, float | None]:
        """Return images/s of this epoch: overall, of the input alone, of the model alone; and the fraction waited."""
        position = self.position
        images = position.step * self.config.batch_size
        return dict(
            images_per_second=round(images / position.seconds, 1),
            input_alone=self.input_alone,
            model_alone=round(images / max(position.seconds - position.waited, 1e-9), 1),
            waited=round(position.waited / position.seconds, 3),
        )

    def measure_input(self, seconds: float = 2.0) -> None:
        """Measure how fast all processes read images without training, within a time and one pass of the images.

        A finished run is not measured, nor a small set on disk, whose workers would take longer to start.
        """
        batches, epoch = self.data.train, self.position.epoch
        if epoch == self.config.epochs or (isinstance(batches, DiskBatches) and self.data.counts[0] < 1000):
            return
        few = batches.smaller() if isinstance(batches, DiskBatches) else batches
        try:
            with self.watch.waiting(lambda: f'the images of {self.config.data.root}'):
                rate = measure_input(few, seconds, [epoch])
            rates = gather_object([rate])
        finally:
            few.close()
        self.input_alone = round(sum(rates), 1) if all(rates) else None

    def step(self, batch: Batch) -> Outcome:
        """Do one step of the optimizer, all processes together."""
        # seeded by the step's number, so that no generator's state needs saving
        seed_all(derive(self.config.seed, self.done, 3, self.accelerator.process_index))
        self.parts.schedule.step_update(self.done)
        if self.done < self.small.until(self.total_steps):
            batch = batch._replace(images=self.small.reduce(batch.images))
        outcome = self.agree(self.accumulate_gradients(batch))
        self.whole = False
        self.update(outcome.loss)
        self.position.step += 1
        self.whole = True
        return outcome

    def accumulate_gradients(self, batch: Batch) -> torch.Tensor:
        """Run forward and backward over the micro-batches of a batch; return this process's mean loss."""
        total = torch.zeros((), device=self.accelerator.device)
        count = self.config.grad_accum_steps
        for i, micro in enumerate(zip(*(tensor.chunk(count) for tensor in batch))):
            last = i == count - 1  # gradients are exchanged once a step
            with nullcontext() if last else self.accelerator.no_sync(self.parts.model):
                with self.accelerator.autocast():
                    loss = self.parts.model(Batch(*micro)) / count
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def agree(self, loss: torch.Tensor | None = None) -> Outcome:
        """Return the mean loss of all processes, and whether any of them was asked to stop or has to save."""
        due = time.monotonic() - self.last_save >= 60 * self.config.save_minutes
        loss = torch.zeros((), device=self.accelerator.device) if loss is None else loss
        if self.accelerator.num_processes == 1:
            return Outcome(loss.item(), bool(self.signals), due)
        flags = torch.tensor([bool(self.signals), due], dtype=loss.dtype, device=loss.device)
        mean, stop, save = self.accelerator.reduce(torch.cat([loss[None], flags]), reduction='mean').tolist()
        return Outcome(mean, stop > 0, save > 0)

    def update(self, loss: float) -> None:
        """Update weights and EMA; skip the step if loss or gradient are not finite.

        Raises:
            Diverged: after `max_skipped_steps` such steps in a row.
        """
        clip, position, scaler = self.config.optimizer.clip_grad, self.position, self.accelerator.scaler
        if clip:
            norm = self.accelerator.clip_grad_norm_(self.parameters, clip)
        else:
            self.accelerator.unscale_gradients()
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = math.isfinite(norm) and (math.isfinite(loss) or scaler is not None)
        if finite or scaler is not None:  # a scaler skips the step itself, and adapts to it
            self.parts.optimizer.step()
        self.parts.optimizer.zero_grad()
        if finite:
            position.in_a_row = 0
            position.loss_sum += loss
            if self.parts.ema:
                self.parts.ema.update(self.parts.net, self.done + 1)
            return
        position.skipped += 1
        position.in_a_row += 1
        position.skipped_here += 1
        if position.in_a_row >= self.config.max_skipped_steps:
            raise Diverged(
                f'loss or gradient were not finite in {position.in_a_row} steps in a row, the last of them step '
                f'{position.step + 1} of epoch {position.epoch + 1} (loss {loss}): try a lower optimizer.lr or '
                f'optimizer.clip_grad 1; the last good state is in {self.folder / "checkpoints"}'
            )

    def save(self, alone: bool = False) -> Path | None:
        """Save the state from the main process, and return the file there.

        All processes must call it at the same step, unless one is left `alone`: it then saves without the others, and
        without the damaged images that only they know. A step that is not complete is not saved.
        """
        path, damaged = None, self.damaged(alone)
        if self.accelerator.is_main_process and self.whole:
            path = save_state(
                self.folder / 'checkpoints',
                {
                    **{name: part.state_dict() for name, part in self.parts.stateful(self.accelerator.scaler).items()},
                    'damaged': damaged,
                    'classes': self.data.classes,
                    'counts': self.data.counts,
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
        self.last_save = time.monotonic()
        return path

    def stop_if_asked(self) -> None:
        """Stop if any process received a signal; all processes must call it at the same step."""
        if self.agree().stop:
            self.stop()

    def stop(self, alone: bool = False) -> NoReturn:
        """Save, and raise Interrupted; `alone` as for `save`."""
        path = self.save(alone)
        if not alone:
            self.accelerator.wait_for_everyone()
        raise Interrupted(
            self.signals.code or RESTART,
            f'stopped; the state is saved in {path or self.folder}; continue with --resume {self.folder}',
        )

    @property
    def validates(self) -> bool:
        """True if this epoch ends with a validation."""
        done = self.position.epoch + 1
        return done % self.config.val_interval == 0 or done >= self.config.epochs

    def finish_epoch(self) -> dict[str, Any]:
        """Validate if it is time, keep the best weights so far, and start the next epoch.

        Returns:
            The record of the epoch, without scores if it was not validated.
        """
        scores = self.validate() if self.validates else {}
        record, damaged = self.record(scores), self.damaged()
        record['damaged'] = len(damaged)
        if damaged and self.accelerator.is_main_process:
            lines = (portable_name(name, line=True) for name in damaged)
            write_text(self.folder / DAMAGED, '\n'.join(lines) + '\n')
        best = max(scores, key=lambda suffix: scores[suffix].top1) if scores else ''
        if scores and scores[best].top1 >= self.position.best and self.accelerator.is_main_process:
            self.save_best(best, scores[best])
        self.position = self.position.next_epoch(record, scores[best].top1 if scores else None)
        return record

    def validate(self) -> dict[str, Scores]:
        """Return the scores of weights and EMA weights, by their suffix in a record."""
        began, scores = time.monotonic(), dict[str, Scores]()
        for suffix, model in self.candidates().items():
            self.stop_if_asked()  # a resumed run scores again what was scored
            try:
                scores[suffix] = score(model, self.watched(self.data.val), len(self.data.classes))
            except DataError as error:
                path = self.save()
                raise DataError(f'validation: {error}; the state is saved in {path or self.folder}') from error
        self.validation_seconds = time.monotonic() - began
        return scores

    def candidates(self) -> dict[str, nn.Module]:
        """Return the models to score, by the suffix of their scores in a record."""
        return {'': self.parts.net, **({'_ema': self.parts.ema.module} if self.parts.ema else {})}

    def record(self, scores: dict[str, Scores]) -> dict[str, Any]:
        """Return the record of this epoch, with the scores of each candidate."""
        position = self.position
        updates = position.step - position.skipped_here
        record: dict[str, Any] = dict(
            epoch=position.epoch,
            lr=self.lr,
            train_loss=position.loss_sum / updates if updates else math.nan,
            **self.rates(),
            skipped=position.skipped,
            seconds=round(time.monotonic() - self.epoch_began, 1),
        )
        for suffix, result in scores.items():
            record.update(
                {f'val_loss{suffix}': result.loss, f'val_top1{suffix}': result.top1, f'val_top5{suffix}': result.top5}
            )
        return record

    def save_best(self, suffix: str, scores: Scores) -> None:
        """Write a candidate with its model card into the run folder."""
        model = merged_model(self.candidates()[suffix])
        card = self.card(scores, 'the EMA weights' if suffix else 'the weights')
        save_folder(model, self.folder, self.config.model_args, card.text(model))

    def card(self, scores: Scores, which: str) -> Card:
        """Build the model card of weights with these scores."""
        config, root, classes = self.config, self.config.data.root, self.data.classes
        name = Path(root).name if Path(root).expanduser().exists() else root
        return Card(
            data=f'{name}: {len(self.data.sources.once.labels):,} training and {self.data.counts[1]:,} validation '
            f'images of {len(classes)} classes: {", ".join(classes[:20])}{", …" * (len(classes) > 20)}.',
            dataset=name,
            recipe=yaml.safe_dump(public(flatten(yaml.safe_load(config.to_yaml()))), sort_keys=False),
            scores={'top-1': scores.top1, 'top-5': scores.top5, 'loss': scores.loss},
            note=f'Scores of {which} after epoch {self.position.epoch + 1} of {config.epochs}, on '
            f'{scores.count:,} images. The epoch was chosen by this score, which flatters it a little.',
            **self.origin,
        )

    def damaged(self, alone: bool = False) -> list[str]:
        """Return the names of images that no process could read since the run began; `alone`, only of this one."""
        mine = [*self.damaged_before, *self.data.train.damaged, *self.data.val.damaged]
        return sorted(set(mine if alone else gather_object(mine)))

    def close(self) -> None:
        """End the processes that open images."""
        self.data.train.close()
        self.data.val.close()
