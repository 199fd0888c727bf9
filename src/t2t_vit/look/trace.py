"""Record one forward pass: the map of every stage, and queries, keys and values of every attention layer.

Works for any timm model: hooks record the outputs of modules, and a function mode the calls of
`scaled_dot_product_attention`. Layers of a T2T-ViT with hooks run their plain forms, in which q, k and v are outputs of
a Linear. Nothing remains in the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..models.t2t_vit import Attention as T2TAttention
from ..models.t2t_vit import TokenAttention, TokenPerformer, TokensToToken
from ..settings import UsageError, nearest
from .attention import Attention, Lattice

Grid = tuple[int, int]


@dataclass
class Trace:
    """Maps and attentions of a batch of images, by module name, in the order of computation."""

    logits: torch.Tensor  # (B, classes)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, C, h, w)
    prefixes: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, P, C); P is 0 if there are none
    attentions: dict[str, Attention] = field(default_factory=dict)
    lattices: dict[str, Lattice] = field(default_factory=dict)  # positions of the cells of `maps`

    def backbone(self) -> list[Attention]:
        """Return the attention layers of the last grid, which a rollout multiplies; none in a convolutional network."""
        whole = [a for a in self.attentions.values() if a.grid is not None and a.query.shape[2] == a.key.shape[2]]
        return [a for a in whole if a.key.shape[2] == whole[-1].key.shape[2] and a.prefix == whole[-1].prefix]


def stage_names(model: nn.Module) -> list[str]:
    """Return the names of a model's stages, in their order in the model.

    These are the entries of its outermost lists of modules (token layers, blocks, residual units), after the stem or
    patch embedding that timm's `feature_info` and `patch_embed` name.
    """
    names = list(_entries(model, ''))
    known = [info['module'] for info in getattr(model, 'feature_info', ()) if isinstance(info, dict)]
    for name in ('patch_embed', *known):
        inside = any(name == other or other.startswith(f'{name}.') or name.startswith(f'{other}.') for other in names)
        if not inside and name in dict(model.named_modules()):
            names.append(name)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=order.__getitem__)


def _entries(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        listed = isinstance(module, (nn.Sequential, nn.ModuleList, TokensToToken))
        if isinstance(child, (nn.Sequential, nn.ModuleList)) or (not listed and len(list(child.children()))):
            yield from _entries(child, f'{prefix}{name}.')
        elif listed:
            yield f'{prefix}{name}'


def trace(model: nn.Module, images: torch.Tensor, layers: Sequence[str] | None = None) -> Trace:
    """Run a model on images, (B, C, H, W), in evaluation mode and without gradients, and record its layers.

    Layers whose output is no grid over the image (a pooled vector, a list) are left out. What is recorded is float32,
    also of a model that computes in half precision.

    Args:
        model: Any timm model, or one with `forward_features` and `forward_head`, or with `forward`.
        images: After the model's preprocessing, of any size that the model accepts.
        layers: Names of the modules whose maps to keep; by default `stage_names(model)`.

    Raises:
        UsageError: naming all layers that the model lacks.
        ValueError: if the model does not accept the images.
    """
    modules = dict(model.named_modules())
    wanted = stage_names(model) if layers is None else list(layers)
    if unknown := [name for name in wanted if name not in modules]:
        raise UsageError('\n'.join(f'the model has no layer {name}{nearest(name, modules)}' for name in unknown))
    recorder = _Recorder(model, wanted, images)
    training = model.training
    with torch.no_grad(), recorder.attached():
        try:
            model.eval()
            logits = all_tokens(model, images)
        finally:
            model.train(training)
    found = Trace(at_least_float32(logits), attentions=recorder.attentions)
    for name, output in recorder.outputs.items():
        found.maps[name], found.prefixes[name], found.lattices[name] = output
    reads_token = getattr(model, 'has_class_token', True) and getattr(model, 'global_pool', 'token') in ('token', '')
    for attention in found.attentions.values():
        recorder.locate(attention)
        attention.class_token = attention.prefix > 0 and reads_token
    return found


def at_least_float32(x: torch.Tensor, copy: bool = False) -> torch.Tensor:
    """Return half precision as float32, and other types as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=copy)


def all_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Compute the scores by way of all tokens; T2TViT.forward skips those that the class token does not need."""
    if hasattr(model, 'forward_features') and hasattr(model, 'forward_head'):
        return model.forward_head(model.forward_features(images))
    return model(images)


def _conv(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, ...]:
    return tuple(weight.shape[-2:]), stride, padding, dilation


def _max_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *rest: Any, **more: Any
) -> tuple[Any, ...]:
    return kernel_size, stride or kernel_size, padding, dilation


def _avg_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **more: Any
) -> tuple[Any, ...]:
    return kernel_size, stride or kernel_size, padding, 1


def _unfold(x: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> tuple[Any, ...]:
    return kernel_size, stride, padding, dilation


WINDOWED: dict[Any, Callable[..., tuple[Any, ...]]] = {  # to kernel, stride, padding, dilation
    F.conv2d: _conv,
    F.unfold: _unfold,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
}


class Grids(TorchFunctionMode):
    """Convert outputs of modules to maps. Tokens have the grid of the last map before them with as many cells.

    While active it follows convolutions, pooling and padding, which determine the positions of cells. A grid from
    another operation, as merging of patches, is assumed to tile the image. Of two paths to one grid, as a residual
    branch and its shortcut, the last one counts.
    """

    def __init__(self, model: nn.Module, size: Grid) -> None:
        super().__init__()
        self.size = size
        self.lattices: dict[Grid, Lattice] = {}
        self.prefix = int(getattr(model, 'num_prefix_tokens', 0))
        self.channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
        self.seen: list[Grid] = []

    def record(self, output: Any) -> None:
        """Record the grid of a map that a module returned."""
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            self.seen.append((output.shape[-2], output.shape[-1]))
            if self.channels_last:
                self.seen.append((output.shape[1], output.shape[2]))

    def lattice(self, grid: Grid) -> Lattice:
        """Return the positions of the cells of a grid, as far as they are known."""
        return self.lattices.get(grid) or Lattice.over(grid, self.size)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in WINDOWED or func is F.pad:
            self.follow(func, args, kwargs or {}, output)
        return output

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Record the positions of the cells of an output."""
        x = args[0] if args else kwargs.get('input')
        if not (isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor) and x.ndim == 4):
            return
        before, after = ((t.shape[-2], t.shape[-1]) for t in (x, output))
        if func is F.pad:
            pads = args[1] if len(args) > 1 else kwargs['pad']
            if len(pads) == 4:  # height and width only
                self.lattices[after] = self.lattice(before).strided((1, 1), (1, 1), (pads[2], pads[0]))
            return
        more = {key: value for key, value in kwargs.items() if key != 'input'}
        kernel, stride, padding, dilation = WINDOWED[func](x, *args[1:], **more)
        if isinstance(padding, str):
            padding = 0  # 'valid'; 'same' keeps the grid
        extent = [(k - 1) * d + 1 for k, d in zip(_pair(kernel), _pair(dilation))]
        if func is F.unfold:  # its output has the windows in one dimension
            sides = zip(before, extent, _pair(stride), _pair(padding))
            height, width = ((side + 2 * pad - size) // step + 1 for side, size, step, pad in sides)
            after = height, width
            self.seen.append(after)
        if before != after:
            self.lattices[after] = self.lattice(before).strided(extent, _pair(stride), _pair(padding))

    def find(self, tokens: int) -> tuple[Grid | None, int]:
        """Find the grid of so many tokens; returns it, None if there is none, and the number of prefix tokens."""
        for prefix in dict.fromkeys((self.prefix, 0)):
            for height, width in reversed(self.seen):
                if height * width == tokens - prefix and tokens > prefix:
                    return (height, width), prefix
        return None, 0

    def as_map(self, output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Convert an output to a map (B, C, h, w) and its prefix tokens (B, P, C); None if it has no grid."""
        if not isinstance(output, torch.Tensor) or output.ndim not in (3, 4):
            return None
        if output.ndim == 4:
            x = output.permute(0, 3, 1, 2) if self.channels_last else output
            return (x, x.flatten(2)[:, :, :0].mT) if x.shape[-2] * x.shape[-1] > 1 else None
        grid, prefix = self.find(output.shape[1])
        if grid is None or grid[0] * grid[1] == 1:
            return None
        return output[:, prefix:].mT.unflatten(-1, grid), output[:, :prefix]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def random_features(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Compute the Performer's φ(x) = exp(w·x - |x|²/2) / √m (Sec. 3.1), (…, D) -> (…, m), in float32."""
    x, w = x.float(), w.float()
    return torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / len(w) ** 0.5


class _Recorder(TorchFunctionMode):
    """Records one forward pass."""

    def __init__(self, model: nn.Module, wanted: Sequence[str], images: torch.Tensor) -> None:
        super().__init__()
        self.model, self.wanted, self.batch = model, set(wanted), len(images)
        self.modules = dict(model.named_modules())
        self.grids = Grids(model, (images.shape[-2], images.shape[-1]))
        self.running: list[str] = []  # names of the modules, innermost last
        self.output_grids: dict[str, tuple[Grid, Lattice]] = {}  # of modules that return a map
        self.outputs: dict[str, tuple[torch.Tensor, torch.Tensor, Lattice]] = {}
        self.attentions: dict[str, Attention] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Record while the context lasts; the model is unchanged afterwards."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(self.enter, name)).remove)
                stack.callback(module.register_forward_hook(partial(self.leave, name)).remove)
                if getattr(module, 'fused_attn', True) is False:  # timm's unfused path computes the same
                    module.fused_attn = True
                    stack.callback(setattr, module, 'fused_attn', False)
            stack.enter_context(self.grids)
            stack.enter_context(self)
            yield

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.running.append(name)
        if isinstance(module, T2TAttention):
            self.keep(name, *module.queries_keys_values(args[0]), scale=module.scale)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        self.grids.record(output)
        owner, _, part = name.rpartition('.')
        layer = self.modules.get(owner)
        if part == 'kqv' and isinstance(layer, TokenPerformer):
            k, q, v = output.unsqueeze(1).chunk(3, dim=-1)
            self.keep(owner, random_features(q, layer.w), random_features(k, layer.w), v, eps=layer.eps)
        elif part == 'qkv' and isinstance(layer, TokenAttention):
            q, k, v = output.unsqueeze(1).chunk(3, dim=-1)
            self.keep(owner.removesuffix('.attn'), q, k, v, scale=layer.scale)
        found = self.grids.as_map(output) if name in self.wanted else None
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            self.output_grids[name] = self.grids.seen[-1], self.grids.lattice(self.grids.seen[-1])
        if found is not None:  # copied, as the next layer may work in place
            grid = (found[0].shape[-2], found[0].shape[-1])
            maps, prefix = (at_least_float32(part, copy=True) for part in found)
            self.outputs[name] = maps, prefix, self.grids.lattice(grid)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.record_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def record_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Record a call of `scaled_dot_product_attention`."""
        if query.ndim != 4:
            return
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        if is_causal:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, device=query.device).masked_fill(~attn_mask, -torch.inf)
        self.keep(
            self.running[-1] if self.running else '',
            query,
            key,
            value,
            bias=attn_mask,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
        )

    def keep(self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> None:
        """Record one attention; the second of a module is named NAME:2."""
        before = sum(other.partition(':')[0] == name for other in self.attentions)
        name = f'{name}:{before + 1}' if before else name
        kept = Attention(name, query.float(), key.float(), value.float(), **how)
        self.attentions[name] = kept
        if len(query) != self.batch:  # attention within windows
            return
        kept.grid, kept.prefix = self.grids.find(key.shape[2])
        kept.lattice = self.grids.lattice(kept.grid) if kept.grid else None
        if (
            query.shape[2] != key.shape[2] and query.shape[2] > 1
        ):  # on a finer grid; a single one is a class token or a latent
            kept.query_grid, kept.query_prefix = self.grids.find(query.shape[2])
            kept.query_lattice = self.grids.lattice(kept.query_grid) if kept.query_grid else None

    def locate(self, attention: Attention) -> None:
        """Correct the grid of the keys by that of the module's output, and give as many queries the same grid."""
        if len(attention.query) != self.batch:
            return
        grid, lattice = self.output_grids.get(attention.name.partition(':')[0], (None, None))
        if grid and grid[0] * grid[1] == attention.key.shape[2]:
            attention.grid, attention.prefix, attention.lattice = grid, 0, lattice
        if attention.query.shape[2] == attention.key.shape[2]:
            attention.query_grid, attention.query_prefix, attention.query_lattice = (
                attention.grid,
                attention.prefix,
                attention.lattice,
            )
