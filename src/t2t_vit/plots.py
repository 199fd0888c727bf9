"""Pictures of runs and benchmarks, as PNG files. Colours are Okabe and Ito's, for every eye."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from PIL import Image

BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
CYCLE = (BLUE, ORANGE, GREEN, RED, '#CC79A7', '#56B4E9', '#000000', '#999999')
MARKERS = 'osD^vPX*'


def style(place: int) -> tuple[str, str]:
    """Colour and marker of the line at a place, another pair for each of 64 lines."""
    return CYCLE[place % len(CYCLE)], MARKERS[(place + place // len(CYCLE)) % len(MARKERS)]


def plot_curves(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Loss and accuracy over epochs, as metrics.jsonl records them."""
    epochs = [record['epoch'] + 1 for record in records]
    figure = Figure(figsize=(9, 3.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [r['train_loss'] for r in records], color=ORANGE, label='training (augmented)')
    left.plot(epochs, [r['val_loss'] for r in records], color=BLUE, label='validation')
    left.set(xlabel='epoch', ylabel='loss (cross-entropy)', yscale='log')
    right.plot(epochs, [100 * r['val_top1'] for r in records], color=BLUE, label='validation, weights')
    if 'val_top1_ema' in records[0]:
        left.plot(epochs, [r['val_loss_ema'] for r in records], color=GREEN, label='validation, average of weights')
        right.plot(epochs, [100 * r['val_top1_ema'] for r in records], color=GREEN, label='validation, average')
    best = max(max(r['val_top1'], r.get('val_top1_ema', 0)) for r in records)
    right.set(xlabel='epoch', ylabel='top-1 (%)', title=f'best {100 * best:.2f} %')
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def plot_confusion(counts: torch.Tensor, classes: Sequence[str], file: Path) -> None:
    """`counts[true][predicted]` as shares of each true class; names and numbers where there is room for them."""
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    n = len(classes)
    figure = Figure(figsize=(min(4 + 0.32 * n, 16),) * 2, layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='cividis', vmin=0, vmax=1)
    axes.set(xlabel='predicted', ylabel='true')
    if n <= 40:
        axes.set_xticks(range(n), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(n), classes)
    if n <= 20:
        for i in range(n):
            for j in range(n):
                if counts[i, j]:
                    axes.text(
                        j,
                        i,
                        str(int(counts[i, j])),
                        ha='center',
                        va='center',
                        fontsize=8,
                        color='black' if shares[i, j] > 0.5 else 'white',
                    )
    figure.colorbar(image, shrink=0.7, label='share of the true class')
    figure.savefig(file, dpi=150)


def plot_predictions(rows: list[tuple[Image.Image, str, float, str]], file: Path) -> None:
    """Images with what the model says, how sure it is, and the truth ('' where unknown); wrong answers in red."""
    cols = min(6, len(rows))
    lines = -(-len(rows) // cols)
    figure = Figure(figsize=(1.7 * cols, 2.1 * lines), layout='constrained')
    axes = figure.subplots(lines, cols, squeeze=False)
    for ax in axes.flat:
        ax.axis('off')
    for ax, (image, name, probability, truth) in zip(axes.flat, rows):
        ax.imshow(image, cmap='gray' if image.mode == 'L' else None)
        wrong = bool(truth) and name != truth
        ax.set_title(
            f'{name}  {100 * probability:.0f} %' + (f'\nis {truth}' if wrong else ''),
            fontsize=9,
            color=RED if wrong else 'black',
        )
    figure.savefig(file, dpi=150)


def plot_sizes(curves: dict[str, list[tuple[int, float, float | None]]], conditions: str, file: Path) -> None:
    """Time and memory over image size, both axes logarithmic: model -> (pixels a side, ms an image, MB) each."""
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    for i, (name, points) in enumerate(curves.items()):
        color, marker = style(i)
        sizes = [size for size, _, _ in points]
        left.plot(sizes, [ms for _, ms, _ in points], color=color, marker=marker, label=name)
        held = [(size, mb) for size, _, mb in points if mb]
        right.plot([size for size, _ in held], [mb for _, mb in held], color=color, marker=marker, label=name)
    for axes, label in ((left, 'ms an image'), (right, 'peak memory of a step (MB)')):
        axes.set(xlabel='pixels a side', ylabel=label, xscale='log', yscale='log')
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle('\n'.join(textwrap.wrap(conditions, 110)), fontsize=9)
    figure.savefig(file, dpi=150)


def plot_speed(points: dict[str, tuple[float, float]], family: Sequence[str], conditions: str, file: Path) -> None:
    """Top-1 against speed: model -> (images/s, % top-1); those of `family` stand out, joined by a line."""
    figure = Figure(figsize=(7, 4.2), layout='constrained')
    axes = figure.subplots()
    ours = sorted((points[name], name) for name in points if name in family)
    axes.plot([x for (x, _), _ in ours], [y for (_, y), _ in ours], color=BLUE, alpha=0.3)
    for name, (x, y) in points.items():
        mine = name in family
        axes.plot(x, y, marker='o' if mine else 's', color=BLUE if mine else ORANGE, linestyle='none')
    axes.set(xlabel='images/s', ylabel='published top-1 on ImageNet (%)', xscale='log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # the usual nine of a decade touch
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.15)
    axes.grid(alpha=0.3, which='both')
    axes.set_title('\n'.join(textwrap.wrap(conditions, 80)), fontsize=9)
    label_points(figure, axes, points)
    figure.savefig(file, dpi=150)


def label_points(figure: Figure, axes: Axes, points: dict[str, tuple[float, float]]) -> list[Annotation]:
    """Write names beside points, each at the first of a few places where it covers no other name and no point."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # the layout is known from here on
    spots = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in spots]
    near = [
        (away * x, away * y, side)
        for away in (1, 2, 3)
        for x, y, side in (
            (6, 3, 'left'),
            (6, -9, 'left'),
            (-6, 3, 'right'),
            (-6, -9, 'right'),
            (0, 8, 'center'),
            (0, -14, 'center'),
        )
    ]
    made = []
    for i, (name, place) in enumerate(points.items()):
        label = axes.annotate(name, place, xytext=(0, 0), textcoords='offset points', fontsize=8)
        others, best = taken[:i] + taken[i + 1 :], None
        for x, y, side in near:
            label.set(position=(x, y), horizontalalignment=side)
            box = label.get_window_extent(renderer).padded(3)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y1)
            covered = sum(box.overlaps(other) for other in others) + 9 * (not inside)
            if best is None or covered < best[0]:
                best = covered, (x, y), side
        assert best is not None
        label.set(position=best[1], horizontalalignment=best[2])
        taken.append(label.get_window_extent(renderer))
        made.append(label)
    return made


def plot_arms(arms: Sequence[tuple[str, int, Sequence[float], float, bool]], conditions: str, file: Path) -> None:
    """Top-1 and parameters, a line each: name, parameters, % of each seed, half of the mean's interval, whether own."""
    kinds = {'T2T-ViT': BLUE, 'ViT': ORANGE, 'CNN': GREEN, 'your design': RED}
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(arms)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for i, (name, parameters, top1, half, own) in enumerate(arms):
        family = 'T2T-ViT' if name.startswith('t2t') else 'ViT' if name.startswith('vit') else 'CNN'
        kind = 'your design' if own else family
        left.errorbar(sum(top1) / len(top1), i, xerr=half, fmt='o', color=kinds[kind], markersize=4, capsize=3)
        left.plot(top1, [i] * len(top1), marker='|', color='black', linestyle='none', markersize=11, zorder=3)
        right.barh(i, parameters / 1e6, color=kinds[kind], label=kind, height=0.6)
    left.set_yticks(range(len(arms)), [name for name, *_ in arms], fontsize=8)
    left.set_ylim(len(arms) - 0.4, -0.6)
    left.set(xlabel='top-1 (%): mean, 95 % interval, a dash for each seed')
    right.set(xlabel='million parameters')
    for axes in (left, right):
        axes.grid(alpha=0.3, axis='x')
    handles, labels = right.get_legend_handles_labels()
    found = dict(zip(labels, handles))
    figure.legend(found.values(), found.keys(), frameon=False, fontsize=8, ncols=4, loc='outside lower center')
    figure.suptitle('\n'.join(textwrap.wrap(conditions, 115)), fontsize=8)
    figure.savefig(file, dpi=150)


def plot_differences(
    pairs: Sequence[tuple[str, float, float, float, str]], margin: float, conditions: str, file: Path
) -> None:
    """Differences of top-1 with intervals, a line each: label, points, half width, the paper's points, verdict."""
    colors = {'holds': BLUE, 'better': BLUE, 'does not hold': RED, 'worse': RED}
    figure = Figure(figsize=(9, 1.6 + 0.25 * len(pairs)), layout='constrained')
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color='#999999', alpha=0.15, lw=0, label=f'within {margin:g} point')
    axes.axvline(0, color='black', lw=0.8)
    for i, (_, difference, half, published, verdict) in enumerate(pairs):
        color = next((color for text, color in colors.items() if verdict.startswith(text)), '#666666')
        axes.errorbar(difference, i, xerr=half, fmt='o', color=color, capsize=3)
        axes.plot(published, i, marker='x', color='black', linestyle='none', label=None if i else 'paper, ImageNet')
    edge = max(abs(bound) for _, d, h, p, _ in pairs for bound in (d - h, d + h, 0.0 if p != p else p))
    axes.set_xlim(-1.08 * edge, 1.08 * edge)
    axes.set_yticks(range(len(pairs)), [label for label, *_ in pairs], fontsize=8)
    right = axes.secondary_yaxis('right')
    right.set_yticks(range(len(pairs)), [verdict for *_, verdict in pairs], fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set(xlabel='points of top-1, first minus second, with 95 % interval')
    axes.grid(alpha=0.3, axis='x')
    figure.legend(frameon=False, fontsize=8, ncols=2, loc='outside lower center')
    figure.suptitle('\n'.join(textwrap.wrap(conditions, 115)), fontsize=8)
    figure.savefig(file, dpi=150)
