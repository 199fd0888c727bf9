"""What the runs say of each claim, by one stated test.

Top-1 behind the last epoch is compared, never the best epoch's. The test is a two-sided t test at 95 % on the
difference of two arms' means over seeds, with one variance for all arms, pooled within them (one-way analysis of
variance, Fisher's least significant difference):

    d ± t(0.975, ν) · s · √(1/n₁ + 1/n₂),   s² = Σ (n_a − 1)·s_a² / ν,   ν = Σ (n_a − 1).

It assumes that seeds scatter alike in all arms; with two or three seeds an arm this is what makes an interval of use at
all. Claims are tested one by one, without a correction for their number, and on one validation set, whose own sampling
the scatter over seeds does not hold. With ν < 3 that scatter is as good as unknown, and nothing is decided: the
interval that is shown then is that of two proportions over the validation images (normal approximation), for
orientation only.

    first > second    holds: the whole interval is above 0; does not hold: it is below
    first < second    the other way round
    first = second    holds: the interval lies within ± MARGIN points; does not hold: it lies outside

An arm whose own interval reaches down to the share of the largest class has not learned, and decides nothing. A pair
whose ratio of parameters is more than CLOSE off the published one is another comparison than the paper's, and is not
judged.
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

from scipy import stats

from .arms import PAIRS, REFERENCE, Pair, published_share

MARGIN = 1.0  # points of top-1 that count as no difference
CONFIDENCE = 0.95
MIN_FREEDOM = 3  # degrees of it, below which the scatter over seeds is not known
CLOSE = 0.05  # of a pair's published ratio of parameters
HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'not decided by these runs'


class Arm(NamedTuple):
    """An arm's runs: top-1 in percent of each seed, and what they share."""

    name: str
    top1: list[float]
    seeds: list[int]
    parameters: int
    macs: float
    macs_weights: float
    images_per_second: float  # median
    val_images: int
    own: bool

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.top1)


class Verdict(NamedTuple):
    """A pair's difference in points of top-1, first minus second, its interval and what follows; None without runs."""

    pair: Pair
    difference: float | None
    half: float | None  # half of the interval's width
    size: float | None  # parameters, first over second
    text: str
    seeds: str


def gather(results: Sequence[dict[str, Any]]) -> dict[str, Arm]:
    """Arms by name, of the results of single runs."""
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
            rows[0]['own'],
        )
    return found


def pooled(arms: Sequence[Arm]) -> tuple[float, int]:
    """The standard deviation over seeds within arms, in points, and its degrees of freedom."""
    freedom = sum(len(arm.top1) - 1 for arm in arms)
    if not freedom:
        return math.nan, 0
    squares = sum((len(arm.top1) - 1) * variance(arm.top1) for arm in arms if len(arm.top1) > 1)
    return math.sqrt(squares / freedom), freedom


def half_width(first: Arm, second: Arm | None, arms: Sequence[Arm]) -> float:
    """Half of the interval of a difference of means, or of one mean where there is no second."""
    deviation, freedom = pooled(arms)
    both = [first] + ([second] if second else [])
    if freedom >= MIN_FREEDOM:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
        return quantile * deviation * math.sqrt(sum(1 / len(arm.top1) for arm in both))
    spread = sum(arm.mean * (100 - arm.mean) / arm.val_images for arm in both)
    return float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(spread)


def obstacle(first: Arm, second: Arm, arms: Sequence[Arm], chance: float, relation: str) -> str | None:
    """Why nothing can be said of a pair, whatever its difference; None where something can."""
    if idle := [arm.name for arm in (first, second) if arm.mean - half_width(arm, None, arms) <= chance]:
        return f'{OPEN}: {" and ".join(idle)} did not learn'
    if relation != '?':
        size, published = first.parameters / second.parameters, published_share(first.name, second.name)
        if abs(size / published - 1) > CLOSE:
            return f'not judged: {size:.2f} of the size, in the paper {published:.2f}'
    if pooled(arms)[1] < MIN_FREEDOM:
        return f'not decided ({"one seed" if min(len(first.top1), len(second.top1)) == 1 else "too few seeds"})'
    return None


def judge(difference: float, half: float, relation: str) -> str:
    """What an interval says of a relation."""
    low, high = difference - half, difference + half
    if relation == '=':
        if low >= -MARGIN and high <= MARGIN:
            return HOLDS
        return FAILS if low > MARGIN or high < -MARGIN else OPEN
    if relation == '<':
        low, high = -high, -low
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def verdicts(arms: dict[str, Arm], chance: float) -> list[Verdict]:
    """Of every pair of the paper's, and of every own design against T2T-ViT-14, whose relation nobody claims.

    `chance` is the top-1 of guessing the largest class, in percent.
    """
    own = [Pair('your design', name, '?', REFERENCE, math.nan) for name, arm in arms.items() if arm.own]
    found = []
    for pair in [*PAIRS, *own]:
        first, second = arms.get(pair.first), arms.get(pair.second)
        if first is None or second is None:
            found.append(Verdict(pair, None, None, None, 'not run', '–'))
            continue
        difference = first.mean - second.mean
        half = half_width(first, second, list(arms.values()))
        size = first.parameters / second.parameters
        text = obstacle(first, second, list(arms.values()), chance, pair.relation) or ''
        if not text and pair.relation == '?':
            better, worse = (judge(difference, half, relation) == HOLDS for relation in '><')
            text = 'better' if better else 'worse' if worse else OPEN
        text = text or judge(difference, half, pair.relation)
        found.append(Verdict(pair, difference, half, size, text, f'{len(first.top1)} and {len(second.top1)}'))
    return found


def overall(found: Sequence[Verdict]) -> str:
    """A claim's verdict of those of its pairs: it holds where all do, it does not where one does not."""
    texts = [verdict.text for verdict in found if verdict.difference is not None]
    if any(text.startswith(FAILS) for text in texts):
        return FAILS
    return HOLDS if len(texts) == len(found) and all(text == HOLDS for text in texts) else OPEN
