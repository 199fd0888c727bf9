"""Less memory in training: cheap results are recomputed in the backward pass instead of stored for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

autograd: Any = torch._C._autograd
find_top = getattr(autograd, '_top_saved_tensors_default_hooks', None)  # missing in torch 2.6


def in_transform() -> bool:
    """Return True inside a transform of torch.func (vmap, grad, …); False while compiling, whatever is compiled."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def saves_as_usual() -> bool:
    """Return True if no other saved-tensor hooks are active: no checkpointing, no offloading, no torch.func."""
    if find_top is None or not autograd._saved_tensors_hooks_is_enabled():
        return False
    top = find_top(True)
    return top is None or isinstance(top[0], Recompute)


class Recompute:
    """Saved-tensor hooks that store `value`, and views of it, as their position in its memory.

    On unpacking, `value` is recomputed as function(source).
    """

    def __init__(
        self, value: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor | None = None
    ) -> None:
        self.storage, self.strides = value.untyped_storage().data_ptr(), value.stride()
        self.function, self.source = function, source

    def __call__(self, tensor: torch.Tensor) -> Any:
        """Return what autograd stores for a tensor."""
        if type(tensor) is not torch.Tensor or tensor.untyped_storage().data_ptr() != self.storage:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> torch.Tensor:
        """Return the tensor from what was stored for it."""
        if isinstance(kept, torch.Tensor):
            return kept
        assert self.source is not None
        with torch.no_grad():
            value = self.function(self.source)
        if value.stride() != self.strides:  # `kept` counts positions in the original's memory
            value = value.new_empty_strided(value.shape, self.strides).copy_(value)
        return value.as_strided(*kept)


def may_recompute(value: torch.Tensor) -> bool:
    """Return True if parts of the graph of `value` may be recomputed; `torch.compile` decides that by itself."""
    return (
        not torch.compiler.is_compiling()
        and type(value) is torch.Tensor
        and value.requires_grad
        and torch.is_grad_enabled()
        and saves_as_usual()
    )


def recomputed(
    value: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor
) -> AbstractContextManager[object]:
    """Return a context in which operations store `value` = function(source) by recomputing it in the backward pass.

    For cheap functions of a tensor that is stored anyway, as GELU or LayerNorm before a Linear: of the 5,376 values
    that a block of T2T-ViT-14 stores for each token, 1,920 need not be. Gradients are the same to the last bit.
    `function` is a module's `forward`, not the module, whose hooks would be called a second time.
    """
    if not may_recompute(value):
        return nullcontext()
    pack = Recompute(value, function, source.detach())
    return torch.autograd.graph.saved_tensors_hooks(pack, pack.unpack)


def scale_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return x·scale + shift, of which the backward pass gets x from the result, which the next layer stores anyway.

    `x` must not be used elsewhere: without gradients it is overwritten.
    """
    if not torch.is_grad_enabled() and not in_transform():  # vmap may have more copies of the shift than of x
        return x.mul_(scale).add_(shift)
    if torch.compiler.is_compiling():
        return x * scale + shift
    if not may_recompute(x):
        return torch.addcmul(shift, x, scale)
    pack = Recompute(x, partial(invert_scale_shift, scale.detach(), shift.detach()))
    with torch.autograd.graph.saved_tensors_hooks(pack, pack.unpack):
        y = torch.addcmul(shift, x, scale)  # one pass; exported graphs get two operations, which more runtimes have
    pack.source = y.detach()
    return y


def invert_scale_shift(scale: torch.Tensor, shift: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the x of y = x·scale + shift."""
    return (y - shift).div_(scale)
