"""Report a run: records as JSON lines and to trackers, a table of epochs and a progress line on the screen."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from ..console import Live, duration
from ..integrity import sign, write_text
from .config import Config

METRICS = 'metrics.jsonl'
FIRST = 50  # steps after which the time left is printed once


class Log:
    """The records of a run: `metrics.jsonl` in its folder, one line an epoch; trackers; and the screen.

    Without a terminal, progress is a line every `interval` seconds. Only the main process prints.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, console: Console | None = None, interval: float = 10
    ) -> None:
        self.folder, self.accelerator, self.interval = folder, accelerator, interval
        self.file = folder / METRICS
        self.main = accelerator.is_main_process
        self.console = console or Console(highlight=False, quiet=not self.main)

    def say(self, text: str) -> None:
        """Print lines as they are."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, config: Config, records: list[dict[str, Any]]) -> None:
        """Create the folder with its configuration and the records of the epochs so far."""
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.folder, config)
            self.write_records(records)
        self.accelerator.wait_for_everyone()
        if config.trackers:
            self.accelerator.init_trackers('t2t-vit', config=config.flat())

    def write_records(self, records: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl."""
        if self.main:
            write_text(self.file, ''.join(map(line, records)))

    def record(self, records: list[dict[str, Any]]) -> None:
        """Write the records of all epochs to metrics.jsonl, and pass the last one to the trackers."""
        self.write_records(records)
        values = records[-1]
        self.accelerator.log({key: value for key, value in values.items() if key != 'epoch'}, step=values['epoch'])

    @contextmanager
    def live(self, total: int, done: int, work: Callable[[int, int, int], float] | None = None) -> Iterator[None]:
        """Show progress as long as the context lasts; `step` updates it. `work` as for `Live`."""
        with Live(self.console, 'step', total, done, self.interval, quiet=not self.main, work=work) as self.shown:
            yield

    def step(self, done: int, text: str, speed: str = '') -> None:
        """Show the number of steps done and a text; once, also how long the run takes, and its speed."""
        if done - self.shown.first == FIRST:
            self.say(
                f'{FIRST} steps in {self.shown.seconds:.1f} s: {self.shown.left(done)} left without validation;\n'
                f'{speed}'
            )
        self.shown.show(done, text)


def write_config(folder: Path, config: Config) -> None:
    """Write the configuration of a run into its folder."""
    write_text(folder / 'config.yaml', sign(config.to_yaml()))


def line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, with null for values that are not finite."""
    return (
        json.dumps(
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in record.items()
            }
        )
        + '\n'
    )


def limit(rates: dict[str, Any]) -> str:
    """Say what limits the speed of a run, the slower of input and model; `rates` as `Trainer.rates` returns them."""
    alone, model, waited = rates['input_alone'], rates['model_alone'], rates['waited']
    side = 'the input' if waited > 0.5 or (alone and alone < model) else 'the model'
    measured = f'input {alone:,.0f}, ' if alone else ''
    return f'{rates["images_per_second"]:,.0f} images/s (alone: {measured}model {model:,.0f}), limited by {side}'


def table_head(ema: bool) -> str:
    """Return the head of the table of epochs, in 80 columns."""
    return f' epoch  train loss  val loss    top-1{"  EMA top-1" if ema else ""}  images/s  waiting     time'


def table_row(record: dict[str, Any], best: bool) -> str:
    """Return an epoch's row of the table; a star marks the best score so far."""
    ema = f'  {100 * record["val_top1_ema"]:7.2f} %' if 'val_top1_ema' in record else ''
    return (
        f'{record["epoch"] + 1:6}  {record["train_loss"]:10.3f}  {record["val_loss"]:8.3f}  '
        f'{100 * record["val_top1"]:5.1f} %{ema}  {record["images_per_second"]:8,.0f}  '
        f'{100 * record["waited"]:5.0f} %  {duration(record["seconds"]):>7}{" *" if best else ""}'
    )
