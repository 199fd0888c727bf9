"""Watch waits for images: say which do not come, and stop after a time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import TypeVar

from .errors import DataError

TIMEOUT = 600.0  # seconds that a command waits for images, unless it has an option for it
FIRST_NOTE = 30.0  # seconds of waiting after which it is said
GRACE = 5.0  # seconds that the main thread gets to react, before the process is ended
ASKED = 5.0  # seconds that a wait may still last once the process was asked to stop
SHOWN = 3  # names in a message

Item = TypeVar('Item')


class Stalled(DataError):
    """Raised when images did not come for too long."""


class TimedOut(BaseException):
    """Raised inside a wait that took too long; no Exception, which would count as a bad image."""


class DataWatch:
    """Watch how long the main thread waits for images, from a thread.

    Args:
        timeout: Seconds after which a wait ends with `Stalled`.
        say: Called with a sentence when a wait has lasted for `FIRST_NOTE` seconds.
        option: The name of the option that sets `timeout`, for that sentence.
        around: Returns a context for each wait, for example one in which signals raise.
        asked: Returns the exit code if the process was asked to stop, else 0; a wait then ends after `ASKED` seconds.
        fatal: End the process (exit code 2, or that of `asked`) if the main thread does not react, since it reads from
            a file system that hangs.
    """

    def __init__(
        self,
        timeout: float = TIMEOUT,
        say: Callable[[str], None] = print,
        option: str = '',
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        asked: Callable[[], int] = int,
        fatal: bool = False,
    ) -> None:
        self.timeout, self.say, self.option, self.fatal = timeout, say, option, fatal
        self.around, self.asked = around, asked
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
        """Count the time in this context as waiting for what `describe` returns.

        Raises:
            Stalled: if it takes too long.
            DataError: if a process that opens images was killed.
        """
        self.describe, self.since = describe, time.monotonic()
        try:
            with self.around():
                yield
        except TimedOut:
            raise Stalled(self.message(self.timeout)) from None
        except RuntimeError as error:
            raise explain_worker_death(error) or error from None
        finally:
            self.since = None

    def each(self, items: Iterable[Item], describe: Callable[[int], str], first: int = 0) -> Iterator[Item]:
        """Yield items, and watch the wait for each; `describe` names an item by its number, from `first` on."""
        rest, end = iter(items), object()
        for number in count(first):
            with self.waiting(lambda number=number: describe(number)):  # type: ignore[misc]
                item = next(rest, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

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
        asked: float | None = None
        while not self.closed.wait(min(0.5, self.timeout / 4)):
            now, begun = time.monotonic(), self.since
            if asked is None and self.asked():
                asked = now
            if begun is None:
                continue
            waited = now - begun
            if waited > FIRST_NOTE and noted != begun:
                noted = begun
                option = f' ({self.option})' if self.option else ''
                self.say(f'waiting: {self.message(waited)}; stops after {self.timeout:.0f} s{option}')
            if waited > self.timeout or (asked is not None and now - max(begun, asked) > ASKED):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
                if self.fatal and not self.closed.wait(GRACE) and self.since == begun:
                    print(f't2t-vit: {self.message(waited)}', file=sys.stderr, flush=True)
                    os._exit(self.asked() or 2)


def command_watch() -> DataWatch:
    """Return a watch for a command: it prints to stderr, and ends a process that does not react."""
    return DataWatch(say=lambda text: print(text, file=sys.stderr, flush=True), fatal=True)


def shorten_names(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return f'{", ".join(names[:SHOWN])}{more}'


def explain_worker_death(error: RuntimeError) -> DataError | None:
    """Return an error in a sentence if a process that opens images was killed; None for other errors."""
    text = str(error).partition('\n')[0]
    if 'DataLoader worker' not in text:
        return None
    return DataError(
        f'a process that opens images died: {text.rstrip(" .")}. If memory ran out, try smaller batches, or fewer '
        'workers'
    )
