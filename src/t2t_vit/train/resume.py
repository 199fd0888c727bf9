"""Where a run starts from: its own last state, a given state, or the beginning; and whether it may."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import gather_object

from ..settings import UsageError, flatten
from ..trained import WEIGHTS
from .config import Config
from .log import METRICS
from .state import Position, load_state, read_state, saved_states

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
    'objective.labels',
)
# settings that a resumed run may change
CHANGEABLE = (*PER_HOST, 'epochs', 'accumulate', 'save_minutes', 'keep', 'max_skips', 'trackers')


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


def check_same_run(config: Config, state: dict[str, Any], path: Path) -> None:
    """Check that a state belongs to a run with this configuration.

    Raises:
        UsageError: naming every setting that differs and may not.
    """
    if changed := [
        f'{key} is {saved} in {path}, and cannot become {asked} there'
        for key, saved, asked in differences(state['config'], config.to_yaml(), CHANGEABLE)
    ]:
        raise UsageError('\n'.join(changed))


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


def find_start(config: Config, folder: Path, resume: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Find the state that a run continues from, None for a new run; and notes for the user.

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
    if state is not None:
        check_same_run(config, state, source)
    return state, [f'skipped   {note}' for note in notes]
