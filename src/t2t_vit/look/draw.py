"""Figures of what the other modules of `look` compute: tensors in, a matplotlib Figure out.

They fit the width of a README. Green and red frames, the paper's marks for channels, are Okabe and Ito's bluish green
and vermilion, which every eye tells apart; red frames are dashed as well.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..plots import CYCLE, GREEN, RED, best_epoch, one_line, save_figure, style, use_log_scale
from .attention import Attention, Lattice, class_maps, mean_distance
from .features import LayerMeasure, Windows
from .trace import Trace

WIDTH = 9.0  # inches
DPI = 120
MARGIN = 0.07  # inches
LETTER = 0.058  # inches of a letter of 8 points, on average
CROSS = '#56B4E9'
HEAT = colormaps['magma']
OPACITY = 0.35, 0.8  # of a heat map over a grey photo, at 0 and at its maximum


class Heat(NamedTuple):
    """A map to draw over an image."""

    title: str
    map: torch.Tensor  # (h, w), at least 0
    lattice: Lattice | None = None  # position of its cells; by default they tile the image
    cross: tuple[float, float] | None = None  # position of the query, (y, x) in pixels


def blend(fractions: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Blend the colours of a heat map, values 0 to 1, over a photo's grey of the same shape: (…) -> (…, 3)."""
    opacity = (OPACITY[0] + (OPACITY[1] - OPACITY[0]) * fractions)[..., None]
    return opacity * HEAT(fractions)[..., :3] + (1 - opacity) * grey[..., None]


SCALE = ListedColormap(blend(np.linspace(0, 1, 256), np.full(256, 0.5)))  # on a photo of medium grey


class Result(NamedTuple):
    """One model's forward pass over the images."""

    trace: Trace
    measures: list[LayerMeasure]
    inputs: torch.Tensor  # (B, H, W, 3), 0 to 1: the images as cropped and resized for the model


def save(figure: Figure, file: Path) -> Path:
    """Write a figure as a PNG file of DPI dots per inch, as large as its content; returns the file."""
    return save_figure(figure, file, DPI, 'tight')


def sheet(
    rows: int, columns: int, ratio: float, title_lines: int, margin: float = 0.0, widest: float = 3.0
) -> tuple[Figure, Any]:
    """Create a figure of panels without axes; returns it and its panels, [row, column].

    Args:
        rows: Panels from top to bottom.
        columns: Panels from left to right.
        ratio: Height over width of a panel.
        title_lines: Lines of text above each panel.
        margin: Inches beside the panels.
        widest: Maximum width of a panel in inches.
    """
    width = min((WIDTH - margin) / columns, widest)
    height = rows * (width * ratio + 0.17 * title_lines + 0.2)
    figure = Figure(
        figsize=(width * columns + margin, height + 2 * MARGIN),
        layout=ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN, compress=True),
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure, axes


Frame = tuple[float, float, float, float]  # left, top, width, height


def mosaic(tiles: Sequence[tuple[int, int, np.ndarray]]) -> tuple[np.ndarray, list[Frame]]:
    """Join pictures, (row, column, (h, w) or (h, w, 3)), with gaps of NaN; returns the canvas and a frame of each."""
    height, width = tiles[0][2].shape[:2]
    zoom = max(1, -(-32 // max(height, width)))
    height, width, gap = zoom * height, zoom * width, max(2, zoom * max(height, width) // 8)
    rows, cols = (1 + max(tile[i] for tile in tiles) for i in (0, 1))
    canvas = np.full((rows * (height + gap), cols * (width + gap), *tiles[0][2].shape[2:]), np.nan)
    frames = []
    for row, col, values in tiles:
        top, left = row * (height + gap) + gap // 2, col * (width + gap) + gap // 2
        canvas[top : top + height, left : left + width] = values.repeat(zoom, 0).repeat(zoom, 1)
        pad = gap * 0.25
        frames.append((left - 0.5 - pad, top - 0.5 - pad, width + 2 * pad, height + 2 * pad))
    return canvas, frames


def overlay(photo: torch.Tensor, values: torch.Tensor, lattice: Lattice | None = None) -> np.ndarray:
    """Draw a map, (h, w), in colours over a photo, (H, W, 3), in grey; returns (H, W, 3), 0 to 1.

    Colours go from 0 to the largest value of the map. Pixels of the photo that no cell covers stay grey.
    """
    cells = values.float().cpu().numpy()
    (height, width), grid = photo.shape[:2], cells.shape
    lattice = lattice or Lattice.over((grid[0], grid[1]), (height, width))
    row = np.floor((np.arange(height) + 0.5 - lattice.y) / lattice.down + 0.5).astype(int)
    col = np.floor((np.arange(width) + 0.5 - lattice.x) / lattice.right + 0.5).astype(int)
    covered = ((row >= 0) & (row < grid[0]))[:, None] & ((col >= 0) & (col < grid[1]))
    fractions = (cells / max(cells.max(), 1e-12)).clip(0, 1)
    fractions = fractions[row.clip(0, grid[0] - 1)][:, col.clip(0, grid[1] - 1)]
    grey = photo.mean(-1).cpu().numpy()
    return np.where(covered[..., None], blend(fractions, grey), grey[..., None])


def scaled_map(values: torch.Tensor, dead: bool) -> np.ndarray:
    """Stretch a channel, (h, w), between its own minimum and maximum, 0 to 1; a dead one is grey."""
    values = values.float().cpu()
    low, high = values.aminmax()
    return np.full(values.shape, 0.5) if dead else ((values - low) / (high - low).clamp(min=1e-12)).numpy()


def sample_channels(measure: LayerMeasure, count: int) -> list[int]:
    """Choose channels to show: evenly spaced, but the last is a dead one if there are any and none was chosen."""
    channels = len(measure.dead)
    chosen = sorted({round(i) for i in np.linspace(0, channels - 1, min(count, channels))})
    dead = measure.dead.nonzero().flatten().tolist()
    if dead and not measure.dead[chosen].any():
        chosen[-1] = dead[0]
    return chosen


def spread_stages(measures: Sequence[LayerMeasure], count: int = 3) -> list[int]:
    """Choose `count` evenly spaced stages, the first and the last among them; returns their indices."""
    return sorted({round(i) for i in np.linspace(0, len(measures) - 1, count)})


def feature_maps(results: dict[str, Result], image: int = 0, side: int = 5, rows: int = 3) -> Figure:
    """Draw the paper's Fig. 2: the input, and maps of shallow, middle and deep layers, models side by side.

    Each map is stretched between its own extremes. Green frame: rich in structure; dashed red frame: dead. The counts
    above a panel are of all its channels.

    Args:
        results: By the model's name, a column each.
        image: Index of the image.
        side: Maps are shown side × side.
        rows: Depths, from the first stage to the last.
    """
    inputs: list[tuple[list[str], torch.Tensor]] = []
    for name, result in results.items():
        same = next((names for names, other in inputs if torch.equal(other, result.inputs[image])), None)
        if same is None:
            inputs.append(([name], result.inputs[image]))
        else:
            same.append(name)
    ratio = max(maps.shape[-2] / maps.shape[-1] for result in results.values() for maps in result.trace.maps.values())
    letters = int((WIDTH - 0.4) / (1 + len(results)) / LETTER)
    columns = []
    for name, result in results.items():
        stages = [result.measures[i] for i in spread_stages(result.measures, rows)]
        titles = [_title(measure, side, '' if row else name, letters) for row, measure in enumerate(stages)]
        columns.append([(result.trace.maps[m.name][image], m, title) for m, title in zip(stages, titles)])
    title_lines = 1 + max(title.count('\n') for column in columns for *_, title in column)
    figure, axes = sheet(rows, 1 + len(results), ratio, title_lines, 0.4, 4.5)
    for row, (names, photo) in enumerate(inputs[:rows]):
        axes[row, 0].imshow(photo.numpy())
        models = [] if len(inputs) == 1 else [name.partition(' (')[0] for name in names]
        axes[row, 0].set_title('\n'.join([f'input, {photo.shape[0]}×{photo.shape[1]} pixels', *models]), fontsize=8)
    for col, column in enumerate(columns, 1):
        for row, (maps, measure, title) in enumerate(column):
            _draw_channels(axes[row, col], maps, measure, side)
            axes[row, col].set_title(title, fontsize=8)
    for row, label in enumerate(('shallow', *['middle'] * (rows - 2), 'deep') if rows > 1 else ()):
        axes[row, 1].set_ylabel(label, fontsize=11)
    figure.supxlabel(
        f'green frame: rich in structure, dashed red: dead; up to {side * side} evenly spaced channels, '
        'one of them dead if the layer has any',
        fontsize=9,
    )
    return figure


def _draw_channels(ax: Axes, maps: torch.Tensor, measure: LayerMeasure, side: int) -> None:
    chosen = sample_channels(measure, side * side)
    canvas, frames = mosaic(
        [(i // side, i % side, scaled_map(maps[c], bool(measure.dead[c]))) for i, c in enumerate(chosen)]
    )
    for channel, (left, top, width, height) in zip(chosen, frames):
        if (dead := bool(measure.dead[channel])) or measure.rich[channel]:
            color, dash = (RED, '--') if dead else (GREEN, '-')
            ax.add_patch(Rectangle((left, top), width, height, fill=False, linewidth=1.6, color=color, linestyle=dash))
    ax.imshow(canvas, cmap='gray', vmin=0, vmax=1, interpolation='nearest')


def _title(measure: LayerMeasure, side: int, head: str, letters: int) -> str:
    """Name a layer and count its channels, in lines of at most so many letters."""
    count = len(measure.dead)
    shown = f'{min(count, side * side)} of {count} channels:'
    found = f'{measure.rich.sum()} rich, {measure.dead.sum()} dead'
    lines = [
        *head.replace(' (', '\n(').splitlines(),
        f'{short(measure.name)}, {"×".join(map(str, measure.grid))}',
        *([f'{shown} {found}'] if len(shown) + len(found) < letters else [shown, found]),
    ]
    return '\n'.join(part for line in lines for part in textwrap.wrap(line, letters))


def short(name: str) -> str:
    """Shorten the module name of a layer for a title."""
    return name.removeprefix('tokens_to_token.')


def structure_curves(results: dict[str, Result]) -> Figure:
    """Plot local structure and dead channels over depth: medians and quartiles over the channels that are not dead."""
    figure = Figure(figsize=(WIDTH, 3.3), layout='constrained')
    panels = figure.subplots(1, 3)
    for i, (name, (_, measures, _)) in enumerate(results.items()):
        color, marker = style(i)
        depth = np.linspace(0, 1, len(measures)) if len(measures) > 1 else np.zeros(1)
        for ax, kind in zip(panels, ('edges', 'fine')):
            middle, low, high = np.array([quartiles(getattr(m, kind)[~m.dead]) for m in measures]).T
            ax.plot(depth, middle, color=color, marker=marker, markersize=4, label=name)
            ax.fill_between(depth, low, high, color=color, alpha=0.15, linewidth=0)
        dead = [100 * m.dead.float().mean().item() for m in measures]
        panels[2].plot(depth, dead, color=color, marker=marker, markersize=4, label=name)
    for ax, label in zip(
        panels, ('correlation with edges of the image', 'fraction of high frequencies', 'dead channels (%)')
    ):
        ax.set(xlabel='depth (0: first stage, 1: last)', ylabel=label)
        ax.grid(alpha=0.3)
    panels[1].set_ylim(0, 1)
    panels[2].set_ylim(0, max(1.0, panels[2].get_ylim()[1]))
    _legend(figure, panels[0])
    return figure


def _legend(figure: Figure, ax: Axes) -> None:
    """Add one legend above all panels, with the labels of one of them."""
    handles, labels = ax.get_legend_handles_labels()
    columns = min(len(labels), 3)
    figure.legend(handles, labels, loc='outside upper center', ncols=columns, frameon=False, fontsize=9)


def quartiles(values: torch.Tensor) -> tuple[float, float, float]:
    """Return median, lower and upper quartile of the finite values; NaN if there are none."""
    values = values[values.isfinite()].float()
    if not len(values):
        return (float('nan'),) * 3
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], device=values.device)).tolist()
    return middle, low, high


def dead_counts(results: dict[str, Result]) -> Figure:
    """Plot how many channels of each layer are dead or rich in structure, a row of bars for each model."""
    figure = Figure(figsize=(WIDTH, 0.4 + 1.9 * len(results)), layout='constrained')
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for ax, (name, (_, measures, _)) in zip(axes, results.items()):
        at = range(len(measures))
        total = np.array([len(m.dead) for m in measures])
        dead, rich = (np.array([int(getattr(m, kind).sum()) for m in measures]) for kind in ('dead', 'rich'))
        ax.bar(at, total, color='#DDDDDD', label='all')
        ax.bar(at, rich, color=GREEN, label='rich in structure')
        ax.bar(at, dead, bottom=total - dead, color=RED, hatch='//', edgecolor='white', label='dead')
        for x, count, top in zip(at, dead, total):
            if count:
                ax.text(x, top, str(count), ha='center', va='bottom', fontsize=7, color=RED)
        names = [short(m.name) for m in measures]
        ax.set_xticks(at, names, rotation=60, ha='right', fontsize=7, rotation_mode='anchor')
        ax.set(ylabel='channels')
        ax.margins(y=0.15)
        ax.set_title(name, fontsize=9, loc='left')
    axes[0].legend(frameon=False, fontsize=8, ncols=3, loc='lower right', bbox_to_anchor=(1, 1))
    return figure


def split_windows(image: torch.Tensor, splits: Sequence[Windows]) -> Figure:
    """Draw an image and, enlarged, four neighbouring windows of each soft split.

    Args:
        image: (H, W, 3), 0 to 1.
        splits: From `features.windows` for this image size.
    """
    height, width = image.shape[:2]
    columns = 1 + len(splits)
    figure = Figure(
        figsize=(WIDTH, WIDTH / max(columns, 3) * max(height / width, 0.7) + 0.75),
        layout=ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN),
    )
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.imshow(image.numpy(), interpolation='nearest', extent=(0, width, height, 0))
    axes[0].set_title(f'input, {height}×{width} pixels', fontsize=9)
    for ax, split, color in zip(axes[1:], splits, cycle(CYCLE)):
        row, col = split.grid[0] // 2, split.grid[1] // 2
        near = [(i, j) for i in (row - 1, row) for j in (col - 1, col) if i >= 0 and j >= 0]
        boxes = [split.box(*index) for index in near]
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
            f'{split.name}: {split.grid[0]}×{split.grid[1]} tokens\n'
            f'windows of {split.size}×{split.size} pixels,\noverlap {overlap}',
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


def token_colours(image: torch.Tensor, grids: dict[str, torch.Tensor]) -> Figure:
    """Draw an image, (H, W, 3), and the tokens of each stage in PCA colours, name -> (h, w, 3)."""
    columns = min(1 + len(grids), 5)
    figure, axes = sheet(-(-(1 + len(grids)) // columns), columns, image.shape[0] / image.shape[1], 2)
    pictures = {'input': image, **{f'{short(name)}\n{c.shape[0]}×{c.shape[1]} tokens': c for name, c in grids.items()}}
    for ax, (title, picture) in zip(axes.flat, pictures.items()):
        ax.imshow(picture.numpy(), interpolation='nearest')
        ax.set_title(title, fontsize=9)
    return figure


def heat_maps(image: torch.Tensor, heats: Sequence[Heat], caption: str = '', columns: int = 5) -> Figure:
    """Draw an image, (H, W, 3), and maps over it in grey, each from 0 to its own maximum; a cross marks the query."""
    height, width = image.shape[:2]
    columns = min(columns, 1 + len(heats))
    titles = 2 + max((heat.title.count('\n') for heat in heats), default=0)
    figure, axes = sheet(-(-(1 + len(heats)) // columns), columns, height / width, titles, 0.6)
    axes.flat[0].set_title('\n'.join(filter(None, ('input', caption))), fontsize=8)
    axes.flat[0].imshow(image.numpy(), extent=(0, width, height, 0), interpolation='nearest')
    for ax, heat in zip(axes.flat[1:], heats):
        picture = overlay(image, heat.map, heat.lattice)
        ax.imshow(picture, extent=(0, width, height, 0), interpolation='nearest')
        if heat.cross is not None:
            y, x = heat.cross
            for marked in (ax, axes.flat[0]) if heat is heats[0] else (ax,):
                marked.plot(x, y, marker='+', markersize=11, markeredgewidth=3.5, color='white')
                marked.plot(x, y, marker='+', markersize=10, markeredgewidth=1.6, color=CROSS)
        ax.set_title(f'{heat.title}\nmax {peak(heat.map)} mean', fontsize=8)
    _colour_bar(figure, axes, shrink=0.6, aspect=30, pad=0.01)
    return figure


def _colour_bar(figure: Figure, axes: Any, **layout: Any) -> None:
    bar = figure.colorbar(ScalarMappable(cmap=SCALE), ax=axes, ticks=[0, 1], **layout)
    bar.ax.set_yticklabels(['0', 'max'], fontsize=8)


def peak(values: torch.Tensor) -> str:
    """Format how far a map is from uniform: its maximum over its mean."""
    return f'{float(values.max() / values.mean().clamp(min=1e-30)):.3g}×'


def attention_heads(attentions: Sequence[Attention], photo: torch.Tensor, image: int = 0) -> Figure:
    """Draw where the class token looks (or all tokens on average), over the photo, (H, W, 3), in grey.

    A column for each layer, a row for each head; every map goes from 0 to its own maximum.
    """
    step = max(min(photo.shape[:2]) // 96, 1)
    canvas, _ = mosaic(
        [
            (row, col, overlay(photo, values, attention.lattice)[::step, ::step])
            for col, attention in enumerate(attentions)
            for row, values in enumerate(class_maps(attention)[image])
        ]
    )
    rows, cols = max(a.query.shape[1] for a in attentions), len(attentions)
    figure, axes = sheet(1, 1, canvas.shape[0] / canvas.shape[1], 2, 1.0, min(WIDTH - 1, max(1.2 * cols, 3.0)))
    ax = axes[0, 0]
    ax.imshow(np.nan_to_num(canvas, nan=1.0))
    for axis, count, length in ((ax.xaxis, cols, canvas.shape[1]), (ax.yaxis, rows, canvas.shape[0])):
        centres = [(i + 0.5) * length / count - 0.5 for i in range(count)]
        axis.set_ticks(centres, [str(i + 1) for i in range(count)], fontsize=8)
    ax.set(xlabel='layer', ylabel='head')
    ax.tick_params(length=0)
    _colour_bar(figure, ax, fraction=0.02, pad=0.01)
    return figure


def attention_distance(attentions: Mapping[str, Sequence[Attention]]) -> Figure:
    """Plot how far each head looks, over depth: the mean over images, as a fraction of the grid's diagonal."""
    figure = Figure(figsize=(WIDTH * 0.7, 3.2), layout='constrained')
    ax = figure.subplots()
    for i, (name, layers) in enumerate(attentions.items()):
        color, marker = style(i)
        points = [(n, d) for n, layer in enumerate(layers, 1) for d in fraction_of_diagonal(layer).tolist()]
        ax.plot(*zip(*points), marker=marker, color=color, linestyle='none', markersize=5, alpha=0.7, label=name)
    ax.set(xlabel='layer', ylabel='mean attention distance\n(fraction of the diagonal)')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return figure


def fraction_of_diagonal(attention: Attention) -> torch.Tensor:
    """Return `mean_distance`, averaged over images, as a fraction of the longest distance in the grid: (n,)."""
    assert attention.grid is not None
    return mean_distance(attention).mean(0) / max(math.dist((1, 1), attention.grid), 1.0)


def runs(records: dict[str, list[dict[str, Any]]]) -> Figure:
    """Plot runs side by side, from the records of metrics.jsonl: losses, top-1, and speed against the best top-1.

    The best top-1 is that of the weights which the run saved: the best of all epochs, of the weights or of their
    moving average. The validation curves are of the same kind.
    """
    figure = Figure(figsize=(WIDTH, 6.2), layout='constrained')
    (train, val), (top1, speed) = figure.subplots(2, 2)
    for i, (name, lines) in enumerate(records.items()):
        color, marker = style(i)
        best = best_epoch(lines)
        label = one_line(name) + (' (EMA weights)' if best.suffix else '')
        look = dict(color=color, marker=marker, markersize=4, label=label)
        scored = [line for line in lines if f'val_top1{best.suffix}' in line]
        for ax, kept, key, factor in (
            (train, lines, 'train_loss', 1),
            (val, scored, f'val_loss{best.suffix}', 1),
            (top1, scored, f'val_top1{best.suffix}', 100),
        ):
            epochs = [line['epoch'] + 1 for line in kept]
            ax.plot(epochs, [factor * line[key] for line in kept], markevery=max(len(kept) // 8, 1), **look)
        images_per_second = float(np.median([line['images_per_second'] for line in lines]))
        for ax, x in ((top1, float(best.epoch)), (speed, images_per_second)):
            ax.plot(x, 100 * best.top1, color=color, marker=marker, markersize=9, linestyle='none')
        speed.annotate(
            f'{100 * best.top1:.2f} %\nepoch {best.epoch}',
            (images_per_second, 100 * best.top1),
            xytext=(8, -8),
            textcoords='offset points',
            fontsize=8,
        )
    for ax, title in ((train, 'training loss (augmented)'), (val, 'validation loss'), (top1, 'validation top-1 (%)')):
        ax.set(xlabel='epoch', title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    use_log_scale(train, 'y')
    use_log_scale(val, 'y')
    speed.set(xlabel='training speed (images/s, median over epochs)', title='best validation top-1 (%)')
    speed.margins(x=0.25, y=0.2)
    speed.set_ylim(top=min(speed.get_ylim()[1], 101))
    for ax in (train, val, top1, speed):
        ax.grid(alpha=0.3)
    _legend(figure, train)
    return figure
