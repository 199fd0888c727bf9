"""T2T-ViT once more, plainly: the paper's equations line by line, with every window and every attention map laid out.

The package computes the same in fewer steps; this file is what it is held to, in values and in gradients, and what a
benchmark compares it with. Parameters have the published names, so a state dict of `T2TViT` fits, and the other way
round; arguments are `T2TViT`'s. Nothing here calls the package's code.

Letters: B images, C channels, k the window, (h, w) the grid after a split, N tokens, D a width, m random features.
"""

import math
import zlib
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def soft_split(x, kernel, stride, padding):
    """Sec. 3.1: overlapping windows, each flattened to a token; (B, C, H, W) -> (B, N, C·k·k) and (h, w)."""
    grid = tuple((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    return F.unfold(x, kernel, stride=stride, padding=padding).transpose(1, 2), grid


def restructurize(tokens, grid):
    """Sec. 3.1: tokens back to a map, (B, N, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def softmax_attention(q, k, v, scale):
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def position_table(positions, dim):
    """Sec. 3.2: sine in the even columns, cosine in the odd ones, of position / 10000^(2i/D)."""
    column = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()[None]


def mlp(dim, hidden):
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))


class SingleHeadAttention(nn.Module):
    """One head, scaled by the width of its input; that differs from the output's, so the skip carries v."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.scale = in_dim**-0.5
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return v + self.proj(softmax_attention(q, k, v, self.scale))


class TokenTransformer(nn.Module):
    """T' = MLP(MSA(T)), Eq. 1; (B, N, C·k·k) -> (B, N, D)."""

    def __init__(self, in_chans, kernel, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_chans * kernel**2)
        self.attn = SingleHeadAttention(in_chans * kernel**2, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, dim)

    def forward(self, x):
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """The same with positive random features instead of the softmax; (B, N, C·k·k) -> (B, N, D)."""

    def __init__(self, in_chans, kernel, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_chans * kernel**2)
        self.kqv = nn.Linear(in_chans * kernel**2, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(0.1))
        features = dim // 2
        self.register_buffer('w', nn.init.orthogonal_(torch.empty(features, dim)) * features**0.5)

    def phi(self, x):
        """exp(w·x - |x|²/2) / √m; (B, N, D) -> (B, N, m)."""
        return torch.exp(x @ self.w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(self.w))

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.phi(k), self.phi(q)
        weights = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)  # (B, N, 1)
        x = v + self.drop(self.proj(q @ (k.transpose(1, 2) @ v) / (weights + 1e-8)))
        return x + self.mlp(self.norm2(x))


class TokenConvolution(nn.Module):
    """One filter bank over the windows, and GELU; (B, N, C·k·k) -> (B, N, D)."""

    def __init__(self, in_chans, kernel, dim):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel)

    def forward(self, x):
        return F.gelu(F.linear(x, self.conv.weight.flatten(1), self.conv.bias))


TOKEN_LAYERS = {'transformer': TokenTransformer, 'performer': TokenPerformer, 'convolution': TokenConvolution}


class TokensToToken(nn.Module):
    """Split, layer, split, layer, split, Linear (Fig. 3)."""

    def __init__(self, splits, token_layer, in_chans, token_dim, embed_dim):
        super().__init__()
        self.splits = splits
        for i, (kernel, _, _) in enumerate(splits[:-1]):
            self.add_module(f'attention{i + 1}', TOKEN_LAYERS[token_layer](in_chans, kernel, token_dim))
            in_chans = token_dim
        self.project = nn.Linear(in_chans * splits[-1][0] ** 2, embed_dim)

    def forward(self, x):
        """(B, C, H, W) -> each layer's name with its tokens, and the last grid."""
        stages = {}
        for split, (name, layer) in zip(self.splits, self.named_children()):
            tokens, grid = soft_split(x, *split)
            stages[name] = layer(tokens)
            x = restructurize(stages[name], grid)
        return stages, grid


class SqueezeExcite(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // 16, bias=False), nn.ReLU(), nn.Linear(dim // 16, dim, bias=False), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.fc(x.mean(1, keepdim=True))


class Attention(nn.Module):
    """Multi-head self-attention scaled by (D / heads)^-1/2."""

    def __init__(self, dim, num_heads, se=False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.se_layer = SqueezeExcite(dim) if se else nn.Identity()

    def queries_keys_values(self, x):
        return self.qkv(x).chunk(3, dim=-1)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.queries_keys_values(x))
        x = softmax_attention(q, k, v, q.shape[-1] ** -0.5)
        return self.se_layer(self.proj(x.transpose(1, 2).flatten(2)))


class ChannelScale(nn.Conv1d):
    """The ghost design's cheap operation: a depthwise convolution of one position."""

    def __init__(self, dim):
        super().__init__(dim, dim, 1, groups=dim, bias=False)

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GhostAttention(Attention):
    """One half of q, k and v by a Linear, the other as a scale of each of its channels."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        del self.qkv
        for name in 'qkv':
            self.add_module(name, nn.Linear(dim, dim // 2, bias=False))
            self.add_module(f'cheap_operation_{name}', ChannelScale(dim // 2))

    def queries_keys_values(self, x):
        halves = [getattr(self, name)(x) for name in 'qkv']
        ghosts = [getattr(self, f'cheap_operation_{name}')(half) for name, half in zip('qkv', halves)]
        return [torch.cat(pair, dim=-1) for pair in zip(halves, ghosts)]


class GhostMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.cheap_operation2 = ChannelScale(dim)
        self.cheap_operation3 = ChannelScale(dim)
        self.fc2 = nn.Linear(3 * dim, dim)

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        return self.fc2(torch.cat([x, F.gelu(self.cheap_operation2(x)), F.gelu(self.cheap_operation3(x))], dim=-1))


class Block(nn.Module):
    """Eq. 6: attention and MLP, each behind a norm and beside a skip. A dense block appends what it made of it."""

    def __init__(self, kind, dim, num_heads, mlp_ratio, growth_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GhostAttention(dim, num_heads) if kind == 'ghost' else Attention(dim, num_heads, se=kind == 'se')
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GhostMlp(dim) if kind == 'ghost' else mlp(dim, int(dim * mlp_ratio))
        self.dense_linear = nn.Linear(dim, growth_rate) if kind == 'dense' else None

    def forward(self, x):
        y = x + self.attn(self.norm1(x))
        y = y + self.mlp(self.norm2(y))
        return y if self.dense_linear is None else torch.cat([x, self.dense_linear(y)], dim=-1)


def transition(dim):
    """Between dense groups: to half the width."""
    return nn.Sequential(OrderedDict(linear=nn.Linear(dim, dim // 2), act=nn.GELU()))


class ReferenceT2TViT(nn.Module):
    def __init__(
        self,
        token_layer='performer',
        depth=14,
        embed_dim=384,
        num_heads=6,
        mlp_ratio=3,
        block='plain',
        img_size=224,
        splits=((7, 4, 2), (3, 2, 1), (3, 2, 1)),
        in_chans=3,
        num_classes=1000,
        token_dim=64,
        growth_rate=64,
    ):
        super().__init__()
        self.tokens_to_token = TokensToToken(splits, token_layer, in_chans, token_dim, embed_dim)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        for kernel, stride, padding in splits:
            sides = tuple((side + 2 * padding - kernel) // stride + 1 for side in sides)
        self.grid = sides
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer('pos_embed', position_table(1 + sides[0] * sides[1], embed_dim))
        self.blocks, dim = nn.ModuleList(), embed_dim
        for group, count in enumerate([depth] if isinstance(depth, int) else depth):
            if group > 0:
                self.blocks.append(transition(dim))
                dim //= 2
            for _ in range(count):
                self.blocks.append(Block(block, dim, num_heads, mlp_ratio, growth_rate))
                dim += growth_rate if block == 'dense' else 0
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def positions(self, grid):
        """The table, its grid part resampled (bicubic) for a grid other than it was made for."""
        if grid == self.grid:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], restructurize(self.pos_embed[:, 1:], self.grid)
        rest = F.interpolate(rest, grid, mode='bicubic', antialias=True)
        return torch.cat([first, rest.flatten(2).transpose(1, 2)], dim=1)

    def stages(self, x):
        """Every stage by its module's name, as tokens (B, N, D), then `norm` and `head`."""
        tokens, grid = self.tokens_to_token(x)
        stages = {f'tokens_to_token.{name}': t for name, t in tokens.items()}
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens['project']], dim=1)  # Eq. 5
        x = x + self.positions(grid)
        for i, block in enumerate(self.blocks):
            stages[f'blocks.{i}'] = x = block(x)
        stages['norm'] = x = self.norm(x)
        stages['head'] = self.head(x[:, 0])  # Eq. 7
        return stages

    def forward(self, x):
        return self.stages(x)['head']


def plain_14(img_size):
    """T2T-ViT-14 as published, for `t2t-vit bench tests/reference.py:plain_14`."""
    return ReferenceT2TViT(img_size=img_size)


def plain_t_14(img_size):
    return ReferenceT2TViT('transformer', img_size=img_size)


def fill(module, seed=7):
    """Weights by rule: every parameter but the position table from its name, see golden/README.md."""
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        z = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
        if 'norm' in name and name.endswith('weight'):
            z = 1 + 0.1 * z
        elif name.endswith('.w'):
            z = 0.5 * z
        elif len(shape) >= 2:
            z = z / math.prod(shape[1:]) ** 0.5
        else:
            z = 0.1 * z
        if name != 'pos_embed':
            tensor.copy_(torch.from_numpy(z))
    return module


def relative_error(ours, expected):
    """‖ours - expected‖ / ‖expected‖; 0 where both are zero."""
    ours, expected = ours.detach().double(), expected.detach().double()
    difference = (ours - expected).norm().item()
    return difference and difference / expected.norm().item()
