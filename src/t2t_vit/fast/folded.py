"""Soft split, LayerNorm and Linear folded into one convolution, and the token layers that use it (Sec. 3.1).

Windows are never written to memory. For a window p with mean m and r = (var + eps)^-1/2, and W' = W·diag(gamma) with
the mean of each row subtracted,

    LN(p)·Wᵀ + b = (W'·p)·r + (W·beta + b):

one convolution, a few one-channel means and one multiplication instead of N·n values written and read three times.
Maps are kept in channels_last memory, in which (B, D, h, w) and (B, N, D) are the same bytes.

Shapes: B images, C channels, (H, W) map, (h, w) grid after the split, k kernel, n = C·k·k values of a window, O output
channels, N = h·w tokens, D token_dim, m random features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.precision import cpu_has_matmuls, full_precision, half_precision
from ..models.t2t_vit import TokenAttention, TokenPerformer, TokensToToken, TokenTransformer
from .attention import attention
from .memory import in_transform, recomputed, scale_shift
from .rule import Fast, active_rate, is_exporting

MAP_CHANNELS = 32  # from which a map is one of tokens, not an image


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, N, C); a view if the map is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """(B, N, C) -> (B, C, h, w), a channels_last view: re-structurization without a copy."""
    return x.reshape(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)


def as_kernel(weight: Tensor, kernel: int) -> Tensor:
    """Return a Linear's weight over windows, (O, n), as that of a channels_last convolution, (O, C, k, k)."""
    weight = weight.view(weight.shape[0], -1, kernel, kernel)
    # runtimes choose the layout of their kernels, and XNNPACK takes no other than the usual one; vmap has none to give
    if is_exporting() or in_transform():
        return weight
    return weight.contiguous(memory_format=torch.channels_last)


def as_tf32(weight: Tensor) -> Tensor:
    """Round float32 to TF32's ten bits of mantissa, as an accelerator's convolution does; the gradient passes."""
    bits = weight.detach().contiguous().view(torch.int32)
    return weight + (((bits + 0x1000) & -0x2000).view(torch.float32) - weight).detach()


def rounds_to_tf32(x: Tensor) -> bool:
    """Return True if convolutions of `x` may use TF32: on a GPU unless it is switched off, or if that is unknown."""
    if x.device.type == 'cpu' or x.dtype != torch.float32:
        return False
    try:
        return torch.compiler.is_compiling() or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through the newer names, which this one contradicts
        return True


def window_values(x: Tensor, dim: int, kernel: int, stride: int) -> Tensor:
    """Stack the k values under each window along one dimension: (…, L, …) -> (k, …, l, …)."""
    last = x.shape[dim] - kernel
    parts = [x.narrow(dim, i, last + 1) for i in range(kernel)]
    return torch.stack([part[:, :, ::stride] if dim == 2 else part[:, :, :, ::stride] for part in parts])


class ChannelMeanVar(torch.autograd.Function):
    """Mean and biased variance over channels, (B, C, H, W) -> (B, 1, H, W) each, with a backward pass of one operation.

    Autograd's own takes several passes over the map. d mean / dx = 1/C, d var / dx = 2/C·(x - mean).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance."""
        mean = x.mean(1, keepdim=True)
        deviations = x - mean
        return mean, deviations.mul_(deviations).mean(1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Store the map, which the convolution stores too, and its mean."""
        ctx.save_for_backward(*inputs, output[0])
        ctx.save_for_forward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        """Return the gradient of the map, itself differentiable."""
        x, mean = ctx.saved_tensors
        scale = grad_var * (2 / x.shape[1])
        return torch.addcmul(grad_mean / x.shape[1] - scale * mean, x, scale)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivatives along a tangent."""
        x, mean = ctx.saved_tensors
        return tangent.mean(1, keepdim=True), 2 * ((x - mean) * tangent).mean(1, keepdim=True)


def channel_mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over channels: (B, C, H, W) -> (B, 1, H, W) each."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return ChannelMeanVar.apply(x)
    mean = x.mean(1, keepdim=True)
    return mean, (x - mean).square().mean(1, keepdim=True)


def window_mean_var(x: Tensor, kernel: int, stride: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the n values of every window of a map, (B, 1, h, w) each.

    The variance is gathered over channels, columns and rows: the variance of a union of equal groups is the mean of
    their variances plus the variance of their means. Each step subtracts its mean before it squares, so flat bright
    windows lose no digits, as E[p²] - E[p]² would; and only one-channel maps are cut into windows.
    """
    mean, var = channel_mean_var(x)
    if padding:
        mean, var = F.pad(mean, [padding] * 4), F.pad(var, [padding] * 4)
    for dim in (3, 2):
        means = window_values(mean, dim, kernel, stride)
        mean = means.mean(0)
        deviations = means - mean
        var = window_values(var, dim, kernel, stride).mean(0) + (deviations * deviations).mean(0)
    return mean, var


def fold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fold LayerNorm's weight and bias, (n,), into the Linear after it: W' (O, n) and W·beta + b (O,)."""
    scaled = weight * norm_weight
    shift = F.linear(norm_bias, weight, None if bias is None else bias.to(weight.dtype))
    return scaled - scaled.mean(1, keepdim=True), shift


def split_norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, split: tuple[int, int, int]) -> Tensor:
    """Soft split, LayerNorm over each window, Linear: (B, C, H, W) -> (B, O, h, w) in float32, or float64 if x is.

    In flat windows r is large, up to eps^-1/2, and enlarges the rounding of W'·p. Two terms that are zero in exact
    arithmetic keep that small: the image's own mean is subtracted first, which LayerNorm does not see, and m·(W'·1) at
    the end, on accelerators whose convolutions may round W' to a short mantissa (TF32): W' is rounded beforehand, so
    that the effect of rounding on its row sums is known.
    """
    kernel, stride, padding = split
    with full_precision(x):
        x = x if x.dtype == torch.float64 else x.float()
        scaled, shift = fold(norm.weight.to(x.dtype), norm.bias.to(x.dtype), linear.weight.to(x.dtype), linear.bias)
        x = F.pad(x, [padding] * 4) - x.detach().mean((1, 2, 3), keepdim=True)
        mean, var = window_mean_var(x, kernel, stride)
        short = rounds_to_tf32(x)
        if short:
            scaled = as_tf32(scaled)
        out = F.conv2d(x, as_kernel(scaled, kernel), stride=stride)
        if short:
            out = out - (mean * scaled.sum(1).view(1, -1, 1, 1)).detach()
        return scale_shift(out, (var + norm.eps).rsqrt(), shift.view(1, -1, 1, 1))


def split_norm_linear_half(
    x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, split: tuple[int, int, int], kind: torch.dtype
) -> Tensor:
    """Compute `split_norm_linear` with operands of the matmul in half precision; oneDNN sums in float32.

    Statistics and normalisation are in float32. Images have few channels, so their windows are few values: these are
    normalised, rounded and multiplied, because the normalisation of flat windows enlarges rounding before it. So are
    all in float16, in whose range W'·p may overflow. For maps of tokens the convolution is rounded, and the effect of
    rounding W' on its row sums subtracted.
    """
    kernel, stride, padding = split
    with full_precision(x):
        weight, shift = fold(norm.weight.float(), norm.bias.float(), linear.weight.float(), linear.bias)
        if x.shape[1] < MAP_CHANNELS or kind == torch.float16:
            x = F.pad(x.float(), [padding] * 4).permute(0, 2, 3, 1).contiguous()
            windows = x.unfold(1, kernel, stride).unfold(2, kernel, stride).permute(0, 1, 2, 4, 5, 3).flatten(3)
            windows = F.layer_norm(windows, windows.shape[3:], eps=norm.eps).to(kind)  # (B, h, w, k·k·C)
            weight = weight.unflatten(1, (-1, kernel, kernel)).permute(0, 2, 3, 1).flatten(1)
            return F.linear(windows, weight.to(kind), shift.to(kind)).permute(0, 3, 1, 2)
        x, weight = x.to(kind), weight.to(kind)
        mean, var = window_mean_var(x.float(), kernel, stride, padding)
        out = F.conv2d(x, as_kernel(weight, kernel), stride=stride, padding=padding).float()
        out = out - (mean * weight.float().sum(1).view(1, -1, 1, 1)).detach()
        return scale_shift(out, (var + norm.eps).rsqrt(), shift.view(1, -1, 1, 1)).to(kind)


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout that draws 16 bits for each value on a CPU, four values from one random number.

    torch draws one number for each value, one after the other. The probability is a multiple of 2^-16, 0.10001 for 0.1.
    """
    if not 0 < p < 1 - 2**-16 or x.device.type != 'cpu' or torch.compiler.is_compiling() or in_transform():
        return F.dropout(x, p)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = bits.view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15
    return x * kept.to(x.dtype).mul_(1 / (1 - p))


class FoldedTokenLayer(Fast):
    """Base of the folded token layers: the soft split with its norm and Linear, in float32 or in half precision."""

    kernel: int
    stride: int
    padding: int

    def half_type(self, x: Tensor) -> torch.dtype | None:
        """Return the type to multiply windows in if it is a half precision that this processor has."""
        kind = half_precision(x)
        fits = x.device.type == 'cpu' and kind is not None and x.dtype in (kind, torch.float32)
        return kind if fits and cpu_has_matmuls(kind) else None

    def split_norm_linear(self, x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
        """(B, C, H, W) -> (B, O, h, w), in half precision, float32 or float64."""
        split, kind = (self.kernel, self.stride, self.padding), self.half_type(x)
        if kind is None:
            return split_norm_linear(x, norm, linear, split)
        return split_norm_linear_half(x, norm, linear, split, kind)

    def dtype_after(self, x: Tensor) -> torch.dtype:
        """Return the type of the layer's output."""
        return self.half_type(x) or x.dtype


class FoldedTokenTransformer(FoldedTokenLayer, TokenTransformer):
    """`TokenTransformer` without windows in memory, and with fused attention."""

    parts = {
        'norm1': nn.LayerNorm,
        'attn': TokenAttention,
        'attn.qkv': nn.Linear,
        'attn.attn_drop': nn.Dropout,
        'norm2': nn.LayerNorm,
    }

    def fast_forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        qkv = self.split_norm_linear(x, self.norm1, self.attn.qkv)
        height, width = qkv.shape[-2], qkv.shape[-1]
        q, k, v = to_tokens(qkv.to(self.dtype_after(x))).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, N, D) each
        y = attention(q, k, v, active_rate(self.attn.attn_drop), self.attn.scale)
        x = v.squeeze(1) + self.attn.proj(y.squeeze(1))
        y = self.norm2(x)
        with recomputed(y, self.norm2.forward, x):
            return to_map(x + self.mlp(y), height, width)


class FoldedTokenPerformer(FoldedTokenLayer, TokenPerformer):
    """`TokenPerformer` without windows in memory."""

    parts = {
        'norm1': nn.LayerNorm,
        'kqv': nn.Linear,
        'proj_drop': nn.Dropout,
        'norm2': nn.LayerNorm,
        'mlp': nn.Sequential,
        'mlp.1': nn.GELU,
        'mlp.3': nn.Dropout,
    }

    def features(self, x: Tensor) -> Tensor:
        """Return φ(x) in float32 or float64, (B, N, D) -> (B, N, m); the factor 1/√m is in the exponent."""
        x = x if x.dtype == torch.float64 else x.float()
        half_norm = 0.5 * x.square().sum(-1, keepdim=True)
        return F.linear(x, self.w.to(x.dtype)).sub_(half_norm + 0.5 * math.log(len(self.w))).exp_()

    def kernel_attention(self, kqv: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3·D) -> attention's output and v, (B, N, D) each; φ is in float32 where `kqv` is float16."""
        k, q, v = kqv.chunk(3, dim=-1)
        k, q = self.features(k), self.features(q)
        weights = q @ k.sum(1).unsqueeze(-1) + self.eps  # (B, N, 1)
        kind = torch.float32 if v.dtype == torch.float16 else v.dtype  # in whose range φ, about e^-30, would be 0
        values = k.to(kind).transpose(1, 2) @ v.to(kind)
        return (q / weights).to(kind) @ values, v  # m is half of D: half the divisions

    def fast_forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        kqv, dtype = self.split_norm_linear(x, self.norm1, self.kqv), self.dtype_after(x)
        height, width = kqv.shape[-2], kqv.shape[-1]
        with full_precision(x):
            y, v = self.kernel_attention(to_tokens(kqv))
        x = v.to(dtype) + fast_dropout(self.proj(y.to(dtype)), active_rate(self.proj_drop))
        del kqv, v, y
        y = self.norm2(x)
        with recomputed(y, self.norm2.forward, x):
            hidden = self.mlp[0](y)
        y = self.mlp[1](hidden)
        with recomputed(y, self.mlp[1].forward, hidden):
            y = self.mlp[2](y)
        return to_map(x + fast_dropout(y, active_rate(self.mlp[3])), height, width)


class FoldedTokensToToken(Fast, TokensToToken):
    """`TokensToToken` whose last split and Linear are one convolution, since unfold orders a window (C, k, k)."""

    parts = {'project': nn.Linear}
    forward = TokensToToken.forward

    def last_split(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, h, w)."""
        if not self.runs_fast(x):
            return super().last_split(x)
        padding = self.padding
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            # Inductor fails to save this map, a view with symbolic strides, for the backward pass (docs/clients.md)
            x, padding = F.pad(x, [padding] * 4), 0
        weight = as_kernel(self.project.weight, self.kernel)
        return F.conv2d(x, weight, self.project.bias, stride=self.stride, padding=padding)
