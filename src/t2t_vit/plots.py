"""Plots of runs, scores and benchmarks, as PNG files, in the colours of Okabe and Ito, which every eye tells apart."""

import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from PIL import Image

BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
CYCLE = (BLUE, ORANGE, GREEN, RED, '#CC79A7', '#56B4E9', '#000000', '#999999')
MARKERS = 'osD^vPX*'
DPI = 150
CJK = ('CJK', 'HIRAGANA', 'KATAKANA', 'HANGUL')  # first words of Unicode names


def style(index: int) -> tuple[str, str]:
    """Return the colour and marker of line `index`; the first 64 pairs differ."""
    return CYCLE[index % len(CYCLE)], MARKERS[(index + index // len(CYCLE)) % len(MARKERS)]


def save_figure(figure: Figure, file: Path, dpi: float = DPI, bbox: str | None = None) -> Path:
    """Write a figure as a PNG file and return the file; all text is literal, so `$` starts no formula.

    With `bbox` 'tight' the picture is as large as its content.
    """
    texts: list[Any] = figure.findobj(Text)
    for text in texts:
        text.set_parse_math(False)
    choose_fonts(texts)
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # see `choose_fonts`
        figure.savefig(file, dpi=dpi, bbox_inches=bbox, pad_inches=0.03)  # no wider than the figure
    return file


def choose_fonts(texts: Sequence[Text]) -> None:
    """Let texts use other installed fonts for characters that the usual font lacks; say once which no font has."""
    usual = font_manager.findfont(FontProperties())
    lacking = {c for text in texts for c in text.get_text() if c.isprintable() and ord(c) not in characters(usual)}
    if not lacking:
        return
    names, missing = fonts_for(frozenset(lacking))
    for text in texts:
        if lacking & {*text.get_text()}:
            text.set_fontfamily([*text.get_fontfamily(), *names])
    if missing:
        warn_missing(''.join(sorted(missing)))


@cache
def characters(file: str) -> frozenset[int]:
    """Return the code points of a font file that matplotlib can draw; none if it cannot be read."""
    try:
        font = font_manager.get_font(file)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):  # colour bitmaps, damaged files
        return frozenset()


@cache
def fonts_for(wanted: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Return the names of installed fonts that have these characters, and the characters that no font has."""
    regular = [font for font in font_manager.fontManager.ttflist if font.style == 'normal' and font.weight == 400]
    names: list[str] = []
    for font in sorted(regular, key=lambda font: (not font.name.startswith('Noto'), font.name)):
        if found := {c for c in wanted if ord(c) in characters(font.fname)}:
            names, wanted = [*names, font.name], wanted - found
        if not wanted:
            break
    return names, wanted


@cache
def warn_missing(missing: str) -> None:
    """Say once that characters are drawn as boxes, and which fonts have them."""
    scripts = {unicodedata.name(c, 'SYMBOLS').split()[0] for c in missing}
    fonts = sorted({'Noto Sans CJK' if name in CJK else f'Noto Sans {name.title()}' for name in scripts})
    print(
        f't2t-vit: no installed font has {missing[:20]}{"…" * (len(missing) > 20)}, drawn as boxes in pictures; tables '
        f'have the names. Install {" and ".join(fonts[:3])}',
        file=sys.stderr,
    )


def one_line(name: str, width: int = 40) -> str:
    """Return a name in one printable line of at most `width` characters."""
    words = ' '.join(''.join(c if c.isprintable() else ' ' for c in name).split())
    return words if len(words) <= width else f'{words[: width - 1]}…'


def use_log_scale(axes: Axes, which: Literal['x', 'y']) -> None:
    """Make an axis logarithmic, after its data are drawn, with ticks in plain numbers."""
    axes.set(**{f'{which}scale': 'log'})
    axis = axes.xaxis if which == 'x' else axes.yaxis
    low, high = axes.get_xlim() if which == 'x' else axes.get_ylim()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(5))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_locator(NullLocator())


class Best(NamedTuple):
    """The best validation score of a run, which is that of the weights it saved."""

    epoch: int  # counted from 1
    suffix: str  # of the keys in metrics.jsonl: '' for the weights, '_ema' for their moving average
    top1: float


def best_epoch(records: Sequence[dict[str, Any]]) -> Best:
    """Find the best score in the records of metrics.jsonl; of equal ones the last, as training saves it."""
    found = [
        Best(record['epoch'] + 1, suffix, record[f'val_top1{suffix}'])
        for record in records
        for suffix in ('_ema', '')
        if f'val_top1{suffix}' in record
    ]
    return max(reversed(found), key=lambda best: best.top1)


def plot_curves(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot loss and accuracy over epochs from the records of metrics.jsonl, with the best epoch marked."""
    epochs = [record['epoch'] + 1 for record in records]
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [r['train_loss'] for r in records], color=ORANGE, label='training (augmented)')
    for suffix, color, label in (('', BLUE, 'validation'), ('_ema', GREEN, 'validation, EMA weights')):
        scored = [r for r in records if f'val_top1{suffix}' in r]
        if scored:
            at = [r['epoch'] + 1 for r in scored]
            left.plot(at, [r[f'val_loss{suffix}'] for r in scored], color=color, label=label)
            right.plot(at, [100 * r[f'val_top1{suffix}'] for r in scored], color=color)
    best = best_epoch(records)
    right.plot(best.epoch, 100 * best.top1, marker='o', color=GREEN if best.suffix else BLUE)
    kind = ' (EMA weights)' if best.suffix else ''
    left.set(xlabel='epoch', ylabel='loss (cross-entropy)', title='Loss')
    title = f'Best top-1 {100 * best.top1:.2f} % in epoch {best.epoch}{kind}'
    right.set(xlabel='epoch', ylabel='top-1 (%)', title=title)
    use_log_scale(left, 'y')
    for axes in (left, right):
        axes.axvline(best.epoch, color='#999999', linestyle=':', zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
    save_figure(figure, file)


def plot_confusion(counts: torch.Tensor, classes: Sequence[str], file: Path, title: str = '') -> None:
    """Plot `counts[true][predicted]` with the top-1; names and counts are left out of large tables."""
    fractions = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    n, total, right = len(classes), int(counts.sum()), int(counts.trace())
    figure = Figure(figsize=(min(4 + 0.32 * n, 16),) * 2, layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(fractions, cmap='cividis', vmin=0, vmax=1)
    score = f'top-1 {100 * right / max(total, 1):.2f} %: {right} of {total} images'
    axes.set_title('\n'.join([*textwrap.wrap(one_line(title, 120), 60), score]), fontsize=10)
    axes.set(xlabel='predicted', ylabel='true (number of images)')
    if n <= 40:
        names = [one_line(name, 24) for name in classes]
        axes.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(n), [f'{name} ({int(count)})' for name, count in zip(names, counts.sum(1))])
        for i, j in counts.nonzero().tolist():
            color = 'black' if fractions[i, j] > 0.5 else 'white'
            axes.text(j, i, str(int(counts[i, j])), ha='center', va='center', fontsize=8 if n <= 20 else 6, color=color)
    figure.colorbar(image, shrink=0.7, label='fraction of the true class')
    save_figure(figure, file)


def plot_predictions(rows: list[tuple[Image.Image, str, float, str]], file: Path) -> None:
    """Plot images with the predicted class, its probability, and the true class ('' if unknown) where it differs."""
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
            f'{one_line(name, 20)}  {100 * probability:.0f} %' + (f'\ntrue: {one_line(truth, 20)}' if wrong else ''),
            fontsize=9,
            color=RED if wrong else 'black',
        )
    save_figure(figure, file, bbox='tight')  # titles lie outside of the axes of narrow images


def plot_sizes(curves: dict[str, list[tuple[int, float, float | None]]], conditions: str, file: Path) -> None:
    """Plot time, and memory if it was measured, over image size.

    Args:
        curves: For each model, (side in pixels, ms per image, MB or None) of each size.
        conditions: The title.
        file: The picture.
    """
    measured = any(mb for points in curves.values() for _, _, mb in points)
    figure = Figure(figsize=(9 if measured else 5, 3.6), layout='constrained')
    panels = figure.subplots(1, 1 + measured, squeeze=False)[0]
    for i, (name, points) in enumerate(curves.items()):
        color, marker = style(i)
        sizes = [size for size, _, _ in points]
        panels[0].plot(sizes, [ms for _, ms, _ in points], color=color, marker=marker, label=name)
        known = [(size, mb) for size, _, mb in points if mb]
        panels[-1].plot([size for size, _ in known], [mb for _, mb in known], color=color, marker=marker)
    for axes, label in zip(panels, ('ms per image', 'peak memory of a step (MB)')):
        axes.set(xlabel='image side (pixels)', ylabel=label)
        use_log_scale(axes, 'x')
        use_log_scale(axes, 'y')
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=4 if measured else 2, frameon=False, fontsize=8)
    figure.suptitle('\n'.join(textwrap.wrap(conditions, 110 if measured else 60)), fontsize=9)
    save_figure(figure, file)


def plot_speed(points: dict[str, tuple[float, float]], family: Sequence[str], conditions: str, file: Path) -> None:
    """Plot top-1 against speed: model -> (images/s, top-1 in %); the models of `family` are joined by a line."""
    figure = Figure(figsize=(7, 4.2), layout='constrained')
    axes = figure.subplots()
    line = sorted(points[name] for name in points if name in family)
    axes.plot([x for x, _ in line], [y for _, y in line], color=BLUE, alpha=0.3)
    for name, (x, y) in points.items():
        member = name in family
        axes.plot(x, y, marker='o' if member else 's', color=BLUE if member else ORANGE, linestyle='none')
    axes.set(xlabel='images/s', ylabel='published top-1 on ImageNet (%)', xscale='log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))  # labels of nine ticks a decade would touch
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.15)
    axes.grid(alpha=0.3, which='both')
    axes.set_title('\n'.join(textwrap.wrap(conditions, 80)), fontsize=9)
    label_points(figure, axes, points)
    save_figure(figure, file)


def label_points(figure: Figure, axes: Axes, points: dict[str, tuple[float, float]]) -> list[Annotation]:
    """Write names beside points, each at the first of a few positions where it covers no other name and no point."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # computes the layout
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
    for i, (name, point) in enumerate(points.items()):
        label = axes.annotate(name, point, xytext=(0, 0), textcoords='offset points', fontsize=8, parse_math=False)
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
    """Plot top-1 and size of arms: name, parameters, top-1 of each seed (%), half the interval of the mean, custom."""
    kinds = {'T2T-ViT': BLUE, 'ViT': ORANGE, 'CNN': GREEN, 'your design': RED}
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(arms)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for i, (name, parameters, top1, half, custom) in enumerate(arms):
        family = 'T2T-ViT' if name.startswith('t2t') else 'ViT' if name.startswith('vit') else 'CNN'
        kind = 'your design' if custom else family
        left.errorbar(sum(top1) / len(top1), i, xerr=half, fmt='o', color=kinds[kind], markersize=4, capsize=3)
        left.plot(top1, [i] * len(top1), marker='|', color='black', linestyle='none', markersize=11, zorder=3)
        right.barh(i, parameters / 1e6, color=kinds[kind], label=kind, height=0.6)
    left.set_yticks(range(len(arms)), [name for name, *_ in arms], fontsize=8)
    left.set_ylim(len(arms) - 0.4, -0.6)
    left.set(xlabel='top-1 (%): mean with 95 % interval, seeds as dashes')
    right.set(xlabel='million parameters')
    for axes in (left, right):
        axes.grid(alpha=0.3, axis='x')
    handles, labels = right.get_legend_handles_labels()
    shown = dict(zip(labels, handles))  # one entry a colour
    figure.legend(shown.values(), shown.keys(), frameon=False, fontsize=8, ncols=4, loc='outside lower center')
    figure.suptitle('\n'.join(textwrap.wrap(conditions, 115)), fontsize=8)
    save_figure(figure, file)


def plot_differences(
    pairs: Sequence[tuple[str, float, float, float, str]], margin: float, conditions: str, file: Path
) -> None:
    """Plot differences in top-1: label, difference in points, half its interval, the paper's difference, verdict."""
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
    save_figure(figure, file)
