"""Weights by a rule that any implementation can follow, see golden/README.md, and how far two results are apart."""

import math
import zlib

import numpy as np
import torch


def fill(module, seed=7):
    """Fill every parameter but the position table from its name."""
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        z = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
        if 'norm' in name and name.endswith('weight'):
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
