"""Attention weights of a layer, and maps, rollout and distances computed from them.

Layers compute attention without materialising its weights (`scaled_dot_product_attention`, the Performer's kernel).
Here they are recomputed from the same queries and keys, only for the rows that are asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ROWS = 1024  # queries at a time, when all are needed


class Lattice(NamedTuple):
    """Positions of the cells of a map in the image: cell (i, j) is centred at (y + i·down, x + j·right).

    In pixels from the top left corner of the image, whose first pixel is centred at (0.5, 0.5). Padding moves cells:
    the first cell of a ResNet's map of stride 32 is centred at 0.5, of T2T-ViT's last grid at 1.5, of 16×16 patches
    at 8.
    """

    y: float
    x: float
    down: float
    right: float

    @classmethod
    def over(cls, grid: tuple[int, int], size: tuple[int, int]) -> 'Lattice':
        """Return the lattice of cells that tile an H×W image evenly."""
        down, right = (n / cells for n, cells in zip(size, grid))
        return cls(down / 2, right / 2, down, right)

    def strided(self, kernel: Sequence[float], stride: Sequence[float], padding: Sequence[float]) -> 'Lattice':
        """Return the lattice of a sliding window over these cells; each argument is (vertical, horizontal)."""
        y, x = ((k - 1) / 2 - before for k, before in zip(kernel, padding))
        return Lattice(self.y + y * self.down, self.x + x * self.right, self.down * stride[0], self.right * stride[1])

    def centre(self, row: int, col: int) -> tuple[float, float]:
        """Return the centre of a cell, (y, x)."""
        return self.y + row * self.down, self.x + col * self.right

    def nearest(self, y: float, x: float, grid: tuple[int, int]) -> tuple[int, int]:
        """Return row and column of the cell whose centre is nearest to a position."""
        row, col = round((y - self.y) / self.down), round((x - self.x) / self.right)
        return min(max(row, 0), grid[0] - 1), min(max(col, 0), grid[1] - 1)

    def extent(self, grid: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return left, right, bottom and top of all cells; each reaches half a step from its centre."""
        left, top = self.x - self.right / 2, self.y - self.down / 2
        return left, left + grid[1] * self.right, top + grid[0] * self.down, top


@dataclass(eq=False)  # == of tensors is not a bool
class Attention:
    """Queries, keys and values of one attention layer for a batch of images.

    In a softmax layer a row of weights is softmax(q·kᵀ·scale + bias). In a Performer `query` and `key` are the random
    features φ(q) and φ(k) (Sec. 3.1), and a row is φ(q)·φ(k)ᵀ / (φ(q)·Σ φ(k) + eps).
    """

    name: str
    query: torch.Tensor  # (B, n, M, d)
    key: torch.Tensor  # (B, n, N, d)
    value: torch.Tensor  # (B, n, N, d)
    grid: tuple[int, int] | None = None  # (h, w) of the keys; None if they do not cover the image, as in windows
    prefix: int = 0  # P, keys before those of the grid
    lattice: Lattice | None = None  # of the keys' grid; None if there is none or it is unknown
    query_grid: tuple[int, int] | None = None  # of the queries, which may differ from the keys'
    query_prefix: int = 0  # queries before those of the grid
    query_lattice: Lattice | None = None
    class_token: bool = False  # token 0 is the class token that the head reads
    scale: float = 1.0
    bias: torch.Tensor | None = None  # added to the logits, broadcast to (B, n, M, N)
    eps: float | None = None  # of the Performer; None for softmax

    def weights(self, queries: Sequence[int] | None = None) -> torch.Tensor:
        """Compute rows of the weights, of `queries` or of all: (B, n, M, N). A row sums to 1 (in a Performer nearly).

        Raises:
            IndexError: if a query is out of range.
        """
        q = self.query if queries is None else self.query[:, :, list(queries)]
        if self.eps is not None:
            return q @ self.key.mT / (q @ self.key.sum(-2).unsqueeze(-1) + self.eps)
        logits = q @ self.key.mT * self.scale
        if self.bias is not None:
            rows = self.bias if queries is None or self.bias.shape[-2] == 1 else self.bias[..., list(queries), :]
            logits = logits + rows
        return logits.softmax(-1)

    def on_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """Reshape weights to the grid, without those of prefix tokens: (…, N) -> (…, h, w).

        Raises:
            ValueError: if the keys form no grid.
        """
        if self.grid is None:
            raise ValueError(f'the keys of {self.name} form no grid over the image')
        return rows[..., self.prefix :].unflatten(-1, self.grid)


def query_maps(attention: Attention, token: int) -> torch.Tensor:
    """Return the attention of one token, head by head: (B, n, h, w).

    `token` is its index among the queries: that of (row, col) is query_prefix + row · query_grid[1] + col.
    """
    return attention.on_grid(attention.weights([token])[:, :, 0])


def class_maps(attention: Attention) -> torch.Tensor:
    """Return the attention of the class token, head by head: (B, n, h, w); without one the mean over all tokens."""
    if attention.class_token:
        return query_maps(attention, 0)
    count = attention.query.shape[2]
    total = sum(attention.weights(range(start, min(start + ROWS, count))).sum(2) for start in range(0, count, ROWS))
    assert isinstance(total, torch.Tensor)
    return attention.on_grid(total / count)


def rollout(attentions: Sequence[Attention], residual: float = 0.5) -> torch.Tensor:
    """Multiply the attention of all layers, (B, N, N): row i is how much token i is mixed from each; it sums to 1.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (2020): each layer mixes tokens by the mean of its
    heads and keeps `residual` of each, as the skip connection does. Values, MLPs and signs are ignored: it shows how
    information may flow, not what causes the score.

    Raises:
        ValueError: if there are no layers, or they have different tokens.
    """
    sizes = {attention.query.shape[2] for attention in attentions} | {a.key.shape[2] for a in attentions}
    if len(sizes) != 1:
        raise ValueError(
            f'rollout needs layers of the same tokens, got {len(attentions)} layers of {sorted(sizes)} tokens'
        )
    total: torch.Tensor | None = None
    for attention in attentions:
        mixed = attention.weights().mean(1)
        mixed = (1 - residual) * mixed / mixed.sum(-1, keepdim=True)
        mixed.diagonal(dim1=-2, dim2=-1).add_(residual)
        total = mixed if total is None else mixed @ total
    assert total is not None
    return total


def rollout_map(attentions: Sequence[Attention], residual: float = 0.5) -> torch.Tensor:
    """Return the rollout row of the class token, or without one the mean of all rows: (B, h, w)."""
    rows = rollout(attentions, residual)
    return attentions[-1].on_grid(rows[:, 0] if attentions[-1].class_token else rows.mean(1))


def mean_distance(attention: Attention) -> torch.Tensor:
    """Compute the mean attention distance of each head, in tokens of the grid: (B, n).

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), Fig. 7. Prefix tokens are ignored as queries and keys.

    Raises:
        ValueError: if the keys form no grid.
    """
    if attention.grid is None:
        raise ValueError(f'the keys of {attention.name} form no grid over the image')
    height, width = attention.grid
    rows = torch.arange(height, dtype=torch.float32).repeat_interleave(width)
    cols = torch.arange(width, dtype=torch.float32).repeat(height)
    total, count = torch.zeros(attention.query.shape[:2]), height * width
    for start in range(0, count, ROWS):
        part = slice(start, min(start + ROWS, count))
        distance = torch.hypot(rows[part, None] - rows, cols[part, None] - cols)
        weights = attention.weights(range(attention.prefix + part.start, attention.prefix + part.stop))
        weights = weights[..., attention.prefix :].cpu().float()
        total += ((weights * distance).sum(-1) / weights.sum(-1).clamp(min=math.ulp(0.0))).sum(-1)
    return total / count
