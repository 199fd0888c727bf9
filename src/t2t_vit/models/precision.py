"""Which precision to compute in: half precision where autocast or the weights say so, float32 inside such a region."""

import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from time import perf_counter
from typing import Any, Literal

import torch

GAIN = 1.5  # times float32's speed, of matmuls, from which half precision makes a whole model faster


def full_precision(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of `x`; a null context if autocast is off anyway.

    The null context keeps exported graphs free of autocast regions.
    """
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):  # autocast does not know meta, and raises
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that it runs without autocast on the device of its first argument.

    TorchScript, which knows no such context, compiles the decorated function itself.
    """

    @wraps(function)
    def run(x: torch.Tensor, *args: Any) -> Any:
        with full_precision(x):
            return function(x, *args)

    return run


def half_precision(x: torch.Tensor) -> torch.dtype | None:
    """Return float16 or bfloat16 if `x` has that type or autocast gives it; otherwise None."""
    kind = x.dtype
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):  # not on meta
        kind = torch.get_autocast_dtype(x.device.type)
    return kind if kind in (torch.float16, torch.bfloat16) else None


@torch.compiler.assume_constant_result
def cpu_has_matmuls(kind: torch.dtype) -> bool:
    """Return True if this processor has instructions for matmuls in float16 or bfloat16; others emulate them slowly."""
    if kind == torch.bfloat16 and platform.machine().lower() in ('x86_64', 'amd64'):
        # oneDNN's own answer includes emulation there
        return any(getattr(torch.cpu, f'_is_{name}_supported', bool)() for name in ('avx512_bf16', 'amx_tile'))
    name = 'bf16' if kind == torch.bfloat16 else 'fp16'
    try:
        return bool(getattr(torch.ops.mkldnn, f'_is_mkldnn_{name}_supported')())
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return False


@torch.compiler.assume_constant_result
def cpu_has_avx512_bf16_alone() -> bool:
    """Return True if this processor multiplies bfloat16 by AVX512-BF16, and has no AMX, whose tiles are faster."""
    vectors, tiles = (getattr(torch.cpu, f'_is_{name}_supported', bool)() for name in ('avx512_bf16', 'amx_tile'))
    return bool(vectors and not tiles)


@lru_cache
def cpu_gain(kind: torch.dtype) -> float:
    """Return how many times as fast as float32 this processor multiplies matrices in `kind`; 0 if it only emulates it.

    Measured once, on a Linear of T2T-ViT-14, in some hundredths of a second.
    """
    if not cpu_has_matmuls(kind):
        return 0.0
    seconds = dict.fromkeys((torch.float32, kind), math.inf)
    with torch.inference_mode():
        for _ in range(4):  # the first is warm-up
            for dtype in seconds:
                x, weight = torch.ones(1576, 384, dtype=dtype), torch.ones(1152, 384, dtype=dtype)
                torch.nn.functional.linear(x, weight)
                begun = perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds[dtype] = min(seconds[dtype], perf_counter() - begun)
    return seconds[torch.float32] / seconds[kind]


def choose_precision(device: torch.device) -> tuple[Literal['no', 'bf16'], str]:
    """Return the precision, `no` or `bf16`, in which a device computes fastest, and why."""
    if device.type == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return 'bf16', 'the GPU computes in bfloat16'
        return 'no', 'the GPU has no bfloat16'
    if device.type != 'cpu':
        return 'no', f'float32 on {device.type}'
    gain = cpu_gain(torch.bfloat16)
    if not gain:
        return 'no', 'this processor has no instructions for bfloat16 (AVX512-BF16, AMX)'
    measured = f'this processor multiplies matrices in bfloat16 {gain:.1f} times as fast as in float32'
    return ('bf16', measured) if gain >= GAIN else ('no', f'{measured}, which gains too little')


def describe_precision(precision: str, reason: str) -> str:
    """Say which precision was chosen, and why."""
    return f'precision {"float32" if precision == "no" else precision}: {reason}'
