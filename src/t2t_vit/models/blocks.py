"""The backbone's blocks: a pre-norm ViT's, and the paper's designs carried over from CNNs (Sec. 3.2, Sec. 4.2).

Letters: B images, N tokens (class token first), C width, n heads, d = C/n.

A block maps (B, N, C) to (B, N, C_out). `class_only` asks for the class token's row alone, (B, 1, C_out), exactly:
keys and values are still made of all tokens, everything behind them of one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from .recompute import Mlp, recomputed


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, dropout: float) -> torch.Tensor:
    """Multi-head attention scaled by d^-1/2: (B, M, C), (B, N, C), (B, N, C) -> (B, M, C)."""
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, n, M, d)
    k = k.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = v.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


class SqueezeExcite(nn.Module):
    """Channel attention over tokens (SENet): mean over N, then C -> C/16 -> C, a gate for every channel."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        return x * self.fc(x.mean(1, keepdim=True))


class Attention(nn.Module):
    """Multi-head self-attention without bias on q, k, v; with `se`, channel attention on its output."""

    def __init__(
        self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0, se: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.all_tokens = se  # the gate is a mean over all of them
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.se_layer = SqueezeExcite(dim) if se else nn.Identity()

    def forward(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """(B, N, C) -> (B, N, C), or (B, 1, C)."""
        if torch.jit.is_scripting():  # noqa: SIM108  (the form that TorchScript leaves one branch of out of)
            plain = True
        else:
            plain = type(self.qkv) is nn.Linear  # and no adapter in its place, as LoRA's
        if class_only and plain and not self.all_tokens:
            weight_q, weight_kv = self.qkv.weight.tensor_split([self.qkv.in_features])
            q = F.linear(x[:, :1], weight_q)
            k, v = F.linear(x, weight_kv).chunk(2, dim=-1)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = attend(q, k, v, self.num_heads, self.attn_drop if self.training else 0.0)
        x = self.se_layer(self.proj_drop(self.proj(x)))
        return x[:, :1] if class_only else x


class ChannelScale(nn.Module):
    """A factor per channel, the "cheap operation" of the ghost design (a 1×1 depthwise Conv1d in the release)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 1).uniform_(-1, 1))  # a Conv1d's own initial values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        return x * self.weight.flatten()


class GhostAttention(nn.Module):
    """Attention whose q, k, v are half made by a Linear, half a per-channel scale of that half (GhostNet)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        half = dim // 2
        self.q = nn.Linear(dim, half, bias=False)
        self.k = nn.Linear(dim, half, bias=False)
        self.v = nn.Linear(dim, half, bias=False)
        self.cheap_operation_q = ChannelScale(half)
        self.cheap_operation_k = ChannelScale(half)
        self.cheap_operation_v = ChannelScale(half)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """(B, N, C) -> (B, N, C), or (B, 1, C)."""
        q, k, v = self.q(x[:, :1] if class_only else x), self.k(x), self.v(x)
        q = torch.cat([q, self.cheap_operation_q(q)], dim=-1)
        k = torch.cat([k, self.cheap_operation_k(k)], dim=-1)
        v = torch.cat([v, self.cheap_operation_v(v)], dim=-1)
        x = attend(q, k, v, self.num_heads, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(x))


class GhostMlp(nn.Module):
    """An MLP whose hidden layer is one Linear and two per-channel scales of its result (GhostNet); ratio 3."""

    def __init__(self, in_features: int, hidden_features: int, drop: float = 0.0) -> None:
        super().__init__()
        if hidden_features != 3 * in_features:
            raise ValueError(
                f'the ghost MLP is built of three parts: mlp_ratio must be 3, got {hidden_features / in_features:g}'
            )
        self.fc1 = nn.Linear(in_features, in_features)
        self.act = nn.GELU()
        self.cheap_operation2 = ChannelScale(in_features)
        self.cheap_operation3 = ChannelScale(in_features)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = self.act(self.fc1(x))
        x = torch.cat([x, self.act(self.cheap_operation2(x)), self.act(self.cheap_operation3(x))], dim=-1)
        return self.drop2(self.fc2(self.drop1(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP. LayerNorm's eps is 1e-5.

    A block of one's own derives from it, or takes the same arguments, has `out_dim`, and maps
    (B, N, C) to (B, N, out_dim), with `class_only` to (B, 1, out_dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        attn_layer: Callable[..., nn.Module] = Attention,
        mlp_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        if dim % num_heads:  # the widths of dense blocks follow from one another
            raise ValueError(f'a block of width {dim} cannot be split into num_heads {num_heads}')
        self.out_dim = dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn_layer(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), drop=proj_drop)

    def residual(self, x: torch.Tensor, class_only: bool) -> torch.Tensor:
        """Both residual steps, (B, N, C) -> (B, N, C), or (B, 1, C)."""
        y = self.norm1(x)
        if torch.jit.is_scripting():
            x = (x[:, :1] if class_only else x) + self.drop_path(self.attn(y, class_only))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        with recomputed(y, self.norm1.forward, x):
            y = self.attn(y, class_only)
        x = (x[:, :1] if class_only else x) + self.drop_path(y)
        y = self.norm2(x)
        with recomputed(y, self.norm2.forward, x):
            y = self.mlp(y)
        return x + self.drop_path(y)

    def forward(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """(B, N, C) -> (B, N, C), or (B, 1, C)."""
        return self.residual(x, class_only)


class DenseBlock(Block):
    """A block whose result, mapped to `growth_rate` channels, is appended to its input (DenseNet)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, growth_rate: int = 64, **kwargs: float) -> None:
        super().__init__(dim, num_heads, mlp_ratio, **kwargs)  # type: ignore[arg-type]
        self.out_dim = dim + growth_rate
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """(B, N, C) -> (B, N, C + growth_rate), or (B, 1, C + growth_rate)."""
        new = self.dense_linear(self.residual(x, class_only))
        return torch.cat([x[:, :1] if class_only else x, new], dim=-1)


class Transition(nn.Module):
    """Between two groups of dense blocks: Linear to half the width, GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out_dim = dim // 2
        self.linear = nn.Linear(dim, self.out_dim)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """(B, N, C) -> (B, N, C/2), or (B, 1, C/2)."""
        return self.act(self.linear(x[:, :1] if class_only else x))


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    'plain': Block,
    'se': partial(Block, attn_layer=partial(Attention, se=True)),
    'ghost': partial(Block, attn_layer=GhostAttention, mlp_layer=GhostMlp),
    'dense': DenseBlock,
}


def build_blocks(
    block: Callable[..., nn.Module],
    embed_dim: int,
    depth: int | Sequence[int],
    num_heads: int,
    mlp_ratio: float,
    drop_path_rate: float,
    **kwargs: float,
) -> tuple[nn.ModuleList, list[int]]:
    """The backbone and the width behind each of its entries.

    `depth` is a number of blocks, or the numbers in groups with a `Transition` between two. Stochastic depth grows
    linearly from 0 in the first block to `drop_path_rate` in the last.
    """
    groups = [depth] if isinstance(depth, int) else depth
    last = max(sum(groups) - 1, 1)
    blocks, dims, index, dim = nn.ModuleList(), [], 0, embed_dim
    for group, count in enumerate(groups):
        if group > 0:
            blocks.append(Transition(dim))
            dims.append(dim := dim // 2)
        for _ in range(count):
            built: Any = block(dim, num_heads, mlp_ratio, drop_path=drop_path_rate * index / last, **kwargs)
            blocks.append(built)
            dims.append(dim := built.out_dim)
            index += 1
    return blocks, dims
