"""The backbone's fast forms: fused attention, recomputation in blocks, and the class token alone in the last block.

Shapes: B images, N tokens, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.designs import DenseBlock, GhostAttention, GhostBlock, SEBlock
from ..models.t2t_vit import Attention, Block, T2TViT
from ..models.timm_api import TimmT2TViT
from .attention import attention
from .memory import recomputed
from .rule import Fast, active_rate, is_intact, is_observed, is_unobserved


class FusedAttention(Fast, Attention):
    """`Attention` by torch's fused kernel; attention weights are never written to memory."""

    parts = {'attn_drop': nn.Dropout}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three of (B, heads, N, D / heads), q of M tokens -> (B, M, D)."""
        x = attention(q, k, v, active_rate(self.attn_drop), self.scale).transpose(1, 2).flatten(2)
        return self.se_layer(self.proj_drop(self.proj(x)))

    def fast_forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.attend(*self.queries_keys_values(x))

    def class_token(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, 1, D): keys and values of all tokens, the query of the first."""
        if type(self.se_layer) is not nn.Identity or not self.runs_fast(x) or not is_intact(self.qkv, nn.Linear):
            return self(x)[:, :1]  # the gate is a mean over all tokens
        dim = x.shape[-1]
        bias = [None, None] if self.qkv.bias is None else self.qkv.bias.tensor_split([dim])
        weight = self.qkv.weight.tensor_split([dim])
        q = F.linear(x[:, :1], weight[0], bias[0])
        kv = F.linear(x, weight[1], bias[1])
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, dim=-1))]
        return self.attend(*heads)


class FusedGhostAttention(FusedAttention, GhostAttention):
    """`GhostAttention` by torch's fused kernel."""

    def class_token(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, 1, D): keys and values of all tokens, the query of the first."""
        q, k, v = self.q(x[:, :1]), self.k(x), self.v(x)
        halves = (q, self.cheap_operation_q(q)), (k, self.cheap_operation_k(k)), (v, self.cheap_operation_v(v))
        return self.attend(*(self.heads(*pair) for pair in halves))


class RecomputingMlp(Fast, Mlp):
    """timm's MLP, which stores GELU's input for the backward pass, and not its output too."""

    parts = {'act': nn.GELU}

    def fast_forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = self.fc1(x)
        x = self.act(hidden)
        with recomputed(x, self.act.forward, hidden):
            return self.drop2(self.fc2(self.norm(self.drop1(x))))


class RecomputingBlock(Fast, Block):
    """`Block` whose norms are recomputed in the backward pass, and which can compute the class token alone."""

    parts = {'norm1': nn.LayerNorm, 'norm2': nn.LayerNorm}
    attn: Any

    def residual(self, x: Tensor, class_only: bool) -> Tensor:
        """Both residual steps, (B, N, D) -> (B, N, D), or of the class token, (B, 1, D)."""
        y = self.norm1(x)
        with recomputed(y, self.norm1.forward, x):
            y = self.attn.class_token(y) if class_only else self.attn(y)
        x = (x[:, :1] if class_only else x) + self.drop_path(y)
        y = self.norm2(x)
        with recomputed(y, self.norm2.forward, x):
            y = self.mlp(y)
        return x + self.drop_path(y)

    def fast_forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.residual(x, class_only=False)

    def class_token(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, 1, D), the first row of `forward`."""
        return self.residual(x, class_only=True)


class RecomputingSEBlock(RecomputingBlock, SEBlock):
    """`SEBlock`, likewise."""


class RecomputingGhostBlock(RecomputingBlock, GhostBlock):
    """`GhostBlock`, likewise."""


class RecomputingDenseBlock(RecomputingBlock, DenseBlock):
    """`DenseBlock`, likewise: (B, N, D) -> (B, N, D + growth_rate)."""

    def residual(self, x: Tensor, class_only: bool) -> Tensor:
        """(B, N, D) -> (B, N, D + growth_rate), or of the class token, (B, 1, D + growth_rate)."""
        new = self.dense_linear(super().residual(x, class_only))
        return torch.cat([x[:, :1] if class_only else x, new], dim=-1)


class ClassTokenT2TViT(Fast, T2TViT):
    """`T2TViT` whose last block computes only the class token, which is all that the head reads.

    Everything is computed if anything observes the last block, so that its hooks see all tokens, as in timm's ViT.
    """

    def runs_fast(self, x: Any) -> bool:
        """Return True if the head reads the class token alone and nothing else observes the others."""
        if type(self.blocks) is not nn.Sequential or len(self.blocks) == 0:  # wrapped, for example by FSDP
            return False
        last: Any = self.blocks[-1]
        return (
            super().runs_fast(x)
            and getattr(self, 'global_pool', 'token') == 'token'
            and isinstance(last, RecomputingBlock)
            and isinstance(last.attn, FusedAttention)
            and last.runs_fast(x)
            and is_unobserved(last)
            and is_unobserved(self.norm)
            and not is_observed(self.blocks)
            and not {'forward_features', 'forward_head'} & self.__dict__.keys()  # replaced on this model
        )

    def fast_forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        x = self.embed(self.tokens_to_token(x))
        *blocks, last = self.blocks
        for step in (*blocks, last.class_token):
            x = checkpoint(step, x, use_reentrant=False) if getattr(self, 'grad_checkpointing', False) else step(x)
        return self.forward_head(self.norm(x))


class ClassTokenTimmT2TViT(ClassTokenT2TViT, TimmT2TViT):
    """`TimmT2TViT`, likewise."""
