"""Low-rank adapters (LoRA, Hu et al. 2021) in the Linear layers of a model, by peft; merged into them for use.

An adapter adds B·A to the weight of a layer, (O, I), with A (r, I) and B (O, r); only A, B and the head are trained.
"""

from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..settings import UsageError
from .listing import heads

BASE, DOWN, UP = '.base_layer.', '.lora_A.default.weight', '.lora_B.default.weight'  # peft's names, after the layer's


def add_adapters(net: Any, rank: int) -> None:
    """Freeze a model and put an adapter on each Linear layer but the head, which stays trainable; in place.

    Raises:
        UsageError: if peft is not installed, or the model has no Linear layer besides its head.
    """
    if find_spec('peft') is None:
        raise UsageError("lora needs peft, not installed here: pip install 't2t-vit[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    head = {id(module) for part in heads(net) for module in part.modules()}
    # a subclass, as in nn.MultiheadAttention, may be read without being called
    layers = [name for name, module in net.named_modules() if type(module) is nn.Linear and id(module) not in head]
    if not layers:
        raise UsageError(f'lora: {type(net).__name__} has no Linear layers to adapt')
    # alpha / r = 1: the weight that is added is B·A itself
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), net)
    for part in heads(net):
        part.requires_grad_(True)


def has_adapters(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a state dict is that of a model with adapters."""
    return any(BASE in name for name in state_dict)


def merge_adapters(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of the plain model that computes what a model with adapters does."""
    merged = {name.replace(BASE, '.'): tensor for name, tensor in state_dict.items() if '.lora_' not in name}
    for name, up in state_dict.items():
        if name.endswith(UP):
            layer = name.removesuffix(UP)
            merged[f'{layer}.weight'] = merged[f'{layer}.weight'] + up @ state_dict[f'{layer}{DOWN}']
    return merged


def merged_model(net: Any) -> Any:
    """Return a plain copy of a model with adapters merged into its layers; a model without adapters as it is."""
    if not has_adapters(state_dict := net.state_dict()):
        return net
    plain = deepcopy(net)
    for name, module in list(plain.named_modules()):
        if hasattr(module, 'base_layer'):
            plain.set_submodule(name, module.base_layer)
    plain.load_state_dict(merge_adapters(state_dict))
    return plain
