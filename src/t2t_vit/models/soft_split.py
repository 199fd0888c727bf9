"""The paper's soft split, and its exact form without unfolding (Sec. 3.1, "Soft Split").

Letters: B images, C channels, (H, W) the map, (h, w) the grid after the split, k·k the window,
n = C·k·k the values of a window, O output channels, N = h·w tokens.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .recompute import scale_shift


class Split(NamedTuple):
    """One soft split: k×k windows, a window every `stride` pixels (overlap s = k - stride), `padding` zeros around.

    The paper's three are `Split(7, 4, 2)`, `Split(3, 2, 1)`, `Split(3, 2, 1)`; a hard split has stride = kernel.
    """

    kernel: int
    stride: int
    padding: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows over an H×W map: floor((H + 2p - k) / (k - s) + 1), the paper's l_o."""
        return (
            (height + 2 * self.padding - self.kernel) // self.stride + 1,
            (width + 2 * self.padding - self.kernel) // self.stride + 1,
        )


def full_precision(x: torch.Tensor) -> AbstractContextManager[object]:
    """Autocast off on the device of `x`, for sums that float16 cannot hold; nothing where it is off already."""
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):  # meta has none, and raises
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()  # keeps exported graphs free of autocast regions


def as_kernel(weight: torch.Tensor, kernel: int) -> torch.Tensor:
    """A Linear's weight over windows, (O, C·k·k), as a convolution's; channels_last, so that its output is too."""
    return weight.view(weight.shape[0], -1, kernel, kernel).contiguous(memory_format=torch.channels_last)


def as_tf32(weight: torch.Tensor) -> torch.Tensor:
    """float32 rounded to TF32's ten bits of mantissa, as an accelerator's convolution does; the gradient passes."""
    bits = weight.detach().contiguous().view(torch.int32)
    return weight + (((bits + 0x1000) & -0x2000).view(torch.float32) - weight).detach()


@torch.jit.unused
def allows_tf32() -> bool:
    """Whether a GPU's convolutions may run with TF32's mantissa; where there is no telling, they do."""
    try:
        return torch.compiler.is_compiling() or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # told so by names that this one does not go with
        return True


def rounds(x: torch.Tensor) -> bool:
    """Whether convolutions of `x` may run with TF32's mantissa; they do on a GPU, unless told otherwise."""
    if x.device.type == 'cpu' or x.dtype != torch.float32:
        return False
    return torch.jit.is_scripting() or allows_tf32()


def split_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kernel: int, stride: int, padding: int
) -> torch.Tensor:
    """Soft split, then a Linear on every window: one convolution, as unfold orders a window (C, k, k).

    (B, C, H, W), weight (O, n), bias (O,) -> (B, O, h, w).
    """
    return F.conv2d(x, as_kernel(weight, kernel), bias, stride=stride, padding=padding)


def _windows(x: torch.Tensor, dim: int, kernel: int, stride: int) -> torch.Tensor:
    """The k values under each window along one dimension, stacked in front: (…, L, …) -> (k, …, l, …)."""
    last = x.shape[dim] - kernel
    parts: list[torch.Tensor] = []
    for i in range(kernel):
        parts.append(x[:, :, i : i + last + 1 : stride] if dim == 2 else x[:, :, :, i : i + last + 1 : stride])
    return torch.stack(parts)


def window_mean_var(x: torch.Tensor, kernel: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of the n values of every window of an already padded map.

    (B, C, H, W) -> two of (B, 1, h, w).

    The variance is gathered in three steps, channels, columns, rows: the variance of a union of equal groups is the
    mean of the groups' variances plus the variance of their means. Each step subtracts its mean before it squares,
    so a flat bright window loses no digits, as E[p²] - E[p]² would; and only one-channel maps are ever windowed.
    """
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    for dim in (3, 2):
        means = _windows(mean, dim, kernel, stride)
        mean = means.mean(0)
        var = _windows(var, dim, kernel, stride).mean(0) + (means - mean).square().mean(0)
    return mean, var


def fold(
    norm_weight: torch.Tensor, norm_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm's weight and bias, (n,), into the Linear behind it: W·diag(gamma), rows centred, and W·beta + b."""
    scaled = weight * norm_weight
    shift = F.linear(norm_bias, weight, None if bias is None else bias.to(weight.dtype))
    return scaled - scaled.mean(1, keepdim=True), shift


def _split_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    scaled, shift = fold(norm_weight.to(x.dtype), norm_bias.to(x.dtype), weight.to(x.dtype), bias)
    x = F.pad(x, [padding, padding, padding, padding]) - x.detach().mean((1, 2, 3), keepdim=True)
    mean, var = window_mean_var(x, kernel, stride)
    if rounds(x):
        scaled = as_tf32(scaled)
    out = F.conv2d(x, as_kernel(scaled, kernel), stride=stride)
    if rounds(x):
        out = out - (mean * scaled.sum(1).view(1, -1, 1, 1)).detach()
    return scale_shift(out, (var + eps).rsqrt(), shift.view(1, -1, 1, 1))


def split_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kernel: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """Soft split, LayerNorm over each window, Linear; exact, and without ever laying the windows out.

    (B, C, H, W), norm (n,), weight (O, n), bias (O,) -> (B, O, h, w) in float32, or in float64 where x is.

    For a window p with mean m and r = (var + eps)^-1/2, and W' = W·diag(gamma) with each row's mean taken out,
    LN(p)·Wᵀ + b = (W'·p)·r + (W·beta + b): one convolution, a few one-channel means, one multiply, instead of
    N·n values written and read three times.

    Where a window is flat r is large (up to eps^-1/2) and shows what rounding leaves of (W'·p). Two terms that are
    zero in exact arithmetic keep it small: the image's own mean is taken off first (LayerNorm does not see it), and
    m·(W'·1) at the end, on accelerators, whose convolutions may round W' to a short mantissa (TF32): it is rounded
    beforehand, so that what rounding adds to its row sums is known.
    """
    if torch.jit.is_scripting():  # TorchScript has no autocast to leave
        return _split_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kernel, stride, padding)
    with full_precision(x):
        return _split_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, kernel, stride, padding)
