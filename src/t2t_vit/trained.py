"""A trained model as a folder: weights, architecture, preprocessing and class names, as timm and the Hub keep them."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import nn

from .custom import UntrustedCodeError
from .data import Preprocessing
from .models.checkpoints import CheckpointError, convert_state_dict, few, read_checkpoint
from .models.listing import build_from_file
from .models.t2t_vit import VARIANTS
from .settings import UsageError

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


def save_folder(model: nn.Module, folder: Path, model_args: dict[str, Any], card: str | None = None) -> None:
    """Write a model's weights and configuration into `folder`, each beside and renamed; `local-dir:` loads it.

    `model_args` are what it was built with, besides its name and what its pretrained_cfg says; `card` is its model
    card.

    Raises:
        OSError: if it cannot be written, as on a full disk; what stood there before stays.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix='.') as draft:
        try:
            save_for_hf(model, draft, model_args=model_args, safe_serialization=True)
        except SafetensorError as error:  # in which its writer wraps the system's
            raise OSError(f'the model cannot be written to {folder}: {error}') from error
        if card is not None:
            (Path(draft) / CARD).write_text(card, encoding='utf-8')
        for name in (WEIGHTS, CONFIG) + ((CARD,) if card is not None else ()):
            os.replace(Path(draft) / name, folder / name)


def check_folder(path: Path) -> None:
    """CheckpointError unless a trained model stands in the folder."""
    missing = [name for name in (WEIGHTS, CONFIG) if not (path / name).exists()]
    if missing:
        raise CheckpointError(f'{path} is not the folder of a trained model: it has no {" and no ".join(missing)}')


def from_pretrained(place: str, **kwargs: Any) -> Any:
    """A trained model, by timm: from a run's folder, `hf-hub:USER/NAME` or `local-dir:FOLDER`.

    `kwargs` go to `timm.create_model`, as num_classes for another head.

    Raises:
        CheckpointError: if there is no model in the folder.
    """
    if not place.startswith('hf-hub:'):
        check_folder(Path(place.removeprefix('local-dir:')))
        place = f'local-dir:{place.removeprefix("local-dir:")}'
    return timm.create_model(place, pretrained=True, **kwargs)


def load_model(checkpoint: str, model: str | None = None) -> tuple[nn.Module, Preprocessing, list[str]]:
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
        net = from_pretrained(checkpoint)
    elif path.is_dir() or checkpoint.startswith('local-dir:'):
        return load_folder(Path(checkpoint.removeprefix('local-dir:')))
    elif not path.exists():
        raise CheckpointError(f'no checkpoint at {path}; expected a run folder, a file, or hf-hub:USER/NAME')
    elif model is None:
        raise CheckpointError(f'{path} is a file of weights: say which model it is of with --model NAME')
    else:
        net, _ = build_from_file(model, path)
    return describe(net)


def load_folder(path: Path) -> tuple[nn.Module, Preprocessing, list[str]]:
    """`load_model` of a run's folder, or of one that timm's or the Hub's tools wrote.

    Raises:
        CheckpointError: if something is missing, damaged, or does not belong together.
    """
    check_folder(path)
    try:
        config = json.loads((path / CONFIG).read_text())
        if config['architecture'] in VARIANTS:  # nothing is allocated before the weights are known to fit
            with torch.device('meta'):
                draft = timm.create_model(f'local-dir:{path}')
            found = convert_state_dict(read_checkpoint(path / WEIGHTS), draft)
            if missing := [name for name in draft.state_dict() if name not in found]:
                raise CheckpointError(
                    f'{path / WEIGHTS} is not of {config["architecture"]} with {draft.num_classes} '
                    f'classes: {few(missing)} missing'
                )
        return describe(timm.create_model(f'local-dir:{path}', pretrained=True))
    except UntrustedCodeError:
        raise
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f'{path}: {error}') from None
    except Exception as error:  # whatever timm and the model make of damaged settings
        raise CheckpointError(
            f'{path} does not hold a whole model, see {path / CONFIG}: {type(error).__name__} {few([str(error)])}'
        ) from error


def describe(net: Any) -> tuple[nn.Module, Preprocessing, list[str]]:
    """What `load_model` gives, of a model that timm built."""
    names = class_names(net)
    if len(names) != net.num_classes or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f'label_names are {net.num_classes} names, one for each class, got {few(map(str, names))}'
        )
    return net.eval(), Preprocessing.of(net.pretrained_cfg), names


def class_names(net: nn.Module) -> list[str]:
    """As its configuration has them, or numbers."""
    cfg = getattr(net, 'pretrained_cfg', {})
    return list(cfg.get('label_names') or map(str, range(int(getattr(net, 'num_classes', 0)))))


def has_classes(net: nn.Module, classes: list[str]) -> bool:
    """Whether its outputs may be these classes: the same names in the same order, or as many where it knows none."""
    names = class_names(net)
    return names == classes or len(names) == len(classes) and not net.pretrained_cfg.get('label_names')  # type: ignore


def other_classes(net: nn.Module, classes: list[str], data: str) -> str:
    """What to say of data whose classes the model has not; nothing where it may have them."""
    if has_classes(net, classes):
        return ''
    names = class_names(net)
    return (
        f'the model knows {len(names)} classes ({", ".join(names[:3])}, …), '
        f'{data} has {len(classes)} ({", ".join(classes[:3])}, …)'
    )


def spoken_names(names: list[str]) -> list[str]:
    """Class names for people: of a model for a thousand classes without names, ImageNet-1k's, by timm's list.

    The first word of each synset; where two have the same (two kinds of crane), with the synset's number.
    """
    if names != [str(i) for i in range(1000)]:
        return names
    info = ImageNetInfo()
    words = [description.partition(',')[0] for description in info.label_descriptions()]
    return [f'{word} ({synset})' if words.count(word) > 1 else word for word, synset in zip(words, info.label_names())]


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all tensors with their names: the same for the same weights, whatever file they came in."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


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
