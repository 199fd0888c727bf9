"""The screen."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console(stderr: bool = False) -> Console:
    """Where tables are printed; in a pipe or a file, wide enough that none is cut."""
    plain: dict[str, Any] = dict(highlight=False, markup=False, emoji=False, stderr=stderr)  # names are no markup
    return Console(**plain) if (sys.stderr if stderr else sys.stdout).isatty() else Console(**plain, width=200)


class Live:
    """While it is entered, where a long job is: a bar on a terminal, a line every `interval` seconds elsewhere."""

    def __init__(
        self, screen: Console, unit: str, total: int, done: int = 0, interval: float = 10, quiet: bool = False
    ) -> None:
        self.screen, self.unit, self.total, self.first, self.interval = screen, unit, total, done, interval
        self.quiet = quiet
        self.progress: Progress | None = None
        self.begun = self.last = time.monotonic()

    def __enter__(self) -> 'Live':
        self.begun = self.last = time.monotonic()
        if self.screen.is_terminal and not self.quiet:
            self.progress = Progress(
                TextColumn('{task.description}'),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.screen,
            )
            self.progress.add_task('', total=self.total, completed=self.first)
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    @property
    def seconds(self) -> float:
        """Since it was entered."""
        return time.monotonic() - self.begun

    def left(self, done: int) -> str:
        """The time that is left, by what was done since it was entered."""
        return duration(self.seconds / max(done - self.first, 1) * (self.total - done))

    def show(self, done: int, text: str) -> None:
        """Say how much is done, and what there is to say."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=done, description=text)
        elif not self.quiet and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self.screen.print(
                f'{self.unit} {done}/{self.total}  {text}  {self.left(done)} left', markup=False, soft_wrap=True
            )


def duration(seconds: float) -> str:
    """As 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
