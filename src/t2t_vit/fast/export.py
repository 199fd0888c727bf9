"""The forms for exported graphs: the same numbers by operations that other runtimes like.

In PyTorch a slice is a view, and a map in channels_last is its tokens. Other runtimes copy what they slice and
transpose, and there the token layers of an unchanged graph take longer than their matmuls. So here nothing large is
sliced (weights are), and values that depend on weights alone are computed beforehand.

Shapes: B images, C channels, (H, W) map, (h, w) grid, N = h·w tokens, D width, m random features.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.t2t_vit import TokenLayer
from . import optimize
from .backbone import ClassTokenTimmT2TViT, FusedAttention
from .folded import to_map, to_tokens
from .fused import FusedTokenPerformer, FusedTokenTransformer

SCALE = 2.0**27  # of both sides of the Performer's quotient: ONNX's optimizer takes an addend of 1e-8 for zero


class SplitNormLinears(nn.Module):
    """Soft split, LayerNorm over each window and several Linears: see `split_norm_linear`, whose sums these are.

    Only the statistics differ. The variance of a window is the mean of its pixels' variances over channels, plus the
    variance of their means; windows of these one-channel maps are cut by a convolution with the identity. Each mean is
    subtracted before squaring, as there.
    """

    identity: Tensor

    def __init__(
        self, layer: TokenLayer, norm: nn.LayerNorm, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.eps = layer.kernel, layer.stride, layer.padding, norm.eps
        area = layer.kernel**2
        self.register_buffer('identity', torch.eye(area).view(area, 1, layer.kernel, layer.kernel))
        self.weights, self.shifts = nn.ParameterList(), nn.ParameterList()
        for weight, bias in zip(weights, biases):
            scaled = weight.float() * norm.weight.float()  # rounded afterwards, its rows would not sum to zero
            scaled = (scaled - scaled.mean(1, keepdim=True)).unflatten(1, (-1, layer.kernel, layer.kernel))
            self.weights.append(nn.Parameter(scaled))
            self.shifts.append(nn.Parameter(F.linear(norm.bias.float(), weight.float(), bias.float())))

    def forward(self, x: Tensor) -> tuple[list[Tensor], int, int]:
        """(B, C, H, W) -> tokens (B, N, O) in float32 for each Linear, and h and w."""
        x = F.pad(x.float(), [self.padding] * 4) - x.float().mean((1, 2, 3), keepdim=True)
        mean = x.mean(1, keepdim=True)
        var = F.avg_pool2d((x - mean).square().mean(1, keepdim=True), self.kernel, self.stride)
        means = F.conv2d(mean, self.identity.float(), stride=self.stride)  # (B, k·k, h, w)
        var = var + (means - means.mean(1, keepdim=True)).square().mean(1, keepdim=True)
        scale = (var + self.eps).rsqrt()
        maps = [
            F.conv2d(x, weight.float(), stride=self.stride) * scale + shift.float().view(1, -1, 1, 1)
            for weight, shift in zip(self.weights, self.shifts)
        ]
        return [to_tokens(part) for part in maps], scale.shape[2], scale.shape[3]


class ExportedTokenPerformer(FusedTokenPerformer):
    """`TokenPerformer` whose φ of keys and queries is one matmul over twice the tokens, never sliced.

    Sums over only one of the two halves have zeros for the other.
    """

    def prepare(self) -> None:
        """Compute what depends on weights alone, and remove these weights."""
        sizes = [2 * self.token_dim, self.token_dim]
        self.split = SplitNormLinears(self, self.norm1, self.kqv.weight.split(sizes), self.kqv.bias.split(sizes))
        self.w = self.w.float()
        del self.norm1, self.kqv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        (kq, v), height, width = self.split(x)
        both = kq.unflatten(2, (2, -1)).flatten(1, 2)  # (B, 2·N, D), a view
        half_norm = (both * both).sum(2, keepdim=True) * 0.5
        features = len(self.w)
        phi = torch.exp(F.linear(both, self.w.float()) - (half_norm + 0.5 * math.log(features)))
        phi = phi.unflatten(1, (-1, 2)).flatten(2)  # φ(k) and φ(q), (B, N, 2·m)
        turned = phi.transpose(1, 2)
        sums = turned.sum(2, keepdim=True)[:, :features] * SCALE
        values = (turned @ v)[:, :features] * SCALE
        sums, values = (F.pad(part, [0, 0, features, 0]) for part in (sums, values))  # zeros, Σ φ(k) or Σ φ(k)ᵀv
        y = (phi @ values) / (phi @ sums + self.eps * SCALE)
        x = v.to(x.dtype) + self.proj(y.to(x.dtype))
        return to_map(x + self.mlp(self.norm2(x)), height, width)


class ExportedTokenTransformer(FusedTokenTransformer):
    """`TokenTransformer` whose q, k and v are computed one by one."""

    def prepare(self) -> None:
        """Compute what depends on weights alone, and remove these weights."""
        weights = self.attn.qkv.weight.chunk(3)
        self.split = SplitNormLinears(self, self.norm1, weights, [weights[0].new_zeros(self.token_dim)] * 3)
        del self.norm1, self.attn.qkv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        tokens, height, width = self.split(x)
        q, k, v = (part.to(x.dtype).unsqueeze(1) for part in tokens)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.attn.scale)
        x = v.squeeze(1) + self.attn.proj(y.squeeze(1))
        return to_map(x + self.mlp(self.norm2(x)), height, width)


class ExportedAttention(FusedAttention):
    """`Attention` whose q, k and v are computed one by one."""

    parts = {**FusedAttention.parts, 'qkv': nn.Linear}

    def prepare(self) -> None:
        """Split the weights of q, k and v."""
        self.projections = nn.ModuleList()
        biases = [None] * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        for weight, bias in zip(self.qkv.weight.chunk(3), biases):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            linear.weight = nn.Parameter(weight.detach().clone())
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().clone())
            self.projections.append(linear)
        del self.qkv

    def separate(self, *inputs: Tensor) -> Tensor:
        """Attend with separate inputs of q, k and v: three of (B, N, D) -> (B, N, D)."""
        heads = [
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear, x in zip(self.projections, inputs)
        ]
        return self.attend(*heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.separate(x, x, x)

    def class_token(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, 1, D)."""
        return self.separate(x[:, :1], x, x) if type(self.se_layer) is nn.Identity else self(x)[:, :1]


class ExportedT2TViT(ClassTokenTimmT2TViT):
    """`TimmT2TViT` whose position table is resampled by two matmuls with the matrices of the interpolation.

    Other runtimes lack torch's operator with antialiasing, or have it with another kernel. So this is the form of every
    model, also of one that computes all tokens.
    """

    def embed(self, x: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 1 + N, D)."""
        table = resample_by_matmuls(self.pos_embed, (x.shape[2], x.shape[3]), self.grid_size)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return tokens + table


def resample_by_matmuls(table: Tensor, new: tuple[int, int], old: tuple[int, int]) -> Tensor:
    """Resample a position table as `resample_positions`: (1, 1 + old_h·old_w, D) -> (1, 1 + h·w, D)."""
    if isinstance(new[0], int) and isinstance(new[1], int) and new == tuple(old):  # not so if a size is dynamic
        return table
    rows, columns = cubic_matrix(new[0], old[0], table.device), cubic_matrix(new[1], old[1], table.device)
    grid = table[0, 1:].float().unflatten(0, (old[0], old[1]))  # (h, w, D)
    grid = (rows @ grid.flatten(1)).unflatten(1, (old[1], -1))
    grid = (columns @ grid).flatten(0, 1)
    return torch.cat([table[:, :1], grid.unsqueeze(0).to(table.dtype)], dim=1)


def cubic_matrix(new: int, old: int, device: torch.device) -> Tensor:
    """Return bicubic interpolation with antialiasing along one axis as a matrix, (new, old)."""
    positions = torch.arange(1, new + 1, device=device)
    scale = old / positions[-1].float()  # not old / new: not every runtime can divide by a dynamic size
    centres = (positions.float() - 0.5) * scale
    distance = (torch.arange(old, device=device) + 0.5 - centres.unsqueeze(1)).abs() / scale.clamp(min=1)
    near = (1.5 * distance - 2.5) * distance.square() + 1  # Keys' kernel, a = -0.5
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
    return weights / weights.sum(1, keepdim=True)


FORMS: dict[type, type] = {
    FusedTokenPerformer: ExportedTokenPerformer,
    FusedTokenTransformer: ExportedTokenTransformer,
    FusedAttention: ExportedAttention,
}


@torch.no_grad()
def prepare_for_export(model: nn.Module) -> nn.Module:
    """Give the parts of a model in evaluation mode their forms for exported graphs, in place; custom classes stay."""
    for module in [*optimize(model).modules()]:
        layer, kind = cast(Any, module), type(module)
        if kind is ClassTokenTimmT2TViT:
            layer.__class__ = ExportedT2TViT
        elif kind in FORMS:
            layer.__class__ = FORMS[kind]
            if layer.runs_fast(torch.empty(0)):
                layer.prepare()
            else:
                layer.__class__ = kind
    return model
