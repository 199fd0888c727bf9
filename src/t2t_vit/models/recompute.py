"""Less memory in training: what is cheap is made again in the backward pass, not kept for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import timm.layers
import torch

autograd: Any = torch._C._autograd
find_top = getattr(autograd, '_top_saved_tensors_default_hooks', None)  # torch 2.6 cannot say


def saves_as_usual() -> bool:
    """Whether nobody else decides what autograd keeps: no checkpointing or offloading around, no torch.func."""
    if find_top is None or not autograd._saved_tensors_hooks_is_enabled():
        return False
    top = find_top(True)
    return top is None or isinstance(top[0], Recompute)


class Recompute:
    """Packs `value`, and views of it, as their place in it; makes it of `source` when one is unpacked."""

    def __init__(
        self, value: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor | None = None
    ) -> None:
        self.storage, self.strides = value.untyped_storage().data_ptr(), value.stride()
        self.function, self.source = function, source

    def __call__(self, tensor: torch.Tensor) -> Any:
        """What autograd keeps in the place of a tensor."""
        if type(tensor) is not torch.Tensor or tensor.untyped_storage().data_ptr() != self.storage:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> torch.Tensor:
        """The tensor again."""
        if isinstance(kept, torch.Tensor):
            return kept
        assert self.source is not None
        with torch.no_grad():
            value = self.function(self.source)
        if value.stride() != self.strides:  # `kept` speaks of places in the original's memory
            value = value.new_empty_strided(value.shape, self.strides).copy_(value)
        return value.as_strided(*kept)


def may_recompute(value: torch.Tensor) -> bool:
    """Whether something of `value`'s graph may be made again; `torch.compile` chooses for itself."""
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
    """While it lasts, operations that keep `value` = function(source) for their backward pass make it again instead.

    For a cheap function of a tensor that is kept anyway, as GELU or LayerNorm before a Linear: of the 5,376 values that
    a block of T2T-ViT-14 keeps for each token, 1,920 need not be. The gradients are the same to the last bit.
    `function` is a module's `forward`, not the module, whose hooks would be called a second time.
    """
    if not may_recompute(value):
        return nullcontext()
    pack = Recompute(value, function, source.detach())
    return torch.autograd.graph.saved_tensors_hooks(pack, pack.unpack)


def scale_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x·scale + shift. The backward pass needs x, and has it from the result, which the next layer keeps anyway.

    `x` must not be used otherwise: without gradients, it is overwritten.
    """
    if not torch.is_grad_enabled():
        return x.mul_(scale).add_(shift)
    if torch.jit.is_scripting():
        return torch.addcmul(shift, x, scale)
    if not may_recompute(x):
        return torch.addcmul(shift, x, scale)
    pack = Recompute(x, partial(undo, scale.detach(), shift.detach()))
    with torch.autograd.graph.saved_tensors_hooks(pack, pack.unpack):
        y = torch.addcmul(shift, x, scale)
    pack.source = y.detach()
    return y


def undo(scale: torch.Tensor, shift: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What `scale_shift` was given."""
    return (y - shift).div_(scale)


class Mlp(timm.layers.Mlp):
    """timm's, which keeps GELU's input for the backward pass, and not its output too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        hidden = self.fc1(x)
        x = self.act(hidden)
        if torch.jit.is_scripting():
            return self.drop2(self.fc2(self.drop1(x)))
        with recomputed(x, self.act.forward, hidden):
            return self.drop2(self.fc2(self.drop1(x)))
