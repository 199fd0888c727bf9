"""A trained model as a folder: weights, architecture, preprocessing and class names, as timm and the Hub keep them."""

import os
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from .data import Preprocessing
from .models.checkpoints import CheckpointError, count_classes, load_weights
from .models.listing import check_name
from .settings import UsageError

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'


def save_folder(model: nn.Module, folder: Path, model_args: Dict[str, Any]) -> None:
    """Write a model's weights and configuration into `folder`, each beside and renamed; `local-dir:` loads it.

    `model_args` are what it was built with, besides its name and what its pretrained_cfg says.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix='.') as draft:
        save_for_hf(model, draft, model_args=model_args, safe_serialization=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(draft) / name, folder / name)


def load_model(checkpoint: str, model: Optional[str] = None) -> Tuple[nn.Module, Preprocessing, List[str]]:
    """A trained model in evaluation mode, its preprocessing, and its class names (numbers where they are unknown).

    Args:
        checkpoint: A run's folder, `hf-hub:USER/NAME`, or a file in any published layout.
        model: The registered name, with its tag if it has one; needed for a file.

    Raises:
        CheckpointError: if there is no such model in it.
        ValueError: if no model has this name.
    """
    path = Path(checkpoint)
    if checkpoint.startswith('hf-hub:'):
        net = timm.create_model(checkpoint, pretrained=True)
    elif path.is_dir():
        missing = [name for name in (WEIGHTS, CONFIG) if not (path / name).exists()]
        if missing:
            raise CheckpointError(f'{path} is not the folder of a trained model: it has no {" and no ".join(missing)}')
        net = timm.create_model(f'local-dir:{path}', pretrained=True)
    elif not path.exists():
        raise CheckpointError(f'no checkpoint at {path}; expected a run folder, a file, or hf-hub:USER/NAME')
    elif model is None:
        raise CheckpointError(f'{path} is a file of weights: say which model it is of with --model NAME')
    else:
        check_name(model)
        net = timm.create_model(model, num_classes=count_classes(path))
        load_weights(net, str(path))
    cfg = net.pretrained_cfg
    names = list(cfg.get('label_names') or map(str, range(net.num_classes)))
    return net.eval(), Preprocessing.of(cfg), names


def pick_device(device: str) -> torch.device:
    """`auto` for the accelerator if there is one.

    Raises:
        UsageError: if there is no such device.
    """
    if device == 'auto':
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return best or torch.device('cpu')
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise UsageError(f'no device {device!r} here: {str(error).splitlines()[0]}') from None
