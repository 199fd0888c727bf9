"""Pictures of what the compute layer finds: tensors in, a matplotlib Figure out; `save` writes it.

Made for the width of a README. Green and red, as the paper marks channels, are Okabe and Ito's bluish green and
vermilion, which every eye can tell apart, and the red frames are dashed.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from contourpy import contour_generator
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..plots import CYCLE, GREEN, RED, style
from .attention import Attention, Lattice, class_maps, mean_distance
from .features import LayerMeasure, Windows
from .trace import Trace

WIDTH = 9.0  # inches
DPI = 120
HEAT = 'magma'
EDGE = 0.07  # inches left free round everything
LEVELS = (0.3, 0.5, 0.7)  # of the image's brightness, whose lines are drawn over maps
DETAIL = 40  # places along the shorter side that lines follow


class Heat(NamedTuple):
    """A map to lay over an image."""

    title: str
    map: torch.Tensor  # (h, w), at least 0
    lattice: Lattice | None = None  # where its cells lie; by default they tile the image
    cross: tuple[float, float] | None = None  # the place it belongs to, (y, x) in pixels, marked


class Looked(NamedTuple):
    """One model's pass over the images, as figures that compare models take it."""

    trace: Trace
    measures: list[LayerMeasure]


def save(figure: Figure, file: Path) -> Path:
    """Write a PNG, with the folder it stands in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
    return file


def sheet(
    lines: int, columns: int, ratio: float, titles: int, margin: float = 0.0, widest: float = 3.0
) -> tuple[Figure, Any]:
    """A figure of panels without axes, and the panels, [line, column].

    Args:
        lines: Panels from top to bottom.
        columns: Panels from left to right.
        ratio: A panel's height over its width.
        titles: Lines of text over each.
        margin: Inches beside them.
        widest: A panel's width at most, in inches.
    """
    width = min((WIDTH - margin) / columns, widest)
    height = lines * (width * ratio + 0.17 * titles + 0.2)
    figure = Figure(
        figsize=(width * columns + margin, height + 2 * EDGE),
        layout=ConstrainedLayoutEngine(w_pad=EDGE, h_pad=EDGE, compress=True),
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, axes


Frame = tuple[float, float, float, float]  # left, top, width, height


def mosaic(tiles: Sequence[tuple[int, int, torch.Tensor]]) -> tuple[np.ndarray, list[Frame]]:
    """Maps, (row, column, (h, w)), as one picture with gaps of NaN; and a frame round each."""
    height, width = tiles[0][2].shape
    zoom = max(1, -(-32 // max(height, width)))
    height, width, gap = zoom * height, zoom * width, max(2, zoom * max(height, width) // 8)
    rows, cols = (1 + max(tile[i] for tile in tiles) for i in (0, 1))
    canvas = np.full((rows * (height + gap), cols * (width + gap)), np.nan)
    frames = []
    for row, col, values in tiles:
        top, left = row * (height + gap) + gap // 2, col * (width + gap) + gap // 2
        canvas[top : top + height, left : left + width] = values.cpu().numpy().repeat(zoom, 0).repeat(zoom, 1)
        pad = gap * 0.25
        frames.append((left - 0.5 - pad, top - 0.5 - pad, width + 2 * pad, height + 2 * pad))
    return canvas, frames


def sample_channels(measure: LayerMeasure, count: int) -> list[int]:
    """Which channels to show: evenly spaced, none picked for its looks; the last is a dead one if there is any."""
    channels = len(measure.dead)
    chosen = sorted({round(i) for i in np.linspace(0, channels - 1, min(count, channels))})
    dead = measure.dead.nonzero().flatten().tolist()
    if dead and not measure.dead[chosen].any():
        chosen[-1] = dead[0]
    return chosen


def spread_stages(measures: Sequence[LayerMeasure], count: int = 3) -> list[int]:
    """Places of the first stage, the last, and those evenly between."""
    return sorted({round(i) for i in np.linspace(0, len(measures) - 1, count)})


def feature_maps(looked: dict[str, Looked], image: int = 0, side: int = 5, rows: int = 3) -> Figure:
    """The paper's Fig. 2: maps of shallow, middle and deep layers, models side by side.

    Each map is stretched between its own extremes, a dead one to nothing. A green frame: rich in structure; a dashed
    red one: dead. The counts over a panel are of all its channels.

    Args:
        looked: A column each, by the model's name.
        image: Which of the images.
        side: Maps are shown side × side.
        rows: Depths, from the first stage to the last.
    """
    ratio = max(
        trace.maps[m.name].shape[-2] / trace.maps[m.name].shape[-1]
        for trace, measures in looked.values()
        for m in measures
    )
    figure, axes = sheet(rows, len(looked), ratio, 3, 0.4, 4.5)
    for col, (name, (trace, measures)) in enumerate(looked.items()):
        for row, place in enumerate(spread_stages(measures, rows)):
            _maps(
                axes[row, col], trace.maps[measures[place].name][image], measures[place], side, name if row == 0 else ''
            )
    for row, label in enumerate(('shallow', *['middle'] * (rows - 2), 'deep') if rows > 1 else ()):
        axes[row, 0].set_ylabel(label, fontsize=11)
    figure.supxlabel(
        f'green frame: rich in structure, dashed red: dead; up to {side * side} channels, evenly spaced, '
        'but the last a dead one if there is any',
        fontsize=9,
    )
    return figure


def _maps(ax: Axes, maps: torch.Tensor, measure: LayerMeasure, side: int, head: str) -> None:
    tiles = []
    for i, channel in enumerate(chosen := sample_channels(measure, side * side)):
        values = maps[channel].float()
        low, high = values.aminmax()
        scaled = (values - low) / (high - low).clamp(min=1e-12)
        tiles.append((i // side, i % side, torch.full_like(values, 0.5) if measure.dead[channel] else scaled))
    canvas, frames = mosaic(tiles)
    for channel, (left, top, width, height) in zip(chosen, frames):
        if (dead := bool(measure.dead[channel])) or measure.rich[channel]:
            ax.add_patch(
                Rectangle(
                    (left, top),
                    width,
                    height,
                    fill=False,
                    linewidth=1.6,
                    color=RED if dead else GREEN,
                    linestyle='--' if dead else '-',
                )
            )
    ax.imshow(canvas, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
    ax.set_title(
        (f'{head}\n' if head else '') + f'{short(measure.name)}, {"×".join(map(str, measure.grid))}: '
        f'{len(chosen)} of {len(measure.dead)} channels,\n'
        f'{int(measure.rich.sum())} rich, {int(measure.dead.sum())} dead',
        fontsize=8,
    )


def short(name: str) -> str:
    """A layer's name without what goes without saying."""
    return name.removeprefix('tokens_to_token.')


def structure_curves(looked: dict[str, Looked]) -> Figure:
    """Local structure and dead channels over depth: medians over channels that live, with quartiles."""
    figure = Figure(figsize=(WIDTH, 3.3), layout='constrained')
    panels = figure.subplots(1, 3)
    for i, (name, (_, measures)) in enumerate(looked.items()):
        color, marker = style(i)
        depth = np.linspace(0, 1, len(measures)) if len(measures) > 1 else np.zeros(1)
        for ax, kind in zip(panels, ('edges', 'fine')):
            middle, low, high = np.array([quartiles(getattr(m, kind)[~m.dead]) for m in measures]).T
            ax.plot(depth, middle, color=color, marker=marker, markersize=4, label=name)
            ax.fill_between(depth, low, high, color=color, alpha=0.15, linewidth=0)
        shares = [100 * m.dead.float().mean().item() for m in measures]
        panels[2].plot(depth, shares, color=color, marker=marker, markersize=4, label=name)
    for ax, label in zip(
        panels, ("agreement with the image's edges", 'share of high frequencies', 'dead channels (%)')
    ):
        ax.set(xlabel='depth (share of stages)', ylabel=label)
        ax.grid(alpha=0.3)
    panels[1].set_ylim(0, 1)
    panels[2].set_ylim(0, max(1.0, panels[2].get_ylim()[1]))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc='outside upper center',
        ncols=min(len(looked), 3),
        frameon=False,
        fontsize=9,
    )
    return figure


def quartiles(values: torch.Tensor) -> tuple[float, float, float]:
    """Median, lower and upper quartile of those that are numbers; NaN of none."""
    values = values[values.isfinite()].float()
    if not len(values):
        return (float('nan'),) * 3
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], device=values.device)).tolist()
    return middle, low, high


def dead_counts(looked: dict[str, Looked]) -> Figure:
    """Channels of each layer: dead ones, ones rich in structure, and the others, a row of bars for each model."""
    figure = Figure(figsize=(WIDTH, 0.4 + 1.9 * len(looked)), layout='constrained')
    axes = figure.subplots(len(looked), 1, squeeze=False)[:, 0]
    for ax, (name, (_, measures)) in zip(axes, looked.items()):
        places = range(len(measures))
        total = np.array([len(m.dead) for m in measures])
        dead, rich = (np.array([int(getattr(m, kind).sum()) for m in measures]) for kind in ('dead', 'rich'))
        ax.bar(places, total, color='#DDDDDD', label='all')
        ax.bar(places, rich, color=GREEN, label='rich in structure')
        ax.bar(places, dead, bottom=total - dead, color=RED, hatch='//', edgecolor='white', label='dead')
        for x, count, top in zip(places, dead, total):
            if count:
                ax.text(x, top, str(count), ha='center', va='bottom', fontsize=7, color=RED)
        ax.set_xticks(
            places, [short(m.name) for m in measures], rotation=60, ha='right', fontsize=7, rotation_mode='anchor'
        )
        ax.set(ylabel='channels')
        ax.margins(y=0.15)
        ax.set_title(name, fontsize=9, loc='left')
    axes[0].legend(frameon=False, fontsize=8, ncols=3, loc='lower right', bbox_to_anchor=(1, 1))
    return figure


def split_windows(image: torch.Tensor, splits: Sequence[Windows]) -> Figure:
    """What each soft split sees: the image with the places that are enlarged, then windows and their overlap.

    Args:
        image: (H, W, 3), 0 to 1.
        splits: As `features.windows` gives them, for this size.
    """
    height, width = image.shape[:2]
    columns = 1 + len(splits)
    figure = Figure(
        figsize=(WIDTH, WIDTH / max(columns, 3) * max(height / width, 0.7) + 0.75),
        layout=ConstrainedLayoutEngine(w_pad=EDGE, h_pad=EDGE),
    )
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.imshow(image.numpy(), interpolation='nearest', extent=(0, width, height, 0))
    axes[0].set_title(f'{height}×{width} pixels', fontsize=9)
    for ax, split, color in zip(axes[1:], splits, cycle(CYCLE)):
        row, col = split.grid[0] // 2, split.grid[1] // 2
        near = [(i, j) for i in (row - 1, row) for j in (col - 1, col) if i >= 0 and j >= 0]
        boxes = [split.box(*place) for place in near]
        pad = split.size / 2
        top, left = min(b[0] for b in boxes) - pad, min(b[1] for b in boxes) - pad
        bottom, right = max(b[2] for b in boxes) + pad, max(b[3] for b in boxes) + pad
        for (y0, x0, y1, x1), edge, dash in zip(boxes, CYCLE, ('-', '--', '-.', ':')):
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor=edge, alpha=0.18, linewidth=0))
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor='white', linewidth=3.2))
            ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=2, linestyle=dash))
        ax.set(xlim=(left, right), ylim=(bottom, top))
        overlap = max(split.size - split.step, 0)
        ax.set_title(
            f'{split.name}\n{split.size}×{split.size} pixels, overlap {overlap}\n'
            f'{split.grid[0]}×{split.grid[1]} tokens',
            fontsize=9,
        )
        for edge, line in (('white', 3.0), (color, 1.6)):
            axes[0].add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=edge, linewidth=line)
            )
        for spine in ax.spines.values():
            spine.set(color=color, linewidth=2)
    for ax in axes:
        ax.tick_params(labelsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_ylabel('pixels', fontsize=8)
    return figure


def panels(images: Sequence[tuple[str, Any]], columns: int = 4) -> Figure:
    """Pictures side by side with a title each: (title, (H, W, 3) or (h, w, 3), 0 to 1)."""
    columns = min(columns, len(images))
    figure, axes = sheet(-(-len(images) // columns), columns, images[0][1].shape[0] / images[0][1].shape[1], 2)
    for ax, (title, image) in zip(axes.flat, images):
        ax.imshow(np.asarray(image), interpolation='nearest')
        ax.set_title(title, fontsize=9)
    return figure


def token_colours(image: torch.Tensor, grids: dict[str, torch.Tensor]) -> Figure:
    """An image, (H, W, 3), and the tokens of each stage in PCA colours, name -> (h, w, 3)."""
    shown = [('image', image)] + [
        (f'{short(name)}\n{colours.shape[0]}×{colours.shape[1]} tokens', colours) for name, colours in grids.items()
    ]
    return panels(shown, min(len(shown), 5))


def heat_maps(image: torch.Tensor, heats: Sequence[Heat], columns: int = 5) -> Figure:
    """Maps and the image, (H, W, 3), each map from 0 to its own largest value; a cross marks the token it belongs to.

    Colours are those of the bar: nothing shines through. White lines follow the image's brightness; grey is where the
    map has no cell.
    """
    height, width = image.shape[:2]
    columns = min(columns, 1 + len(heats))
    titles = 2 + max((heat.title.count('\n') for heat in heats), default=0)
    figure, axes = sheet(-(-(1 + len(heats)) // columns), columns, height / width, titles, 0.6)
    lines = outlines(image)
    first = axes.flat[0]
    first.imshow(image.numpy(), extent=(0, width, height, 0), interpolation='nearest')
    first.set_title('image', fontsize=8)
    drawn = None
    for ax, heat in zip(axes.flat[1:], heats):
        values = heat.map.float().cpu()
        grid = (values.shape[0], values.shape[1])
        lattice = heat.lattice or Lattice.over(grid, (height, width))
        drawn = ax.imshow(
            values.numpy(),
            cmap=HEAT,
            vmin=0,
            vmax=max(float(values.max()), 1e-12),
            extent=lattice.extent(grid),
            interpolation='nearest',
        )
        ax.add_collection(LineCollection(lines, colors='white', linewidths=0.6, alpha=0.7))
        ax.set(xlim=(0, width), ylim=(height, 0), facecolor='#CCCCCC')  # which shows where no cell lies
        if heat.cross is not None:
            y, x = heat.cross
            for ours in (ax, first) if heat is heats[0] else (ax,):
                ours.plot(x, y, marker='+', markersize=11, markeredgewidth=3.5, color='white')
                ours.plot(x, y, marker='+', markersize=10, markeredgewidth=1.6, color='#56B4E9')
        ax.set_title(f'{heat.title}\nmax {peak(values)} mean', fontsize=8)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, shrink=0.6, ticks=[0, drawn.get_clim()[1]], aspect=30, pad=0.01)
        bar.ax.set_yticklabels(['0', 'max'], fontsize=8)
    return figure


def outlines(image: torch.Tensor) -> list[np.ndarray]:
    """Lines of equal brightness of an image, (H, W, 3), as (n, 2) points, x and y in its pixels.

    It is smoothed to DETAIL places first, and the levels are LEVELS between its 2nd and 98th percentile.
    """
    height, width = image.shape[:2]
    step = max(min(height, width) / DETAIL, 1.0)
    size = (round(height / step), round(width / step))
    grey = F.interpolate(image.mean(-1)[None, None].float(), size, mode='bilinear', antialias=True)[0, 0]
    low, high = torch.quantile(grey.flatten(), torch.tensor([0.02, 0.98])).tolist()
    place = Lattice.over(size, (height, width))
    lines = contour_generator(
        [place.x + place.right * i for i in range(size[1])],
        [place.y + place.down * i for i in range(size[0])],
        grey.numpy(),
    )
    levels = [low + share * (high - low) for share in LEVELS] if high > low else []
    return [np.asarray(line) for level in levels for line in lines.lines(level)]


def peak(values: torch.Tensor) -> str:
    """How far a map is from uniform: its largest value over its mean."""
    return f'{float(values.max() / values.mean().clamp(min=1e-30)):.3g}×'


def attention_heads(attentions: Sequence[Attention], photo: torch.Tensor, image: int = 0) -> Figure:
    """Where the class token looks (or all tokens on average): a column for each layer, a row for each head.

    Every map goes from 0 to its own largest weight; white lines follow the brightness of the photo, (H, W, 3).
    """
    tiles = []
    for col, attention in enumerate(attentions):
        for row, values in enumerate(class_maps(attention)[image]):
            tiles.append((row, col, values / values.max().clamp(min=1e-12)))
    canvas, frames = mosaic(tiles)
    rows, cols = (1 + max(tile[i] for tile in tiles) for i in (0, 1))
    figure, axes = sheet(1, 1, canvas.shape[0] / canvas.shape[1], 2, 1.0, min(WIDTH - 1, max(1.2 * cols, 3.0)))
    ax = axes[0, 0]
    drawn = ax.imshow(canvas, cmap=HEAT, vmin=0, vmax=1, interpolation='nearest')
    over: list[np.ndarray] = []
    lines = outlines(photo)
    for (_, col, values), (left, top, wide, high) in zip(tiles, frames):
        grid, pad = (values.shape[0], values.shape[1]), (canvas.shape[1] / cols - wide) / 2  # of a frame round its map
        lattice = attentions[col].lattice or Lattice.over(grid, (photo.shape[0], photo.shape[1]))
        x0, x1, y1, y0 = lattice.extent(grid)
        for line in lines:
            shares = (line - (x0, y0)) / (x1 - x0, y1 - y0)
            shares[((shares < 0) | (shares > 1)).any(1)] = np.nan  # where the cells do not reach
            over.append((left + pad, top + pad) + shares * (wide - 2 * pad, high - 2 * pad))
    ax.add_collection(LineCollection(over, colors='white', linewidths=0.4, alpha=0.7))
    for axis, count, length in ((ax.xaxis, cols, canvas.shape[1]), (ax.yaxis, rows, canvas.shape[0])):
        axis.set_ticks(
            [(i + 0.5) * length / count - 0.5 for i in range(count)], [str(i) for i in range(count)], fontsize=8
        )
    ax.set(xlabel='layer', ylabel='head')
    ax.tick_params(length=0)
    bar = figure.colorbar(drawn, ax=ax, fraction=0.02, pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(['0', 'max'], fontsize=8)
    return figure


def attention_distance(attentions: Mapping[str, Sequence[Attention]]) -> Figure:
    """How far each head looks, over depth, model by model: the mean over images, as a share of the grid's diagonal."""
    figure = Figure(figsize=(WIDTH * 0.7, 3.2), layout='constrained')
    ax = figure.subplots()
    for i, (name, layers) in enumerate(attentions.items()):
        color, marker = style(i)
        points = [(place, d) for place, layer in enumerate(layers) for d in share_of_diagonal(layer).tolist()]
        ax.plot(*zip(*points), marker=marker, color=color, linestyle='none', markersize=5, alpha=0.7, label=name)
    ax.set(xlabel='layer', ylabel='mean distance\n(share of the diagonal)')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return figure


def share_of_diagonal(attention: Attention) -> torch.Tensor:
    """`mean_distance`, of all images and of grids of any size, as a share of the longest distance: (n,)."""
    assert attention.grid is not None
    return mean_distance(attention).mean(0) / max(math.dist((1, 1), attention.grid), 1.0)


def runs(records: dict[str, list[dict[str, Any]]]) -> Figure:
    """Runs side by side, by the records of their metrics.jsonl: losses, top-1, and speed against the best top-1.

    A run that keeps an average of its weights is drawn by the better of the two at its end, which is what it saves.
    """
    figure = Figure(figsize=(WIDTH, 6.2), layout='constrained')
    (train, val), (top1, speed) = figure.subplots(2, 2)
    for i, (name, lines) in enumerate(records.items()):
        color, marker = style(i)
        epochs = [line['epoch'] + 1 for line in lines]
        kind = '_ema' if lines[-1].get('val_top1_ema', -1) > lines[-1]['val_top1'] else ''
        look = dict(
            color=color,
            marker=marker,
            markersize=4,
            markevery=max(len(lines) // 8, 1),
            label=name + (' (average of weights)' if kind else ''),
        )
        train.plot(epochs, [line['train_loss'] for line in lines], **look)
        val.plot(epochs, [line[f'val_loss{kind}'] for line in lines], **look)
        shares = [100 * line[f'val_top1{kind}'] for line in lines]
        top1.plot(epochs, shares, **look)
        rate = float(np.median([line['images_per_second'] for line in lines]))
        speed.plot(rate, max(shares), color=color, marker=marker, markersize=9, linestyle='none')
        speed.annotate(
            f'{max(shares):.1f} %', (rate, max(shares)), xytext=(8, -3), textcoords='offset points', fontsize=8
        )
    for ax, label in ((train, 'training loss (augmented)'), (val, 'validation loss'), (top1, 'validation top-1 (%)')):
        ax.set(xlabel='epoch', ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (train, val):
        ax.set_yscale('log')
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_locator(NullLocator())
    speed.set(xlabel='training speed (images/s, median over epochs)', ylabel='best validation top-1 (%)')
    speed.margins(x=0.25, y=0.2)
    for ax in (train, val, top1, speed):
        ax.grid(alpha=0.3)
    figure.legend(
        *train.get_legend_handles_labels(),
        loc='outside upper center',
        ncols=min(len(records), 3),
        frameon=False,
        fontsize=9,
    )
    return figure
