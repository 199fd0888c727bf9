"""Parts of the token layers in half precision on a GPU, as torch operators that launch Triton kernels.

A GPU's memory traffic is the bottleneck there: the eager form reads and writes every map some twenty times. The kernels
gather, normalise and multiply windows on the chip; the Performer takes one pass over k and v and one over q, and
everything after the attention one more. Forward and backward compute what the eager form does: sums are in float32,
operands of matmuls in half precision, and the Performer's exponents as exact as float32 makes them from k and q.
`tests/fast/test_fused.py` compares the kernels with float64, in Triton's interpreter if there is no GPU.

Shapes: B images, C channels, (H, W) map, N tokens, D token_dim, m = D/2 random features, n = k·k·C values of a window.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..models.precision import full_precision
from ..models.t2t_vit import Split
from .folded import fold

kernels: Any
try:
    from . import kernels
except ImportError:  # Triton does not support every system
    kernels = None

interpreted = False  # set by tests: run kernels on a CPU, with TRITON_INTERPRET=1
LAUNCH = {  # tokens per tile and warps: the fastest measured, see results/speed-h200-2026-11-26
    'split': dict(M=64, num_warps=4),
    'split_weight': dict(M=64, BK=64, num_warps=4),
    'row': dict(M=64, num_warps=4),
}
WIDTHS = (32, 64)  # token_dim: a power of two; half of it, m, is at least 16, the smallest matmul of Triton
PROGRAMS = 528  # programs that sum over tokens: four on each multiprocessor of an H100


@torch.compiler.assume_constant_result
def capable(device: int) -> bool:
    """Return True if a GPU has matmuls in bfloat16 and TF32: NVIDIA's since Ampere."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels as an operator; it runs on the device of its first argument."""

    def register(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def on_device(first: torch.Tensor, *others: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *others)

        return torch.library.custom_op(f't2t_vit::{name}', on_device, mutates_args=())

    return register


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def split_tiles(tiles: int, most: int) -> tuple[int, int]:
    """Distribute tiles over at most `most` programs; return the number of programs and of tiles for each."""
    per = cdiv(tiles, max(most, 1))
    return cdiv(tiles, per), per


def padded_channels(chans: int) -> int:
    """Return the channels padded to a power of two, at least 4."""
    return max(4, 1 << (chans - 1).bit_length())


@operator('pack')
def _pack_op(x: torch.Tensor) -> torch.Tensor:
    images, chans, height, width = x.shape
    out = x.new_empty(images, height, width, padded_channels(chans))
    kernels.pack[(cdiv(height * width, 256), images)](
        x, out, height * width, width, *x.stride(), C=chans, CP=padded_channels(chans), BP=256
    )
    return out


@_pack_op.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], padded_channels(x.shape[1]))


def _keep_pack(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.chans = inputs[0].shape[1]


def _pack_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return grad[..., : ctx.chans].permute(0, 3, 1, 2)


_pack_op.register_autograd(_pack_backward, setup_context=_keep_pack)


def half_operands(weight: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Return weights in bfloat16; in float32 (TF32 matmuls) instead of float16, in which pixels could overflow."""
    return weight.to(kind) if kind == torch.bfloat16 else weight


@operator('split_norm_linear')
def _split(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    chans: int,
    kernel: int,
    stride: int,
    padding: int,
    eps: float,
    kind: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images, height, width, _ = x.shape
    rows, cols = Split(kernel, stride, padding).grid(height, width)
    x = x.contiguous()
    out = x.new_empty(images, rows * cols, weight.shape[1], dtype=kind)
    means = x.new_empty(images, rows * cols, dtype=torch.float32)
    scales, weight = torch.empty_like(means), half_operands(weight, kind)
    launch = LAUNCH['split']
    kernels.split_norm_linear[(cdiv(rows * cols, launch['M']), images)](
        x,
        weight,
        weight.sum(0, dtype=torch.float32),
        shift,
        out,
        means,
        scales,
        rows * cols,
        cols,
        1 / cols,
        height,
        width,
        eps,
        C=chans,
        CP=x.shape[3],
        K=kernel,
        STRIDE=stride,
        PADDING=padding,
        D=weight.shape[1] // 3,
        BK=64 if x.shape[3] >= 64 and weight.dtype == kind else 32,
        **launch,
    )
    return out, means, scales


@_split.register_fake
def _(x, weight, shift, chans, kernel, stride, padding, eps, kind):  # type: ignore[no-untyped-def]
    rows, cols = Split(kernel, stride, padding).grid(x.shape[1], x.shape[2])
    means = x.new_empty(x.shape[0], rows * cols, dtype=torch.float32)
    return means.new_empty(*means.shape, weight.shape[1], dtype=kind), means, torch.empty_like(means)


@operator('split_norm_linear_weight')
def _split_weight(
    x: torch.Tensor,
    means: torch.Tensor,
    scales: torch.Tensor,
    grad: torch.Tensor,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    images, height, width, padded_chans = x.shape
    x, grad = x.contiguous(), grad.contiguous()
    _, cols = Split(kernel, stride, padding).grid(height, width)
    tokens, size, launch = means.shape[1], kernel**2 * padded_chans, LAUNCH['split_weight']
    columns = cdiv(size, launch['BK'])
    programs, per = split_tiles(images * cdiv(tokens, launch['M']), PROGRAMS // columns)
    weight_sums = means.new_empty(programs, size, grad.shape[2])
    shift_sums = means.new_empty(programs, 16, grad.shape[2])
    kernels.split_norm_linear_weight[(columns, programs)](
        x,
        means,
        scales,
        grad,
        weight_sums,
        shift_sums,
        images,
        tokens,
        cols,
        1 / cols,
        height,
        width,
        per,
        CP=padded_chans,
        K=kernel,
        STRIDE=stride,
        PADDING=padding,
        D=grad.shape[2] // 3,
        **launch,
    )
    return weight_sums.sum(0), shift_sums[:, 0].sum(0)


@_split_weight.register_fake
def _(x, means, scales, grad, kernel, stride, padding):  # type: ignore[no-untyped-def]
    return means.new_empty(kernel**2 * x.shape[3], grad.shape[2]), means.new_empty(grad.shape[2])


@operator('split_norm_linear_input')
def _split_input(
    x: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    out: torch.Tensor,
    means: torch.Tensor,
    scales: torch.Tensor,
    grad: torch.Tensor,
    chans: int,
    kernel: int,
    stride: int,
    padding: int,
) -> torch.Tensor:
    images, height, width, padded_chans = x.shape
    x, out, grad = x.contiguous(), out.contiguous(), grad.contiguous()
    rows, cols = Split(kernel, stride, padding).grid(height, width)
    scaled, slopes, offsets = torch.empty_like(grad), torch.empty_like(means), torch.empty_like(means)
    launch = LAUNCH['row']
    kernels.scaled_grad[(cdiv(means.numel(), launch['M']),)](
        grad,
        out,
        shift,
        means,
        scales,
        scaled,
        slopes,
        offsets,
        means.numel(),
        kernel**2 * chans,
        D=grad.shape[2] // 3,
        **launch,
    )
    spread = torch.ops.aten.convolution_backward(
        scaled.transpose(1, 2).unflatten(2, (rows, cols)),
        torch.empty_like(x, dtype=grad.dtype).permute(0, 3, 1, 2),
        weight.to(grad.dtype).unflatten(0, (kernel, kernel, -1)).permute(3, 2, 0, 1),
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, False, False],
    )[0]
    result = torch.empty_like(x)
    kernels.window_grad[(cdiv(height * width, launch['M']), images)](
        x,
        spread.permute(0, 2, 3, 1).contiguous(),
        slopes,
        offsets,
        result,
        rows,
        cols,
        height,
        width,
        CP=padded_chans,
        K=kernel,
        STRIDE=stride,
        PADDING=padding,
        **launch,
    )
    return result


@_split_input.register_fake
def _(x, weight, shift, out, means, scales, grad, chans, kernel, stride, padding):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _keep_split(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, shift, ctx.chans, *ctx.split, _, _ = inputs
    ctx.save_for_backward(x, weight, shift, *output)


def _split_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, shift, out, means, scales = ctx.saved_tensors
    grad_x = grad_weight = grad_shift = None
    if ctx.needs_input_grad[0]:
        grad_x = _split_input(x, weight, shift, out, means, scales, grad, ctx.chans, *ctx.split)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, grad_shift = _split_weight(x, means, scales, grad, *ctx.split)
    return (grad_x, grad_weight, grad_shift, *[None] * 6)


_split.register_autograd(_split_backward, setup_context=_keep_split)


@operator('layer_output')
def _layer_output_op(
    y: torch.Tensor,
    v: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor,
    seeds: torch.Tensor | None,
    chance: float,
    eps: float,
) -> torch.Tensor:
    y = y.contiguous()
    out, rows, launch = torch.empty_like(y), y.shape[0] * y.shape[1], LAUNCH['row']
    kernels.layer_output[(cdiv(rows, launch['M']),)](
        y,
        v,
        matrices.to(y.dtype),
        biases,
        seeds,
        out,
        rows,
        v.stride(1),
        chance,
        eps,
        DROP=seeds is not None,
        D=y.shape[2],
        **launch,
    )
    return out


@_layer_output_op.register_fake
def _(y, v, matrices, biases, seeds, chance, eps):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape)


def _layer_output_grads(
    y: torch.Tensor,
    v: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor,
    seeds: torch.Tensor | None,
    grad: torch.Tensor,
    grad_v: torch.Tensor,
    chance: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of y, matrices and biases; that of v is written into `grad_v`."""
    dim, rows, launch = y.shape[2], y.shape[0] * y.shape[1], LAUNCH['row']
    programs, per = split_tiles(cdiv(rows, launch['M']), PROGRAMS)
    common = dict(DROP=seeds is not None, D=dim, **launch)
    matrices, grad_y = matrices.to(y.dtype), torch.empty_like(y)
    mlp = y.new_empty(programs, 2, dim, dim, dtype=torch.float32)
    mlp_biases = y.new_empty(programs, 16, 2, dim, dtype=torch.float32)
    kernels.mlp_grad[(programs,)](
        y,
        v,
        matrices,
        biases,
        seeds,
        grad,
        grad_v,
        mlp,
        mlp_biases,
        rows,
        v.stride(1),
        grad_v.stride(1),
        per,
        chance,
        eps,
        **common,
    )
    proj = y.new_empty(programs, 1, dim, dim, dtype=torch.float32)
    proj_biases = y.new_empty(programs, 16, 1, dim, dtype=torch.float32)
    kernels.proj_grad[(programs,)](
        y, grad_v, matrices, seeds, grad_y, proj, proj_biases, rows, grad_v.stride(1), per, chance, **common
    )
    return grad_y, torch.cat([proj.sum(0), mlp.sum(0)]), torch.cat([proj_biases[:, 0].sum(0), mlp_biases[:, 0].sum(0)])


@operator('layer_output_grad')
def _layer_output_grad_op(
    y: torch.Tensor,
    v: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor,
    seeds: torch.Tensor | None,
    grad: torch.Tensor,
    chance: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, grad = y.contiguous(), grad.contiguous()
    grad_v = torch.empty_like(y)
    grad_y, grad_matrices, grad_biases = _layer_output_grads(y, v, matrices, biases, seeds, grad, grad_v, chance, eps)
    return grad_y, grad_v, grad_matrices, grad_biases


@_layer_output_grad_op.register_fake
def _(y, v, matrices, biases, seeds, grad, chance, eps):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape), y.new_empty(y.shape), torch.empty_like(matrices), torch.empty_like(biases)


def _keep_layer_output(ctx: Any, inputs: Any, output: Any) -> None:
    y, v, matrices, biases, seeds, ctx.chance, ctx.eps = inputs
    ctx.save_for_backward(y, v, matrices, biases, seeds)


def _layer_output_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    grads = _layer_output_grad_op(*ctx.saved_tensors, grad, ctx.chance, ctx.eps)
    return (*grads, None, None, None)


_layer_output_op.register_autograd(_layer_output_backward, setup_context=_keep_layer_output)


def _halves(w: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Split w, (m, D), into its half-precision value and the remainder, (D, m) each."""
    w = w.float().t().contiguous()
    high = w.to(kind)
    return high, (w - high.float()).to(kind)


@operator('performer')
def _performer(
    kqv: torch.Tensor,
    w: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor,
    seeds: torch.Tensor | None,
    chance: float,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, tokens, dim = len(kqv), kqv.shape[1], kqv.shape[2] // 3
    kqv = kqv.contiguous()
    features, half_log = len(w), 0.5 * math.log(len(w))
    halves = _halves(w, kqv.dtype)
    launch = LAUNCH['row']
    programs, per = split_tiles(cdiv(tokens, launch['M']), PROGRAMS // images)
    products = kqv.new_empty(images, programs, features, dim, dtype=torch.float32)
    sums = kqv.new_empty(images, programs, features, dtype=torch.float32)
    kernels.key_sums[(images, programs)](
        kqv, *halves, products, sums, tokens, per, half_log, D=dim, F=features, **launch
    )
    products, sums = products.sum(1), sums.sum(1)
    y = kqv.new_empty(images, tokens, dim)
    kernels.attend[(cdiv(tokens, launch['M']), images)](
        kqv, *halves, products, sums, y, tokens, eps, half_log, D=dim, F=features, **launch
    )
    return _layer_output_op(y, kqv[..., 2 * dim :], matrices, biases, seeds, chance, norm_eps), y, products, sums


@_performer.register_fake
def _(kqv, w, matrices, biases, seeds, chance, eps, norm_eps):  # type: ignore[no-untyped-def]
    images, tokens, dim = kqv.shape[0], kqv.shape[1], kqv.shape[2] // 3
    out = kqv.new_empty(images, tokens, dim)
    return (
        out,
        torch.empty_like(out),
        kqv.new_empty(images, w.shape[0], dim, dtype=torch.float32),
        kqv.new_empty(images, w.shape[0], dtype=torch.float32),
    )


@operator('performer_grad')
def _performer_grad(
    kqv: torch.Tensor,
    w: torch.Tensor,
    matrices: torch.Tensor,
    biases: torch.Tensor,
    seeds: torch.Tensor | None,
    y: torch.Tensor,
    products: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
    chance: float,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images, tokens, dim = y.shape
    kqv, grad = kqv.contiguous(), grad.contiguous()
    features, half_log = len(w), 0.5 * math.log(len(w))
    halves, w = _halves(w, kqv.dtype), w.float().contiguous()
    grad_kqv = torch.empty_like(kqv)
    grad_y, grad_matrices, grad_biases = _layer_output_grads(
        y, kqv[..., 2 * dim :], matrices, biases, seeds, grad, grad_kqv[..., 2 * dim :], chance, norm_eps
    )
    launch = LAUNCH['row']
    programs, per = split_tiles(cdiv(tokens, launch['M']), PROGRAMS // images)
    grad_products = kqv.new_empty(images, programs, features, dim, dtype=torch.float32)
    grad_sums = kqv.new_empty(images, programs, features, dtype=torch.float32)
    kernels.attend_grad[(images, programs)](
        kqv,
        *halves,
        w,
        products,
        sums,
        grad_y,
        grad_kqv,
        grad_products,
        grad_sums,
        tokens,
        per,
        eps,
        half_log,
        D=dim,
        F=features,
        **launch,
    )
    kernels.key_grad[(cdiv(tokens, launch['M']), images)](
        kqv, *halves, w, grad_products.sum(1), grad_sums.sum(1), grad_kqv, tokens, half_log, D=dim, F=features, **launch
    )
    return grad_kqv, grad_matrices, grad_biases


@_performer_grad.register_fake
def _(kqv, w, matrices, biases, seeds, y, products, sums, grad, chance, eps, norm_eps):  # type: ignore[no-untyped-def]
    return kqv.new_empty(kqv.shape), torch.empty_like(matrices), torch.empty_like(biases)


def _keep_performer(ctx: Any, inputs: Any, output: Any) -> None:
    kqv, w, matrices, biases, seeds, ctx.chance, ctx.eps, ctx.norm_eps = inputs
    ctx.save_for_backward(kqv, w, matrices, biases, seeds, *output[1:])


def _performer_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    grad_kqv, grad_matrices, grad_biases = _performer_grad(*ctx.saved_tensors, grad, ctx.chance, ctx.eps, ctx.norm_eps)
    return grad_kqv, None, grad_matrices, grad_biases, None, None, None, None


_performer.register_autograd(_performer_backward, setup_context=_keep_performer)


def split_norm_linear(
    x: torch.Tensor, norm: nn.LayerNorm, linear: nn.Linear, split: Split, kind: torch.dtype
) -> torch.Tensor:
    """Soft split, LayerNorm over each window, Linear to q, k and v: (B, C, H, W) -> (B, N, 3·D) of type `kind`."""
    chans = x.shape[1]
    with full_precision(x):
        weight, shift = fold(norm.weight.float(), norm.bias.float(), linear.weight.float(), linear.bias)
        weight = weight.unflatten(1, (-1, split.kernel, split.kernel)).permute(2, 3, 1, 0)  # (k, k, C, 3·D)
        if padded_channels(chans) > chans:
            weight = torch.cat(
                [weight, weight.new_zeros(*weight.shape[:2], padded_channels(chans) - chans, len(shift))], 2
            )
        weight = weight.reshape(-1, len(shift))
        if padded_channels(chans) == chans and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)
        else:
            x = _pack_op(x)
        return _split(x, weight.contiguous(), shift, chans, *split, norm.eps, kind)[0]


def _stack(
    proj: nn.Linear, first: nn.Linear, second: nn.Linear, norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack projection and MLP, norm folded into the MLP's first Linear: weights (3, D, D) and biases (3, D)."""
    weight = first.weight.float()
    bias = nn.functional.linear(norm.bias.float(), weight, first.bias.float())
    return (
        torch.stack([proj.weight.float(), weight * norm.weight.float(), second.weight.float()]),
        torch.stack([proj.bias.float(), bias, second.bias.float()]),
    )


def layer_output(
    y: torch.Tensor, v: torch.Tensor, proj: nn.Linear, first: nn.Linear, second: nn.Linear, norm: nn.LayerNorm
) -> torch.Tensor:
    """Return z + MLP(LN(z)) with z = v + proj(y), a token layer after its attention: (B, N, D) -> (B, N, D)."""
    with full_precision(y):
        return _layer_output_op(y, v, *_stack(proj, first, second, norm), None, 0.0, norm.eps)


def performer(
    kqv: torch.Tensor,
    w: torch.Tensor,
    eps: float,
    proj: nn.Linear,
    first: nn.Linear,
    second: nn.Linear,
    norm: nn.LayerNorm,
    dropout: float,
) -> torch.Tensor:
    """Return a token Performer's output from k, q, v, (B, N, 3·D), and features w: (B, N, D)."""
    seeds = torch.randint(2**31, (4,), device=kqv.device) if dropout else None
    with full_precision(kqv):
        return _performer(kqv, w, *_stack(proj, first, second, norm), seeds, dropout, eps, norm.eps)[0]


def usable(x: torch.Tensor, token_dim: int) -> bool:
    """Return True if there are kernels for the device of `x` and for this width."""
    if kernels is None or token_dim not in WIDTHS or x.numel() == 0:
        return False
    return (x.is_cuda and capable(x.device.index)) or (interpreted and x.device.type == 'cpu')
