"""Token layers in half precision on a GPU, by Triton kernels; elsewhere they are the folded ones."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.precision import half_precision
from ..models.t2t_vit import Split
from . import operators
from .folded import FoldedTokenPerformer, FoldedTokenTransformer, to_map
from .rule import is_intact


class FusedTokenTransformer(FoldedTokenTransformer):
    """`TokenTransformer` by Triton kernels if they are usable, else by the folded convolution."""

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        linears: tuple[Any, Any, Any] = self.attn.proj, self.mlp.fc1, self.mlp.fc2
        kind = half_precision(x) if operators.usable(x, self.token_dim) else None
        if kind is None or not all(is_intact(linear, nn.Linear) for linear in linears):
            return super().fast_forward(x)
        split = Split(self.kernel, self.stride, self.padding)
        q, k, v = operators.split_norm_linear(x, self.norm1, self.attn.qkv, split, kind).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.attn.scale)
        y = operators.layer_output(y.squeeze(1), v.squeeze(1), *linears, self.norm2)
        return to_map(y, *split.grid(x.shape[2], x.shape[3]))


class FusedTokenPerformer(FoldedTokenPerformer):
    """`TokenPerformer` by Triton kernels if they are usable, else by the folded convolution."""

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        linears: tuple[Any, Any, Any] = self.proj, self.mlp[0], self.mlp[2]
        kind = half_precision(x) if operators.usable(x, self.token_dim) else None
        if kind is None or not all(is_intact(linear, nn.Linear) for linear in linears):
            return super().fast_forward(x)
        split = Split(self.kernel, self.stride, self.padding)
        kqv = operators.split_norm_linear(x, self.norm1, self.kqv, split, kind)
        y = operators.performer(kqv, self.w, self.eps, *linears, self.norm2, self.proj_drop.p if self.training else 0.0)
        return to_map(y, *split.grid(x.shape[2], x.shape[3]))
