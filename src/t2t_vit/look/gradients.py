"""Grad-CAM: the regions that raise the score of a class, from its gradient.

The grad-cam package needs the layer and a function from tokens to maps, accumulates gradients in the model's
parameters, scales every map to 0 to 1 and stretches it over the whole image. Here the layer is found, the model is left
as it was, the values keep their scale, and cells keep the positions that padding gives them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..settings import UsageError, nearest
from .attention import Lattice
from .trace import Grids, all_tokens, stage_names


class CamMaps(NamedTuple):
    """Grad-CAM of each image."""

    maps: torch.Tensor  # (B, h, w), at least 0, in the scale of the score
    layer: str
    targets: torch.Tensor  # (B,), class index of each map
    lattice: Lattice  # positions of the cells


def grad_cam(
    model: nn.Module, images: torch.Tensor, targets: Sequence[int] | None = None, layer: str | None = None
) -> CamMaps:
    """Compute Grad-CAM: images (B, C, H, W) -> maps (B, h, w).

    Selvaraju et al., "Grad-CAM" (2017), Eq. 1 and 2: the channels of a layer, each weighted by the mean gradient of the
    score over the map, are summed and clipped at 0. Prefix tokens are left out.

    Args:
        model: Any timm model.
        images: After the model's preprocessing.
        targets: A class index for each image; by default the predicted class.
        layer: A module name. By default the deepest stage whose map the score depends on: in a ViT the last block but
            one, since only the class token is read after the last attention; in a CNN the last stage.

    Raises:
        UsageError: if the model lacks the layer or the class, or the score depends on no map of the layer.
    """
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise UsageError(f'the model has no layer {layer}{nearest(layer, modules)}')
    wanted = [layer] if layer is not None else stage_names(model)
    grids = Grids(model, (images.shape[-2], images.shape[-1]))
    outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    lattices: dict[str, Lattice] = {}

    def keep_output(name: str, output: Any) -> Any:
        grids.record(output)
        found = grids.as_map(output) if name in wanted else None
        if found is not None:
            lattices[name] = grids.lattice((found[0].shape[-2], found[0].shape[-1]))
            copy = output.clone()  # the next layer may work in place
            outputs[name] = (output, copy)
            return copy
        return None

    def hook_for(name: str) -> Any:
        return lambda module, args, output: keep_output(name, output)

    hooks = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    training = model.training
    try:
        model.eval()
        with torch.enable_grad(), grids:
            logits = all_tokens(model, images.detach().clone().requires_grad_())
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    chosen = logits.argmax(-1) if targets is None else torch.as_tensor(targets, device=logits.device)
    if len(chosen) != len(images) or not bool(((chosen >= 0) & (chosen < logits.shape[-1])).all()):
        raise UsageError(
            f'Grad-CAM needs a class from 0 to {logits.shape[-1] - 1} for each of {len(images)} images, '
            f'got {chosen.tolist()}'
        )
    score = logits.gather(1, chosen[:, None]).sum()
    names: list[str] = list(outputs)
    grads = torch.autograd.grad(score, [outputs[name][1] for name in names], allow_unused=True) if names else ()
    for name, grad in reversed(list(zip(names, grads))):
        maps, slopes = grids.as_map(outputs[name][0]), grids.as_map(grad)
        if maps is not None and slopes is not None and bool(slopes[0].any()):
            weights = slopes[0].mean((2, 3), keepdim=True)
            return CamMaps((weights * maps[0]).sum(1).relu().detach(), name, chosen, lattices[name])
    found = f'layer {layer} has none' if layer else 'no stage has one'
    raise UsageError(f'Grad-CAM needs a map that the score depends on, but {found}')
