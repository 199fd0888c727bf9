"""Measure a few real steps before a run starts: how long the run takes, and how much memory."""

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import gather_object

from ..data import Batch, synchronize
from ..settings import UsageError
from .trainer import Trainer

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STEPS = 6  # at most; the first is not timed
SECONDS = 10.0  # after which no further step is measured
ENDING = 2.0  # seconds kept for the last picture and the end of the process
DRAWING = 80 << 20  # bytes that validation and the picture of the curves add to the process later
RESERVE = 1.1  # factor on the measured time, for saving, drawing and a machine that slows down


class Measured(NamedTuple):
    """Measurements of all processes together.

    Attributes:
        step: Seconds of a training step, with its share of waiting for images.
        epoch: Seconds of an epoch on images of full size, without validation.
        memory: Bytes of the process that trains, at its peak; on a GPU, of its memory.
        workers: Bytes of the processes that open images.
        steps: How many steps were timed.
        compute: Seconds of a step without waiting for images; 0 if it was not measured.
        validation: Seconds of a validation.
        one_thread: Seconds of a step on one CPU thread without waiting for images; 0 if it was not measured.
    """

    step: float
    epoch: float
    memory: int
    workers: int
    steps: int
    compute: float = 0.0
    validation: float = 0.0
    one_thread: float = 0.0


@contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Leave gradients, buffers and damaged-image lists as they were when the context ends."""
    buffers = {name: buffer.clone() for name, buffer in trainer.parts.task.named_buffers()}
    try:
        yield
    finally:
        trainer.parts.optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in trainer.parts.task.named_buffers():
                buffer.copy_(buffers[name])


def measure(trainer: Trainer, steps: int = STEPS, seconds: float = SECONDS) -> Measured:
    """Time some training steps, without an update, and the scoring of a batch; the trainer stays as it is.

    Raises:
        UsageError: if the model does not take the smaller images of data.start_scale.
    """
    device, parts, position = trainer.accelerator.device, trainer.parts, trainer.position
    times: list[float] = []
    waits: list[float] = []
    parts.model.train()
    begun = clock = time.perf_counter()
    batch = None
    with unchanged(trainer):
        start = position.step if position.step < len(trainer.data.train) else 0  # an epoch may only lack its scores
        for batch in islice(trainer.watched(trainer.data.train, position.epoch, start), steps):
            synchronize(device)
            waits.append(time.perf_counter() - clock)
            trainer.accumulate_gradients(type(batch)(*(tensor.clone() for tensor in batch)))
            parts.optimizer.zero_grad()
            synchronize(device)
            times.append(time.perf_counter() - clock)
            if sum(gather_object([time.perf_counter() - begun])) > seconds * trainer.accelerator.num_processes:
                break
            clock = time.perf_counter()
    step, wait = (sum(each[1:] or each) / max(len(each) - 1, 1) for each in (times, waits))
    scored = len(batch.labels) / score_seconds(trainer, batch) if batch is not None else 1.0
    passes = len(trainer.candidates())
    validation = passes * trainer.data.counts[1] / (scored * trainer.accelerator.num_processes)
    slowest = max(gather_object([step]))
    compute = max(gather_object([step - wait]))
    if batch is not None and trainer.small.scale < 1:
        trainer.small.cost = min(1.0, (small_seconds(trainer, batch) + wait) / slowest)
    epoch = slowest * len(trainer.data.train)
    memory, workers = peak_memory(trainer), worker_memory()
    alone = one_thread_seconds(trainer, batch, compute) if batch is not None else 0.0
    return Measured(slowest, epoch, memory, workers, len(times), compute, validation, alone)


def small_seconds(trainer: Trainer, batch: Batch) -> float:
    """Return the seconds of a step on smaller images, in the slowest process, without waiting for images.

    Raises:
        UsageError: if the model does not take them.
    """
    small = trainer.small.reduce(batch.images)
    try:
        seconds = step_seconds(trainer, batch._replace(images=small))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = 'x'.join(map(str, small.shape[2:]))
        raise UsageError(
            f'data.start_scale {trainer.small.scale:g}: {trainer.config.model} does not take images of {size} '
            f'pixels: {error}'
        ) from error
    return max(gather_object([seconds]))


def one_thread_seconds(trainer: Trainer, batch: Batch, compute: float) -> float:
    """Return the seconds of a step on one CPU thread, or 0 where nothing could be gained or it would take too long.

    Threads wait for each other many times in a step. If another process has one of their cores, that takes many times
    longer than the computation.
    """
    threads = torch.get_num_threads()
    alone = trainer.accelerator.num_processes == 1 and trainer.accelerator.device.type == 'cpu'
    if not alone or trainer.config.threads or threads == 1 or compute * threads > SECONDS:
        return 0.0
    torch.set_num_threads(1)
    try:
        return step_seconds(trainer, batch, 1)
    finally:
        torch.set_num_threads(threads)


def step_seconds(trainer: Trainer, batch: Batch, steps: int = 3) -> float:
    """Return the seconds of a step on a batch, without an update: the least of those after the first."""
    times = []
    with unchanged(trainer):
        for _ in range(steps):
            begun = time.perf_counter()
            trainer.accumulate_gradients(Batch(*(tensor.clone() for tensor in batch)))
            synchronize(trainer.accelerator.device)
            times.append(time.perf_counter() - begun)
    return min(times[1:] or times)


def score_seconds(trainer: Trainer, batch: Any) -> float:
    """Return the seconds of a forward pass without gradients."""
    net = trainer.parts.net
    net.eval()
    begun = time.perf_counter()
    with torch.inference_mode():
        net(batch.images)
    synchronize(trainer.accelerator.device)
    net.train()
    return time.perf_counter() - begun


def peak_memory(trainer: Trainer) -> int:
    """Return the bytes that training takes at its peak: what was measured, and the state that the optimizer adds.

    On a CPU it is the memory of the whole process; on a GPU what the allocator reserves there.
    """
    slots = 1 if trainer.config.optimizer.name in ('sgd', 'momentum') else 2  # the optimizer's, for each weight
    state = 0 if trainer.position.step or trainer.position.epoch else slots
    added = state * sum(parameter.numel() * parameter.element_size() for parameter in trainer.parameters)
    if trainer.accelerator.device.type == 'cuda':
        return torch.cuda.max_memory_reserved() + added
    added += DRAWING
    if resource is None:
        return psutil.Process().memory_info().peak_wset + added
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + added


def worker_memory() -> int:
    """Return the bytes that the processes that open images take for themselves."""
    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            memory = child.memory_full_info()
            total += getattr(memory, 'uss', memory.rss)
        except psutil.Error:  # it ended, or may not be looked at
            continue
    return total


def affordable_epochs(
    seconds: float,
    training: float,
    validation: float,
    interval: int,
    work: Callable[[int], float] = float,
    most: int = 1_000_000,
) -> int:
    """Return how many epochs fit into the rest of a budget, with a validation after the last one.

    Args:
        seconds: What is left.
        training: Seconds of an epoch without validation, on images of full size.
        validation: Seconds of a validation.
        interval: Epochs between two validations.
        work: Returns the work of so many epochs, in epochs on images of full size.
        most: No more than these.
    """
    usable = (seconds - ENDING) / RESERVE - validation * (1 - 1 / interval)

    def fits(epochs: int) -> bool:
        return training * work(epochs) + validation * epochs / interval <= usable

    return bisect_right(range(1, most + 1), False, key=lambda epochs: not fits(epochs))
