"""Draw the views of the page as HTML: each is a function of one model's forward pass over one image.

Pictures are embedded (data: URIs), so that no file is written for them, and each has a text for screen readers.
Colours as in `look.draw`.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image, ImageOps

from ..data import Preprocessing
from ..look.attention import Attention, Lattice, class_maps, query_maps, rollout_map
from ..look.draw import CROSS, SCALE, mosaic, overlay, peak, scaled_map, short
from ..look.features import Windows, principal_colours, splits_of, token_grids, windows
from ..look.gradients import grad_cam
from ..look.opened import OpenModel, Photo, prepare
from ..plots import GREEN, RED
from .explorer import Seen

SIDE = 8  # feature maps are shown SIDE × SIDE
STEPS = 150  # positions of a moving window
CLASS_TOKEN, CROSS_TOKEN = 'the class token', 'the token at the cross'
THUMBNAIL = 96  # pixels


@dataclass
class Choice:
    """Values of the controls. Layers are chosen by depth, so that models of different depth can be compared."""

    top_k: int = 5
    across: float = 0.5  # position of the cross, as fractions of width and height
    down: float = 0.5
    moving: bool = False
    depth: float = 1.0  # of the attention layer, 0 to 1
    head: int = 0  # 0 for the mean, else counted from 1
    reader: str = CLASS_TOKEN
    residual: float = 0.5
    target: int | None = None  # class of Grad-CAM; None for the predicted one
    stage: float = 1.0  # depth of the feature maps, 0 to 1
    page: int = 1  # of the channels


def data_uri(pixels: np.ndarray) -> str:
    """Encode a picture, (H, W) or (H, W, 3), 0 to 1, as a data: URI, a large colour picture as JPEG, others as PNG."""
    image = Image.fromarray((np.clip(np.nan_to_num(pixels, nan=1.0), 0, 1) * 255).round().astype(np.uint8))
    kind = 'jpeg' if pixels.ndim == 3 and pixels.shape[-1] == 3 and pixels.shape[0] * pixels.shape[1] > 9000 else 'png'
    image.save(buffer := io.BytesIO(), kind, quality=88)
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def raster(pixels: np.ndarray, height: float, width: float, left: float = 0, top: float = 0) -> str:
    """Draw pixels over height × width of an SVG, with hard edges."""
    return (
        f'<image href="{data_uri(pixels)}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    )


def drawing(height: float, width: float, inside: str, label: str, caption: str = '', box: str = '') -> str:
    """Return an SVG with a caption, which is HTML; `label` is the text for screen readers."""
    box = box or f'0 0 {width:g} {height:g}'
    return (
        f'<figure><svg viewBox="{box}" role="img" aria-label="{escape(label)}">{inside}</svg>'
        f'<figcaption>{caption or escape(label)}</figcaption></figure>'
    )


def frame(left: float, top: float, width: float, height: float, color: str, dash: str = '', inside: str = '') -> str:
    """Return a rectangle with a line of constant width, and a white one around it."""
    box = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" fill="none"'
    return ''.join(
        f'<rect {box} stroke="{stroke}" stroke-width="{thick}" vector-effect="non-scaling-stroke"'
        f'{f" stroke-dasharray={dash!r}" if dash and stroke != "white" else ""}>{inside}</rect>'
        for stroke, thick in (('white', 4), (color, 2))
    )


def cross(height: float, width: float, choice: Choice) -> str:
    """Return the cross at the chosen position."""
    x, y, arm = choice.across * width, choice.down * height, 0.05 * min(height, width)
    path = f'M{x - arm:g} {y:g}H{x + arm:g}M{x:g} {y - arm:g}V{y + arm:g}'
    return ''.join(
        f'<path d="{path}" stroke="{stroke}" stroke-width="{thick}" vector-effect="non-scaling-stroke"/>'
        for stroke, thick in (('white', 5), (CROSS, 2.5))
    )


def token_at(grid: tuple[int, int], choice: Choice) -> tuple[int, int]:
    """Return row and column of the token under the cross."""
    return min(int(choice.down * grid[0]), grid[0] - 1), min(int(choice.across * grid[1]), grid[1] - 1)


def preview(seen: Seen, choice: Choice, name: str) -> str:
    """Draw the model's input with the cross."""
    height, width = seen.shown.shape[:2]
    return drawing(
        height,
        width,
        raster(seen.shown.numpy(), height, width) + cross(height, width, choice),
        f'{name}, as the model sees it: {width}×{height} pixels. Click to move the cross.',
    )


def answer(seen: Seen, choice: Choice) -> str:
    """Draw the probabilities of the most probable classes as bars."""
    rows = ''.join(
        f'<li><span>{escape(name)}</span><b>{100 * p:.1f} %</b><i style="width:{100 * p:.2f}%"></i></li>'
        for _, name, p in seen.ranking(choice.top_k)
    )
    return f'<ol class="bars">{rows}</ol>'


def soft_splits(seen: Seen, choice: Choice) -> str:
    """Draw the window of each split under the cross, on the image and enlarged, or moving over the image."""
    height, width = seen.shown.shape[:2]
    cuts = [cut for cut in windows(splits_of(seen.one.model), (height, width)) if min(cut.grid) > 0]
    if not cuts:
        return '<p>This model has no windows: neither soft splits nor a patch embedding.</p>'
    return ''.join(_window(cut, seen, choice) for cut in cuts)


def _window(cut: Windows, seen: Seen, choice: Choice) -> str:
    height, width = seen.shown.shape[:2]
    row, col = token_at(cut.grid, choice)
    boxes = [cut.box(*index) for index in (_path(cut) if choice.moving else [(row, col)])]

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
        f'{where}: its pixels; those outside the image are zero',
        box=views[0],
    )
    return f'<div class="pair">{whole}{near}</div>'


def _path(cut: Windows) -> list[tuple[int, int]]:
    """Return rows and columns of at most about STEPS windows, row by row."""
    rows, cols = cut.grid
    along = range(0, cols, -(-cols // 28))
    lines = range(0, rows, max(1, -(-rows * len(along) // STEPS)))
    return [(row, col) for row in lines for col in along]


def tokens(seen: Seen, choice: Choice) -> str:
    """Draw the tokens of each grid, coloured by their first three principal components."""
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
    """Draw a map, (h, w), over the image in grey, from 0 to its own maximum."""
    height, width = seen.shown.shape[:2]
    picture = raster(overlay(seen.shown, values, lattice), height, width)
    return drawing(height, width, picture + extra, f'{label}; max {peak(values)} the mean')


def colour_bar() -> str:
    """Return the colours of the maps, from 0 to the maximum of each."""
    stops = ', '.join(to_hex(SCALE(i)) for i in range(0, 256, 15))
    return (
        f'<p class="scale" role="img" aria-label="Colours from 0, dark, to the maximum of each map, bright">'
        f'<span>0</span><i style="background:linear-gradient(to right, {stops})"></i><span>max</span></p>'
    )


def layers_of(seen: Seen) -> list[Attention]:
    """Return the attention layers that can be drawn over the image."""
    return [attention for attention in seen.trace.attentions.values() if attention.grid is not None]


def at_depth(count: int, depth: float) -> int:
    """Return the index of the layer at a depth of 0 to 1."""
    return round(depth * (count - 1))


def attention(seen: Seen, choice: Choice) -> str:
    """Draw the attention of a token in one layer, of one head or the mean, and of all heads."""
    layers = layers_of(seen)
    if not layers:
        return '<p>This model has no attention over the whole image.</p>'
    index = at_depth(len(layers), choice.depth)
    layer = layers[index]
    assert layer.grid is not None
    height, width = seen.shown.shape[:2]
    mark = ''
    if choice.reader == CROSS_TOKEN and layer.query_grid is not None:
        lattice = layer.query_lattice or Lattice.over(layer.query_grid, (height, width))
        row, col = lattice.nearest(choice.down * height, choice.across * width, layer.query_grid)
        maps = query_maps(layer, layer.query_prefix + row * layer.query_grid[1] + col)[0]
        mark = cross(height, width, choice)
        who = f'attention of the token at row {row + 1}, column {col + 1}'
    else:
        maps = class_maps(layer)[0]
        who = 'attention of the class token' if layer.class_token else 'mean attention of all tokens'
    heads = len(maps)
    head = min(choice.head, heads)
    which = 'its one head' if heads == 1 else f'head {head} of {heads}' if head else f'mean of {heads} heads'
    kind = 'kernel' if layer.eps is not None else 'softmax'
    main = over_image(
        seen,
        maps[head - 1] if head else maps.mean(0),
        layer.lattice,
        f'Layer {index + 1} of {len(layers)}, {short(layer.name)}, {kind}, '
        f'{"×".join(map(str, layer.grid))}: {who}, {which}',
        mark,
    )
    rest = (
        ''.join(over_image(seen, maps[i], layer.lattice, f'head {i + 1}') for i in range(heads))
        if 1 < heads <= 16
        else ''
    )
    return main + colour_bar() + (f'<div class="many small">{rest}</div>' if rest else '')


def evidence(seen: Seen, choice: Choice) -> str:
    """Draw the last layer's attention, the rollout through all layers, and Grad-CAM."""
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
    logits = seen.trace.logits[0].float()
    cam = grad_cam(
        seen.one.model, seen.images, None if choice.target is None else [min(choice.target, len(logits) - 1)]
    )
    target = int(cam.targets[0])
    probability = 100 * float(logits.softmax(-1)[target])
    name = f'“{seen.class_name(target)}” ({probability:.1f} %)'
    text = f'Grad-CAM at {short(cam.layer)}: regions that raise the score of {name}'
    shown.append(over_image(seen, cam.maps[0], cam.lattice, text))
    return f'{colour_bar()}<div class="many">{"".join(shown)}</div>'


def feature_maps(seen: Seen, choice: Choice) -> str:
    """Draw channels of one layer; dead ones have a dashed red frame, those rich in structure a green one."""
    found = seen.measures[at_depth(len(seen.measures), choice.stage)]
    maps = seen.trace.maps[found.name][0]
    dead, rich = found.dead.cpu(), found.rich.cpu()
    pages = pages_of(len(maps))
    page = min(choice.page, pages)
    channels = range((page - 1) * SIDE**2, min(page * SIDE**2, len(maps)))
    canvas, frames = mosaic(
        [(i // SIDE, i % SIDE, scaled_map(maps[channel], bool(dead[channel]))) for i, channel in enumerate(channels)]
    )
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
    """Return the number of pages that show so many channels."""
    return max(1, -(-channels // SIDE**2))


VIEWS: dict[str, tuple[Callable[[Seen, Choice], str], str]] = {  # by name: the function and a description
    'Answer': (answer, 'The classes that the model finds most probable.'),
    'Windows': (
        soft_splits,
        'The pixels that each token is made from: windows of a soft split overlap, and each split joins tokens of the '
        'one before.',
    ),
    'Tokens': (tokens, 'The tokens of each stage: similar colours mean similar principal components.'),
    'Attention': (attention, 'What a token attends to, by layer and head.'),
    'Evidence': (
        evidence,
        'What the answer is based on: rollout follows attention through all layers (how information may flow, not what '
        'causes the score), Grad-CAM follows the gradient of one class.',
    ),
    'Feature maps': (
        feature_maps,
        'Channels as pictures, each stretched between its own minimum and maximum; a dead one does not depend on the '
        'image.',
    ),
}


def card(one: OpenModel) -> str:
    """Describe a model in a paragraph: architecture, size, weights, data and score."""
    name = getattr(one.model, 'pretrained_cfg', {}).get('architecture') or type(one.model).__name__
    (height, width), grey = one.preprocessing.size, ' grey' * (one.preprocessing.channels == 1)
    count = sum(parameter.numel() for parameter in one.model.parameters())
    weights = '' if one.about else f' Weights: {Path(one.weights).name}.'
    text = f'{name}, {count / 1e6:.2f} million parameters, {height}×{width} pixels{grey}.{weights} {one.about}'
    return f'<p class="card">{escape(text)}</p>'


def show(view: str, seen: Sequence[Seen], choice: Choice) -> str:
    """Draw a view of one model, or of several side by side, each with its card."""
    function, description = VIEWS[view]
    columns = ''.join(
        f'<section aria-label="{escape(one.one.name)}"><h3>{escape(one.one.name)}</h3>{card(one.one)}'
        f'{function(one, choice)}</section>'
        for one in seen
    )
    return (
        f'<p class="what" data-view="{view}">{escape(description)}</p><div class="models n{len(seen)}">{columns}</div>'
    )


def gallery(photos: Sequence[Photo], preprocessing: Preprocessing) -> str:
    """Return small pictures of the examples, as a model with this preprocessing gets them, as buttons."""
    buttons = []
    for i, photo in enumerate(photos):
        shown = Image.fromarray((prepare([photo], preprocessing)[1][0].numpy() * 255).astype(np.uint8))
        name = escape(photo.name)
        uri = data_uri(np.asarray(ImageOps.fit(shown, (min(THUMBNAIL, max(shown.size)),) * 2)) / 255)
        buttons.append(f'<button type="button" data-index="{i}" title="{name}"><img src="{uri}" alt="{name}"></button>')
    return f'<div class="gallery" role="group" aria-label="Examples">{"".join(buttons)}</div>'
