"""Attention made visible: exact weights of a layer's queries and keys, and what is made of them.

Layers compute attention without ever writing its weights down (`scaled_dot_product_attention`, the Performer's kernel).
Here they are made again from the same queries and keys, for the rows that are asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ROWS = 1024  # queries at once, where all are needed


class Lattice(NamedTuple):
    """Where a map's cells lie in the image: cell (i, j) is centred at (y + i·down, x + j·right).

    In pixels from the image's top left corner, so that its own first pixel is centred at (0.5, 0.5). Padding moves
    cells: a ResNet's at stride 32 begin at 0.5, those of T2T-ViT's last grid at 1.5, those of 16×16 patches at 8.
    """

    y: float
    x: float
    down: float
    right: float

    @classmethod
    def over(cls, grid: tuple[int, int], size: tuple[int, int]) -> 'Lattice':
        """Cells that tile an image of H×W evenly."""
        down, right = (n / cells for n, cells in zip(size, grid))
        return cls(down / 2, right / 2, down, right)

    def strided(self, kernel: Sequence[float], stride: Sequence[float], shift: Sequence[float]) -> 'Lattice':
        """Cells of a window over these: its size, step, and how many cells it begins before the first, by axis."""
        y, x = ((k - 1) / 2 - before for k, before in zip(kernel, shift))
        return Lattice(self.y + y * self.down, self.x + x * self.right, self.down * stride[0], self.right * stride[1])

    def centre(self, row: int, col: int) -> tuple[float, float]:
        """Of a cell, (y, x)."""
        return self.y + row * self.down, self.x + col * self.right

    def nearest(self, y: float, x: float, grid: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the cell that is centred nearest to a place."""
        row, col = round((y - self.y) / self.down), round((x - self.x) / self.right)
        return min(max(row, 0), grid[0] - 1), min(max(col, 0), grid[1] - 1)

    def extent(self, grid: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of all cells, each reaching half a step around its centre, as imshow takes it."""
        left, top = self.x - self.right / 2, self.y - self.down / 2
        return left, left + grid[1] * self.right, top + grid[0] * self.down, top


@dataclass(eq=False)  # tensors cannot be compared so
class Attention:
    """One layer's attention to one batch of images.

    Of a softmax layer `query` and `key` are its own, and a row of weights is softmax(q·kᵀ·scale + bias). Of a
    Performer they are the random features φ(q) and φ(k) (Sec. 3.1), and a row is φ(q)·φ(k)ᵀ / (φ(q)·Σ φ(k) + eps).
    """

    name: str
    query: torch.Tensor  # (B, n, M, d)
    key: torch.Tensor  # (B, n, N, d)
    value: torch.Tensor  # (B, n, N, d)
    grid: tuple[int, int] | None = None  # (h, w) of the keys; None where they are no whole image, as in windows
    prefix: int = 0  # P, keys in front of the grid's
    lattice: Lattice | None = None  # of the keys' grid; None where there is none, or it was not followed
    query_grid: tuple[int, int] | None = None  # of the queries, which may be more than the keys; None if not a grid
    query_prefix: int = 0  # queries in front of it
    query_lattice: Lattice | None = None
    class_token: bool = False  # whether token 0 is what the model's head reads
    scale: float = 1.0
    bias: torch.Tensor | None = None  # added to the products, broadcast to (B, n, M, N)
    eps: float | None = None  # the Performer's; None for a softmax

    def weights(self, queries: Sequence[int] | None = None) -> torch.Tensor:
        """Rows of the weights, those of `queries` or all: (B, n, M, N), each with the sum 1 (a Performer's nearly).

        Raises:
            IndexError: for a query that there is not.
        """
        q = self.query if queries is None else self.query[:, :, list(queries)]
        if self.eps is not None:
            return q @ self.key.mT / (q @ self.key.sum(-2).unsqueeze(-1) + self.eps)
        products = q @ self.key.mT * self.scale
        if self.bias is not None:
            rows = self.bias if queries is None or self.bias.shape[-2] == 1 else self.bias[..., list(queries), :]
            products = products + rows
        return products.softmax(-1)

    def on_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights without those of prefix tokens, on the grid: (…, N) -> (…, h, w).

        Raises:
            ValueError: if the layer's keys are no grid.
        """
        if self.grid is None:
            raise ValueError(f'the keys of {self.name} are no grid over the whole image')
        return rows[..., self.prefix :].unflatten(-1, self.grid)


def query_maps(attention: Attention, token: int) -> torch.Tensor:
    """Where one token looks, head by head: (B, n, h, w). Token 0 is the first prefix token, else the top left one.

    Tokens are counted among the queries: token (row, col) of their grid is query_prefix + row · query_grid[1] + col.
    """
    return attention.on_grid(attention.weights([token])[:, :, 0])


def class_maps(attention: Attention) -> torch.Tensor:
    """Where the class token looks, head by head: (B, n, h, w); the mean of all tokens where the head reads none."""
    if attention.class_token:
        return query_maps(attention, 0)
    count = attention.query.shape[2]
    total = sum(attention.weights(range(start, min(start + ROWS, count))).sum(2) for start in range(0, count, ROWS))
    assert isinstance(total, torch.Tensor)
    return attention.on_grid(total / count)


def rollout(attentions: Sequence[Attention], residual: float = 0.5) -> torch.Tensor:
    """Attention through all of these layers, (B, N, N): row i says what token i is made of, and has the sum 1.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020): each layer mixes tokens by the mean of its
    heads, and keeps `residual` of each as the skip does; the layers are multiplied. It knows nothing of values, MLPs
    and signs: a picture of the flow, not of causes.

    Raises:
        ValueError: if there are none, or they are not of the same tokens.
    """
    sizes = {attention.query.shape[2] for attention in attentions} | {a.key.shape[2] for a in attentions}
    if len(sizes) != 1:
        raise ValueError(f'rollout needs layers of the same tokens, got {len(attentions)} layers of {sorted(sizes)}')
    total: torch.Tensor | None = None
    for attention in attentions:
        mixed = attention.weights().mean(1)
        mixed = (1 - residual) * mixed / mixed.sum(-1, keepdim=True)
        mixed.diagonal(dim1=-2, dim2=-1).add_(residual)
        total = mixed if total is None else mixed @ total
    assert total is not None
    return total


def rollout_map(attentions: Sequence[Attention], residual: float = 0.5) -> torch.Tensor:
    """The rollout's row of the class token, or the mean of all rows where the head reads none: (B, h, w)."""
    rows = rollout(attentions, residual)
    return attentions[-1].on_grid(rows[:, 0] if attentions[-1].class_token else rows.mean(1))


def mean_distance(attention: Attention) -> torch.Tensor:
    """How far a head looks: the mean distance from a token to what it looks at, in tokens of the grid, (B, n).

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), Fig. 7. Prefix tokens are left out on both sides.

    Raises:
        ValueError: if the layer's keys are no grid.
    """
    if attention.grid is None:
        raise ValueError(f'the keys of {attention.name} are no grid over the whole image')
    height, width = attention.grid
    rows = torch.arange(height, dtype=torch.float32).repeat_interleave(width)
    cols = torch.arange(width, dtype=torch.float32).repeat(height)
    total, count = torch.zeros(attention.query.shape[:2]), height * width
    for start in range(0, count, ROWS):
        part = slice(start, min(start + ROWS, count))
        away = torch.hypot(rows[part, None] - rows, cols[part, None] - cols)
        weights = attention.weights(range(attention.prefix + part.start, attention.prefix + part.stop))
        weights = weights[..., attention.prefix :].cpu().float()
        total += ((weights * away).sum(-1) / weights.sum(-1).clamp(min=math.ulp(0.0))).sum(-1)
    return total / count
