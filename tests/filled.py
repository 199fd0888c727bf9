"""Inputs for comparisons (weights by the rule of golden/README.md, hard images), and how far two results are apart."""

import math
import zlib

import numpy as np
import torch


def fill(module, seed=7):
    """Fill every parameter but the position table from its name."""
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        z = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
        if not tensor.is_floating_point():  # batch norm's counter
            continue
        if 'norm' in name and name.endswith(('weight', 'running_var')):
            z = 1 + 0.1 * z
        elif name.endswith('.w'):
            z = 0.5 * z
        elif len(shape) >= 2:
            z = z / math.prod(shape[1:]) ** 0.5
        else:
            z = 0.1 * z
        if name != 'pos_embed':
            tensor.copy_(torch.from_numpy(z))
    return module


def relative_error(ours, expected):
    """Return ‖ours - expected‖ / ‖expected‖; 0 if both are zero."""
    ours, expected = ours.detach().double(), expected.detach().double()
    difference = (ours - expected).norm().item()
    return difference and difference / expected.norm().item()


HARD_WINDOWS = ['flat', 'halves', 'halves with noise', 'nearly flat', 'huge', 'one bright channel', 'faint', 'zero']


def hard_windows(kind):
    """Return an image (1, 3, 64, 64) whose windows are hard to normalise."""
    flat = torch.full((1, 3, 64, 64), 2.6)
    noise = torch.randn_like(flat)
    images = {
        'flat': flat,
        'nearly flat': flat + 1e-3 * noise,
        'huge': 100 * noise,
        'faint': 1e-4 * noise,
        'zero': torch.zeros_like(flat),
        'halves': flat.clone(),
        'halves with noise': flat + 3e-3 * noise,
        'one bright channel': flat + 1e-4 * noise,
    }[kind]
    if kind.startswith('halves'):
        images[..., 32:] -= 4.7
    if kind == 'one bright channel':
        images[:, 1] -= 5
    return images
