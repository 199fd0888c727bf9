"""The fixed position table (Sec. 3.2), and the same table for another grid."""

import torch
from timm.layers import resample_abs_pos_embed


def sinusoid_table(positions: int, dim: int) -> torch.Tensor:
    """Return sin and cos of position / 10000^(2i/D), alternating over channels: (1, positions, D), default dtype."""
    rates = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * rates
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :dim]
    return table.to(torch.get_default_dtype())


def resample_positions(table: torch.Tensor, height: int, width: int, old_height: int, old_width: int) -> torch.Tensor:
    """Resample a table to another grid, bicubic: (1, 1 + old_h·old_w, D) -> (1, 1 + h·w, D); the first row stays."""
    # in exported graphs dynamic sizes are no integers, and comparing them would fix them
    if isinstance(height, int) and isinstance(width, int) and height == old_height and width == old_width:
        return table
    return resample_abs_pos_embed(table, [height, width], [old_height, old_width])
