"""Encode the same image or the same weights in different ways; every encoding must give the same answer.

These are the oracles of the fuzz run: an input that only looks different must not be refused, and an input whose damage
the format can detect (by a checksum) must give the answer of the undamaged one or be refused.
"""

import argparse
import hashlib
import io
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

MODES = {  # modes and the lossless formats that store them
    'RGB': ('png', 'bmp', 'tiff', 'webp', 'ppm'),
    'L': ('png', 'bmp', 'tiff', 'ppm', 'gif'),
    'P': ('png', 'bmp', 'tiff', 'gif'),
    'RGBA': ('png', 'tiff', 'webp'),
    'LA': ('png',),
    '1': ('png', 'tiff', 'ppm'),
}
ORIENTED = ('png', 'tiff', 'webp')  # formats with EXIF
INVERSE = {  # how a camera stores an upright picture, by the value of the orientation tag
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
LAYOUTS = ('plain', 'prefixed', 'shuffled', 'double', 'release', 'net', 'model', 'state_dict', 'safetensors')


def encode_image(pixels: np.ndarray, mode: str, format: str, orientation: int = 1) -> tuple[bytes, np.ndarray]:
    """Encode pixels without loss.

    Args:
        pixels: Four channels, (H, W, 4) uint8: colour and opacity.
        mode: A key of MODES. L and 1 take the first channel, P at most 64 colours of it.
        format: A format of that mode.
        orientation: Value of the EXIF tag; formats without EXIF ignore it.

    Returns:
        The file, and the RGB pixels (H, W, 3) that a viewer shows on white.
    """
    opacity = np.where(pixels[..., 3:] > 127, 255, 0).astype(np.uint8)
    grey = pixels[..., :1]
    if mode == '1':
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
    colour = pixels[..., :3] if mode in ('RGB', 'RGBA') else np.repeat(grey // 4 * 4 if mode == 'P' else grey, 3, 2)
    shown = np.where(opacity > 0, colour, 255).astype(np.uint8) if mode in ('RGBA', 'LA') else colour
    stored = {
        'RGB': lambda: Image.fromarray(colour),
        'L': lambda: Image.fromarray(grey[..., 0]),
        'P': lambda: Image.fromarray(colour).quantize(64, dither=Image.Dither.NONE),
        'RGBA': lambda: Image.fromarray(np.concatenate([colour, opacity], 2)),
        'LA': lambda: Image.merge('LA', [Image.fromarray(grey[..., 0]), Image.fromarray(opacity[..., 0])]),
        '1': lambda: Image.fromarray(grey[..., 0]).convert('1'),
    }[mode]()
    if mode == 'P':  # the quantiser may merge colours: what it stored is what a viewer shows
        shown = np.asarray(stored.convert('RGB'))
    options: dict[str, Any] = {'lossless': True, 'exact': True} if format == 'webp' else {}
    if format in ORIENTED and orientation != 1:
        stored = stored.transpose(INVERSE[orientation])
        exif = Image.Exif()
        exif[0x0112] = orientation
        options['exif'] = exif
    stored.save(file := io.BytesIO(), format, **options)
    return file.getvalue(), shown


def random_image(rng: random.Random) -> tuple[bytes, str, str, np.ndarray]:
    """Return a random encoded image, its format, a description, and the RGB pixels that a viewer shows."""
    size = rng.randrange(2, 40), rng.randrange(2, 40), 4
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size)
    mode = rng.choice([*MODES])
    format, orientation = rng.choice(MODES[mode]), rng.randrange(1, 9)
    content, shown = encode_image(pixels, mode, format, orientation)
    return content, format, f'{mode} as {format}, orientation {orientation}', shown


def encode_weights(weights: dict[str, torch.Tensor], layout: str, rng: random.Random, old: bool = False) -> bytes:
    """Write the same weights in one of LAYOUTS; `old` writes torch's format before 1.6."""
    if layout == 'safetensors':
        return save_safetensors(weights)
    shuffled = rng.sample(sorted(weights), len(weights))
    tree: Any = {
        'plain': lambda: weights,
        'prefixed': lambda: {f'module.{key}': value for key, value in weights.items()},
        'shuffled': lambda: {key: weights[key] for key in shuffled},
        'double': lambda: {key: value.double() for key, value in weights.items()},
        'release': lambda: {'state_dict_ema': weights, 'state_dict': {}, 'args': argparse.Namespace(lr=1)},
        'net': lambda: {'net': {f'module.{key}': value for key, value in weights.items()}},
        'model': lambda: {'model': weights, 'epoch': 3},
        'state_dict': lambda: {'state_dict': weights},
    }[layout]()
    torch.save(tree, file := io.BytesIO(), _use_new_zipfile_serialization=not old)
    return file.getvalue()


def digest(values: Any) -> str:
    """Return a digest of an array, a tensor, or a dict of tensors."""
    items = sorted(values.items()) if isinstance(values, dict) else [('', values)]
    found = hashlib.sha256()
    for key, value in items:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        found.update(f'{key} {array.shape} {array.dtype} '.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
