"""The tokens-to-token module: soft split and re-structurization, stage after stage (Sec. 3.1, Fig. 3).

Every token layer takes a map and gives a map, (B, C, H, W) -> (B, token_dim, h, w): a token layer's tokens, laid out
in channels_last, *are* the next map, so the paper's re-structurization costs nothing.

Letters: B images, C channels, (H, W) the map, (h, w) the grid after the split, N = h·w tokens, D token_dim.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from . import fused
from .recompute import Mlp, recomputed
from .soft_split import Split, full_precision, split_linear, split_norm_linear


class TokenLayer(nn.Module):
    """What every token layer knows: its split, and how maps and tokens turn into each other.

    A layer of one's own derives from it, is built as `layer(in_chans, token_dim, split)`, and maps
    (B, in_chans, H, W) to (B, token_dim, h, w).
    """

    if TYPE_CHECKING:  # TorchScript would read them as attributes of every layer
        norm2: nn.LayerNorm  # of those that end in `mlp_map`
        mlp: Any

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.token_dim = token_dim
        self.kernel, self.stride, self.padding = split
        self.window_dim = in_chans * split.kernel**2
        self.norm_eps = 1e-5

    def mlp_map(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The MLP's residual step with a layer's own `norm2` and `mlp`, then the map: (B, N, D) -> (B, D, h, w)."""
        y = self.norm2(x)
        if torch.jit.is_scripting():
            return to_map(x + self.mlp(y), height, width)
        with recomputed(y, self.norm2.forward, x):
            return to_map(x + self.mlp(y), height, width)


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) -> (B, N, C); a view where the map is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Re-structurization (Sec. 3.1): (B, N, C) -> (B, C, h, w), a channels_last view."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Dropout(nn.Dropout):
    """Dropout whose mask on a CPU takes a number of 16 bits for each value, four of one that is drawn.

    torch draws one for each value, one after the other. The chance is a multiple of 2^-16, 0.10001 for 0.1.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape, the same."""
        if torch.jit.is_scripting():
            return F.dropout(x, self.p, self.training)
        if not self.training or x.device.type != 'cpu' or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = bits[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class SingleHeadAttention(nn.Module):
    """The weights of the token transformer's attention, under their published names; used by its layer."""

    def __init__(self, window_dim: int, token_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(window_dim, 3 * token_dim, bias=False)
        self.proj = nn.Linear(token_dim, token_dim)


class TokenTransformer(TokenLayer):
    """T' = MLP(MSA(T)) over the windows of a soft split (Eq. 1), one head of width D, MLP ratio 1.

    Two things differ from a usual block: the products are scaled by window_dim^-1/2, the width of the layer's input,
    and the skip around attention carries v, since the input's width is another.
    """

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.scale = self.window_dim**-0.5
        self.norm1 = nn.LayerNorm(self.window_dim, eps=self.norm_eps)
        self.attn = SingleHeadAttention(self.window_dim, token_dim)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = Mlp(token_dim, token_dim)

    @torch.jit.unused
    def fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same by kernels, where they serve."""
        parts: tuple[Any, Any, Any] = self.attn.proj, self.mlp.fc1, self.mlp.fc2
        if not fused.serves(x, self.token_dim, self.norm2, (self.attn.qkv, *parts)):
            return None
        split = Split(self.kernel, self.stride, self.padding)
        q, k, v = fused.split_norm_linear(x, self.norm1, self.attn.qkv, split).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        y = fused.behind(y.squeeze(1), v.squeeze(1), *parts, self.norm2)
        return to_map(y, *split.grid(x.shape[2], x.shape[3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        if not torch.jit.is_scripting():
            y = self.fused(x)
            if y is not None:
                return y
        qkv = split_norm_linear(
            x,
            self.norm1.weight,
            self.norm1.bias,
            self.norm_eps,
            self.attn.qkv.weight,
            None,
            self.kernel,
            self.stride,
            self.padding,
        ).to(x.dtype)
        height, width = qkv.shape[-2], qkv.shape[-1]
        q, k, v = to_tokens(qkv).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, N, D) each
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = v.squeeze(1) + self.attn.proj(x.squeeze(1))
        return self.mlp_map(x, height, width)


class PerformerMlp(nn.Sequential):
    """Linear, GELU, Linear, dropout, under their published names; keeps GELU's input only for the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        hidden = self[0](x)
        x = self[1](hidden)
        if torch.jit.is_scripting():
            x = self[2](x)
        else:
            with recomputed(x, self[1].forward, hidden):
                x = self[2](x)
        return self[3](x)


class TokenPerformer(TokenLayer):
    """The token transformer with its softmax replaced by m = D/2 positive random features (Sec. 3.1, "T2T module").

    φ(x) = exp(w·x - |x|²/2) / √m with a fixed orthogonal w, and attention is φ(q)·(Σ φ(k)ᵀv) / (φ(q)·Σ φ(k) + 1e-8):
    linear in the number of tokens. The Linear gives k, q, v, in this order.

    The kernel runs in float32 whatever the surrounding precision: half precision turns 1e-8 into 0 and exp into inf,
    the NaN of the published code. In float32 nothing can overflow: w·x - |x|²/2 ≤ |w|²/2 = m/2.
    """

    w: torch.Tensor
    features_ratio = 0.5
    dropout = 0.1  # fixed in the published model, after the projection and after the MLP

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.num_features = int(token_dim * self.features_ratio)
        self.eps = 1e-8
        self.norm1 = nn.LayerNorm(self.window_dim, eps=self.norm_eps)
        self.kqv = nn.Linear(self.window_dim, 3 * token_dim)
        self.proj = nn.Linear(token_dim, token_dim)
        self.proj_drop = Dropout(self.dropout)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = PerformerMlp(
            nn.Linear(token_dim, token_dim), nn.GELU(), nn.Linear(token_dim, token_dim), Dropout(self.dropout)
        )
        self.register_buffer('w', torch.empty(self.num_features, token_dim))
        self.init_features()

    def init_features(self) -> None:
        """Draw w: orthogonal rows of length √m; part of every checkpoint, never trained."""
        nn.init.orthogonal_(self.w, gain=math.sqrt(self.num_features))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """φ, (B, N, D) -> (B, N, m); the factor 1/√m stands in the exponent."""
        half_norm = 0.5 * torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        return F.linear(x, self.w.to(x.dtype)).sub_(half_norm + 0.5 * math.log(self.num_features)).exp_()

    def kernel_attention(self, kqv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 or float64 (B, N, 3·D) -> attention's output and v, (B, N, D) each."""
        k, q, v = kqv.chunk(3, dim=-1)
        k, q = self.features(k), self.features(q)
        weights = q @ k.sum(1).unsqueeze(-1) + self.eps  # (B, N, 1)
        return (q / weights) @ (k.transpose(1, 2) @ v), v  # m is half of D: half the divisions

    @torch.jit.unused
    def fused(self, x: torch.Tensor) -> torch.Tensor | None:
        """The same by kernels, where they serve."""
        parts: tuple[Any, Any, Any] = self.proj, self.mlp[0], self.mlp[2]
        if not fused.serves(x, self.token_dim, self.norm2, (self.kqv, *parts)):
            return None
        split = Split(self.kernel, self.stride, self.padding)
        kqv = fused.split_norm_linear(x, self.norm1, self.kqv, split)
        dropout = self.proj_drop.p if self.training else 0.0
        y = fused.performer(kqv, self.w, self.eps, *parts, self.norm2, dropout)
        return to_map(y, *split.grid(x.shape[2], x.shape[3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        if not torch.jit.is_scripting():
            y = self.fused(x)
            if y is not None:
                return y
        kqv = split_norm_linear(
            x,
            self.norm1.weight,
            self.norm1.bias,
            self.norm_eps,
            self.kqv.weight,
            self.kqv.bias,
            self.kernel,
            self.stride,
            self.padding,
        )
        height, width = kqv.shape[-2], kqv.shape[-1]
        if torch.jit.is_scripting():
            y, v = self.kernel_attention(to_tokens(kqv))
        else:
            with full_precision(x):
                y, v = self.kernel_attention(to_tokens(kqv))
        x = v.to(x.dtype) + self.proj_drop(self.proj(y.to(x.dtype)))
        del kqv, v, y
        return self.mlp_map(x, height, width)


class TokenConvolution(TokenLayer):
    """A convolution in the place of soft split and attention (Table 4's T2T-ViT_c-14), with GELU behind it.

    The release declares the convolutions and has no forward for them; without the GELU the whole module would be one
    linear map. It has no parameters, so the count is the published one.
    """

    def __init__(self, in_chans: int, token_dim: int, split: Split) -> None:
        super().__init__(in_chans, token_dim, split)
        self.conv = nn.Conv2d(in_chans, token_dim, split.kernel, split.stride, split.padding)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        return self.act(self.conv(x))


class SplitLinear(nn.Linear):
    """The last soft split and the Linear to the backbone's width (Sec. 3.1), one convolution."""

    def __init__(self, in_chans: int, embed_dim: int, split: Split) -> None:
        super().__init__(in_chans * split.kernel**2, embed_dim)
        self.kernel, self.stride, self.padding = split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, embed_dim, h, w)."""
        return split_linear(x, self.weight, self.bias, self.kernel, self.stride, self.padding)


TOKEN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    'transformer': TokenTransformer,
    'performer': TokenPerformer,
    'convolution': TokenConvolution,
}


@register_notrace_module  # FX takes it as one node: its checks look at sizes
class TokensToToken(nn.Sequential):
    """A token layer for every split but the last, then the projection of the last split: `attention1`, …, `project`.

    With the paper's splits 224² becomes 56², 28², 14² tokens. One split and no token layer is a ViT's patch embedding.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        token_layer: Callable[..., nn.Module] | None,
        in_chans: int,
        token_dim: int,
        embed_dim: int,
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        chans = in_chans
        for i, split in enumerate(splits[:-1]):
            assert token_layer is not None  # T2TViT has checked it
            layers[f'attention{i + 1}'] = token_layer(chans, token_dim, split)
            chans = token_dim
        layers['project'] = SplitLinear(chans, embed_dim, splits[-1])
        super().__init__(layers)
        self.in_chans = in_chans
        self.splits = tuple(splits)

    @torch.jit.unused
    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens after each split of an H×W image.

        Raises:
            ValueError: if the image is too small for one token.
        """
        grids: list[tuple[int, int]] = []
        for split in self.splits:
            rows, cols = split.grid(*(grids[-1] if grids else (height, width)))
            if rows < 1 or cols < 1:
                raise ValueError(
                    f'an image of {height}×{width} is too small: the splits (kernel, stride, padding) '
                    f'{", ".join(str(tuple(s)) for s in self.splits)} leave no token of it'
                )
            grids.append((rows, cols))
        return grids

    @torch.jit.unused
    def check(self, x: torch.Tensor) -> None:
        """Raises ValueError where images do not fit: their shape, their channels, or too small for one token."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f'expected images of shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}; '
                'the number of channels is set by in_chans'
            )
        self.grids(x.shape[2], x.shape[3])

    @torch.jit.unused
    def named_stages(self, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Each layer's name and the map behind it, (B, C, h, w)."""
        self.check(x)
        for name, layer in self.named_children():
            x = layer(x)
            yield name, x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, embed_dim, h, w)."""
        if not torch.jit.is_scripting():
            self.check(x)
        for layer in self:
            x = layer(x)
        return x
