"""Models for the client tests: a plain ViT of timm, and a T2T-ViT with each token layer.

A client (LoRA, offloading, hooks, exporters, …) has to work on the ViT, or the test is wrong; on a T2T-ViT it has to
return the values of the plain model, `fast=False`, with the same weights.
"""

from collections.abc import Iterable

import timm
import torch
from torch import nn

import t2t_vit  # noqa: F401  (registers the models)

VIT = 'vit_tiny_patch16_224'
T2T = ['t2t_vit_7', 't2t_vit_t_14']  # Performer and transformer token layers
NAMES = [VIT, *T2T]
SIZE = 64
CLASSES = 10


def build(name: str, **kwargs: object) -> nn.Module:
    """Return the model in evaluation mode, two blocks deep, with every parameter away from its initial value."""
    torch.manual_seed(0)
    small: dict[str, object] = dict(img_size=SIZE, depth=2, num_classes=CLASSES)
    if name in T2T:
        small.update(embed_dim=96, num_heads=3)
    model = timm.create_model(name, **{**small, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape).to(parameter)
    return model


def plain(name: str, **kwargs: object) -> nn.Module:
    """Return the plain form of `build(name)`, with the same weights."""
    if name == VIT:
        return build(name, **kwargs)
    model = build(name, fast=False, **kwargs)
    model.load_state_dict(build(name, **kwargs).state_dict())
    return model


def images(batch: int = 2, size: int = SIZE) -> torch.Tensor:
    """Return noise of shape (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Return a scalar that every logit has a part in."""
    return logits.square().mean() + logits[:, 0].mean()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of `loss` by parameter name, for parameters that have one."""
    model.zero_grad()
    loss(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def linears(model: nn.Module) -> list[nn.Linear]:
    """Return every Linear of the model."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout's rate to 0, for clients that need training mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def error(found: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> float:
    """Return the largest absolute difference relative to the largest expected value, or to `scale` if larger."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    assert expected.isfinite().all()
    return ((found - expected).abs().max() / max(expected.abs().max().item(), scale, 1e-30)).item()


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest error of any parameter's gradient; small ones count relative to 1/1000 of the largest."""
    assert found.keys() == expected.keys()
    scale = 1e-3 * max(g.abs().max().item() for g in expected.values())
    assert scale > 0
    return max(error(found[name], expected[name], scale) for name in expected)


def all_nonzero(gradients: Iterable[torch.Tensor | None]) -> bool:
    """Return whether each is present and not zero throughout."""
    return all(g is not None and g.abs().max().item() > 0 for g in gradients)
