"""A run's state on disk: written beside and renamed, the one before kept."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from ..models.checkpoints import CheckpointError

LAST, BEFORE = 'last.pt', 'before.pt'


@dataclass
class Position:
    """Where a run is: the next step of an epoch, counted from 0, and what was summed in it so far."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best: float = 0.0


def save_state(folder: Path, state: Dict[str, Any]) -> Path:
    """Write the state into `folder`; the last one becomes the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / (LAST + '.new')
    torch.save(state, draft)
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / BEFORE)
    os.replace(draft, folder / LAST)
    return folder / LAST


def load_state(folder: Path) -> Optional[Dict[str, Any]]:
    """The last state that can be read; None where there is none.

    Raises:
        CheckpointError: if states are there and none can be read.
    """
    errors = []
    for name in (LAST, BEFORE):
        if (folder / name).exists():
            try:
                return torch.load(folder / name, map_location='cpu', weights_only=True)
            except Exception as error:  # torn files raise many kinds
                errors.append(f'{folder / name}: {str(error).splitlines()[0]}')
    if errors:
        raise CheckpointError('no state can be read: ' + '; '.join(errors))
    return None
