"""Pictures of a run, as PNG files: curves, confusion, predictions. Colours are Okabe and Ito's, for every eye."""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'


def plot_curves(records: Sequence[Dict[str, Any]], file: Path) -> None:
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
        axes.grid(alpha=.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def plot_confusion(counts: torch.Tensor, classes: Sequence[str], file: Path) -> None:
    """counts[true][predicted] as shares of each true class; names and numbers where there is room for them."""
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
                    axes.text(j, i, str(int(counts[i, j])), ha='center', va='center', fontsize=8,
                              color='black' if shares[i, j] > .5 else 'white')
    figure.colorbar(image, shrink=.7, label='share of the true class')
    figure.savefig(file, dpi=150)


def plot_predictions(rows: List[Tuple[Image.Image, str, float, str]], file: Path) -> None:
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
        ax.set_title(f'{name}  {100 * probability:.0f} %' + (f'\nis {truth}' if wrong else ''), fontsize=9,
                     color=RED if wrong else 'black')
    figure.savefig(file, dpi=150)

