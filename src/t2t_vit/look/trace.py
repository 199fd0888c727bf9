"""One forward pass watched: every stage's map, and every attention's queries, keys and values.

Works for any timm model as it is: hooks see what modules give, a function mode sees each call of
`scaled_dot_product_attention`, and the Performer's kernel is overheard at its layer. Nothing of it stays in the model.
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

from ..models.tokens import TokenPerformer
from ..settings import UsageError, nearest
from .attention import Attention, Lattice

Grid = tuple[int, int]


@dataclass
class Trace:
    """What a model made of a batch of images, stage by stage in the order of computation, by module name."""

    logits: torch.Tensor  # (B, classes)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, C, h, w)
    prefixes: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, P, C); P is 0 where there are none
    attentions: dict[str, Attention] = field(default_factory=dict)
    lattices: dict[str, Lattice] = field(default_factory=dict)  # where the cells of `maps` lie

    def backbone(self) -> list[Attention]:
        """The attentions of the last grid, the ones a rollout goes through; none in a convolutional network."""
        whole = [a for a in self.attentions.values() if a.grid is not None and a.query.shape[2] == a.key.shape[2]]
        return [a for a in whole if a.key.shape[2] == whole[-1].key.shape[2] and a.prefix == whole[-1].prefix]


def stage_names(model: nn.Module) -> list[str]:
    """The layers of a model that are worth a look, in the order in which they stand in it.

    They are the entries of its outermost lists of modules (token layers, blocks, residual units), with the stem or
    patch embedding in front as timm's `feature_info` and `patch_embed` name it.
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
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        if isinstance(child, (nn.Sequential, nn.ModuleList)) or (not listed and len(list(child.children()))):
            yield from _entries(child, f'{prefix}{name}.')
        elif listed:
            yield f'{prefix}{name}'


def trace(model: nn.Module, images: torch.Tensor, layers: Sequence[str] | None = None) -> Trace:
    """Run a model on images, (B, C, H, W), and keep what its layers gave.

    All tokens are computed, in evaluation mode and without gradients. A layer whose output is no grid over the image
    (a pooled vector, a list) is left out.

    Args:
        model: Any model of timm's, or one like them (`forward_features` and `forward_head`, or `forward`).
        images: As the model's preprocessing gives them, of any size the model takes.
        layers: Module names to keep maps of; by default `stage_names(model)`.

    Raises:
        UsageError: for layers that the model does not have, all of them.
        ValueError: for images that the model does not take.
    """
    modules = dict(model.named_modules())
    wanted = stage_names(model) if layers is None else list(layers)
    if unknown := [name for name in wanted if name not in modules]:
        raise UsageError('\n'.join(f'the model has no layer {name}{nearest(name, modules)}' for name in unknown))
    watch = _Watch(model, wanted, images)
    training = model.training
    with torch.no_grad(), watch.listening():
        try:
            model.eval()
            logits = all_tokens(model, images)
        finally:
            model.train(training)
    found = Trace(logits, attentions=watch.attentions)
    for name in sorted(watch.outputs, key=list(watch.outputs).index):
        found.maps[name], found.prefixes[name], found.lattices[name] = watch.outputs[name]
    reads_token = getattr(model, 'has_class_token', True) and getattr(model, 'global_pool', 'token') in ('token', '')
    for attention in found.attentions.values():
        watch.place(attention)
        attention.class_token = attention.prefix > 0 and reads_token
    return found


def all_tokens(model: Any, images: torch.Tensor) -> torch.Tensor:
    """A model's scores with every token computed; ours saves those that a class token does not need."""
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


WINDOWED: dict[Any, Callable[..., tuple[Any, ...]]] = {
    F.conv2d: _conv,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
}


class Grids(TorchFunctionMode):
    """Turns what modules give into maps. Tokens get the grid of the last map before them that has as many places.

    While it is entered it follows every convolution, pooling and padding, so as to know where a grid's cells lie. A
    grid that comes from elsewhere, as by merging patches, tiles the image evenly. Of two ways to one grid, as a unit
    and its shortcut, the last counts.
    """

    def __init__(self, model: nn.Module, size: Grid) -> None:
        super().__init__()
        self.size = size
        self.lattices: dict[Grid, Lattice] = {}
        self.prefix = int(getattr(model, 'num_prefix_tokens', 0))
        self.channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
        self.seen: list[Grid] = []

    def see(self, output: Any) -> None:
        """Remember the grid of a map that a module gave."""
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            self.seen.append((output.shape[-2], output.shape[-1]))
            if self.channels_last:
                self.seen.append((output.shape[1], output.shape[2]))

    def lattice(self, grid: Grid) -> Lattice:
        """Where the cells of a grid lie, as far as is known now."""
        return self.lattices.get(grid) or Lattice.over(grid, self.size)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in WINDOWED or func is F.pad:
            self.follow(func, args, kwargs or {}, output)
        return output

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Note where the cells of an output lie."""
        x = args[0] if args else kwargs.get('input')
        if not (isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor) and x.ndim == output.ndim == 4):
            return
        before, after = ((t.shape[-2], t.shape[-1]) for t in (x, output))
        if func is F.pad:
            pads = args[1] if len(args) > 1 else kwargs['pad']
            if len(pads) == 4:  # of an image's sides; more are of other dimensions
                self.lattices[after] = self.lattice(before).strided((1, 1), (1, 1), (pads[2], pads[0]))
            return
        more = {key: value for key, value in kwargs.items() if key != 'input'}
        kernel, stride, padding, dilation = WINDOWED[func](x, *args[1:], **more)
        if isinstance(padding, str):
            padding = 0  # 'valid'; 'same' keeps its grid
        if before != after:
            extent = [(k - 1) * d + 1 for k, d in zip(_pair(kernel), _pair(dilation))]
            self.lattices[after] = self.lattice(before).strided(extent, _pair(stride), _pair(padding))

    def find(self, tokens: int) -> tuple[Grid | None, int]:
        """The grid of so many tokens, and how many of them stand in front of it."""
        for prefix in dict.fromkeys((self.prefix, 0)):
            for height, width in reversed(self.seen):
                if height * width == tokens - prefix and tokens > prefix:
                    return (height, width), prefix
        return None, 0

    def as_map(self, output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A module's output as a map (B, C, h, w) and its prefix tokens (B, P, C); None if it is no grid of them."""
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


class _Watch(TorchFunctionMode):
    """Listens to one forward pass."""

    def __init__(self, model: nn.Module, wanted: Sequence[str], images: torch.Tensor) -> None:
        super().__init__()
        self.model, self.wanted, self.batch = model, set(wanted), len(images)
        self.grids = Grids(model, (images.shape[-2], images.shape[-1]))
        self.inside: list[str] = []  # the modules that are running, innermost last
        self.own: dict[str, tuple[Grid, Lattice]] = {}  # the grid that a module itself gave
        self.outputs: dict[str, tuple[torch.Tensor, torch.Tensor, Lattice]] = {}
        self.attentions: dict[str, Attention] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While it lasts, the model is overheard; afterwards it is as it was."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(self.enter, name)).remove)
                stack.callback(module.register_forward_hook(partial(self.leave, name)).remove)
                if getattr(module, 'fused_attn', True) is False:  # timm's other path writes out the same maths
                    module.fused_attn = True
                    stack.callback(setattr, module, 'fused_attn', False)
                if isinstance(module, TokenPerformer):
                    module.__dict__['kernel_attention'] = partial(self.overhear, name, module)
                    stack.callback(module.__dict__.pop, 'kernel_attention')
            stack.enter_context(self.grids)
            stack.enter_context(self)
            yield

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.inside.append(name)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.inside.pop()
        self.grids.see(output)
        found = self.grids.as_map(output) if name in self.wanted else None
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            self.own[name] = self.grids.seen[-1], self.grids.lattice(self.grids.seen[-1])
        if found is not None:  # a copy: what comes next may work in place
            grid = (found[0].shape[-2], found[0].shape[-1])
            self.outputs[name] = (found[0].clone(), found[1].clone(), self.grids.lattice(grid))

    def overhear(self, name: str, layer: TokenPerformer, kqv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In the place of the Performer's kernel: keep its features, and do as it does."""
        k, q, v = kqv.chunk(3, dim=-1)
        self.keep(name, layer.features(q)[:, None], layer.features(k)[:, None], v[:, None], eps=layer.eps)
        return type(layer).kernel_attention(layer, kqv)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attended(
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
        """Keep the arguments of a call of `scaled_dot_product_attention`."""
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
            self.inside[-1] if self.inside else '',
            query,
            key,
            value,
            bias=attn_mask,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
        )

    def keep(self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> None:
        """One attention; the second of the same module is called NAME:2."""
        again = sum(kept.partition(':')[0] == name for kept in self.attentions)
        name = f'{name}:{again + 1}' if again else name
        kept = Attention(name, query.float(), key.float(), value.float(), **how)
        self.attentions[name] = kept
        if len(query) != self.batch:  # of windows
            return
        kept.grid, kept.prefix = self.grids.find(key.shape[2])
        kept.lattice = self.grids.lattice(kept.grid) if kept.grid else None
        if query.shape[2] != key.shape[2] and query.shape[2] > 1:  # of a finer grid; one is a class token or a latent
            kept.query_grid, kept.query_prefix = self.grids.find(query.shape[2])
            kept.query_lattice = self.grids.lattice(kept.query_grid) if kept.query_grid else None

    def place(self, attention: Attention) -> None:
        """Keys of a layer that gave a map of as many places are that map's; and as many queries are where keys are."""
        if len(attention.query) != self.batch:
            return
        own = self.own.get(attention.name.partition(':')[0])
        if own and own[0][0] * own[0][1] == attention.key.shape[2]:
            attention.grid, attention.prefix, attention.lattice = own[0], 0, own[1]
        if attention.query.shape[2] == attention.key.shape[2]:
            attention.query_grid, attention.query_prefix, attention.query_lattice = (
                attention.grid,
                attention.prefix,
                attention.lattice,
            )
