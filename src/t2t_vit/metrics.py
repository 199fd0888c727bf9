"""Measures of a classifier from its logits on labelled images, with confidence intervals.

Letters: N images, C classes, R resamples.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_auroc,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

RESAMPLES, CONFIDENCE = 200, 0.95
MOST_AUROC = 1_000_000  # N x C values up to which the AUROC is resampled too
BINS = 15  # of the calibration error
EXACT_AUROC = 50_000_000  # N x C values up to which the AUROC has no bins
Interval = tuple[float, float]


@dataclass
class Measures:
    """Measures of N images; rates lie in [0, 1], averages are over the classes that have images.

    `per_class` holds, for each class, `recall` (the fraction of its images that were recognised), `precision`, `f1` and
    `auroc` (one against the rest); None where a class has no images. `intervals` are 95 % confidence intervals:
    Wilson's for top-1 and top-5, percentiles of a bootstrap over images for the others.
    """

    images: int
    loss: float
    top1: float
    top5: float
    balanced_accuracy: float
    precision: float
    f1: float
    auroc: float | None
    calibration_error: float
    temperature: float | None
    calibration_error_scaled: float | None
    intervals: dict[str, Interval]
    per_class: dict[str, list[float | None]]
    confusion: np.ndarray  # (C, C) counts, [true][predicted]


def measure(logits: torch.Tensor, labels: torch.Tensor, temperature: bool = False) -> Measures:
    """Measure a classifier.

    Args:
        logits: (N, C), finite.
        labels: (N,), from 0 to C - 1.
        temperature: Also fit the temperature that calibrates the probabilities; its calibration error is measured by
            cross-fitting: each half of the images with the temperature of the other half.
    """
    logits, labels = logits.float().cpu(), labels.long().cpu()
    count, classes = logits.shape
    probabilities = logits.softmax(1)
    predicted = logits.argmax(1)
    right = predicted == labels
    in_top5 = (logits.topk(min(5, classes)).indices == labels[:, None]).any(1)
    support = torch.bincount(labels, minlength=classes)
    auroc = area_under_roc(probabilities, labels, support)
    values = {
        'recall': multiclass_recall(predicted, labels, classes, average=None),
        'precision': multiclass_precision(predicted, labels, classes, average=None),
        'f1': multiclass_f1_score(predicted, labels, classes, average=None),
        'auroc': auroc,
    }
    present = support > 0
    per_class = {
        name: [value if there and not math.isnan(value) else None for value, there in zip(column.tolist(), present)]
        for name, column in values.items()
    }
    confidence = probabilities.gather(1, predicted[:, None])[:, 0]
    scale, scaled = fit_temperature(logits, labels) if temperature else (None, None)
    return Measures(
        images=count,
        loss=F.cross_entropy(logits, labels).item(),
        top1=right.float().mean().item(),
        top5=in_top5.float().mean().item(),
        **{
            name: mean_of(per_class[key]) or 0.0
            for name, key in (('balanced_accuracy', 'recall'), ('precision', 'precision'), ('f1', 'f1'))
        },
        auroc=mean_of(per_class['auroc']),
        calibration_error=calibration_error(confidence, right),
        temperature=scale,
        calibration_error_scaled=scaled,
        intervals={
            'top1': proportion_interval(int(right.sum()), count),
            'top5': proportion_interval(int(in_top5.sum()), count),
            **bootstrap(probabilities, labels, predicted, confidence),
        },
        per_class=per_class,
        confusion=multiclass_confusion_matrix(predicted, labels, classes).numpy(),
    )


def mean_of(values: list[float | None]) -> float | None:
    """Return the mean of the values that are there; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def area_under_roc(probabilities: torch.Tensor, labels: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """Return the AUROC of each class against the rest, (C,); NaN where a class has no images, or all."""
    classes = probabilities.shape[1]
    bins = None if probabilities.numel() <= EXACT_AUROC else 1000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about classes without images, which are masked below
        areas = multiclass_auroc(probabilities, labels, classes, average=None, thresholds=bins)
    return areas.where((support > 0) & (support < len(labels)), math.nan)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """Return the expected calibration error: |confidence - accuracy|, averaged over `BINS` bins of confidence."""
    return binary_calibration_error(confidence, right.long(), n_bins=BINS, norm='l1').item()


def proportion_interval(successes: int, count: int) -> Interval:
    """Return Wilson's confidence interval of a proportion."""
    found = binomtest(successes, count).proportion_ci(CONFIDENCE, method='wilson')
    return float(found.low), float(found.high)


def bootstrap(
    probabilities: torch.Tensor, labels: torch.Tensor, predicted: torch.Tensor, confidence: torch.Tensor
) -> dict[str, Interval]:
    """Return percentile intervals over R resamples of the images, always the same ones."""
    count, classes = probabilities.shape
    chance = np.random.default_rng(0)
    cells = (labels * classes + predicted).numpy()
    right = predicted == labels
    statistics: dict[str, Callable[[np.ndarray], Any]] = {
        'balanced_accuracy': lambda chosen: rates(cells[chosen], classes)[0],
        'precision': lambda chosen: rates(cells[chosen], classes)[1],
        'f1': lambda chosen: rates(cells[chosen], classes)[2],
        'calibration_error': lambda chosen: calibration_error(confidence[chosen], right[chosen]),
    }
    if probabilities.numel() <= MOST_AUROC // 10:
        statistics['auroc'] = lambda chosen: area_under_roc(
            probabilities[chosen], labels[chosen], torch.bincount(labels[chosen], minlength=classes)
        ).nanmean()
    rounds = RESAMPLES if probabilities.numel() <= MOST_AUROC else RESAMPLES // 4
    found: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(rounds):
        chosen = chance.integers(count, size=count)
        for name, statistic in statistics.items():
            found[name].append(float(statistic(chosen)))
    tail = (1 - CONFIDENCE) / 2
    known = {name: [value for value in values if not math.isnan(value)] for name, values in found.items()}
    return {name: tuple(np.quantile(values, (tail, 1 - tail)).tolist()) for name, values in known.items() if values}


def rates(cells: np.ndarray, classes: int) -> tuple[float, float, float]:
    """Return mean recall, precision and F1 of the classes with images; `cells` are true x C + predicted, (N,)."""
    confusion = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    hits, support, named = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    there = support > 0
    hits, support, named = hits[there], support[there], named[there]
    precision = hits / np.maximum(named, 1)
    return float((hits / support).mean()), float(precision.mean()), float((2 * hits / (support + named)).mean())


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return the temperature of the least cross-entropy on all images, and the cross-fitted calibration error."""

    def best(chosen: torch.Tensor) -> float:
        some, truth = logits[chosen], labels[chosen]
        found = minimize_scalar(
            lambda log: F.cross_entropy(some / math.exp(log), truth).item(), bounds=(-4, 4), method='bounded'
        )
        return math.exp(found.x)

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    halves = order.tensor_split(2)
    if not len(halves[1]):
        halves = (order, order)
    confidence, right = [], []
    for half, other in (halves, halves[::-1]):
        top = (logits[half] / best(other)).softmax(1).max(1)
        confidence.append(top.values)
        right.append(top.indices == labels[half])
    return best(order), calibration_error(torch.cat(confidence), torch.cat(right))
