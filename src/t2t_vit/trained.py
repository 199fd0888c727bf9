"""Save and load a trained model: weights, architecture, preprocessing and class names, as timm and the Hub store them.

A model folder holds `model.safetensors`, `config.json` and `README.md` (the model card). timm (`local-dir:FOLDER`),
transformers (`AutoModelForImageClassification`, `pipeline`) and the Hugging Face Hub read it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import nn

from .custom import UntrustedCodeError, refuse_code
from .data import Preprocessing
from .integrity import KEY as DIGEST
from .integrity import check_seal, has_digest, seal
from .models.checkpoints import convert_state_dict, few
from .models.listing import build_from_file, check_name
from .models.lora import merge_adapters
from .models.safe_load import CheckpointError, read_checkpoint, save_weights
from .models.shipped import locate
from .models.variants import VARIANTS
from .settings import UsageError

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'


class Trained(NamedTuple):
    """A trained model in evaluation mode.

    `names` are its classes in the order of its outputs, numbers if the checkpoint names none (`named` is false).
    `natural` is true for a checkpoint of timm's train.py, which sorts class folders in natural order (2 before 10).
    """

    net: nn.Module
    preprocessing: Preprocessing
    names: list[str]
    named: bool
    natural: bool


def save_folder(model: nn.Module, folder: Path, model_args: dict[str, Any], card: str | None = None) -> None:
    """Write weights, config.json and model card into `folder`; each file is written under another name and renamed.

    Args:
        model: A model that timm built; its pretrained_cfg holds preprocessing and class names.
        folder: An existing folder.
        model_args: Arguments that the model was built with, except its name and what pretrained_cfg says.
        card: The text of README.md.

    Raises:
        OSError: if the files cannot be written, as on a full disk; the previous files stay.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix='.draft-') as draft:
        config = Path(draft) / CONFIG
        try:
            save_for_hf(model, draft, model_args=model_args, safe_serialization=True)
            config.write_text(
                json.dumps(seal(complete(json.loads(config.read_text('utf-8')), model)), indent=2), 'utf-8'
            )
            tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
            save_weights(tensors, Path(draft) / WEIGHTS, {DIGEST: hash_tensors(tensors)})
        except SafetensorError as error:  # safetensors wraps the error of the file system
            raise OSError(f'the model cannot be written to {folder}: {error}') from error
        if card is not None:
            (Path(draft) / CARD).write_text(card, encoding='utf-8')
        for name in (WEIGHTS, CONFIG) + ((CARD,) if card is not None else ()):
            os.replace(Path(draft) / name, folder / name)


def complete(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return timm's config.json in the form that every released timm and transformers reads.

    Class names stand at the top level. `model_args` do not repeat `num_classes`, which transformers passes by itself,
    and hold image size and channels, which transformers does not take from pretrained_cfg.
    """
    cfg, args = config['pretrained_cfg'], config.get('model_args', {})
    names = config.pop('label_names', None) or cfg.pop('label_names', None)
    args = {key: value for key, value in args.items() if key != 'num_classes'}
    if config['architecture'] in VARIANTS:
        height, width = cfg['input_size'][1:]
        args = {'in_chans': cfg['input_size'][0], 'img_size': [height, width], **args}
    return {
        **config,
        'num_classes': model.num_classes,
        **({'label_names': names} if names else {}),
        **({'model_args': args} if args else {}),
        'pretrained_cfg': {**cfg, 'num_classes': model.num_classes},
    }


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all names, types, shapes and values: the same for the same weights in any file."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def hash_weights(model: nn.Module) -> str:
    """Return `hash_tensors` of a model's state dict."""
    return hash_tensors(model.state_dict())


def check_folder(path: Path) -> None:
    """Raise CheckpointError unless the folder holds a trained model."""
    missing = [name for name in (WEIGHTS, CONFIG) if not (path / name).exists()]
    if missing:
        raise CheckpointError(f'{path} is not the folder of a trained model: it has no {" and no ".join(missing)}')


def from_pretrained(source: str, **kwargs: Any) -> Any:
    """Load a trained model by timm: from a run folder, `hf-hub:USER/NAME` or `local-dir:FOLDER`.

    `kwargs` go to `timm.create_model`, for example `num_classes` for another head.

    Raises:
        CheckpointError: if the folder holds no model.
    """
    source = locate(source)
    if not source.startswith('hf-hub:'):
        check_folder(Path(source.removeprefix('local-dir:')))
        source = f'local-dir:{source.removeprefix("local-dir:")}'
    return timm.create_model(source, pretrained=True, **kwargs)


def load_trained(checkpoint: str, model: str | None = None, ema: bool = True) -> Trained:
    """Load a trained model.

    Args:
        checkpoint: A run folder, `hf-hub:USER/NAME`, a `model.safetensors` with its config.json beside it, a training
            state (`checkpoints/step-*.pt`), a model of the package (see `models.shipped`), or a file in any published
            layout.
        model: The registered name, with its tag if it has one; needed for a file without a config.json.
        ema: Take the EMA weights if the file has them, else the raw weights.

    Raises:
        CheckpointError: if there is no such model in it.
        ValueError: if no model has this name.
    """
    checkpoint = locate(checkpoint)
    path = Path(checkpoint.removeprefix('local-dir:'))
    if checkpoint.startswith('hf-hub:'):
        return describe(from_pretrained(checkpoint))
    if path.is_dir():
        check_folder(path)
        return build_trained(path / CONFIG, read_config(path / CONFIG), path / WEIGHTS, ema)
    if not path.exists():
        raise CheckpointError(f'no checkpoint at {path}; expected a run folder, a file, or hf-hub:USER/NAME')
    if model is not None:
        check_name(model)
        net, _ = build_from_file(model, path, ema)
        return describe(net, natural=is_from_timm(read_checkpoint(path)))
    folder = path.parent.parent if path.parent.name == 'checkpoints' else path.parent
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f'{path} is a file of weights, and there is no {folder / CONFIG} that describes its model: '
            'name the model with --model NAME'
        )
    return build_trained(folder / CONFIG, read_config(folder / CONFIG), path, ema)


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        config = json.loads(path.read_text('utf-8'))
        assert isinstance(config['architecture'], str) and isinstance(config['pretrained_cfg'], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise CheckpointError(f'{path} is not the configuration of a model: {few([repr(error)])}') from None
    if 'transformers_version' not in config:  # transformers keeps the digest when it writes other content
        try:
            check_seal(config)
        except ValueError as error:
            raise CheckpointError(f'{path}: {error}') from None
    return config


def build_trained(place: Path, config: dict[str, Any], weights: Path, ema: bool) -> Trained:
    """Build the model that a config.json (read from `place`) describes, with the weights of a file.

    Raises:
        CheckpointError: if something is missing, damaged, or does not belong together.
        UntrustedCodeError: if the configuration names code to execute.
    """
    try:
        refuse_code(config.get('model_args', {}), str(place))
        state_dict = read_weights(weights, ema)
        with torch.device('meta'):  # nothing is allocated before the weights are known to fit
            draft = create(config)
        if config['architecture'] in VARIANTS:
            state_dict = convert_state_dict(state_dict, draft)
        if missing := [name for name in draft.state_dict() if name not in state_dict]:
            raise CheckpointError(
                f'{weights} is not of {config["architecture"]} with {draft.num_classes} classes: {few(missing)} missing'
            )
        net = create(config)
        net.load_state_dict(state_dict)
        return describe(net)
    except UntrustedCodeError:
        raise
    except CheckpointError as error:
        known = str(place.parent) in str(error)
        raise CheckpointError(str(error) if known else f'{weights}: {error}') from None
    except Exception as error:  # timm and the model raise many kinds for damaged settings
        raise CheckpointError(
            f'{weights} does not fit the model that {place} describes: {type(error).__name__} {few([str(error)])}'
        ) from error


def create(config: dict[str, Any]) -> Any:
    """Build the model of a config.json by timm, with random weights."""
    cfg = {**config['pretrained_cfg'], 'num_classes': config.get('num_classes')}
    cfg['num_classes'] = cfg['num_classes'] or config['pretrained_cfg'].get('num_classes', 1000)
    if config.get('label_names'):
        cfg['label_names'] = config['label_names']
    args = {'num_classes': cfg['num_classes'], **config.get('model_args', {})}
    return timm.create_model(config['architecture'], pretrained=False, pretrained_cfg=cfg, **args)


def read_weights(path: Path, ema: bool) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a file; of a training state the EMA or the raw weights.

    Raises:
        CheckpointError: if the file is damaged, or its tensors are not those that were saved.
    """
    checkpoint = read_checkpoint(path)
    if 'position' in checkpoint:  # a training state
        if ema and 'ema' in checkpoint:
            return merge_adapters(checkpoint['ema'])
        task = checkpoint['model']
        return merge_adapters(
            {name.removeprefix('net.'): tensor for name, tensor in task.items() if name.startswith('net.')}
        )
    if path.suffix == '.safetensors':
        with safe_open(path, 'pt') as file:
            stated = file.metadata() or {}
        if has_digest(stated) and stated.get(DIGEST) != hash_tensors(checkpoint):
            raise CheckpointError(f'{path} is damaged: its tensors do not have the SHA-256 that it states')
    return checkpoint


def is_from_timm(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether timm's train.py wrote a checkpoint: it sorts class folders in natural order."""
    return {'arch', 'version', 'state_dict'} <= set(checkpoint)


def describe(net: Any, natural: bool = False) -> Trained:
    """Return what `load_trained` returns, for a model that timm built."""
    names = class_names(net)
    if len(names) != net.num_classes or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'label_names must be {net.num_classes} names, one a class, got {few(map(str, names))}')
    return Trained(net.eval(), Preprocessing.of(net.pretrained_cfg), names, has_names(net), natural)


def has_names(net: nn.Module) -> bool:
    """Return whether a model's configuration names its classes."""
    return bool(getattr(net, 'pretrained_cfg', {}).get('label_names'))


def class_names(net: nn.Module) -> list[str]:
    """Return the class names of a model's configuration, or numbers if there are none."""
    cfg = getattr(net, 'pretrained_cfg', {})
    return list(cfg.get('label_names') or map(str, range(int(getattr(net, 'num_classes', 0)))))


def spoken_names(names: list[str]) -> list[str]:
    """Return class names for people: ImageNet-1k's, by timm's list, for 1000 classes without names.

    The first word of each synset; where two synsets have the same word (two kinds of crane), with the synset's number.
    """
    if names != [str(i) for i in range(1000)]:
        return names
    info = ImageNetInfo()
    words = [description.partition(',')[0] for description in info.label_descriptions()]
    return [f'{word} ({synset})' if words.count(word) > 1 else word for word, synset in zip(words, info.label_names())]


def note_on_names(named: bool, names: list[str], outputs: list[str]) -> str:
    """Return a sentence about class names that were assumed; empty if the checkpoint names its classes.

    Args:
        named: True if the checkpoint or the user names the classes.
        names: What is printed for the classes.
        outputs: The names in the checkpoint, numbers if it has none.
    """
    if named:
        return ''
    if names != outputs:
        return 'the checkpoint names no classes; the names are those of ImageNet-1k, by the number of classes'
    return 'the checkpoint names no classes; numbers are the positions of its outputs (--classes FILE names them)'


def nonfinite_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]


def pick_device(device: str) -> torch.device:
    """Return a device by its name; `auto` is the accelerator if there is one.

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
