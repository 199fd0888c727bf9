"""Where a class's score comes from, by its gradient (Grad-CAM)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..settings import UsageError, nearest
from .attention import Lattice
from .trace import Grids, all_tokens, stage_names


class CamMaps(NamedTuple):
    """Maps of the layer that Grad-CAM was taken at."""

    maps: torch.Tensor  # (B, h, w), at least 0; of the score's own scale
    layer: str
    targets: torch.Tensor  # (B,), the class that each map is for
    lattice: Lattice  # where the maps' cells lie


def grad_cam(
    model: nn.Module, images: torch.Tensor, targets: Sequence[int] | None = None, layer: str | None = None
) -> CamMaps:
    """Which regions raise a class's score: (B, C, H, W) -> maps (B, h, w).

    Selvaraju et al., "Grad-CAM" (2017), Eq. 1 and 2: the channels of a layer's map, each weighted by the mean of the
    score's gradient over the map, are summed, and what is negative is cut off. Of tokens, those of the grid count.

    Args:
        model: Any model of timm's.
        images: As the model's preprocessing gives them.
        targets: A class for each image; by default the one with the highest score.
        layer: A module's name. By default the deepest stage whose map the score depends on: behind the last attention
            only the class token counts, so it is the last block but one of a ViT, and the last stage of a CNN.

    Raises:
        UsageError: for a layer that is not there, or that gives no map on which the score depends; and for a class
            that the model does not know.
    """
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise UsageError(f'the model has no layer {layer}{nearest(layer, modules)}')
    wanted = [layer] if layer is not None else stage_names(model)
    grids = Grids(model, (images.shape[-2], images.shape[-1]))
    outputs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    lattices: dict[str, Lattice] = {}

    def leave(name: str, output: Any) -> Any:
        grids.see(output)
        found = grids.as_map(output) if name in wanted else None
        if found is not None:
            lattices[name] = grids.lattice((found[0].shape[-2], found[0].shape[-1]))
            kept = output.clone()  # what comes next may work in place
            outputs[name] = (output, kept)
            return kept
        return None

    def hook_for(name: str) -> Any:
        return lambda module, args, output: leave(name, output)

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
    slopes = torch.autograd.grad(score, [outputs[name][1] for name in names], allow_unused=True) if names else ()
    for name, slope in reversed(list(zip(names, slopes))):
        found = grids.as_map(outputs[name][0]), grids.as_map(slope)
        if found[0] is not None and found[1] is not None and bool(found[1][0].any()):
            weights = found[1][0].mean((2, 3), keepdim=True)
            return CamMaps((weights * found[0][0]).sum(1).relu().detach(), name, chosen, lattices[name])
    raise UsageError(
        f'Grad-CAM needs a layer whose map the score depends on; {layer or "no stage"} is '
        f'{"not one" if layer else "one"}'
    )
