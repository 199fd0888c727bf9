"""The form that parts of the model take in an exported graph: the same numbers by other operations.

In PyTorch a slice is a view, and a map in channels_last is its tokens. Other runtimes copy what they slice and
transpose, and there the token layers of an unchanged graph take longer than their products. So here nothing large is
cut in pieces (weights are), and what depends on weights alone is computed beforehand.

Letters as in models/soft_split.py and models/tokens.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..models.blocks import Attention, attend
from ..models.tokens import TokenLayer, TokenPerformer, TokenTransformer, to_tokens

SCALE = 2.0**27  # of both sides of the kernel's quotient: ONNX's optimizer takes an addend of 1e-8 for zero


class SplitNormLinears(nn.Module):
    """Soft split, LayerNorm over each window, several Linears: see `split_norm_linear`, whose sums these are.

    Only the statistics differ. A window's variance is the mean of its pixels' variances over channels, plus the
    variance of their means; windows of these one-channel maps are laid out by a convolution with the identity. Each
    mean is subtracted before squaring, as there.
    """

    def __init__(
        self, layer: TokenLayer, norm: nn.LayerNorm, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
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

    identity: torch.Tensor

    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], int, int]:
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


class Performer(nn.Module):
    """A `TokenPerformer`, whose φ of keys and queries comes of one product, as twice the tokens, and is never cut.

    What only one of the two halves may take part in, has zeros for the other.
    """

    w: torch.Tensor

    def __init__(self, layer: TokenPerformer) -> None:
        super().__init__()
        self.layer = layer
        dim, self.features = layer.token_dim, layer.num_features
        sizes = [2 * dim, dim]
        self.split = SplitNormLinears(layer, layer.norm1, layer.kqv.weight.split(sizes), layer.kqv.bias.split(sizes))
        self.register_buffer('w', layer.w.float())
        self.shift, self.eps = 0.5 * math.log(layer.num_features), layer.eps
        del layer.norm1, layer.kqv, layer.w

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        (kq, v), height, width = self.split(x)
        both = kq.unflatten(2, (2, -1)).flatten(1, 2)  # (B, 2·N, D), a view
        half_norm = both.square().sum(2, keepdim=True) * 0.5
        phi = torch.exp(F.linear(both, self.w.float()) - (half_norm + self.shift))
        phi = phi.unflatten(1, (-1, 2)).flatten(2)  # φ(k) and φ(q), (B, N, 2·m)
        turned = phi.transpose(1, 2)
        sums = turned.sum(2, keepdim=True)[:, : self.features] * SCALE
        values = (turned @ v)[:, : self.features] * SCALE
        sums, values = (F.pad(part, [0, 0, self.features, 0]) for part in (sums, values))  # zeros, Σ φ(k) or Σ φ(k)ᵀv
        y = (phi @ values) / (phi @ sums + self.eps * SCALE)
        return self.layer.mlp_map(v.to(x.dtype) + self.layer.proj(y.to(x.dtype)), height, width)


class Transformer(nn.Module):
    """A `TokenTransformer`, whose q, k and v are made one by one."""

    def __init__(self, layer: TokenTransformer) -> None:
        super().__init__()
        self.layer = layer
        weights = layer.attn.qkv.weight.chunk(3)
        self.split = SplitNormLinears(layer, layer.norm1, weights, [weights[0].new_zeros(layer.token_dim)] * 3)
        del layer.norm1, layer.attn.qkv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        tokens, height, width = self.split(x)
        q, k, v = (part.to(x.dtype).unsqueeze(1) for part in tokens)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.layer.scale)
        return self.layer.mlp_map(v.squeeze(1) + self.layer.attn.proj(y.squeeze(1)), height, width)


class SeparateAttention(nn.Module):
    """An `Attention`, whose q, k and v are made one by one."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer
        dim = layer.qkv.in_features
        self.parts = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3))
        for part, weight in zip(self.parts, layer.qkv.weight.chunk(3)):
            part.weight = nn.Parameter(weight.detach().clone())
        del layer.qkv

    def forward(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """(B, N, C) -> (B, N, C), or (B, 1, C)."""
        first = class_only and not self.layer.all_tokens
        q, k, v = (part(tokens) for part, tokens in zip(self.parts, (x[:, :1] if first else x, x, x)))
        x = self.layer.se_layer(self.layer.proj(attend(q, k, v, self.layer.num_heads, 0.0)))
        return x[:, :1] if class_only and not first else x


FORMS: tuple[tuple[type, type], ...] = (
    (TokenPerformer, Performer),
    (TokenTransformer, Transformer),
    (Attention, SeparateAttention),
)


@torch.no_grad()
def rewrite(model: nn.Module) -> nn.Module:
    """A model in evaluation mode with the parts of `FORMS` exchanged, in place; parts of one's own classes stay."""
    for name, child in [*model.named_children()]:
        form = next((form for kind, form in FORMS if type(child) is kind), None)
        if form:
            setattr(model, name, form(child))
        else:
            rewrite(child)
    return model
