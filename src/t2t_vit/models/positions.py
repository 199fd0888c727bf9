"""The fixed position table (Sec. 3.2), and the same for another grid."""

import torch
from timm.layers import register_notrace_function, resample_abs_pos_embed

_asks = getattr(torch.compiler, 'is_exporting', None)  # torch 2.6 cannot say


def is_exporting() -> bool:
    """Whether torch.export is tracing."""
    return bool(_asks and _asks())


def sinusoid_table(positions: int, dim: int) -> torch.Tensor:
    """sin and cos of position / 10000^(2i/D), alternating; (1, positions, D)."""
    rates = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :dim].float()


@register_notrace_function  # FX does not look inside: what it does depends on sizes
def resample(table: torch.Tensor, new: tuple[int, int], old: tuple[int, int]) -> torch.Tensor:
    """The table (1, 1 + h·w, D) of a grid for another one, bicubic; the class token's row stays.

    In a graph that is exported it is two products with the interpolation's matrices, the same numbers: torch's own
    operator, with antialiasing, is one that other runtimes have not, or have with another kernel.
    """
    if torch.jit.is_scripting():  # alone in its line, or TorchScript reads what follows
        return resample_abs_pos_embed(table, [new[0], new[1]], [old[0], old[1]])
    if not is_exporting():
        return resample_abs_pos_embed(table, [new[0], new[1]], [old[0], old[1]])
    if isinstance(new[0], int) and isinstance(new[1], int) and new == tuple(old):  # not so where a size is dynamic
        return table
    rows, columns = cubic_matrix(new[0], old[0], table.device), cubic_matrix(new[1], old[1], table.device)
    grid = table[0, 1:].float().unflatten(0, (old[0], old[1]))  # (h, w, D)
    grid = (rows @ grid.flatten(1)).unflatten(1, (old[1], -1))
    grid = (columns @ grid).flatten(0, 1)
    return torch.cat([table[:, :1], grid.unsqueeze(0).to(table.dtype)], dim=1)


def cubic_matrix(new: int, old: int, device: torch.device) -> torch.Tensor:
    """Bicubic interpolation with antialiasing along one axis, as a matrix (new, old)."""
    places = torch.arange(1, new + 1, device=device)
    scale = old / places[-1].float()  # not old / new: a dynamic size is no number that every runtime can divide by
    centres = (places.float() - 0.5) * scale
    distance = (torch.arange(old, device=device) + 0.5 - centres.unsqueeze(1)).abs() / scale.clamp(min=1)
    near = (1.5 * distance - 2.5) * distance.square() + 1  # Keys' kernel, a = -0.5
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
    return weights / weights.sum(1, keepdim=True)
