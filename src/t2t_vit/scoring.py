"""Score a model during training: loss, top-1, top-5 and confusion, over all processes."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from .data import Batch, DataError


@dataclass
class Scores:
    """Scores of n images: mean cross-entropy, accuracies in [0, 1], and `counts[true][predicted]`."""

    count: int
    loss: float
    top1: float
    top5: float
    confusion: torch.Tensor

    @property
    def per_class(self) -> list[float | None]:
        """The fraction of each class's images that were recognised; None for a class without images."""
        counts = self.confusion.sum(1)
        return [(self.confusion[i, i] / n).item() if n else None for i, n in enumerate(counts)]


@torch.inference_mode()
def score(model: nn.Module, batches: Iterable[Batch], num_classes: int) -> Scores:
    """Run the model over all batches, each process over its own; all processes get the scores of the whole.

    The model is left in the mode it was in.

    Raises:
        DataError: if no image can be read.
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
    loss = MeanMetric(nan_strategy=math.nan).to(device)  # NaN stays NaN
    for images, labels, *_ in batches:
        logits = model(images.to(device)).float()
        labels = labels.to(device)
        loss.update(F.cross_entropy(logits, labels, reduction='none'))
        metrics.update(logits, labels)
    model.train(training)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='The ``compute`` method')  # of a process that got no images
        result, mean = metrics.compute(), loss.compute().item()
    count = int(result['confusion'].sum())
    if not count:
        raise DataError('not one image could be read')
    return Scores(count, mean, result['top1'].item(), result['top5'].item(), result['confusion'].cpu())
