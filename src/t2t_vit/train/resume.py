"""Where a run starts from: its own last state, a given state, or the beginning; and whether it may."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate.utils import gather_object

from ..data import SPLIT_FILE
from ..settings import Setting, UsageError, flatten, read_settings
from ..trained import WEIGHTS
from .config import Config
from .log import METRICS
from .state import Position, config_of, load_state, read_state, saved_states, settings_of
from .upgrade import upgrade

# settings that may differ between the processes of one run
PER_HOST = (
    'output',
    'weights',
    'device',
    'threads',
    'data.root',
    'data.cache',
    'data.download',
    'data.workers',
    'data.timeout',
    'objective.labels',
)
# settings that a resumed run may change
CHANGEABLE = (
    *PER_HOST,
    'epochs',
    'minutes',
    'val_interval',
    'patience',
    'grad_accum_steps',
    'save_minutes',
    'keep',
    'max_skipped_steps',
    'trackers',
)


def differences(one: str, other: str, ignored: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings in which two configurations (YAML) differ, with both values; those in `ignored` left out."""
    first, second = (
        {key: value for key, value in flatten(yaml.safe_load(text)) if value not in ({}, [])} for text in (one, other)
    )
    yield from (
        (key, first.get(key), second.get(key))
        for key in {**first, **second}
        if key not in ignored and first.get(key) != second.get(key)
    )


def check_same_run(configs: Sequence[Config], state: dict[str, Any], path: Path) -> None:
    """Check that a state belongs to a run with one of these configurations.

    Raises:
        UsageError: naming every setting that differs from the last of them and may not.
    """
    saved = config_of(state)
    changed = [list(differences(saved, config.to_yaml(), CHANGEABLE)) for config in configs]
    if all(changed):
        raise UsageError(
            '\n'.join(f'{key} is {old} in {path}, and cannot become {new} there' for key, old, new in changed[-1])
        )


def check_same_start(config: Config, state: dict[str, Any] | None) -> None:
    """Check that all processes start from the same step with the same configuration.

    Raises:
        UsageError: in every process, if one differs from the first.
    """
    where = state['position'] if state else asdict(Position())
    (first, step), *others = gather_object([(config.to_yaml(), (where['epoch'], where['step']))])
    for rank, (text, other) in enumerate(others, 1):
        if other != step:
            raise UsageError(
                f'ranks disagree on the start step: rank 0 starts in epoch {step[0] + 1}, step {step[1] + 1}, '
                f'rank {rank} in epoch {other[0] + 1}, step {other[1] + 1}; '
                'output must be a folder that all hosts share'
            )
        for key, one, two in differences(first, text, PER_HOST):
            raise UsageError(f'ranks are configured differently: {key} is {one} in rank 0 and {two} in rank {rank}')


def find_split(folder: Path, resume: str | None) -> Path:
    """Return the file that keeps the division of a continued run: its own, or that of the run of a given state file."""
    own = folder / SPLIT_FILE
    return (
        own
        if own.exists() or not resume or not Path(resume).is_file()
        else Path(resume).resolve().parent.parent / SPLIT_FILE
    )


class Start(NamedTuple):
    """The state that a run continues from, None for a new run; where it was read; and notes for the user."""

    state: dict[str, Any] | None
    path: Path
    notes: list[str]


def find_start(folder: Path, resume: str | None) -> Start:
    """Find the state that a run continues from.

    The first of these that exists: the last readable state of its own folder, the state file given by `resume`.

    Raises:
        UsageError: if the folder holds a run that was not asked for, or none that was; or a model that would be lost.
    """
    source = folder / 'checkpoints'
    if not resume and (saved_states(source) or (folder / WEIGHTS).exists()):
        raise UsageError(f'{folder} holds a run: continue it with --resume {folder}, or choose another output')
    state, notes = load_state(source)
    metrics = folder / METRICS  # empty if a run was killed between its first model and its first state
    if state is None and (folder / WEIGHTS).exists() and not (metrics.exists() and not metrics.stat().st_size):
        raise UsageError(
            f'{folder} holds a model but no state of its run to resume from: choose another output, '
            f'with --weights {folder} to start from that model'
        )
    if state is None and resume and resume != 'auto':
        if not Path(resume).is_file():
            raise UsageError(f'{resume} holds no state to resume from')
        state, source = read_state(Path(resume)), Path(resume)
        state['position'].update(best=0.0, since_best=0)  # the best model of the other run is in its folder, not here
    return Start(state, source, [f'skipped   {note}' for note in notes] + (state['notes'] if state else []))


def saved_settings(path: Path) -> list[Setting]:
    """Read the configuration of a run folder or a state file, for this version; without `weights` and `output`.

    A folder's newest state has the configuration, its config.yaml only if there is no state.

    Raises:
        UsageError: if there is no configuration.
        CheckpointError: if no state can be read.
    """
    state = read_state(path) if path.is_file() else load_state(path / 'checkpoints')[0]
    settings = settings_of(state, str(path)) if state else upgrade(read_settings(path / 'config.yaml'))[0]
    # a folder may have moved; a budget was for the run that had it
    return [setting for setting in settings if setting.key not in ('weights', 'output', 'minutes')]
