"""Scores of a model on labelled images: loss, top-1, top-5, per class, confusion."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from .console import console
from .data import DataError, DiskBatches, MemoryBatches, open_batches, open_source
from .plots import plot_confusion
from .settings import require
from .trained import load_model, other_classes, pick_device


@dataclass
class Scores:
    """Of n images: mean cross-entropy, shares of right answers in [0, 1], and `counts[true][predicted]`."""

    count: int
    loss: float
    top1: float
    top5: float
    confusion: torch.Tensor

    @property
    def per_class(self) -> list[float | None]:
        """Share of each class's images that were recognised; None where there were none."""
        counts = self.confusion.sum(1)
        return [(self.confusion[i, i] / n).item() if n else None for i, n in enumerate(counts)]


@torch.inference_mode()
def score(model: nn.Module, batches: 'DiskBatches | MemoryBatches', num_classes: int) -> Scores:
    """Run the model over all batches, each process over its own; all get the scores of the whole.

    The model is left in the mode it was in.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    metrics = MetricCollection(
        {
            'top1': MulticlassAccuracy(num_classes, average='micro'),
            'top5': MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average='micro'),
            'confusion': MulticlassConfusionMatrix(num_classes),
        }
    ).to(device)
    loss = MeanMetric(nan_strategy=math.nan).to(device)  # what is not a number stays so
    for images, labels, *_ in batches.epoch():
        logits = model(images.to(device)).float()
        labels = labels.to(device)
        loss.update(F.cross_entropy(logits, labels, reduction='none'))
        metrics.update(logits, labels)
    model.train(training)
    result, mean = metrics.compute(), loss.compute().item()
    count = int(result['confusion'].sum())
    if not count:
        raise DataError('not one image could be read')
    return Scores(count, mean, result['top1'].item(), result['top5'].item(), result['confusion'].cpu())


def evaluate(
    checkpoint: str,
    data: str = 'digits',
    model: str | None = None,
    split: Literal['train', 'val'] = 'val',
    batch_size: int = 128,
    workers: int = 2,
    device: str = 'auto',
    cache: str | None = None,
    download: bool = False,
    output: str | None = None,
) -> dict[str, Any]:
    """Score a trained model on labelled images; of a data set, only the split asked for is needed.

    Args:
        checkpoint: A run's folder, hf-hub:USER/NAME, or a file in any published layout (then with --model).
        data: digits, torch/NAME, hfds/NAME, a folder with val/ of class folders, a folder of class folders, or a
            Parquet file or tar, or a folder of them.
        model: The registered name of the model in a file.
        split: val or train.
        batch_size: Images at once.
        workers: Processes that open images.
        device: cpu, cuda, mps or auto.
        cache: Where torch/ and hfds/ sets are kept; by default ~/.cache/t2t-vit, and the Hub's own.
        download: Fetch a torch/ set that is not there.
        output: Folder for scores.json and confusion.png; by default the run's own, none for a file.
    """
    require(
        (
            (batch_size >= 1, f'batch_size is at least 1, got {batch_size}'),
            (workers >= 0, f'workers is at least 0, got {workers}'),
        )
    )
    target = pick_device(device)
    source = open_source(data, split, cache, download)
    net, preprocessing, names = load_model(checkpoint, model)
    if problem := other_classes(net, source.classes, data):
        raise DataError(problem)
    batches = open_batches(source, preprocessing, batch_size, None, None, workers, device=target)
    start = time.perf_counter()
    try:
        scores = score(net.to(target), batches, len(names))
    finally:
        batches.close()
    seconds = time.perf_counter() - start

    screen = console()
    table = Table('class', 'images', 'accuracy')
    for name, share, n in zip(source.classes, scores.per_class, scores.confusion.sum(1).tolist()):
        table.add_row(name, str(n), '-' if share is None else f'{100 * share:.1f} %')
    screen.print(table)
    screen.print(
        f'top-1 {100 * scores.top1:.2f} %   top-5 {100 * scores.top5:.2f} %   loss {scores.loss:.4f}   '
        f'{scores.count / seconds:.0f} images/s   {scores.count} images of {data} ({split})',
        soft_wrap=True,
    )
    if batches.damaged:
        damaged = ', '.join(batches.damaged[:5])
        screen.print(f'{len(batches.damaged)} damaged images left out: {damaged}', soft_wrap=True)
    result = dict(
        checkpoint=checkpoint,
        data=data,
        split=split,
        images=scores.count,
        top1=scores.top1,
        top5=scores.top5,
        loss=scores.loss,
        per_class=dict(zip(source.classes, scores.per_class)),
        damaged=batches.damaged,
    )
    folder = Path(output) if output else Path(checkpoint) if Path(checkpoint).is_dir() else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'scores.json').write_text(json.dumps(result, indent=2) + '\n')
        plot_confusion(scores.confusion, source.classes, folder / 'confusion.png')
        screen.print(f'scores.json and confusion.png are in {folder}', soft_wrap=True)
    return result
