"""Measures equal scikit-learn's, and intervals cover them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, roc_auc_score

from t2t_vit.metrics import Measures, bootstrap, measure, rates


@pytest.fixture(scope='module')
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of 300 images of four classes; the last has none."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=chance)
    logits = torch.randn(300, 4, generator=chance) * 2
    logits[torch.arange(300), labels] += 2
    return logits, labels


@pytest.fixture(scope='module')
def found(answers) -> Measures:
    return measure(*answers, temperature=True)


def test_measures_equal_scikit_learns(answers, found):
    logits, labels = answers
    predicted, present = logits.argmax(1), [0, 1, 2]
    macro = dict(labels=present, average='macro', zero_division=0)
    assert found.precision == pytest.approx(precision_score(labels, predicted, **macro))
    assert found.f1 == pytest.approx(f1_score(labels, predicted, **macro))
    recalls = [(predicted[labels == c] == c).float().mean().item() for c in present]
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls))
    only = predicted[predicted < 3], labels[predicted < 3]
    assert measure(logits[predicted < 3, :3], only[1]).balanced_accuracy == pytest.approx(
        balanced_accuracy_score(only[1], only[0])
    )
    areas = [roc_auc_score(labels == c, logits.softmax(1)[:, c]) for c in present]
    assert found.auroc == pytest.approx(np.mean(areas), abs=1e-5)
    assert found.per_class['auroc'][3] is None and found.per_class['recall'][3] is None
    assert found.confusion.sum() == 300 and found.top1 == pytest.approx(np.trace(found.confusion) / 300)
    assert rates((labels * 4 + predicted).numpy(), 4) == pytest.approx(
        (found.balanced_accuracy, found.precision, found.f1)
    )


def test_intervals_hold_their_values(answers, found):
    for name, (low, high) in found.intervals.items():
        assert 0 <= low < high <= 1
        if name != 'calibration_error':  # a resample adds noise, which raises it
            assert low <= getattr(found, name) <= high
    low, high = found.intervals['top1']
    assert 0.08 < high - low < 0.13  # of 300 images
    logits, labels = answers
    top = logits.softmax(1).max(1)
    assert bootstrap(logits.softmax(1), labels, top.indices, top.values)['f1'] == found.intervals['f1']  # repeatable


def test_temperature_calibrates(answers, found):
    """Logits twice as large as the true ones have a temperature of twice as much, and are calibrated by it."""
    logits, labels = answers
    twice = measure(2 * logits, labels, temperature=True)
    assert twice.temperature == pytest.approx(2 * found.temperature, rel=1e-2)
    assert twice.calibration_error > 2 * twice.calibration_error_scaled
    assert measure(logits, labels).temperature is None


def test_few_images():
    one = measure(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), temperature=True)
    assert (one.top1, one.images, one.auroc) == (1.0, 1, None) and one.intervals['top1'][0] < 0.3
