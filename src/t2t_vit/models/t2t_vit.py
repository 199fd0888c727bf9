"""T2T-ViT, the one class of the whole family, its one table of variants, and their registration with timm.

"Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", Yuan et al., ICCV 2021,
arXiv 2101.11986. Letters: B images, C channels, (H, W) the image, (h, w) the final grid, N = h·w tokens, D embed_dim.
"""

import difflib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    model_entrypoint,
    named_apply,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..custom import check_source
from .blocks import BLOCKS, build_blocks
from .checkpoints import convert_state_dict, load_weights, verify_file
from .own import load_own
from .positions import resample, sinusoid_table
from .pyramid import Pyramid
from .soft_split import Split
from .tokens import TOKEN_LAYERS, TokenPerformer, TokensToToken, to_map, to_tokens

POOLS = ('token', 'avg', '')
PAPER_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel, stride, padding (Sec. 3.1)


def init_weights(module: nn.Module, name: str = '') -> None:
    """The published initial values: Linear weights of deviation 0.02, biases 0; the rest as torch has it."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, TokenPerformer):
        module.init_features()


def choose(kind: str, value: Any, table: dict[str, Any]) -> Any:
    """The table's entry, or what is the user's own: `value` itself where it is a callable, or a class in FILE.py:CLASS.

    Raises:
        ValueError: for another name.
    """
    if callable(value):
        return value
    if '.py:' in str(value):
        return load_own(value)
    if value in table:
        return table[value]
    near = difflib.get_close_matches(str(value), table, n=1)
    raise ValueError(
        f'unknown {kind} {value!r}'
        + (f', did you mean {near[0]!r}?' if near else '')
        + f' (choices: {", ".join(map(repr, table))}, a callable, or FILE.py:CLASS)'
    )


def as_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of one number or two.

    Raises:
        ValueError: for anything else.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f'img_size is one whole number or two, (H, W), got {img_size!r}')
    return sides


class T2TViT(nn.Module):
    """A tokens-to-token module and a deep, narrow ViT backbone (Sec. 3, Fig. 3 and 4).

    Any height, width and batch size works at any time: the token grid follows the image, and the position table is
    resampled (bicubic) where the grid is not the one the model was built for.

    Args:
        img_size: Size the position table is built for, in pixels, (H, W) or one number.
        in_chans: Channels of the image.
        num_classes: Width of the head; 0 for none.
        global_pool: What the head reads: the class `token`, the `avg` of the other tokens, or '' (no pooling).
        splits: (kernel, stride, padding) of each soft split; the default is the paper's. A token layer follows each
            but the last, so a single one, with `token_layer='none'`, is a ViT's hard or soft patch embedding.
        token_layer: `performer`, `transformer`, `convolution` or `none`, or a class of one's own (see `TokenLayer`),
            itself or as FILE.py:CLASS.
        token_dim: Width of the token layers.
        embed_dim: Width of the backbone; of its first block where blocks are dense.
        depth: Number of blocks, or the numbers in each group, with a transition to half the width between groups.
        num_heads: Attention heads of each block.
        mlp_ratio: Hidden width of a block's MLP over its width.
        block: `plain`, `se`, `ghost` or `dense`, or a class of one's own (see `Block`), itself or as FILE.py:CLASS.
        growth_rate: Channels that a dense block adds.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position table.
        proj_drop_rate: Dropout after attention's projection and in the MLP of each block.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth, linear from 0 in the first block to this rate in the last.
        device: Where to make the parameters.
        dtype: Their precision.

    Raises:
        ValueError: for arguments that do not fit together; all problems in one message.
    """

    pos_embed: torch.Tensor
    num_prefix_tokens = 1
    has_class_token = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'token',
        splits: Sequence[tuple[int, int, int]] = PAPER_SPLITS,
        token_layer: str | Callable[..., nn.Module] = 'performer',
        token_dim: int = 64,
        embed_dim: int = 384,
        depth: int | Sequence[int] = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        block: str | Callable[..., nn.Module] = 'plain',
        growth_rate: int = 64,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size = as_size(img_size)
        odd = [split for split in splits if len(split) != 3]
        cuts = [Split(*split) for split in splits if len(split) == 3]
        depths = [depth] if isinstance(depth, int) else [*depth]
        widths = dict(embed_dim=embed_dim, token_dim=token_dim, num_heads=num_heads, in_chans=in_chans)
        token_cls = choose('token_layer', token_layer, {**TOKEN_LAYERS, 'none': None})
        block_cls = choose('block', block, BLOCKS)
        problems = [
            text
            for wrong, text in (
                *(
                    (not isinstance(value, int) or value < 1, f'{name} is a whole number from 1, got {value!r}')
                    for name, value in widths.items()
                ),
                (global_pool not in POOLS, f'global_pool is one of {POOLS}, got {global_pool!r}'),
                (bool(odd) or not splits, f'splits are (kernel, stride, padding), at least one, got {list(splits)}'),
                (
                    any(s.kernel < 1 or s.stride < 1 or s.padding < 0 for s in cuts),
                    f'kernel and stride are at least 1, padding at least 0, got splits={list(splits)}',
                ),
                (
                    token_cls is None and len(cuts) > 1,
                    f"token_layer='none' takes a single split, as ((16, 16, 0),), got {len(cuts)}",
                ),
                (
                    num_heads >= 1 and embed_dim % num_heads != 0,
                    f'embed_dim {embed_dim} is not a multiple of num_heads {num_heads}',
                ),
                (embed_dim % 2 != 0, f'embed_dim must be even, got {embed_dim}'),
                (token_layer == 'performer' and token_dim == 1, 'token_dim is at least 2 with Performer tokens, got 1'),
                (
                    min(depths, default=0) < 1 or sum(depths) > 1000,
                    f'depth is at least 1 and at most 1000, got {depth}',
                ),
                (mlp_ratio <= 0, f'mlp_ratio is above 0, got {mlp_ratio}'),
                (
                    not all(1 <= side <= 32768 for side in self.img_size),
                    f'img_size is at least 1 and at most 32768, got {img_size}',
                ),
                (num_classes < 0, f'num_classes is at least 0, got {num_classes}'),
                (
                    any(
                        not 0 <= rate < 1
                        for rate in (drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate)
                    ),
                    'drop rates are at least 0 and below 1',
                ),
            )
            if wrong
        ]
        if problems:
            raise ValueError('T2TViT cannot be built: ' + '; '.join(problems))
        if block == 'dense':
            block_cls = partial(block_cls, growth_rate=growth_rate)

        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.grad_checkpointing = False
        with torch.device(device) if device is not None else nullcontext():
            self.tokens_to_token = TokensToToken(cuts, token_cls, in_chans, token_dim, embed_dim)
            self.grid_size = self.tokens_to_token.grids(*self.img_size)[-1]
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.register_buffer('pos_embed', sinusoid_table(1 + self.grid_size[0] * self.grid_size[1], embed_dim))
            self.pos_drop = nn.Dropout(pos_drop_rate)
            self.blocks, dims = build_blocks(
                block_cls,
                embed_dim,
                depth,
                num_heads,
                mlp_ratio,
                drop_path_rate,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
            )
            self.num_features = self.head_hidden_size = dims[-1]
            self.norm: nn.Module = nn.LayerNorm(self.num_features)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
            self.init_weights()
        if dtype is not None:
            self.to(dtype=dtype)

        reductions = [math.prod(cut.stride for cut in cuts[: i + 1]) for i in range(len(cuts))]
        self.feature_info = [
            dict(num_chs=token_dim, reduction=reduction, module=f'tokens_to_token.attention{i + 1}')
            for i, reduction in enumerate(reductions[:-1])
        ] + [dict(num_chs=dim, reduction=reductions[-1], module=f'blocks.{i}') for i, dim in enumerate(dims)]

    def init_weights(self) -> None:
        """Give every weight its published initial distribution."""
        if self.cls_token.is_meta:  # nothing to fill, and torch would take a second over it
            return
        named_apply(init_weights, self)
        trunc_normal_(self.cls_token, std=0.02)

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load any published file into this model, adapted to its classes, channels and size; timm calls it."""
        for published in PUBLISHED.values():
            if published.file == Path(checkpoint_path).name:
                verify_file(checkpoint_path, published.size, published.sha256)
        load_weights(self, checkpoint_path)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers shall not decay, beside norms and biases."""
        return {'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer decay: tokens and class token, each block (the last norm with the last), head."""
        return dict(
            stem=r'^cls_token|^pos_embed|^tokens_to_token', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))]
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0 for none), and another pooling where one is named."""
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ValueError(f'global_pool is one of {POOLS}, got {global_pool!r}')
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = (
            nn.Linear(self.num_features, num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        self.head.train(self.training)
        init_weights(self.head)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position table for another image size, once, instead of at every forward."""
        size = as_size(img_size)
        old, self.grid_size = self.grid_size, self.tokens_to_token.grids(*size)[-1]
        self.img_size = size
        self.pos_embed = resample(self.pos_embed, self.grid_size, old)
        for record in ('_traits', '_model_args'):  # where timm's builder notes what it saves beside the weights
            if record in self.__dict__:
                getattr(self, record)['img_size'] = self.img_size

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Class token in front, positions added: a map (B, D, h, w) -> (B, 1 + N, D)."""
        pos_embed = resample(self.pos_embed, (x.shape[-2], x.shape[-1]), self.grid_size)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), to_tokens(x)], dim=1)
        return self.pos_drop(x + pos_embed)

    def backbone(self, x: torch.Tensor, class_only: bool = False) -> torch.Tensor:
        """All blocks and the last norm (Sec. 3.2): (B, 1 + N, D) -> the same, or its class token's row, (B, 1, D)."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, class_only and i == last, use_reentrant=False)
            else:
                x = block(x, class_only and i == last)
        return self.norm(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> all tokens behind the last norm, the class token first: (B, 1 + N, D)."""
        return self.backbone(self.embed(self.tokens_to_token(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 1 + N, D) -> (B, num_classes), or what the head reads, (B, D)."""
        if self.global_pool == 'token':
            x = x[:, 0]
        elif self.global_pool == 'avg':
            x = x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, num_classes). Where only the class token is read, the last block makes only that."""
        x = self.embed(self.tokens_to_token(x))
        return self.forward_head(self.backbone(x, class_only=self.global_pool == 'token'))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features behind chosen layers, as timm's models give them.

        The layers count through: the token stages first, then the entries of `blocks` (see `feature_info`). So 0 and
        1 are the paper's maps of strides 4 and 8 with 64 channels, 2 is the first block, -1 the last.

        Args:
            x: Images, (B, C, H, W).
            indices: Which layers: a list, the last n, or None for all.
            return_prefix_tokens: Also give the class token of each, (B, 1, D); of a token stage, which has none, an
                empty (B, 0, D).
            norm: Put the last norm on each block's tokens (not with dense blocks, whose widths differ).
            stop_early: Compute nothing behind the last layer asked for; then no final features.
            output_fmt: NCHW for maps (B, D, h, w), NLC for tokens (B, N, D).
            intermediates_only: Give the list alone, not (final features, list).
            output_dict: Give a dict with `image_features`, `image_intermediates`, `image_intermediates_prefix`.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt is 'NCHW' or 'NLC', got {output_fmt!r}")
        names = [self.feature_info[i]['module'] for i in self.layer_indices(indices)]
        found: dict[str, torch.Tensor] = {}
        y, grid = x, (0, 0)
        for name, y in self.named_intermediates(x):
            if y.ndim == 4:
                grid = (y.shape[-2], y.shape[-1])
            if name in names:
                found[name] = y
            if len(found) == len(names) and (stop_early or intermediates_only):
                break

        prefixes, features = [], []
        for feature in found.values():
            if feature.ndim == 4:
                prefixes.append(to_tokens(feature)[:, :0])
                features.append(feature.contiguous() if output_fmt == 'NCHW' else to_tokens(feature))
                continue
            tokens = self.norm(feature) if norm else feature
            prefixes.append(tokens[:, : self.num_prefix_tokens])
            tokens = tokens[:, self.num_prefix_tokens :]
            features.append(to_map(tokens, *grid).contiguous() if output_fmt == 'NCHW' else tokens)

        if output_dict:
            result: dict[str, Any] = dict(image_intermediates=features)
            if return_prefix_tokens:
                result['image_intermediates_prefix'] = prefixes
            if not intermediates_only:
                result['image_features'] = y
            return result
        given = list(zip(features, prefixes)) if return_prefix_tokens else features
        return given if intermediates_only else (y, given)

    @torch.jit.ignore
    def named_intermediates(self, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Every stage of one forward pass with its module's name, as it is computed.

        First the maps behind the token layers and the projection, (B, C, h, w): `tokens_to_token.attention1`, …,
        `tokens_to_token.project`; then the tokens behind each block, (B, 1 + N, D): `blocks.0`, …; then `norm`.
        `dict(model.named_intermediates(images))` holds them all; whoever stops iterating, stops computing.
        """
        for name, stage in self.tokens_to_token.named_stages(x):
            yield f'tokens_to_token.{name}', stage
        x = self.embed(stage)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            yield f'blocks.{i}', x
        yield 'norm', self.norm(x)

    @torch.jit.ignore
    def layer_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Places in `feature_info`, ascending: all for None, the last n for a number, else those listed."""
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
        """Drop the blocks (and norm, and head) behind the last layer asked for; gives the layers as kept indices."""
        take = self.layer_indices(indices)
        self.blocks = self.blocks[: max(0, take[-1] + 2 - len(self.tokens_to_token))]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take


class Variant(NamedTuple):
    """A row of the table: what a model differs in from `T2TViT`'s defaults."""

    token_layer: str
    depth: int | tuple[int, ...]
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    block: str = 'plain'
    img_size: int = 224
    splits: tuple[tuple[int, int, int], ...] = PAPER_SPLITS


HARD_SPLIT = ((16, 16, 0),)  # a ViT's patches
SPLITS_16 = ((3, 2, 1), (3, 2, 1), (3, 1, 1))  # for small images: 16² becomes 8², 4², 4²
SPLITS_32 = ((3, 1, 1), (3, 2, 1), (3, 2, 1))  # 32², 16², 8²
SPLITS_64 = ((3, 2, 1), (3, 2, 1), (3, 2, 1))  # 32², 16², 8²

VARIANTS: dict[str, Variant] = {
    # Table 1: the family, Performer tokens, then transformer tokens (_t)
    't2t_vit_7': Variant('performer', 7, 256, 4, 2),
    't2t_vit_10': Variant('performer', 10, 256, 4, 2),
    't2t_vit_12': Variant('performer', 12, 256, 4, 2),
    't2t_vit_14': Variant('performer', 14, 384, 6, 3),
    't2t_vit_19': Variant('performer', 19, 448, 7, 3),
    't2t_vit_24': Variant('performer', 24, 512, 8, 3),
    't2t_vit_t_14': Variant('transformer', 14, 384, 6, 3),
    't2t_vit_t_19': Variant('transformer', 19, 448, 7, 3),
    't2t_vit_t_24': Variant('transformer', 24, 512, 8, 3),
    # Table 3, the designs from CNNs on T2T-ViT-14, as the release builds them
    't2t_vit_14_wide': Variant('performer', 4, 768, 12, 3),
    't2t_vit_dense': Variant('performer', (3, 6, 6, 4), 128, 8, 2, block='dense'),
    't2t_vit_14_se': Variant('performer', 14, 384, 6, 3, block='se'),
    't2t_vit_14_resnext': Variant('performer', 14, 384, 32, 3),
    't2t_vit_16_ghost': Variant('performer', 16, 384, 6, 3, block='ghost'),
    # Table 3, on ViT-S/16. What the paper does not print is inferred from its parameter counts:
    # the shallow-wide MLP ratio (47.9 M) and the dense groups and ratio (128 to 736 wide, 46.7 M)
    'vit_s_16': Variant('none', 8, 768, 8, 3, splits=HARD_SPLIT),
    'vit_s_16_deep_narrow': Variant('none', 16, 384, 6, 3, splits=HARD_SPLIT),
    'vit_s_16_shallow_wide': Variant('none', 4, 1024, 8, 3.5, splits=HARD_SPLIT),
    'vit_s_16_dense': Variant('none', (6, 7, 6), 128, 8, 4, block='dense', splits=HARD_SPLIT),
    'vit_s_16_se': Variant('none', 8, 768, 8, 3, block='se', splits=HARD_SPLIT),
    'vit_s_16_resnext': Variant('none', 8, 768, 32, 3, splits=HARD_SPLIT),
    'vit_s_16_ghost': Variant('none', 8, 768, 8, 3, block='ghost', splits=HARD_SPLIT),
    # Table 4: what the tokens-to-token module is worth
    't2t_vit_14_no_t2t': Variant('none', 14, 384, 6, 3, splits=HARD_SPLIT),
    't2t_vit_c_14': Variant('convolution', 14, 384, 6, 3),
    # Ours, for small images: the family's widths with strides that leave enough tokens
    't2t_vit_4_16': Variant('performer', 4, 128, 4, 2, img_size=16, splits=SPLITS_16),
    't2t_vit_7_32': Variant('performer', 7, 256, 4, 2, img_size=32, splits=SPLITS_32),
    't2t_vit_14_32': Variant('performer', 14, 384, 6, 3, img_size=32, splits=SPLITS_32),
    't2t_vit_7_64': Variant('performer', 7, 256, 4, 2, img_size=64, splits=SPLITS_64),
    't2t_vit_14_64': Variant('performer', 14, 384, 6, 3, img_size=64, splits=SPLITS_64),
}


class Published(NamedTuple):
    """A file of the official release, and what its images went through.

    `size` (bytes) and `sha256` are checked after download where they are known. They are not known yet: the release
    page names neither.
    """

    file: str
    img_size: int = 224
    crop_pct: float = 0.9
    num_classes: int = 1000
    interpolation: str = 'bicubic'
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    size: int | None = None
    sha256: str | None = None


RELEASE = 'https://github.com/yitu-opensource/T2T-ViT/releases/download/main/'
# the release's transfer script: resized whole, with CIFAR-10's mean and deviation for both sets
cifar = partial(
    Published, crop_pct=1.0, interpolation='bilinear', mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)

PUBLISHED: dict[str, Published] = {
    't2t_vit_7.in1k': Published('71.7_T2T_ViT_7.pth.tar'),
    't2t_vit_10.in1k': Published('75.2_T2T_ViT_10.pth.tar'),
    't2t_vit_12.in1k': Published('76.5_T2T_ViT_12.pth.tar'),
    't2t_vit_14.in1k': Published('81.5_T2T_ViT_14.pth.tar'),
    't2t_vit_14.in1k_384': Published('83.3_T2T_ViT_14.pth.tar', img_size=384, crop_pct=1.0),
    't2t_vit_14.cifar10': cifar('cifar10_t2t-vit_14_98.3.pth', num_classes=10),
    't2t_vit_14.cifar100': cifar('cirfar100_t2t-vit-14_88.4.pth', num_classes=100),  # the release's spelling
    't2t_vit_19.in1k': Published('81.9_T2T_ViT_19.pth.tar'),
    't2t_vit_19.cifar10': cifar('cifar10_t2t-vit_19_98.4.pth', num_classes=10),
    't2t_vit_19.cifar100': cifar('cifar100_t2t-vit-19_89.0.pth', num_classes=100),
    't2t_vit_24.in1k': Published('82.3_T2T_ViT_24.pth.tar'),
    't2t_vit_24.token_labeling_in1k': Published('84.2_T2T_ViT_24.pth.tar'),
    't2t_vit_t_14.in1k': Published('81.7_T2T_ViTt_14.pth.tar'),
    't2t_vit_t_19.in1k': Published('82.4_T2T_ViTt_19.pth.tar'),
    't2t_vit_t_24.in1k': Published('82.6_T2T_ViTt_24.pth.tar'),
}


def pretrained_cfgs() -> dict[str, Any]:
    """timm's configuration of every variant and every published file, `model` and `model.tag`."""
    cfgs: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        shared = dict(
            classifier='head',
            first_conv=(),  # none that timm could adapt by itself: convert_state_dict does it
            license='bsd-3-clause-clear',
            origin_url='https://github.com/yitu-opensource/T2T-ViT',
            paper_ids='arXiv:2101.11986',
        )
        published = {key: row for key, row in PUBLISHED.items() if key.split('.')[0] == name}
        for key, row in published.items():
            cfgs[key] = dict(
                shared,
                url=RELEASE + row.file,
                custom_load=True,  # by T2TViT.load_pretrained: the layouts are many
                input_size=(3, row.img_size, row.img_size),
                crop_pct=row.crop_pct,
                num_classes=row.num_classes,
                interpolation=row.interpolation,
                mean=row.mean,
                std=row.std,
            )
        if not published:
            cfgs[name] = dict(
                shared,
                input_size=(3, variant.img_size, variant.img_size),
                crop_pct=0.9,
                interpolation='bicubic',
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            )
    return cfgs


default_cfgs = generate_default_cfgs(pretrained_cfgs())  # where timm looks for them


def build(name: str, pretrained: bool, **kwargs: Any) -> T2TViT:
    """The registered model `name`, as `timm.create_model` asks for it; `kwargs` go before the table's row."""
    cfg = resolve_pretrained_cfg(
        name, pretrained_cfg=kwargs.get('pretrained_cfg'), pretrained_cfg_overlay=kwargs.get('pretrained_cfg_overlay')
    )
    check_source(kwargs.get('pretrained_cfg'), kwargs)
    args = {**VARIANTS[name]._asdict(), 'img_size': tuple(cfg.input_size[-2:]), **kwargs}
    stages = len(args['splits']) - 1
    return build_model_with_cfg(
        T2TViT,
        name,
        pretrained,
        pretrained_filter_fn=convert_state_dict,
        feature_cfg=dict(feature_cls=Pyramid, out_indices=stages + 1)
        if stages
        else dict(feature_cls='getter', out_indices=3),
        **args,
    )


def register(name: str) -> Callable[..., T2TViT]:
    """Make timm's entry point of one row of the table; a warning says so where timm has a model of that name."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> T2TViT:
        return build(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{name}, see VARIANTS; arguments are T2TViT's."
    if is_model(name) and model_entrypoint(name).__module__ != __name__:
        warnings.warn(
            f'timm has a model named {name} of its own ({model_entrypoint(name).__module__}); '
            f'from here on timm.create_model({name!r}) builds the one of {__name__}',
            stacklevel=3,
        )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm's own words for the same
        return register_model(entrypoint)


ENTRYPOINTS = {name: register(name) for name in VARIANTS}
