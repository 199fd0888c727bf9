"""Muon with one orthogonalisation for all matrices of a shape, in a precision that the processor is fast in."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim.muon import (
    _COEFFICIENTS,
    get_lr_scale,
    reshape_for_muon,
    resolve_ns_coefficients,
    zeropower_via_newtonschulz,
)

from ..models.precision import cpu_has_matmuls

LR_RULES = ('match_rms_adamw', 'original', 'rms_to_rms')  # of timm's Muon


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, timm's precision of the iteration, where it is fast; float32 on a CPU that only emulates it."""
    emulated = device.type == 'cpu' and not cpu_has_matmuls(torch.bfloat16)
    return torch.float32 if emulated else torch.bfloat16


class Muon(timm.optim.Muon):
    """timm's Muon (Jordan 2024; Moonshot 2025) with its matrices in stacks: the same updates, faster.

    timm iterates in bfloat16, one matrix after another, which is slow on a CPU that only emulates it
    (docs/few-images.md). Groups with `use_fallback` (timm's AdamW), AdaMuon, and convolutions in batched mode are left
    to timm's own step. The arguments and the state are timm's.

    Args:
        params: Parameter groups; those without `use_fallback` hold matrices or convolution kernels only.

    Raises:
        ValueError: for an unknown rule or an unknown preset of coefficients, which timm finds in the first step only.
    """

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        for group in self.param_groups:
            resolve_ns_coefficients(group['ns_coefficients'], _COEFFICIENTS)
            if group['adjust_lr_fn'] not in (None, *LR_RULES):
                raise ValueError(f'adjust_lr_fn is one of {", ".join(LR_RULES)}, got {group["adjust_lr_fn"]!r}')

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done = []
        for group in self.param_groups:
            if group.get('use_fallback') or group['algo'] != 'muon' or group['conv_mode'] != 'flatten':
                continue
            stacks: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group['params']:
                if parameter.grad is not None:
                    stacks[parameter.shape].append(parameter)
            for parameters in stacks.values():
                self.update_stack(parameters, group)
                done += [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in done:
            parameter.grad = None
        super().step()
        for parameter, grad in done:
            parameter.grad = grad
        return loss

    def update_stack(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        momentum, lr = group['momentum'], group['lr']
        for parameter in parameters:
            if 'momentum_buffer' not in (state := self.state[parameter]):
                state.update(use_muon=True, momentum_buffer=torch.zeros_like(parameter))
        buffers = [self.state[parameter]['momentum_buffer'] for parameter in parameters]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if group['nesterov'] else buffers
        matrices = torch.stack([reshape_for_muon(update)[0] for update in updates])
        matrices = zeropower_via_newtonschulz(
            matrices,
            group['ns_steps'],
            resolve_ns_coefficients(group['ns_coefficients'], _COEFFICIENTS),
            group['eps'],
            group['safety_factor'],
            newton_schulz_dtype(matrices.device),
            group['scale_eps'],
        )
        scale = get_lr_scale(matrices.shape, group['adjust_lr_fn']) if group['adjust_lr_fn'] else 1.0
        matrices = matrices.to(parameters[0]) * (-lr * scale)
        torch._foreach_mul_(parameters, 1 - lr * group['weight_decay'])
        torch._foreach_add_(parameters, [*matrices.view(len(parameters), *parameters[0].shape)])
