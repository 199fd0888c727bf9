"""The backbone as a list of blocks: groups, widths and stochastic depth."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class Transition(nn.Module):
    """Between two groups of dense blocks, a Linear to half the width and GELU: (B, N, D) -> (B, N, D/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim // 2
        self.linear = nn.Linear(dim, self.out_dim)
        self.act = nn.GELU()

    def forward(self, x):  # type: ignore[no-untyped-def]
        """(B, N, D) -> (B, N, D/2)."""
        return self.act(self.linear(x))


def stack_blocks(
    block: Callable[..., nn.Module], dim: int, depth: int | Sequence[int], drop_path_rate: float, **args: Any
) -> tuple[Any, list[int]]:
    """Build the blocks and return them with the width after each.

    `depth` is a number of blocks, or the numbers in groups with a `Transition` between two. Stochastic depth rises
    linearly from 0 in the first block to `drop_path_rate` in the last.
    """
    groups = [depth] if isinstance(depth, int) else [*depth]
    last = max(sum(groups) - 1, 1)
    blocks, dims = nn.Sequential(), []

    def add(entry: Any) -> int:
        blocks.append(entry)
        dims.append(getattr(entry, 'out_dim', dim))
        return dims[-1]

    for group, count in enumerate(groups):
        if group > 0:
            dim = add(Transition(dim))
        for i in range(sum(groups[:group]), sum(groups[:group]) + count):
            dim = add(block(dim, drop_path=drop_path_rate * i / last, **args))
    return blocks, dims
