"""Print tables and the progress of long jobs."""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Screen(Console):
    """A console whose reader may go, as head does: the command then ends by BrokenPipeError, not with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the error that rich handles."""
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """Return a console for tables; in a pipe or a file it is 200 columns wide, so that nothing is cut."""
    # names of files and classes are printed as they are
    plain: dict[str, Any] = dict(highlight=False, markup=False, emoji=False, stderr=stderr)
    stream = sys.stderr if stderr else sys.stdout  # None if it is closed
    return Screen(**plain) if stream and stream.isatty() else Screen(**plain, width=200)


class Live:
    """Show the progress of a long job: a bar on a terminal, elsewhere a line every `interval` seconds.

    `work(start, end, total)` returns the work of a part of it; by default it is even.
    """

    def __init__(
        self,
        screen: Console,
        unit: str,
        total: int,
        done: int = 0,
        interval: float = 10,
        quiet: bool = False,
        work: Callable[[int, int, int], float] | None = None,
    ) -> None:
        self.screen, self.unit, self.total, self.first, self.interval = screen, unit, total, done, interval
        self.quiet, self.work = quiet, work or (lambda start, end, total: end - start)
        self.progress: Progress | None = None
        self.begun = self.last = time.monotonic()

    def __enter__(self) -> 'Live':
        self.begun = self.last = time.monotonic()
        if self.screen.is_terminal and not self.quiet:
            self.progress = Progress(
                TextColumn('{task.description}'),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn('{task.fields[left]}'),
                console=self.screen,
            )
            self.progress.add_task('', total=self.total, completed=self.first, left='')
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self.begun

    def left(self, done: int) -> str:
        """Return the estimated time left, from the speed so far."""
        worked = self.work(self.first, max(done, self.first + 1), self.total)
        return duration(self.seconds / worked * self.work(done, self.total, self.total))

    def show(self, done: int, text: str) -> None:
        """Update the progress to `done` steps and show a text beside it."""
        if self.progress:
            task, left = self.progress.task_ids[0], f'{self.left(done)} left'
            self.progress.update(task, completed=done, total=self.total, description=text, left=left)
        elif not self.quiet and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self.screen.print(
                f'{self.unit} {done}/{self.total}  {text}  {self.left(done)} left', markup=False, soft_wrap=True
            )


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
