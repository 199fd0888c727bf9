"""The fixed position table (Sec. 3.2), one for rows and columns, and the same table for another grid."""

import math

import torch
from timm.layers import resample_abs_pos_embed


def sinusoid_table(positions: int, dim: int) -> torch.Tensor:
    """Return sin and cos of position / 10000^(2i/D), alternating over channels: (1, positions, D), default dtype."""
    rates = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :dim]
    return table.to(torch.get_default_dtype())


def grid_table(height: int, width: int, dim: int) -> torch.Tensor:
    """Return sin and cos of the row, then of the column, half of the channels each: (1, h·w, D), default dtype.

    The wavelengths of an axis rise geometrically from 4 positions to 4 times the side, so that near positions are
    similar in every channel and no two of the grid are the same. Channels that do not divide by 4 stay 0.
    """
    count, table = dim // 4, torch.zeros(height, width, dim, dtype=torch.float64)
    for axis, side in enumerate((height, width)):
        rates = math.pi / 2 * side ** -torch.linspace(0, 1, count, dtype=torch.float64)
        angles = torch.arange(side).unsqueeze(1) * rates
        values = torch.cat([angles.sin(), angles.cos()], dim=-1)
        table[..., axis * 2 * count : (axis + 1) * 2 * count] = values.unsqueeze(1 - axis)
    return table.flatten(0, 1).unsqueeze(0).to(torch.get_default_dtype())


def resample_positions(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    """Resample a table to another grid, bicubic: (1, 1 + old_h·old_w, D) -> (1, 1 + h·w, D); the first row stays."""
    # in exported graphs dynamic sizes are no integers, and comparing them would fix them
    if isinstance(height, int) and isinstance(width, int) and height == old_height and width == old_width:
        return table
    return resample_abs_pos_embed(table, [height, width], [old_height, old_width])
