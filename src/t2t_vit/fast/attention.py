"""Softmax attention by the fastest form that a processor has: torch's fused kernel, or two matmuls and a softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.precision import cpu_has_avx512_bf16_alone, half_precision
from .rule import is_exporting

WEIGHTS = 2**25  # bytes of attention weights that are computed at once; of one image, above it the kernel is used


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    """Return softmax(scale·q·kᵀ)·v: (B, heads, M, D), two of (B, heads, N, D) -> (B, heads, M, D).

    In bfloat16 on a processor with AVX512-BF16 and without AMX, matmuls of the whole take less time than torch's fused
    kernel (measured in results/speed-epyc-2026-11-29).
    """
    bytes_per_image = 2 * q.shape[1] * q.shape[2] * k.shape[2]
    if dropout or not prefers_matmuls(q) or bytes_per_image > WEIGHTS:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    if torch.compiler.is_compiling():  # at any batch size
        return by_matmuls(q, k, v, scale)
    images = max(WEIGHTS // max(bytes_per_image, 1), 1)
    parts = [by_matmuls(*part, scale) for part in zip(q.split(images), k.split(images), v.split(images))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def prefers_matmuls(x: Tensor) -> bool:
    """Return True where matmuls are faster than the fused kernel; exported graphs run elsewhere and have the kernel."""
    exporting = is_exporting() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())
    return (
        not exporting and x.device.type == 'cpu' and half_precision(x) == torch.bfloat16 and cpu_has_avx512_bf16_alone()
    )


def by_matmuls(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute `attention` with its weights in memory."""
    images, heads = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    weights = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)  # scaled in it
    return (weights @ v).unflatten(0, (images, heads))
