"""A run's state on disk: written beside and renamed, the last few kept, damaged ones skipped."""

import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..models.safe_load import CheckpointError, check_growth, unpacked_size
from ..settings import Setting, UsageError, as_settings, nest, parse_settings
from .upgrade import default_settings, parse_version, upgrade

NAME = re.compile(r'step-(\d+)\.pt')
DRAFT = 'draft'  # where a state is written before it takes its name


@dataclass
class Position:
    """Where a run is: the next step of an epoch, from 0; sums over this epoch so far; and the epochs before.

    `waited` are the seconds waited for images, `skipped` the steps without an update in the whole run, `skipped_here`
    those of this epoch, `in_a_row` those up to now, `since_best` the epochs from the best score to the last validation.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    best: float = 0.0
    since_best: int = 0
    skipped: int = 0
    skipped_here: int = 0
    in_a_row: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def next_epoch(self, record: dict[str, Any], top1: float | None) -> 'Position':
        """Return the start of the next epoch, after one with this record and best score, or None without validation."""
        since_best = self.since_best
        if top1 is not None:
            unseen = sum(1 for _ in takewhile(lambda earlier: 'val_top1' not in earlier, reversed(self.records)))
            since_best = 0 if top1 > self.best else self.since_best + unseen + 1
        return Position(
            epoch=self.epoch + 1,
            best=self.best if top1 is None else max(self.best, top1),
            since_best=since_best,
            skipped=self.skipped,
            in_a_row=self.in_a_row,
            records=[*self.records, record],
        )


def saved_states(folder: Path) -> list[Path]:
    """Return the state files in a folder, the newest first."""
    found = [(int(match[1]), file) for file in folder.glob('*.pt') if (match := NAME.fullmatch(file.name))]
    return [file for _, file in sorted(found, reverse=True)]


def save_state(folder: Path, state: dict[str, Any], step: int, keep: int) -> Path:
    """Write the state after `step` steps into `folder`, and delete all but the last `keep`.

    The file is complete on the disk before it takes its name, and older ones are deleted only when the name is on the
    disk too: whenever the process is killed or the power fails, one complete state exists.

    Raises:
        OSError: if it cannot be written; nothing of it is left then, and the older ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, draft = folder / f'step-{step:08d}.pt', folder / DRAFT
    try:
        with draft.open('wb') as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
        if hasattr(os, 'O_DIRECTORY'):  # Windows cannot open folders
            descriptor = os.open(folder, os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
        draft.unlink(missing_ok=True)
        raise OSError(f'the state cannot be written to {folder}: {str(error).splitlines()[0]}') from error
    for old in saved_states(folder)[keep:]:
        old.unlink()
    return file


def read_state(file: Path) -> dict[str, Any]:
    """Read a state from its file, after a check of every byte against the checksums in it.

    Its configuration (`settings`, by dotted name) and position are translated to this version; `notes` name the fields
    of older versions that were dropped.

    Raises:
        CheckpointError: if it cannot be read, or is damaged.
        UsageError: if a newer version wrote fields that this one does not know.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch itself does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f'{damaged} in it is damaged')
        check_growth(file, unpacked_size(file))
        state = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'{file} cannot be read: {reason}') from error
    if not isinstance(state, dict) or 'position' not in state or 'config' not in state:
        raise CheckpointError(f'{file} is no state of a training run')
    if not isinstance(state['position'], dict) or not all(isinstance(name, str) for name in state['position']):
        raise CheckpointError(f'{file} is damaged: its position must have named fields, got {state["position"]!r:.80}')
    version = state.get('version')
    tree = parse_settings(str(state['config']), str(file))
    settings, notes = upgrade(as_settings(tree, str(file)), version)
    position = known_fields(state['position'], version, file, notes)
    return {
        **state,
        'settings': {setting.key: setting.value for setting in settings},
        'position': position,
        'notes': notes,
    }


def known_fields(position: dict[str, Any], version: str | None, file: Path, notes: list[str]) -> dict[str, Any]:
    """Return the fields of a position that this version knows, by the rule of `upgrade`; add to `notes`."""
    names = {item.name for item in fields(Position)}
    if unknown := sorted(set(position) - names):
        text = f'position.{", position.".join(unknown)} in {file}'
        if parse_version(version or '0') > parse_version(__version__):
            raise UsageError(f'version {version} of t2t-vit wrote {text}: install {version} or a later one')
        notes.append(f'note      {text} is no longer known and is ignored')
    return {key: value for key, value in position.items() if key in names}


def settings_of(state: dict[str, Any], source: str) -> list[Setting]:
    """Return the configuration in a state as settings of this version; `source` is for messages."""
    return [Setting(f'{key} in {source}', key, value, from_file=True) for key, value in state['settings'].items()]


def config_of(state: dict[str, Any]) -> str:
    """Return the configuration in a state as the YAML of this version, with defaults for missing settings."""
    tree: dict[str, Any] = {}
    for key, value in {**default_settings(), **state['settings']}.items():
        nest(tree, key, value)
    return yaml.safe_dump(tree, sort_keys=False)


def load_state(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the newest readable state in a folder.

    Returns:
        The state, None if the folder has none; and what was wrong with newer ones.

    Raises:
        CheckpointError: if there are states and none can be read.
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


def remove_drafts(folder: Path) -> None:
    """Delete what a process that was killed while it saved left in a run folder; only for the one that trains in it."""
    (folder / 'checkpoints' / DRAFT).unlink(missing_ok=True)
    for draft in folder.glob('.draft-*'):
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


@lru_cache(maxsize=1)  # states may be saved every step
def git_revision() -> str | None:
    """Return the commit of these sources, with a '+' if they were changed; None outside of a repository."""
    here = Path(__file__).parent
    if not (here.parents[2] / '.git').exists() or not shutil.which('git'):
        return None
    done = subprocess.run(
        ['git', '-C', str(here), 'describe', '--always', '--dirty=+', '--abbrev=40', '--match='],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None
