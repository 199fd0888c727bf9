"""Wait for images: say which do not come, stop after a time, and let a signal end the wait."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

from ..data import Batch, DataError
from .signals import StopSignals

FIRST_NOTE = 30.0  # seconds of waiting after which it is said
GRACE = 5.0  # seconds that the main thread gets to react, before the process is ended
SHOWN = 3  # names in a message


class Stalled(DataError):
    """Raised when images did not come for too long."""


class TimedOut(BaseException):
    """Raised inside a wait that took too long; no Exception, which would count as a bad image."""


class DataWatch:
    """Watch how long the main thread waits for images, from a thread.

    Args:
        timeout: Seconds after which the wait ends with `TimedOut`. If the main thread does not react, since it reads
            from a file system that hangs, the process is ended with exit code 2.
        say: Called with a sentence when a wait has lasted for `FIRST_NOTE` seconds.
    """

    def __init__(self, timeout: float, say: Callable[[str], None]) -> None:
        self.timeout, self.say = timeout, say
        self.since: float | None = None  # when the wait began
        self.describe: Callable[[], str] = str
        self.closed = threading.Event()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Watch as long as the context lasts; only the main thread can be interrupted, others are not watched."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, 'pthread_kill'):
            yield
            return
        before = signal.signal(signal.SIGALRM, self.interrupt)
        self.closed.clear()
        thread = threading.Thread(target=self.watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.closed.set()
            thread.join()
            signal.signal(signal.SIGALRM, before)

    @contextmanager
    def waiting(self, describe: Callable[[], str]) -> Iterator[None]:
        """Count the time in this context as waiting for what `describe` returns."""
        self.describe, self.since = describe, time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def interrupt(self, *_: object) -> None:
        """Raise in the main thread, if it still waits."""
        if self.since is not None:
            self.since = None
            raise TimedOut

    def message(self, seconds: float) -> str:
        """Return a sentence that names the images."""
        return f'no images for {seconds:.0f} s: one of {self.describe()} does not answer'

    def watch(self) -> None:
        """Check the wait from time to time, until `closed` is set."""
        noted: float | None = None
        while not self.closed.wait(min(0.5, self.timeout / 4)):
            begun = self.since
            if begun is None:
                continue
            waited = time.monotonic() - begun
            if waited > FIRST_NOTE and noted != begun:
                noted = begun
                self.say(f'waiting: {self.message(waited)}; the run stops after {self.timeout:.0f} s (data.timeout)')
            if waited > self.timeout:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                if not self.closed.wait(GRACE) and self.since == begun:
                    print(f't2t-vit: {self.message(waited)}', file=sys.stderr, flush=True)
                    os._exit(2)


class WatchedBatches:
    """Batches whose waits are watched.

    Args:
        batches: `DiskBatches` or `MemoryBatches`.
        source: Of the images.
        watch: Measures the waits.
        signals: The first one ends a wait by `WaitInterrupted`; None if other processes take part in each step, which
            have to agree first.
    """

    def __init__(self, batches: Any, source: Any, watch: DataWatch, signals: StopSignals | None) -> None:
        self.batches, self.source, self.watch, self.signals = batches, source, watch, signals

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from step `start` on."""
        batches = self.batches.epoch(epoch, start)
        for step in count(start):
            with (
                self.watch.waiting(lambda epoch=epoch, step=step: self.names(epoch, step)),  # type: ignore[misc]
                self.signals.interrupt_waiting() if self.signals is not None else nullcontext(),
            ):
                try:
                    batch = next(batches, None)
                except TimedOut:
                    raise Stalled(self.watch.message(self.watch.timeout)) from None
            if batch is None:
                return
            yield batch

    def names(self, epoch: int, step: int) -> str:
        """Name the images of a step."""
        names = [self.source.name(i) for samples in self.batches.steps.epoch(epoch, step)[:1] for i in samples.tolist()]
        more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
        return f'{", ".join(names[:SHOWN])}{more}'


def explain_worker_death(error: RuntimeError) -> DataError | None:
    """Return an error in a sentence if a process that opens images was killed; None for other errors."""
    text = str(error).partition('\n')[0]
    if 'DataLoader worker' not in text:
        return None
    return DataError(
        f'a process that opens images died: {text.rstrip(" .")}. If memory ran out, try a smaller batch_size, or fewer '
        'data.workers'
    )
