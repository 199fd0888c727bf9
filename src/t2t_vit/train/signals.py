"""Answer to Ctrl-C, SIGTERM and SIGUSR1: the first one saves the run, a second one ends the process at once."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

RESTART = 75  # exit code of a preempted run that can be resumed: EX_TEMPFAIL
INTERRUPTED = 130  # exit code after Ctrl-C
SAME_REQUEST = 0.5  # seconds within which further signals repeat the first: launchers pass on what a terminal sent too
NOTHING = b'\0'  # the number of no signal
NUMBERS = sorted({signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGUSR1', signal.SIGTERM)})


class Interrupted(Exception):
    """Raised when a run was asked to stop and nothing of it is lost; `code` is the exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class StopSignals(list[int]):
    """The signals received so far; true if any was.

    While `interrupt_waiting` is active, the first signal raises `WaitInterrupted` in the main thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting = False

    @property
    def code(self) -> int:
        """Exit code that says why the run stopped; 0 without a signal."""
        return INTERRUPTED if signal.SIGINT in self else RESTART if self else 0

    @contextmanager
    def interrupt_waiting(self) -> Iterator[None]:
        """Let a signal end what the main thread waits for, by `WaitInterrupted`, instead of only being noted."""
        before, self.waiting = self.waiting, True
        try:
            if self:
                raise WaitInterrupted
            yield
        finally:
            self.waiting = before


class WaitInterrupted(BaseException):
    """Raised where the main thread waits when a signal arrives; no Exception, which would count as a bad image."""


@contextmanager
def answer_at_once(signals: StopSignals, text: str) -> Iterator[None]:
    """Stop with the first signal while the context lasts, as before the first step, when nothing can be lost.

    Raises:
        Interrupted: with `text`, after a signal.
    """
    try:
        with signals.interrupt_waiting():
            yield
    except WaitInterrupted:
        raise Interrupted(signals.code, text) from None


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Collect Ctrl-C, SIGTERM and SIGUSR1 instead of ending the process, as long as the context lasts.

    A second signal ends the process at once, without saving; those that follow the first within `SAME_REQUEST`
    seconds count as the same request. A thread watches for it, so that it also works while the main thread is inside
    a call that does not return. Python delivers signals to the main thread only: in another thread nothing is done.
    """
    caught = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _: object) -> None:
        caught.append(number)
        if caught.waiting and len(caught) == 1:  # more of them must not disturb what the first one begins
            raise WaitInterrupted

    handlers = {number: signal.signal(number, note) for number in NUMBERS}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=end_on_second_signal, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield caught
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.send(NOTHING)  # ends the watcher; closing would not, where forked workers hold the socket too
        watcher.join()
        writer.close()
        reader.close()


def end_on_second_signal(reader: socket.socket) -> None:
    """Read the numbers of signals from a socket and end the process on the second one; stop at `NOTHING`."""
    first: tuple[float, int] | None = None
    while (number := reader.recv(1)) != NOTHING:
        if number[0] not in NUMBERS:
            continue
        if first is None:
            first = time.monotonic(), number[0]
        elif time.monotonic() - first[0] > SAME_REQUEST:
            print('second signal: ended without saving; the last saved state remains', file=sys.stderr, flush=True)
            os._exit(INTERRUPTED if signal.SIGINT in (first[1], number[0]) else RESTART)
