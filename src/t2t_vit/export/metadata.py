"""The description of a model inside an exported file, as one JSON text."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..data import DataError, Preprocessing
from ..integrity import STAMP
from ..models.safe_load import CheckpointError, PathLike
from ..settings import nearest

EXPORTED = {'.onnx': 'onnx', '.pt2': 'torch', '.xml': 'openvino'}  # the formats, by suffix
KEY = 't2t_vit'  # of the text in ONNX's metadata_props, OpenVINO's rt_info, the extra files of a .pt2
OUTPUTS = ('logits', 'features')
CHANNELS_LAST = ('uint8-nhwc', 'image')  # the `pixels` of graphs that take (B, H, W, C)

Precision = Literal['float32', 'fp16', 'bf16', 'int8']
Pixels = Literal['float', 'uint8-nchw', 'uint8-nhwc', 'image']


@dataclass
class Metadata:
    """Describe an exported model, its input and its outputs.

    Its input is `images`: normalised float32 (B, C, H, W); with `pixels` uint8-nchw or uint8-nhwc resized and cropped
    images of uint8, (B, C, H, W) or (B, H, W, C), which it normalises; with image one uint8 image of any size,
    (1, H, W, C), which it resizes, crops and normalises. Its outputs are `logits`, (B, classes), and `features`, the
    head's input, (B, D), both float32.
    """

    model: str
    class_names: list[str]
    pretrained_cfg: dict[str, Any]
    precision: Precision
    pixels: Pixels
    batch: int | None  # images at once; None for any number
    size: tuple[int, int] | None  # height and width; None for any
    versions: dict[str, str]
    digest: str = ''  # of .onnx and .xml files, see `integrity.stamp`; a .pt2 has checksums of its own

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the model's input."""
        return Preprocessing.of(self.pretrained_cfg)

    def pixels_of(self, images: torch.Tensor) -> np.ndarray:
        """Return normalised images (B, C, H, W) as the file's input; for uint8 the pixels before normalisation."""
        if self.pixels == 'float':
            return images.float().contiguous().numpy()
        cfg = self.preprocessing
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (cfg.mean, cfg.std))
        images = ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return (images.permute(0, 2, 3, 1) if self.pixels in CHANNELS_LAST else images).contiguous().numpy()

    def to_text(self) -> str:
        """Return the description as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str, path: PathLike) -> 'Metadata':
        """Read the text that `to_text` wrote into the file `path`.

        Raises:
            CheckpointError: if it is anything else.
        """
        if not text:
            raise CheckpointError(f'{path} was not written by `t2t-vit export`: it has no metadata of the key {KEY}')
        try:
            tree = json.loads(text)
            stated = {'digest': tree.get('digest', '')}  # files of version 0.1 have none
            found = cls(**{field.name: tree[field.name] for field in fields(cls) if field.name not in stated}, **stated)
            found.preprocessing  # noqa: B018  # raises for bad values
            good = (
                all(isinstance(name, str) for name in found.class_names)
                and found.precision in get_args(Precision)
                and found.pixels in get_args(Pixels)
                and all(isinstance(n, int) and n > 0 for n in (found.batch or 1, *(found.size or (1, 1))))
                and len(found.size or (1, 1)) == 2
                and (not found.digest or STAMP.fullmatch(found.digest.encode()))
            )
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            raise CheckpointError(f'{path}: its metadata cannot be read: {type(error).__name__} {error}') from error
        if not good:
            raise CheckpointError(f'{path}: its metadata cannot be read: {text[:200]}')
        found.size = (found.size[0], found.size[1]) if found.size else None
        return found


def is_exported(path: PathLike) -> bool:
    """Return whether a path has the suffix of an exported file."""
    return Path(path).suffix in EXPORTED


def files_of(path: PathLike) -> list[Path]:
    """Return an exported file, and the weights beside it for OpenVINO."""
    return [Path(path), *([Path(path).with_suffix('.bin')] if kind(path) == 'openvino' else [])]


def kind(path: PathLike) -> str:
    """Return the format of a file by its suffix: onnx, torch or openvino.

    Raises:
        CheckpointError: for another suffix.
    """
    suffix = Path(path).suffix
    if suffix not in EXPORTED:
        raise CheckpointError(
            f'{path} has no suffix of an exported file{nearest(suffix, EXPORTED)}: '
            'expected .onnx, .pt2 (torch.export) or .xml (OpenVINO)'
        )
    return EXPORTED[suffix]
