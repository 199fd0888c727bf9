"""The one rule by which a layer runs its fast form or its plain one."""

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as global_hooks

TENSORS = (nn.Parameter, torch.Tensor, FakeTensor, FunctionalTensor)  # the last two while a graph is exported
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)  # unknown to old torch


def is_observed(module: nn.Module) -> bool:
    """Return True if a hook or a replaced `forward` is on this module."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or 'forward' in module.__dict__


def is_unobserved(module: nn.Module) -> bool:
    """Return True if no hook and no replaced `forward` is on a module or on any module in it."""
    return not any(is_observed(part) for part in module.modules())


def is_intact(part: nn.Module, kind: type) -> bool:
    """Return True if a part is exactly the module it was built as and nothing observes or replaces its call.

    False for another class (LoRA, quantised, parametrised, sharded), for hooks (feature extraction, pruning, weight
    norm, per-sample gradients), for a replaced `forward` (offloading), for parameters that are tensor subclasses, and
    for a LayerNorm without weight or bias.
    """
    return (
        type(part) is kind
        and not is_observed(part)
        and all(type(p) in TENSORS for p in part._parameters.values() if p is not None)
        and not (kind is nn.LayerNorm and any(p is None for p in part._parameters.values()))
    )


def active_rate(dropout: Any) -> float:
    """Return the fraction of values that a dropout zeroes now; its own mode counts, not that of its parent."""
    return dropout.p if dropout.training else 0.0


class Fast:
    """Base of all fast forms, in front of the plain class: `fast_forward` runs instead of the plain `forward` when

    - every part that it reads without calling it (`parts`: its name and exact class) is intact,
    - no hooks for all modules are registered, and
    - the graph is not scripted or traced: TorchScript and FX see the plain form.
    """

    parts: ClassVar[dict[str, type]] = {}

    def runs_fast(self, x: Any) -> bool:
        """Return True if the fast form may run on `x`."""
        if not isinstance(x, torch.Tensor) or torch.jit.is_tracing():  # FX passes proxies
            return False
        if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
            return False
        if global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks:
            return False
        for name, kind in self.parts.items():
            part: Any = self
            for attribute in name.split('.'):
                part = getattr(part, attribute)
            if not is_intact(part, kind):
                return False
        return True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the fast form if it may run, else the plain one."""
        if self.runs_fast(x):
            return self.fast_forward(x)
        return super().forward(x)  # type: ignore[misc]

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the plain `forward` in another way."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the plain form with this module's tensors; `torch.jit.script` compiles it instead."""
        return plain_twin(self)  # type: ignore[arg-type]


def plain_class(kind: type) -> type:
    """Return the plain class that a fast one replaces; any other class is returned as it is."""
    return next(base for base in kind.__mro__ if not issubclass(base, Fast))


def plain_twin(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its tensors and in which every fast form is the plain one."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    twin = copy.deepcopy(module, tensors)
    for part in twin.modules():
        part.__class__ = plain_class(type(part))
    return twin
