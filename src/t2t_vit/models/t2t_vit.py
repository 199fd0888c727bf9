"""T2T-ViT, as the paper prints it.

"Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", Yuan et al., ICCV 2021, arXiv 2101.11986.
Nothing is optimised here: `t2t_vit.fast` replaces `forward` of these classes by faster equivalents, which are tested
against this file. Parameters have the names of the published weights.

Shapes: B images, C channels, (H, W) image or map, (h, w) grid after a split, N = h·w tokens, k kernel, n = C·k·k values
of a window, D width of the tokens, m random features.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from .checks import as_size, check_arguments, check_images, choose, token_grids
from .init import init_model
from .positions import resample_positions, sinusoid_table
from .precision import without_autocast
from .stack import stack_blocks


class Split(NamedTuple):
    """One soft split: k×k windows every `stride` pixels (the paper's overlap is s = k - stride), zero padding p."""

    kernel: int
    stride: int
    padding: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid (h, w) of windows over an H×W map, h = floor((H + 2p - k) / (k - s) + 1) (Eq. 3)."""
        sides = [(side + 2 * self.padding - self.kernel) // self.stride + 1 for side in (height, width)]
        return sides[0], sides[1]


PAPER_SPLITS = (Split(7, 4, 2), Split(3, 2, 1), Split(3, 2, 1))  # Sec. 3.1: 224² -> 56² -> 28² -> 14² tokens


def soft_split(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """Cut a map into overlapping windows and flatten each, T = SS(I) (Eq. 3): (B, C, H, W) -> (B, N, n), h and w."""
    height = (x.shape[2] + 2 * padding - kernel) // stride + 1
    width = (x.shape[3] + 2 * padding - kernel) // stride + 1
    return F.unfold(x, kernel, padding=padding, stride=stride).transpose(1, 2), height, width


def restructurize(tokens: Tensor, height: int, width: int) -> Tensor:
    """Put tokens back on their grid, I = Reshape(T') (Eq. 2): (B, N, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


class TokenLayer(nn.Module):
    """Soft split, a function of the tokens, re-structurization: (B, C, H, W) -> (B, D, h, w); base of custom layers."""

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__()
        self.token_dim, self.window_dim = token_dim, in_chans * split.kernel**2  # D, n
        self.kernel, self.stride, self.padding = split


class TokenAttention(nn.Module):
    """Self-attention with one head from width n to width D: (B, N, n) -> (B, N, D).

    Unlike the backbone's, it is scaled by n^-1/2, the width of its input, and the skip connection adds v.
    """

    def __init__(self, window_dim: int, token_dim: int) -> None:
        super().__init__()
        self.scale = window_dim**-0.5
        self.qkv = nn.Linear(window_dim, 3 * token_dim, bias=False)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attn = (q @ k.transpose(1, 2) * self.scale).softmax(dim=-1)  # (B, N, N)
        return v + self.proj(self.attn_drop(attn) @ v)


class TokenTransformer(TokenLayer):
    """T' = MLP(MSA(T)) on the tokens of a soft split (Eq. 1), one head of width D, MLP ratio 1."""

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.norm1 = nn.LayerNorm(self.window_dim)
        self.attn = TokenAttention(self.window_dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, height, width = soft_split(x, self.kernel, self.stride, self.padding)
        tokens = self.attn(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return restructurize(tokens, height, width)


@without_autocast
def kernel_attention(kqv: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return linear attention by positive random features, and v (Sec. 3.1): (B, N, 3·D), (m, D) -> (B, N, D) twice.

        φ(x) = exp(w·x - |x|²/2) / √m        y_i = φ(q_i)·Σ_j φ(k_j) v_jᵀ / (φ(q_i)·Σ_j φ(k_j) + eps)

    In float32 at least: half precision rounds eps to 0 and exp to infinity, but w·x - |x|²/2 ≤ |w|²/2 = m/2.
    """
    kqv = kqv if kqv.dtype == torch.float64 else kqv.float()
    w = w.to(kqv.dtype)
    k, q, v = kqv.chunk(3, dim=-1)
    k = torch.exp(k @ w.t() - k.square().sum(-1, keepdim=True) / 2) / w.shape[0] ** 0.5  # φ(k), (B, N, m)
    q = torch.exp(q @ w.t() - q.square().sum(-1, keepdim=True) / 2) / w.shape[0] ** 0.5  # φ(q)
    values, weights = k.transpose(1, 2) @ v, k.sum(1).unsqueeze(-1)  # the two sums over j, (B, m, D) and (B, m, 1)
    return (q @ values) / (q @ weights + eps), v


class TokenPerformer(TokenLayer):
    """The token transformer with m = D/2 random features in place of the softmax, linear in N (Sec. 3.1).

    One Linear gives k, q, v in this order. w, orthogonal rows of length √m, is fixed. Dropout is published at 0.1.
    """

    w: Tensor

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.eps = 1e-8
        self.norm1 = nn.LayerNorm(self.window_dim)
        self.kqv = nn.Linear(self.window_dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.proj_drop = nn.Dropout(0.1)
        self.norm2 = nn.LayerNorm(token_dim)
        fc1, fc2 = nn.Linear(token_dim, token_dim), nn.Linear(token_dim, token_dim)
        self.mlp = nn.Sequential(fc1, nn.GELU(), fc2, nn.Dropout(0.1))
        self.register_buffer('w', torch.empty(token_dim // 2, token_dim))
        self.draw_features()

    def draw_features(self) -> None:
        """Draw w, in float32 whatever its own precision."""
        self.w.copy_(nn.init.orthogonal_(torch.empty_like(self.w, dtype=torch.float32), gain=math.sqrt(len(self.w))))

    def forward(self, x: Tensor) -> Tensor:
        tokens, height, width = soft_split(x, self.kernel, self.stride, self.padding)
        y, v = kernel_attention(self.kqv(self.norm1(tokens)), self.w, self.eps)
        tokens = v.to(x.dtype) + self.proj_drop(self.proj(y.to(x.dtype)))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return restructurize(tokens, height, width)


class TokensToToken(nn.Module):
    """Token layers `attention1` …, then the last split and its Linear, `project` (Fig. 3, Eq. 4): -> (B, D, h, w)."""

    def __init__(self, splits: Sequence[Any], layer: Any, in_chans: int, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.splits: list[Any] = [Split(*split) for split in splits]
        for i, split in enumerate(self.splits[:-1]):
            self.add_module(f'attention{i + 1}', layer(token_dim if i else in_chans, token_dim, split))
        self.kernel, self.stride, self.padding = self.splits[-1]
        self.project = nn.Linear((token_dim if len(splits) > 1 else in_chans) * self.kernel**2, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, self.splits)
        for name, layer in self.named_children():
            if name != 'project':
                x = layer(x)
        return self.last_split(x)

    def last_split(self, x: Tensor) -> Tensor:
        """Split the last map and project its tokens (Sec. 3.1, T_f): (B, C, H, W) -> (B, D, h, w)."""
        tokens, height, width = soft_split(x, self.kernel, self.stride, self.padding)
        return restructurize(self.project(tokens), height, width)


class Attention(nn.Module):
    """Multi-head self-attention, scale (D / heads)^-1/2, no bias on q, k, v: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.se_layer: nn.Module = nn.Identity()  # channel attention in the SE design

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> three of (B, heads, N, D / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, D / heads) each
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)  # (B, heads, N, N)
        x = (self.attn_drop(attn) @ v).transpose(1, 2).flatten(2)
        return self.se_layer(self.proj_drop(self.proj(x)))


class Block(nn.Module):
    """A pre-norm residual block, MLP(MSA(T)) (Sec. 3.2): (B, N, D) -> (B, N, D). Custom ones need only `forward(x)`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0, **drop: float) -> None:
        super().__init__()
        if dim % num_heads:  # the widths of dense blocks follow from one another
            raise ValueError(f'a block of width {dim} cannot be split into num_heads {num_heads}')
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, **drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop.get('proj_drop', 0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


TOKEN_LAYERS: dict[str, Any] = {'performer': TokenPerformer, 'transformer': TokenTransformer, 'none': None}
BLOCKS: dict[str, Any] = {'plain': Block}  # designs.py adds those that the paper carries over from CNNs


class T2TViT(nn.Module):
    """Tokens-to-token module and a deep, narrow ViT (Sec. 3, Fig. 4): (B, C, H, W) of any size -> (B, num_classes).

    Args:
        img_size: Image size that the position table is built for; for others it is resampled.
        splits: (kernel, stride, padding) of each soft split; a token layer follows each but the last.
        token_layer: `performer`, `transformer`, `convolution`, `residual`, `none` (one split), or a `TokenLayer`.
        depth: Number of blocks, or the numbers in each group of dense blocks.
        block: `plain`, `se`, `ghost`, `dense`, `layer_scale`, or a custom class with the arguments of `Block`.
        drop_rate: Dropout before the head; then of positions, of projections and MLPs, of attention weights.
        drop_path_rate: Stochastic depth, rising linearly from 0 in the first block to this in the last.
        weight_init: Initial values: `published`, or `scaled` by width and depth, for small models (see `init`).
        block_args: Further arguments of every block, as `growth_rate` of dense ones.

    Raises:
        ValueError: for arguments that do not fit together; all problems in one message.
    """

    pos_embed: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        splits: Sequence[tuple[int, int, int]] = PAPER_SPLITS,
        token_layer: str | Callable[..., nn.Module] = 'performer',
        token_dim: int = 64,
        embed_dim: int = 384,
        depth: int | Sequence[int] = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        block: str | Callable[..., nn.Module] = 'plain',
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = 'published',
        **block_args: Any,
    ) -> None:
        check_arguments(**{name: value for name, value in locals().items() if name not in ('self', '__class__')})
        super().__init__()
        self.img_size, self.num_classes, self.embed_dim = as_size(img_size), num_classes, embed_dim
        layer, block_cls = choose('token_layer', token_layer, TOKEN_LAYERS), choose('block', block, BLOCKS)
        self.tokens_to_token = TokensToToken(splits, layer, in_chans, token_dim, embed_dim)
        self.grid_size = token_grids(self.tokens_to_token.splits, *self.img_size)[-1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer('pos_embed', sinusoid_table(1 + math.prod(self.grid_size), embed_dim))
        self.pos_drop: nn.Module = nn.Dropout(pos_drop_rate)
        block_args.update(num_heads=num_heads, mlp_ratio=mlp_ratio, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate)
        self.blocks, self.widths = stack_blocks(block_cls, embed_dim, depth, drop_path_rate, **block_args)
        self.num_features = self.widths[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        init_model(self, weight_init)

    def embed(self, x: Tensor) -> Tensor:
        """Put the class token first and add the positions, T_f0 = [t_cls; T_f] + E: (B, D, h, w) -> (B, 1 + N, D)."""
        positions = resample_positions(self.pos_embed, x.shape[2], x.shape[3], self.grid_size[0], self.grid_size[1])
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return self.pos_drop(tokens + positions)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the last norm, the class token first: (B, C, H, W) -> (B, 1 + N, D)."""
        return self.norm(self.blocks(self.embed(self.tokens_to_token(x))))  # T_fi = MLP(MSA(T_fi-1))

    def forward_head(self, x: Tensor) -> Tensor:
        """Classify the class token, y = fc(LN(T_fb)): (B, 1 + N, D) -> (B, num_classes)."""
        return self.head(self.head_drop(x[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


for function in ('check_images', 'soft_split', 'kernel_attention', 'resample_positions'):
    torch.fx.wrap(function)  # one node each in FX graphs: they compare sizes or change the precision
