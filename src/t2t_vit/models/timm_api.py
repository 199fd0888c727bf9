"""The interface of a timm model: intermediates, feature pyramids, head and size changes, layer decay.

Shapes: B images, C channels, (H, W) image, (h, w) grid of a stage, N = h·w tokens, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchDropout, get_act_layer, get_norm_layer
from timm.models import FeatureInfo, checkpoint_seq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpoints import load_weights
from .checks import as_size, check_images, token_grids
from .init import init_model, init_weights, reset_model, zero_head
from .positions import resample_positions
from .published import verify_published
from .t2t_vit import T2TViT

POOLS = ('token', 'avg', '')


def argument_names() -> list[str]:
    """Return the names of the arguments that `TimmT2TViT` takes beside those of its blocks."""
    names = [*signature(T2TViT).parameters, *signature(TimmT2TViT).parameters]
    return [name for name in names if name not in ('kwargs', 'block_args')] + ['growth_rate']


class TimmT2TViT(T2TViT):
    """`T2TViT` with the interface that timm asks of a model; `timm.create_model` builds it.

    Args:
        global_pool: What the head reads: the class `token`, the `avg` of the other tokens, or '' (all, no pooling).
        norm_layer: Normalisation of the backbone, a class or timm's name for one.
        act_layer: Activation in the blocks, a class or timm's name for one.
        qkv_bias: Give q, k, v of the blocks a bias.
        init_values: Scale the branches of each block by trainable factors, at first this (LayerScale).
        patch_drop_rate: Fraction of tokens dropped in training.
        dynamic_img_size: Accepted for compatibility: images of any size are always taken.
        device: Device of the parameters.
        dtype: Precision of the parameters.
        kwargs: The arguments of `T2TViT`.

    Raises:
        ValueError: for arguments that do not fit together.
    """

    weight_init: str
    num_prefix_tokens = 1
    has_class_token = True
    __jit_unused_properties__ = ['patch_embed', 'in_chans']

    def __init__(
        self,
        *,
        global_pool: str = 'token',
        norm_layer: str | Callable[..., nn.Module] | None = None,
        act_layer: str | Callable[..., nn.Module] | None = None,
        qkv_bias: bool = False,
        init_values: float | None = None,
        patch_drop_rate: float = 0.0,
        dynamic_img_size: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if init_values is not None:
            if kwargs.get('block', 'plain') != 'plain':
                raise ValueError(f"init_values goes with block='plain', got block={kwargs['block']!r}")
            kwargs.update(block='layer_scale', init_values=init_values)
        if global_pool not in POOLS:
            raise ValueError(f'global_pool is one of {POOLS}, got {global_pool!r}')
        with torch.device(device) if device is not None else nullcontext():
            super().__init__(**kwargs)
            self._exchange(get_norm_layer(norm_layer), get_act_layer(act_layer), qkv_bias)
        if patch_drop_rate > 0:
            self.pos_drop = nn.Sequential(self.pos_drop, PatchDropout(patch_drop_rate, num_prefix_tokens=1))
        if dtype is not None:
            self.to(dtype=dtype)
        self.global_pool = global_pool
        self.head_hidden_size = self.num_features
        self.grad_checkpointing = False

        splits = self.tokens_to_token.splits
        reductions = [math.prod(split.stride for split in splits[: i + 1]) for i in range(len(splits))]
        self.patch_embed.patch_size = (reductions[-1], reductions[-1])
        token_dim = kwargs.get('token_dim', signature(T2TViT).parameters['token_dim'].default)
        self.feature_info = [
            dict(num_chs=token_dim, reduction=reduction, module=f'tokens_to_token.attention{i + 1}')
            for i, reduction in enumerate(reductions[:-1])
        ] + [dict(num_chs=dim, reduction=reductions[-1], module=f'blocks.{i}') for i, dim in enumerate(self.widths)]

    def _exchange(self, norm_layer: Any, act_layer: Any, qkv_bias: bool) -> None:
        """Put other norms, activations and biased q, k, v into the backbone, and draw its weights again."""
        if norm_layer is None and act_layer is None and not qkv_bias:
            return
        for name, module in [*self.named_modules()]:
            parent, _, attribute = name.rpartition('.')
            if not name.startswith('blocks') and name != 'norm':
                continue
            exchanged: nn.Module | None = None
            if norm_layer is not None and type(module) is nn.LayerNorm:
                exchanged = norm_layer(module.normalized_shape[0])
            elif act_layer is not None and type(module) is nn.GELU:
                exchanged = act_layer()
            elif qkv_bias and attribute in ('q', 'k', 'v', 'qkv') and type(module) is nn.Linear:
                exchanged = nn.Linear(module.in_features, module.out_features)
            if exchanged is not None:
                setattr(self.get_submodule(parent), attribute, exchanged)
        init_model(self, self.weight_init)

    @property
    def in_chans(self) -> int:
        """Return the number of image channels, as timm's distillation task asks for it."""
        return self.tokens_to_token.in_chans

    @property
    def patch_embed(self) -> Any:
        """The tokens-to-token module, under the name that a ViT has for its patch embedding."""
        return self.tokens_to_token

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Give every weight its initial values, also those of norms and convolutions if `needs_reset`.

        So a model that was built on the meta device can be moved by `to_empty` and initialised.
        """
        if needs_reset:
            reset_model(self)
        init_model(self, self.weight_init)

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load any published file into this model, adapted to its classes, channels and size."""
        verify_published(checkpoint_path)
        load_weights(self, checkpoint_path)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay, beside norms and biases."""
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the groups for layer decay: tokens and class token, each block (the norm with the last), head."""
        return dict(
            stem=r'^cls_token|^pos_embed|^tokens_to_token', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))]
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` (0 for none), and the pooling if one is named."""
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ValueError(f'global_pool is one of {POOLS}, got {global_pool!r}')
            self.global_pool = global_pool
        self.num_classes = num_classes
        place: dict[str, Any] = dict(device=self.cls_token.device, dtype=self.cls_token.dtype)
        self.head = nn.Linear(self.num_features, num_classes, **place) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        init_weights(self.head)
        if self.weight_init == 'scaled':
            zero_head(self.head)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resample the position table for another image size once, instead of in every forward pass.

        Args:
            img_size: The image size; None leaves it.
            patch_size: For compatibility: None or that of the model, the stride of its tokens.

        Raises:
            ValueError: for another patch size, or if no token is left.
        """
        stride = self.patch_embed.patch_size
        if patch_size is not None and as_size(patch_size) != stride:
            raise ValueError(f'the splits fix patch_size at {stride}, got {patch_size}; build a model of other splits')
        size = self.img_size if img_size is None else as_size(img_size)
        grid = token_grids(self.tokens_to_token.splits, *size)[-1]
        self.pos_embed = resample_positions(self.pos_embed, *grid, *self.grid_size)
        self.img_size, self.grid_size = size, grid
        for record in ('_traits', '_model_args'):  # timm's builder notes there what it saves beside the weights
            if record in self.__dict__:
                getattr(self, record)['img_size'] = self.img_size

    def forward_features(self, x: Tensor) -> Tensor:
        """Return all tokens after the last norm, the class token first: (B, C, H, W) -> (B, 1 + N, D)."""
        x = self.embed(self.tokens_to_token(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, D) -> (B, num_classes), or with `pre_logits` the head's input, (B, D)."""
        if self.global_pool == 'token':
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    @torch.jit.ignore
    def named_intermediates(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every stage of a forward pass with its module's name, as it is computed.

        First the maps after the token layers and the projection, (B, D, h, w): `tokens_to_token.attention1`, …,
        `tokens_to_token.project`; then the tokens after each block, (B, 1 + N, D): `blocks.0`, …; then `norm`.
        Stopping the iteration stops the computation.
        """
        tokens_to_token = self.tokens_to_token
        check_images(x, tokens_to_token.in_chans, tokens_to_token.splits)
        for name, layer in tokens_to_token.named_children():
            x = tokens_to_token.last_split(x) if name == 'project' else layer(x)
            yield f'tokens_to_token.{name}', x
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            yield f'blocks.{i}', x
        yield 'norm', self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return the features after chosen layers, as timm's models do.

        Layers are the entries of `feature_info`: the token stages first, then the blocks. In the paper's models 0 and 1
        are the maps of strides 4 and 8 with 64 channels, 2 is the first block, -1 the last.

        Args:
            x: Images, (B, C, H, W).
            indices: The layers: a list, the last n, or None for all.
            return_prefix_tokens: Also return the class token of each layer, (B, 1, D); (B, 0, D) of a token stage.
            norm: Apply the last norm to the tokens of each block (not with dense blocks, whose widths differ).
            stop_early: Compute nothing after the last of these layers; the final features are then missing.
            output_fmt: NCHW for maps (B, D, h, w), NLC for tokens (B, N, D).
            intermediates_only: Return the list alone instead of (final features, list).
            output_dict: Return a dict: `image_features`, `image_intermediates`, `image_intermediates_prefix`.

        Raises:
            ValueError: for layers or formats that do not exist.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt is 'NCHW' or 'NLC', got {output_fmt!r}")
        names = [self.feature_info[i]['module'] for i in self.layer_indices(indices)]
        prefixes, features, y, grid = [], [], x, (0, 0)
        for name, y in self.named_intermediates(x):
            tokens = y
            if y.ndim == 4:
                grid, tokens = (y.shape[2], y.shape[3]), y.flatten(2).transpose(1, 2)
            if name in names:
                prefix = 0 if y.ndim == 4 else self.num_prefix_tokens
                tokens = self.norm(tokens) if norm and y.ndim == 3 else tokens
                prefixes.append(tokens[:, :prefix])
                tokens = tokens[:, prefix:]
                features.append(
                    tokens if output_fmt == 'NLC' else tokens.transpose(1, 2).unflatten(2, grid).contiguous()
                )
            if len(features) == len(names) and (stop_early or intermediates_only):
                break

        if output_dict:
            result: dict[str, Any] = dict(image_intermediates=features)
            if return_prefix_tokens:
                result['image_intermediates_prefix'] = prefixes
            if not intermediates_only:
                result['image_features'] = y
            return result
        found = list(zip(features, prefixes)) if return_prefix_tokens else features
        return found if intermediates_only else (y, found)

    @torch.jit.ignore
    def layer_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return positions in `feature_info`, ascending: all for None, the last n for a number, else those listed.

        Raises:
            ValueError: for layers that do not exist.
        """
        count = len(self.feature_info)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        wrong = [i for i in indices if not -count <= i < count]
        if wrong or not indices:
            raise ValueError(f'layers are counted from {-count} to {count - 1}, got {list(indices)}')
        return sorted({i % count for i in indices})

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of these layers (and norm, and head); return the layers' positions.

        The norm is also removed where the remaining tokens have another width than it, in dense models.

        Raises:
            ValueError: for layers that do not exist, and if a head of another width were kept.
        """
        take = self.layer_indices(indices)
        count = max(0, take[-1] + 2 - len(self.tokens_to_token.splits))
        width = self.widths[count - 1] if count else self.embed_dim
        fits = width == self.num_features
        if not (fits or prune_head):
            raise ValueError(
                f'the head is for tokens of width {self.num_features}, and after {count} blocks they have {width}: '
                'remove it too (prune_head=True)'
            )
        self.blocks, self.widths = self.blocks[:count], self.widths[:count]
        self.num_features = self.head_hidden_size = width
        if prune_norm or not fits:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take


class Pyramid(nn.Module):
    """`timm.create_model(…, features_only=True)`: images (B, C, H, W) -> a list of maps (B, D, h, w), largest first.

    `out_indices` counts levels as decoders do: the map after each token layer, then that after the last block, so 0, 1,
    2 are strides 4, 8, 16 of the paper's models. One more level, half the size of the last, is pooled from it (maximum
    of 2×2, as in ViTDet's pyramid), for decoders that want a stride of 32. With `feature_cls='getter'` timm counts
    layers instead, see `TimmT2TViT.forward_intermediates`.

    Args:
        model: A `TimmT2TViT`; the layers after the last level are removed.
        out_indices: Levels, negative ones from the model's last; or how many of these.
        norm: Apply the last norm to the map of the last block.

    Raises:
        ValueError: for levels that do not exist.
    """

    def __init__(self, model: Any, out_indices: int | Sequence[int], norm: bool = False) -> None:
        layers: list[dict[str, Any]] = model.feature_info
        tokens = len(model.tokens_to_token.splits) - 1
        levels = [*range(tokens), len(layers) - 1]  # the layer of each level
        wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
        wrong = [i for i in wanted if not -len(levels) <= i <= len(levels)]
        if wrong or not wanted:
            raise ValueError(f'levels are counted from {-len(levels)} to {len(levels)}, got {list(wanted)}')
        chosen = sorted({i + len(levels) if i < 0 else i for i in wanted})
        last = {**layers[-1], 'reduction': 2 * layers[-1]['reduction'], 'module': 'pool'}
        info = [{**entry, 'index': i} for i, entry in enumerate([*(layers[i] for i in levels), last])]

        super().__init__()
        chosen_layers = sorted({levels[min(i, len(levels) - 1)] for i in chosen})
        self.layers: list[int] = model.prune_intermediate_layers(chosen_layers, prune_norm=not norm)
        self.model, self.norm = model, norm
        self.feature_info = FeatureInfo(info, tuple(chosen))
        self.pooled, self.unpooled = len(levels) in chosen, len(levels) - 1 in chosen

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the chosen levels, the largest first."""
        maps: list[Tensor] = self.model.forward_intermediates(
            x, indices=self.layers, norm=self.norm, intermediates_only=True
        )
        if self.pooled:
            maps.append(F.max_pool2d(maps[-1], 2, ceil_mode=True))
        return maps if self.unpooled or not self.pooled else [*maps[:-2], maps[-1]]
