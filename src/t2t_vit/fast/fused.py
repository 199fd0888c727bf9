"""Token layers in half precision on a GPU, by Triton kernels; elsewhere they are the folded ones."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from ..models.precision import half_precision
from ..models.t2t_vit import Split
from . import operators
from .backbone import RecomputingMlp
from .folded import FoldedTokenPerformer, FoldedTokenTransformer, to_map
from .rule import active_rate, is_intact


def fit_kernels(linears: tuple[Any, Any, Any], act: Any) -> bool:
    """Return True if projection and MLP of a token layer are what the kernels compute: Linears with bias, and GELU."""
    return (
        all(is_intact(linear, nn.Linear) and linear.bias is not None for linear in linears)
        and is_intact(act, nn.GELU)
        and act.approximate == 'none'
    )


class FusedTokenTransformer(FoldedTokenTransformer):
    """`TokenTransformer` by Triton kernels if they are usable, else by the folded convolution."""

    def has_plain_mlp(self) -> bool:
        """Return True if the MLP is as it was built, without active dropout."""
        mlp: Any = self.mlp
        return (
            (is_intact(mlp, Mlp) or is_intact(mlp, RecomputingMlp))
            and fit_kernels((self.attn.proj, mlp.fc1, mlp.fc2), mlp.act)
            and is_intact(mlp.norm, nn.Identity)
            and all(is_intact(drop, nn.Dropout) and not active_rate(drop) for drop in (mlp.drop1, mlp.drop2))
        )

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        kind = half_precision(x) if operators.usable(x, self.token_dim) else None
        if kind is None or not self.has_plain_mlp():
            return super().fast_forward(x)
        split, attn, mlp = Split(self.kernel, self.stride, self.padding), self.attn, cast(Any, self.mlp)
        q, k, v = operators.split_norm_linear(x, self.norm1, attn.qkv, split, kind).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=active_rate(attn.attn_drop), scale=attn.scale)
        y = operators.layer_output(y.squeeze(1), v.squeeze(1), attn.proj, mlp.fc1, mlp.fc2, self.norm2)
        return to_map(y, *split.grid(x.shape[2], x.shape[3]))


class FusedTokenPerformer(FoldedTokenPerformer):
    """`TokenPerformer` by Triton kernels if they are usable, else by the folded convolution."""

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        linears: tuple[Any, Any, Any] = self.proj, self.mlp[0], self.mlp[2]
        kind = half_precision(x) if operators.usable(x, self.token_dim) else None
        drop = active_rate(self.proj_drop)  # the kernels have one for both
        if kind is None or not fit_kernels(linears, self.mlp[1]) or not active_rate(self.mlp[3]) == drop < 1:
            return super().fast_forward(x)
        split = Split(self.kernel, self.stride, self.padding)
        kqv = operators.split_norm_linear(x, self.norm1, self.kqv, split, kind)
        y = operators.performer(kqv, self.w, self.eps, *linears, self.norm2, drop)
        return to_map(y, *split.grid(x.shape[2], x.shape[3]))
