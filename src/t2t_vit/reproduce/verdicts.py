"""Judge the paper's claims by the runs of a comparison.

Top-1 after the last epoch is compared, never the best epoch's. The standard deviation s over seeds is pooled over all
arms (one-way analysis of variance): s² = Σ (n_a − 1)·s_a² / ν with ν = Σ (n_a − 1) degrees of freedom. A pair of arms
with n₁ and n₂ seeds has the difference of means d with the standard error s·√(1/n₁ + 1/n₂), and

    first > second    t test of d = 0; holds if d is significantly positive, does not hold if it is negative
    first < second    the other way round
    first = second    TOST: two one-sided t tests of |d| ≥ MARGIN; holds if both are significant. It does not hold if d
                      is significantly outside ±MARGIN

Holm's method corrects the p-values for the number of judged pairs, so that the probability of any wrong verdict is at
most 5 %. The printed intervals are 95 % intervals of single pairs, without that correction.

Assumptions: seeds vary equally in all arms. Sampling of the validation images is not part of the variation over seeds.
With ν < 3 nothing is decided; the intervals are then those of two proportions over the validation images (normal
approximation), for orientation only.

A pair is not judged if an arm's interval reaches down to the fraction of the largest class (it did not learn), or if
its ratio of parameters differs from the published one by more than SIZE_TOLERANCE (it is another comparison).
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .arms import PAIRS, REFERENCE, Pair, published_ratio

MARGIN = 1.0  # points of top-1 that count as no difference
CONFIDENCE = 0.95
MIN_FREEDOM = 3  # degrees of freedom below which the variation over seeds counts as unknown
SIZE_TOLERANCE = 0.05  # of a pair's published ratio of parameters
HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not decided by these runs'


class Arm(NamedTuple):
    """Hold the runs of an arm: top-1 in percent for each seed, and what the seeds have in common."""

    name: str
    top1: list[float]
    seeds: list[int]
    parameters: int
    macs: float
    macs_weights: float
    images_per_second: float  # median
    val_images: int
    custom: bool

    @property
    def mean(self) -> float:
        """Return the mean top-1 over seeds."""
        return fmean(self.top1)


class Verdict(NamedTuple):
    """Hold a pair's difference in points of top-1 (first minus second) and the verdict; None without runs."""

    pair: Pair
    difference: float | None
    half: float | None  # half the width of the interval of this pair alone
    p: float | None  # corrected by Holm's method; None if the pair is not judged
    size: float | None  # parameters, first over second
    text: str
    seeds: str


def gather(results: Sequence[dict[str, Any]]) -> dict[str, Arm]:
    """Return the arms by name, from the results of single runs."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result['arm'], []).append(result)
    found = {}
    for name, rows in arms.items():
        rows = sorted(rows, key=lambda row: row['seed'])
        speeds = sorted(row['images_per_second'] for row in rows)
        found[name] = Arm(
            name,
            [100 * row['top1'] for row in rows],
            [row['seed'] for row in rows],
            rows[0]['parameters'],
            rows[0]['macs'],
            rows[0]['macs_weights'],
            speeds[len(speeds) // 2],
            rows[0]['val_images'],
            rows[0]['custom'],
        )
    return found


def pooled_std(arms: Sequence[Arm]) -> tuple[float, int]:
    """Return the standard deviation over seeds within arms, in points, and its degrees of freedom."""
    freedom = sum(len(arm.top1) - 1 for arm in arms)
    if not freedom:
        return math.nan, 0
    squares = sum((len(arm.top1) - 1) * variance(arm.top1) for arm in arms if len(arm.top1) > 1)
    return math.sqrt(squares / freedom), freedom


def standard_error(compared: Sequence[Arm], arms: Sequence[Arm]) -> float:
    """Return the standard error of one arm's mean, or of the difference of two, with the std pooled over `arms`."""
    return pooled_std(arms)[0] * math.sqrt(sum(1 / len(arm.top1) for arm in compared))


def half_width(compared: Sequence[Arm], arms: Sequence[Arm]) -> float:
    """Return half the width of the interval of one arm's mean, or of the difference of two."""
    freedom = pooled_std(arms)[1]
    if freedom >= MIN_FREEDOM:
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * standard_error(compared, arms)
    variances = sum(arm.mean * (100 - arm.mean) / arm.val_images for arm in compared)
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variances)


def obstacle(first: Arm, second: Arm, arms: Sequence[Arm], chance: float, relation: str) -> str:
    """Return why a pair cannot be judged, or an empty string."""
    if idle := [arm.name for arm in (first, second) if arm.mean - half_width([arm], arms) <= chance]:
        return f'{OPEN}: {" and ".join(idle)} did not learn'
    if relation != '?':
        size, published = first.parameters / second.parameters, published_ratio(first.name, second.name)
        if abs(size / published - 1) > SIZE_TOLERANCE:
            return f'not judged: size ratio {size:.2f}, in the paper {published:.2f}'
    if pooled_std(arms)[1] < MIN_FREEDOM:
        return f'not decided ({"one seed" if min(len(first.top1), len(second.top1)) == 1 else "too few seeds"})'
    return ''


def p_value(difference: float, error: float, freedom: int, relation: str) -> float:
    """Return the p-value of the hypothesis that the sign, or for '=' the size, of a difference points to."""
    distance = abs(difference)
    if relation != '=':
        return float(2 * stats.t.sf(distance / error, freedom))
    if distance < MARGIN:  # TOST: the larger of the two one-sided p-values
        return float(stats.t.sf((MARGIN - distance) / error, freedom))
    return float(2 * stats.t.sf((distance - MARGIN) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down method, in the order given."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def judge(difference: float, p: float, relation: str) -> str:
    """Return the verdict on a relation."""
    if p >= 1 - CONFIDENCE:
        return OPEN
    if relation == '?':
        return 'better' if difference > 0 else 'worse'
    if relation == '=':
        return HOLDS if abs(difference) < MARGIN else FAILS
    return HOLDS if (difference > 0) == (relation == '>') else FAILS


def verdicts(arms: dict[str, Arm], chance: float) -> list[Verdict]:
    """Judge every pair of the paper, and every custom design against T2T-ViT-14.

    Args:
        arms: Arms by name.
        chance: Top-1 of always answering the largest class, in percent.
    """
    custom = [Pair('your design', name, '?', REFERENCE, math.nan) for name, arm in arms.items() if arm.custom]
    everyone, freedom = list(arms.values()), pooled_std(list(arms.values()))[1]
    found: list[Verdict] = []
    for pair in [*PAIRS, *custom]:
        first, second = arms.get(pair.first), arms.get(pair.second)
        if first is None or second is None:
            found.append(Verdict(pair, None, None, None, None, 'not run', '–'))
            continue
        difference, half = first.mean - second.mean, half_width([first, second], everyone)
        text = obstacle(first, second, everyone, chance, pair.relation)
        error = standard_error([first, second], everyone)
        p = None if text else p_value(difference, error, freedom, pair.relation)
        size = first.parameters / second.parameters
        found.append(Verdict(pair, difference, half, p, size, text, f'{len(first.top1)} and {len(second.top1)}'))
    corrected = iter(holm([v.p for v in found if v.p is not None]))
    for i, v in enumerate(found):
        if v.p is not None and v.difference is not None:
            p = next(corrected)
            found[i] = v._replace(p=p, text=judge(v.difference, p, v.pair.relation))
    return found


def overall(found: Sequence[Verdict]) -> str:
    """Return the verdict on a claim: it holds if all of its pairs do, and does not hold if one of them does not."""
    texts = [verdict.text for verdict in found if verdict.difference is not None]
    if any(text.startswith(FAILS) for text in texts):
        return FAILS
    return HOLDS if len(texts) == len(found) and all(text == HOLDS for text in texts) else OPEN
