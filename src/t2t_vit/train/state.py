"""A run's state on disk: written beside and renamed, the last few kept, a torn one passed over."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..models.safe_load import CheckpointError, check_growth, unpacked_size

NAME = re.compile(r'step-(\d+)\.pt')


@dataclass
class Position:
    """Where a run is: the next step of an epoch, counted from 0, what was summed in it so far, and all before it."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0  # of these, for images
    best: float = 0.0
    skipped: int = 0  # steps without an update, in the whole run
    skipped_here: int = 0  # in this epoch
    in_a_row: int = 0  # of these, the last ones
    records: list[dict[str, Any]] = field(default_factory=list)

    def next_epoch(self, record: dict[str, Any], top1: float) -> 'Position':
        """Return the start of the next epoch, after one with this record and best score."""
        return Position(
            epoch=self.epoch + 1,
            best=max(self.best, top1),
            skipped=self.skipped,
            in_a_row=self.in_a_row,
            records=[*self.records, record],
        )


def saved_states(folder: Path) -> list[Path]:
    """The states in a folder, the newest first."""
    found = [(int(match[1]), file) for file in folder.glob('*.pt') if (match := NAME.fullmatch(file.name))]
    return [file for _, file in sorted(found, reverse=True)]


def save_state(folder: Path, state: dict[str, Any], step: int, keep: int) -> Path:
    """Write the state after `step` steps into `folder`, and drop all but the last `keep`.

    The file is complete on the disk before it takes its name, and the older ones go only when the name is on the disk
    too: whenever the process dies, or the power does, one whole state is there.

    Raises:
        OSError: if it cannot be written; then nothing is left of it, and the older ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, draft = folder / f'step-{step:08d}.pt', folder / 'draft'
    try:
        with draft.open('wb') as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
        if hasattr(os, 'O_DIRECTORY'):  # elsewhere folders cannot be opened
            place = os.open(folder, os.O_DIRECTORY)
            try:
                os.fsync(place)
            finally:
                os.close(place)
    except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
        draft.unlink(missing_ok=True)
        raise OSError(f'the state cannot be written to {folder}: {str(error).splitlines()[0]}') from error
    for old in saved_states(folder)[keep:]:
        old.unlink()
    return file


def read_state(file: Path) -> dict[str, Any]:
    """A state from its file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        check_growth(file, unpacked_size(file))
        state = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # torn files raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'{file} cannot be read: {reason}') from error
    if not isinstance(state, dict) or 'position' not in state:
        raise CheckpointError(f'{file} is no state of a training run')
    return state


def load_state(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state that can be read, None where there is none; and what was wrong with those passed over.

    Raises:
        CheckpointError: if states are there and none can be read.
    """
    wrong: list[str] = []
    for file in saved_states(folder):
        try:
            return read_state(file), wrong
        except CheckpointError as error:
            wrong.append(str(error))
    if wrong:
        raise CheckpointError('no state can be read: ' + '; '.join(wrong))
    return None, []


@lru_cache(maxsize=1)  # of what was loaded, and states may be saved every step
def git_revision() -> str | None:
    """The commit of the sources that run, '+' behind it where they were changed; None outside of a repository."""
    here = Path(__file__).parent
    if not (here.parents[2] / '.git').exists() or not shutil.which('git'):
        return None
    done = subprocess.run(
        ['git', '-C', str(here), 'describe', '--always', '--dirty=+', '--abbrev=40', '--match='],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None
