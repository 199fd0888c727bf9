"""What the page shows, as HTML: each view is a function of one model's pass over one image.

Pictures are inside of it (data: URIs), so that no file is made of what a person looks at. Each has a text for those
who do not see it. Colours as in `look.draw`.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from ..look.attention import Attention, Lattice, class_maps, query_maps, rollout_map
from ..look.draw import HEAT, mosaic, peak, short
from ..look.features import Windows, principal_colours, splits_of, token_grids, windows
from ..look.gradients import grad_cam
from ..plots import GREEN, RED
from .seen import Seen

CROSS = '#56B4E9'
SIDE = 8  # feature maps are shown SIDE × SIDE
STEPS = 150  # of a window on its way over the image
CLASS_TOKEN, PLACE = 'the class token', 'the token at the cross'


@dataclass
class Choice:
    """What the controls are set to. Layers are chosen by depth, so that models of any depth stand side by side."""

    top_k: int = 5
    across: float = 0.5  # the cross, as shares of the width and the height
    down: float = 0.5
    moving: bool = False
    depth: float = 1.0  # of the attention layers, 0 to 1
    head: int = 0  # 0 for the mean, else counted from 1
    reader: str = CLASS_TOKEN
    residual: float = 0.5
    target: int | None = None  # class of Grad-CAM; the answer if None
    stage: float = 1.0  # depth of the feature maps, 0 to 1
    page: int = 1  # of the feature maps


def data_uri(pixels: np.ndarray) -> str:
    """(H, W), (H, W, 3) or (H, W, 4), 0 to 1, as a PNG, or a JPEG where it is a photo."""
    image = Image.fromarray((np.clip(np.nan_to_num(pixels, nan=1.0), 0, 1) * 255).round().astype(np.uint8))
    kind = 'jpeg' if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.shape[0] * pixels.shape[1] > 9000 else 'png'
    image.save(buffer := io.BytesIO(), kind, quality=88)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def raster(pixels: np.ndarray, height: float, width: float, left: float = 0, top: float = 0) -> str:
    """Pixels stretched over height × width of a drawing, with hard edges."""
    return (
        f'<image href="{data_uri(pixels)}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    )


def drawing(height: float, width: float, inside: str, label: str, caption: str = '', box: str = '') -> str:
    """An SVG with a caption; `label` is what it says to those who do not see it."""
    box = box or f'0 0 {width:g} {height:g}'
    return (
        f'<figure><svg viewBox="{box}" role="img" aria-label="{escape(label)}">{inside}</svg>'
        f'<figcaption>{caption or escape(label)}</figcaption></figure>'
    )


def frame(left: float, top: float, width: float, height: float, color: str, dash: str = '', inside: str = '') -> str:
    """A rectangle whose line is as thick on any screen, white behind its colour."""
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" fill="none"'
    return ''.join(
        f'<rect {place} stroke="{stroke}" stroke-width="{thick}" vector-effect="non-scaling-stroke"'
        f'{f" stroke-dasharray={dash!r}" if dash and stroke != "white" else ""}>{inside}</rect>'
        for stroke, thick in (('white', 4), (color, 2))
    )


def cross(height: float, width: float, choice: Choice) -> str:
    """The place that was chosen."""
    x, y, arm = choice.across * width, choice.down * height, 0.05 * min(height, width)
    path = f'M{x - arm:g} {y:g}H{x + arm:g}M{x:g} {y - arm:g}V{y + arm:g}'
    return ''.join(
        f'<path d="{path}" stroke="{stroke}" stroke-width="{thick}" vector-effect="non-scaling-stroke"/>'
        for stroke, thick in (('white', 5), (CROSS, 2.5))
    )


def token_at(grid: tuple[int, int], choice: Choice) -> tuple[int, int]:
    """Row and column of the token under the cross."""
    return tuple(min(int(share * n), n - 1) for share, n in zip((choice.down, choice.across), grid))  # type: ignore


def preview(seen: Seen, choice: Choice, name: str) -> str:
    """The image as the model sees it, with the cross."""
    height, width = seen.shown.shape[:2]
    return drawing(
        height,
        width,
        raster(seen.shown.numpy(), height, width) + cross(height, width, choice),
        f'{name}, {width}×{height} pixels as the model sees it',
    )


def answer(seen: Seen, choice: Choice) -> str:
    """The most probable classes as bars."""
    shares = seen.trace.logits[0].float().softmax(-1).cpu()
    values, classes = shares.topk(min(choice.top_k, len(shares)))
    names = seen.one.classes or [str(i) for i in range(len(shares))]
    rows = ''.join(
        f'<li><span>{escape(names[i])}</span><b>{100 * p:.1f} %</b><i style="width:{100 * p:.2f}%"></i></li>'
        for p, i in zip(values.tolist(), classes.tolist())
    )
    return f'<ol class="bars">{rows}</ol>'


def soft_splits(seen: Seen, choice: Choice) -> str:
    """The window of each split under the cross, on the image and enlarged; or on its way over the image."""
    height, width = seen.shown.shape[:2]
    cuts = [cut for cut in windows(splits_of(seen.one.model), (height, width)) if min(cut.grid) > 0]
    if not cuts:
        return '<p>This model is not made of windows: it has neither soft splits nor a patch embedding.</p>'
    return ''.join(_window(cut, seen, choice) for cut in cuts)


def _window(cut: Windows, seen: Seen, choice: Choice) -> str:
    height, width = seen.shown.shape[:2]
    row, col = token_at(cut.grid, choice)
    places = _way(cut) if choice.moving else [(row, col)]
    boxes = [cut.box(*place) for place in places]

    def moves(attribute: str, values: Sequence[str]) -> str:
        return (
            (
                f'<animate attributeName="{attribute}" values="{";".join(values)}" calcMode="discrete" '
                f'dur="{0.15 * len(values):g}s" repeatCount="indefinite"/>'
            )
            if choice.moving
            else ''
        )

    top, left, _, _ = boxes[0]
    moving = moves('x', [str(box[1]) for box in boxes]) + moves('y', [str(box[0]) for box in boxes])
    photo = raster(seen.shown.numpy(), height, width)
    beside = ''
    if not choice.moving and col + 1 < cut.grid[1]:
        y, x, _, _ = cut.box(row, col + 1)
        beside = frame(x, y, cut.size, cut.size, '#E69F00', '5 4')
    overlap = max(cut.size - cut.step, 0)
    what = f'{cut.name}: {cut.grid[0]}×{cut.grid[1]} tokens, each of {cut.size}×{cut.size} pixels, ' + (
        f'{overlap} shared with its neighbour' if overlap else 'none shared'
    )
    where = 'Every token in turn' if choice.moving else f'Token at row {row + 1}, column {col + 1}'
    pad = max(-cut.start, 0)
    whole = drawing(
        height,
        width,
        photo + beside + frame(left, top, cut.size, cut.size, '#0072B2', inside=moving),
        what,
        box=f'{-pad} {-pad} {width + 2 * pad} {height + 2 * pad}',
    )
    views = [f'{box[1]} {box[0]} {cut.size} {cut.size}' for box in boxes]
    near = drawing(
        cut.size,
        cut.size,
        moves('viewBox', views) + photo,
        f'{where}: its pixels; what lies outside the image is zero',
        box=views[0],
    )
    return f'<div class="pair">{whole}{near}</div>'


def _way(cut: Windows) -> list[tuple[int, int]]:
    """Row by row over the grid; some are left out where there are many."""
    rows, cols = cut.grid
    along = range(0, cols, -(-cols // 28))
    lines = range(0, rows, max(1, -(-rows * len(along) // STEPS)))
    return [(row, col) for row in lines for col in along]


def tokens(seen: Seen, choice: Choice) -> str:
    """The tokens of each grid, by their first three principal components."""
    height, width = seen.shown.shape[:2]
    return (
        '<div class="many">'
        + ''.join(
            drawing(
                height,
                width,
                raster(principal_colours(maps)[0].cpu().numpy(), height, width),
                f'{short(name)}: {maps.shape[-2]}×{maps.shape[-1]} tokens of {maps.shape[1]} values',
            )
            for name, maps in token_grids(seen.trace).items()
        )
        + '</div>'
    )


def over_image(seen: Seen, values: torch.Tensor, lattice: Lattice | None, label: str, extra: str = '') -> str:
    """A map, (h, w), over the image in grey where its cells lie: from 0 to its own largest value."""
    height, width = seen.shown.shape[:2]
    grid = (values.shape[0], values.shape[1])
    left, right, bottom, top = (lattice or Lattice.over(grid, (height, width))).extent(grid)
    values = values.float().cpu()
    shares = (values / values.max().clamp(min=1e-12)).clamp(0, 1).numpy()
    heat = colormaps[HEAT](shares)
    heat[..., 3] = 0.72
    grey = np.clip(seen.shown.mean(-1).numpy() / 1.4, 0, 1)
    text = f'{label}; most: {peak(values)} of the mean'
    cells = raster(heat, bottom - top, right - left, left, top)
    return drawing(height, width, raster(grey, height, width) + cells + extra, text)


def layers_of(seen: Seen) -> list[Attention]:
    """The attentions that can be shown over the image."""
    return [attention for attention in seen.trace.attentions.values() if attention.grid is not None]


def at_depth(count: int, depth: float) -> int:
    """Which of so many layers stands at a depth of 0 to 1."""
    return round(depth * (count - 1))


def attention(seen: Seen, choice: Choice) -> str:
    """Where a token looks in one layer, by one head or the mean of them; and all heads beside."""
    layers = layers_of(seen)
    if not layers:
        return '<p>This model has no attention over the whole image.</p>'
    place = at_depth(len(layers), choice.depth)
    layer = layers[place]
    assert layer.grid is not None
    height, width = seen.shown.shape[:2]
    mark = ''
    if choice.reader == PLACE and layer.query_grid is not None:
        lattice = layer.query_lattice or Lattice.over(layer.query_grid, (height, width))
        row, col = lattice.nearest(choice.down * height, choice.across * width, layer.query_grid)
        maps = query_maps(layer, layer.query_prefix + row * layer.query_grid[1] + col)[0]
        mark = cross(height, width, choice)
        who = f'where the token at row {row + 1}, column {col + 1} looks'
    else:
        maps = class_maps(layer)[0]
        who = 'where the class token looks' if layer.class_token else 'where all tokens look, on average'
    heads = len(maps)
    head = min(choice.head, heads)
    which = 'its one head' if heads == 1 else f'head {head} of {heads}' if head else f'mean of {heads} heads'
    kind = 'kernel' if layer.eps is not None else 'softmax'
    main = over_image(
        seen,
        maps[head - 1] if head else maps.mean(0),
        layer.lattice,
        f'Layer {place + 1} of {len(layers)}, {short(layer.name)}, {kind}, '
        f'{"×".join(map(str, layer.grid))}: {who}, {which}',
        mark,
    )
    rest = (
        ''.join(over_image(seen, maps[i], layer.lattice, f'head {i + 1}') for i in range(heads))
        if 1 < heads <= 16
        else ''
    )
    return main + (f'<div class="many small">{rest}</div>' if rest else '')


def evidence(seen: Seen, choice: Choice) -> str:
    """What the scores are made from: the last layer's attention, the rollout through all layers, and Grad-CAM."""
    backbone = seen.trace.backbone()
    shown = []
    if backbone:
        reader = 'class token' if backbone[-1].class_token else 'all tokens'
        lattice = backbone[-1].lattice
        shown += [
            over_image(
                seen,
                rollout_map(backbone, choice.residual)[0],
                lattice,
                f'Rollout through {len(backbone)} layers, skips keep {100 * choice.residual:.0f} %',
            ),
            over_image(
                seen, class_maps(backbone[-1])[0].mean(0), lattice, f'Last layer alone, {reader}, mean of heads'
            ),
        ]
    classes = seen.trace.logits.shape[-1]
    target = None if choice.target is None else [min(choice.target, classes - 1)]
    cam = grad_cam(seen.one.model, seen.images, target)
    best = int(cam.targets[0])
    name = seen.one.classes[best] if best < len(seen.one.classes) else str(best)
    shown.append(
        over_image(seen, cam.maps[0], cam.lattice, f'Grad-CAM at {short(cam.layer)}: what raises the score of “{name}”')
    )
    return f'<div class="many">{"".join(shown)}</div>'


def feature_maps(seen: Seen, choice: Choice) -> str:
    """Channels of one layer, dead ones in dashed red, those rich in structure in green."""
    found = seen.measures[at_depth(len(seen.measures), choice.stage)]
    maps = seen.trace.maps[found.name][0].float().cpu()
    dead, rich = found.dead.cpu(), found.rich.cpu()
    pages = pages_of(len(maps))
    page = min(choice.page, pages)
    channels = range((page - 1) * SIDE**2, min(page * SIDE**2, len(maps)))
    low, high = (getattr(maps.flatten(1), side)(1)[:, None, None] for side in ('amin', 'amax'))
    scaled = torch.where(dead[:, None, None], 0.5, (maps - low) / (high - low).clamp(min=1e-12))
    canvas, frames = mosaic([(i // SIDE, i % SIDE, scaled[channel]) for i, channel in enumerate(channels)])
    height, width = canvas.shape
    marks = ''.join(
        f'<g><title>channel {channel + 1}{": dead" if dead[channel] else ": rich in structure"}</title>'
        f'{frame(*box, RED if dead[channel] else GREEN, "4 3" if dead[channel] else "")}</g>'
        for channel, box in zip(channels, frames)
        if dead[channel] or rich[channel]
    )
    text = (
        f'{short(found.name)}, {"×".join(map(str, found.grid))}: channels {channels[0] + 1} to {channels[-1] + 1} '
        f'of {len(maps)}. Of all, {int(dead.sum())} dead (dashed red), {int(rich.sum())} rich in structure (green)'
    )
    return f'<div class="wide">{drawing(height, width, raster(canvas, height, width) + marks, text)}</div>'


def pages_of(channels: int) -> int:
    """How many pages of feature maps there are."""
    return max(1, -(-channels // SIDE**2))


VIEWS: dict[str, tuple[Callable[[Seen, Choice], str], str]] = {  # by the name that people choose them by, what they are
    'Answer': (answer, 'What the model takes the image for.'),
    'Windows': (soft_splits, 'What a token is cut from: soft splits overlap, and each split makes tokens of tokens.'),
    'Tokens': (tokens, 'The tokens of each stage; alike in colour, alike in their three principal components.'),
    'Attention': (attention, 'Where tokens look, layer by layer and head by head.'),
    'Evidence': (
        evidence,
        'What the answer is made from: rollout follows attention through all layers (a flow, not a '
        'cause), Grad-CAM the gradient of one class.',
    ),
    'Feature maps': (
        feature_maps,
        'Channels as pictures, each between its own extremes; a dead one says nothing of this image.',
    ),
}


def show(view: str, seen: Sequence[Seen], choice: Choice) -> str:
    """A view of one model, or of several side by side."""
    function, what = VIEWS[view]
    columns = ''.join(
        f'<section aria-label="{escape(one.one.name)}"><h3>{escape(one.one.name)}'
        f'{" <small>random weights</small>" * (one.one.weights == "random weights")}</h3>'
        f'{function(one, choice)}</section>'
        for one in seen
    )
    return f'<p class="what" data-view="{view}">{escape(what)}</p><div class="models n{len(seen)}">{columns}</div>'
