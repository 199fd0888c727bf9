"""Designs carried over from CNNs (Sec. 4.2, Tables 3 and 4), and LayerScale.

Importing this module adds them to `TOKEN_LAYERS` and `BLOCKS`, from which `T2TViT` chooses by name.
Shapes: B images, N tokens, D width.
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from .t2t_vit import BLOCKS, TOKEN_LAYERS, Attention, Block, Split, TokenLayer


class TokenConvolution(TokenLayer):
    """A convolution in place of soft split and attention (T2T-ViT_c-14 in Table 4), then GELU.

    The release declares the convolutions but no forward for them; without GELU the module would be one linear map. GELU
    has no parameters, so the count is the published one.
    """

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.conv = nn.Conv2d(in_chans, token_dim, split.kernel, split.stride, split.padding)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        return self.act(self.conv(x))


class TokenResidual(TokenLayer):
    """Two convolutions with batch norm and GELU, the second beside a skip connection, as a block of ResNet has them.

    Not the paper's: it learns more from few images than the other token layers do (docs/few-images.md).
    """

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.conv1 = nn.Conv2d(in_chans, token_dim, split.kernel, split.stride, split.padding, bias=False)
        self.norm1 = nn.BatchNorm2d(token_dim)
        self.conv2 = nn.Conv2d(token_dim, token_dim, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(token_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(x + self.norm2(self.conv2(x)))


class SqueezeExcite(nn.Module):
    """Channel attention (SENet): mean over tokens, D -> D/16 -> D, a gate for every channel."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x * self.fc(x.mean(1, keepdim=True))


class SEBlock(Block):
    """A block with channel attention on the output of its self-attention (SENet)."""

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.attn.se_layer = SqueezeExcite(dim)


class ChannelScale(nn.Module):
    """A factor per channel, the ghost design's "cheap operation" (a 1×1 depthwise Conv1d in the release)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors as a Conv1d draws its weights."""
        nn.init.uniform_(self.weight, -1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x * self.weight.flatten()


class GhostAttention(Attention):
    """Self-attention with q, k, v half from a Linear, half a per-channel scale of that half (GhostNet)."""

    if TYPE_CHECKING:
        q: nn.Module
        k: nn.Module
        v: nn.Module
        cheap_operation_q: nn.Module
        cheap_operation_k: nn.Module
        cheap_operation_v: nn.Module

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__(dim, num_heads, attn_drop, proj_drop)
        del self.qkv
        proj: Any = self._modules.pop('proj')
        for name in 'qkv':
            self.add_module(name, nn.Linear(dim, dim // 2, bias=False))
        for name in 'qkv':
            self.add_module(f'cheap_operation_{name}', ChannelScale(dim // 2))
        self.proj = proj  # last, the order in which saved optimizer states count parameters

    def heads(self, half: Tensor, ghost: Tensor) -> Tensor:
        """Join the two halves and split into heads: two of (B, N, D/2) -> (B, heads, N, D / heads)."""
        return torch.cat([half, ghost], dim=-1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> three of (B, heads, N, D / heads)."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        return (
            self.heads(q, self.cheap_operation_q(q)),
            self.heads(k, self.cheap_operation_k(k)),
            self.heads(v, self.cheap_operation_v(v)),
        )


class GhostMlp(nn.Module):
    """An MLP whose hidden layer is one Linear and two per-channel scales of its result (GhostNet); ratio 3."""

    def __init__(self, dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.cheap_operation2 = ChannelScale(dim)
        self.cheap_operation3 = ChannelScale(dim)
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(3 * dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = self.act(self.fc1(x))
        x = torch.cat([x, self.act(self.cheap_operation2(x)), self.act(self.cheap_operation3(x))], dim=-1)
        return self.drop2(self.fc2(self.drop1(x)))


class GhostBlock(Block):
    """A block with `GhostAttention` and `GhostMlp`; mlp_ratio must be 3."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0, **drop: float) -> None:
        super().__init__(dim, num_heads, mlp_ratio, drop_path, **drop)
        if mlp_ratio != 3:
            raise ValueError(f'the ghost MLP is built of three parts: mlp_ratio must be 3, got {mlp_ratio:g}')
        self.attn = GhostAttention(dim, num_heads, **drop)
        self.mlp = GhostMlp(dim, drop.get('proj_drop', 0.0))


class DenseBlock(Block):
    """A block whose result, mapped to `growth_rate` channels, is appended to its input (DenseNet)."""

    def __init__(self, dim: int, *args: Any, growth_rate: int = 64, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.out_dim = dim + growth_rate
        self.dense_linear = nn.Linear(dim, growth_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D + growth_rate)."""
        y = x + self.drop_path(self.attn(self.norm1(x)))
        y = y + self.drop_path(self.mlp(self.norm2(y)))
        return torch.cat([x, self.dense_linear(y)], dim=-1)


class LayerScaleBlock(Block):
    """A block that scales each channel of its two branches by a trainable factor, at first `init_values`.

    From "Going deeper with Image Transformers" (Touvron et al., 2021); timm's `init_values`.
    """

    def __init__(self, dim: int, *args: Any, init_values: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.ls1 = LayerScale(dim, init_values)
        self.ls2 = LayerScale(dim, init_values)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


TOKEN_LAYERS.update(convolution=TokenConvolution, residual=TokenResidual)
BLOCKS.update(se=SEBlock, ghost=GhostBlock, dense=DenseBlock, layer_scale=LayerScaleBlock)
