"""Small trained models that come with the package: model folders named MODEL.DATA, as t2t_vit_6_64.imagenette."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / 'shipped'
PARTS = ('model.safetensors', 'config.json')


def shipped() -> dict[str, Path]:
    """Return the folders of the models by name."""
    return {path.name: path for path in sorted(FOLDER.glob('*.*')) if all((path / part).exists() for part in PARTS)}


def compared() -> list[str]:
    """Return the names of a ResNet, a ViT and a T2T-ViT of about the same size, as in the paper's Fig. 2."""
    return [next(name for name in shipped() if name.startswith(kind)) for kind in ('resnet', 'vit', 't2t_vit')]


def locate(checkpoint: str) -> str:
    """Return the folder of a shipped model if this is its name and no such path exists, else the text unchanged."""
    folder = shipped().get(checkpoint)
    return str(folder) if folder and not Path(checkpoint).exists() else checkpoint


def shipped_cfgs(model: str) -> dict[str, dict[str, Any]]:
    """Return timm's configuration of the shipped weights of a registered model, by MODEL.DATA."""
    found = {}
    for name, folder in shipped().items():
        config = json.loads((folder / 'config.json').read_text('utf-8'))
        if name.partition('.')[0] == model == config['architecture']:
            names = config.get('label_names')
            cfg = {key: as_tuple(value) for key, value in config['pretrained_cfg'].items() if key != 'tag'}
            found[name] = {**cfg, 'label_names': names, 'file': str(folder / 'model.safetensors'), 'custom_load': True}
    return found


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, as timm's configurations have them, other values unchanged."""
    return tuple(value) if isinstance(value, list) else value
