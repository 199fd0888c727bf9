"""Initial values of the weights: the published ones, or such that the variance is kept at every width and depth.

`published` is std 0.02 for every Linear, whatever its width: right for the release's widths and long schedules, but a
narrow model starts with branches that are almost zero, and learns slowly.

`scaled` keeps the size of tokens and gradients about the same at every width and depth, by five rules:

- weights of Linears and convolutions have std 1/√fan_in, so that a branch answers a normalised token with values of
  variance near 1, beside which the position table has variance 1/2; convolutions of tokens have √2 times that, since
  GELU halves the second moment;
- the last Linear of each of the 2·L residual branches of a backbone of L blocks is divided by √(2·L), so that the sum
  of all branches does not grow with the depth; those of a token layer, which has two, by √2;
- keys and queries of a Performer are divided by D^1/4, so that q·k has variance 1 as in the attention of the blocks,
  and its random features, exp(w·x - |x|²/2), are neither 0 nor dominated by one;
- the head starts at 0, so that the first loss is that of equal probabilities;
- the position table has sines of rows and of columns in place of those of the index, so that neighbours in both
  directions are similar. It has the same name and shape, and checkpoints hold it.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import named_apply
from torch import nn

from .positions import grid_table, sinusoid_table

WEIGHT_INITS = ('published', 'scaled')
BRANCH_ENDS = ('.attn.proj', '.mlp.fc2', '.mlp.2', '.proj')  # names of the Linears that end a residual branch


def init_weights(module: nn.Module, name: str = '') -> None:
    """Give one module its published initial values: Linear weights std 0.02, biases 0; other modules keep torch's.

    Random features (`draw_features`) are drawn anew.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif draw := getattr(module, 'draw_features', None):
        draw()


def init_model(model: Any, weight_init: str) -> None:
    """Give every weight of a `T2TViT` its initial distribution, which `model.weight_init` remembers.

    Weights on the meta device stay there.
    """
    model.weight_init = weight_init
    if model.cls_token.is_meta:
        return
    named_apply(init_weights, model)
    trunc_normal_(model.cls_token, std=0.02)
    if weight_init == 'scaled':
        scale_weights(model)


@torch.no_grad()
def reset_model(model: Any) -> None:
    """Give every weight of a `T2TViT` what its module starts with, whatever it held: for `init_model` after this."""
    for module in model.modules():
        if reset := getattr(module, 'reset_parameters', None):
            reset()
    model.pos_embed.copy_(sinusoid_table(*model.pos_embed.shape[1:]))


def zero_head(head: nn.Module) -> None:
    """Let a head start at equal probabilities; nothing happens if there is none."""
    if isinstance(head, nn.Linear):
        nn.init.zeros_(head.weight)


@torch.no_grad()
def scale_weights(model: Any) -> None:
    """Draw the weights of a `T2TViT` again, with variances that suit their width and depth."""
    branches = 2 * sum(name.endswith('attn') for name, _ in model.blocks.named_modules())
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        gain = 2 if isinstance(module, nn.Conv2d) else 1
        nn.init.normal_(module.weight, std=(gain / module.weight[0].numel()) ** 0.5)
        if name.endswith(BRANCH_ENDS):
            module.weight /= (branches if name.startswith('blocks') else 2) ** 0.5
        elif name.endswith('.kqv'):
            width = len(module.weight) // 3
            module.weight[: 2 * width] /= width**0.25
    zero_head(model.head)
    height, width = model.grid_size
    model.pos_embed[:, 1:] = grid_table(height, width, model.embed_dim)
