"""What a run tells: metrics as JSON lines, and a live line on a terminal or plain lines elsewhere."""

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """One run's records: `metrics.jsonl` in its folder, one line an epoch, and the screen.

    Where the screen is no terminal, it is told every `interval` seconds.
    """

    def __init__(self, folder: Path, console: Optional[Console] = None, interval: float = 10) -> None:
        self.file = folder / 'metrics.jsonl'
        self.console = console or Console(highlight=False)
        self.progress: Optional[Progress] = None
        self.interval = interval
        self.total = 0
        self.last = 0.0

    def say(self, text: str) -> None:
        """Show lines as they are."""
        self.console.print(text, markup=False, soft_wrap=True)

    def records(self) -> List[Dict[str, Any]]:
        """What metrics.jsonl holds."""
        return read_records(self.file)

    def record(self, values: Dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with self.file.open('a') as file:
            file.write(json.dumps(values) + '\n')

    def keep(self, epochs: int) -> None:
        """Forget the records of later epochs, which a resumed run makes again."""
        kept = [record for record in self.records() if record['epoch'] < epochs]
        self.file.write_text(''.join(json.dumps(record) + '\n' for record in kept))

    @contextmanager
    def live(self, total: int, done: int) -> Iterator[None]:
        """While it lasts, `step` shows where the run is: a bar on a terminal, now and then a line elsewhere."""
        self.total, self.last = total, time.monotonic()
        if not self.console.is_terminal:
            yield
            return
        with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                      console=self.console) as self.progress:
            self.progress.add_task('', total=total, completed=done)
            yield
        self.progress = None

    def step(self, done: int, text: str, left: float) -> None:
        """Show the number of steps done, what there is to say, and the seconds left."""
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=done, description=text)
        elif time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self.say(f'step {done}/{self.total}  {text}  {duration(left)} left')


def read_records(file: Path) -> List[Dict[str, Any]]:
    """The lines of a metrics.jsonl; one torn by a crash is passed over."""
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def duration(seconds: float) -> str:
    """As 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
