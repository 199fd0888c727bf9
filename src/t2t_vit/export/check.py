"""Compare an exported file with its PyTorch model: differences, accuracy, speed, and a verdict.

The verdict knows sampling error: a rate fails if its 95 % lower confidence bound exceeds the tolerance.
"""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import nn

from ..timing import device_name, interleave, spread
from .images import Batch
from .metadata import Metadata
from .runtime import ExportedModel


class Tolerance(NamedTuple):
    """What a precision may cost: the logits' relative difference, images with another first class, top-1."""

    difference: float
    disagreement: float
    top1_loss: float
    of_mean: bool = False  # the difference is the mean over images, else that of the worst image


TOLERANCES = {
    'float32': Tolerance(1e-3, 0.002, 0.001),
    'fp16': Tolerance(2e-2, 0.01, 0.005),
    'bf16': Tolerance(1e-1, 0.03, 0.005),
    'int8': Tolerance(0.2, 0.10, 0.005, True),  # one image of ten thousand has logits that are all small
}
CONFIDENCE = 0.95  # of the bounds that the verdict uses, one-sided


@dataclass
class Speed:
    """Images per second over interleaved rounds, medians and quartiles, and the ratio of each round."""

    pytorch: tuple[float, float, float]
    exported: tuple[float, float, float]
    ratio: tuple[float, float, float]
    batch_size: int
    rounds: int
    threads: int
    device: str


@dataclass
class Report:
    """The comparison of an exported file with its model; differences are of logits."""

    file: str
    bytes: int
    model: str
    precision: str
    opset: int | None
    runtime: str
    pixels: str
    dynamic: str
    batch: int | None
    size: tuple[int, int] | None
    data: str
    images: int
    max_difference: float | None
    not_finite: int  # images with NaN or infinity in either's logits; the differences are of the others
    relative_difference: float | None  # max |a - b| over max |b| of an image; the largest over images
    mean_relative_difference: float | None
    top1_agreement: float
    labelled: int
    top1_pytorch: float | None
    top1_exported: float | None
    only_pytorch: int  # labelled images that PyTorch has right and the file wrong
    only_exported: int
    damaged: list[str]
    sizes_tried: list[tuple[int, int]]
    kept_in_float: list[str]
    calibration: str | None
    speed: Speed | None
    latency: Speed | None  # at batch 1
    tolerance: Tolerance
    versions: dict[str, str]
    command: str

    @property
    def disagreement_shown(self) -> float:
        """The fraction of images with another first class that this many images can show: a lower bound."""
        return lower_bound(round((1 - self.top1_agreement) * self.images), self.images)

    @property
    def loss_shown(self) -> float | None:
        """The loss of top-1 that the labelled images can show, a lower bound; None without labels.

        By the sign test on the images that only one of the two has right.
        """
        if self.top1_pytorch is None:
            return None
        changed = self.only_pytorch + self.only_exported
        return changed / self.labelled * (2 * lower_bound(self.only_pytorch, changed) - 1) if changed else 0.0

    @property
    def problems(self) -> list[str]:
        """What is outside the tolerance beyond sampling error, a sentence each."""
        limit, loss = self.tolerance, self.loss_shown
        difference = self.mean_relative_difference if limit.of_mean else self.relative_difference
        return [
            sentence
            for wrong, sentence in (
                (self.not_finite > 0, f'{self.not_finite} images have logits that are not finite'),
                (
                    difference is None or not difference <= limit.difference,
                    f'{"mean " if limit.of_mean else ""}relative difference '
                    f'{"unknown" if difference is None else f"{difference:.2g}"}, at most {limit.difference:g} allowed',
                ),
                (
                    self.disagreement_shown > limit.disagreement,
                    f'first class differs on {100 - 100 * self.top1_agreement:.2f} % of {self.images} images, '
                    f'which shows at least {100 * self.disagreement_shown:.2f} %; '
                    f'at most {100 * limit.disagreement:g} % allowed',
                ),
                (
                    loss is not None and loss > limit.top1_loss,
                    f'top-1 falls by {100 * ((self.top1_pytorch or 0) - (self.top1_exported or 0)):.2f} points on '
                    f'{self.labelled} images, which shows at least {100 * (loss or 0):.2f}; '
                    f'at most {100 * limit.top1_loss:g} allowed',
                ),
            )
            if wrong
        ]


def lower_bound(successes: int, count: int) -> float:
    """Return the one-sided Clopper-Pearson lower bound of a proportion."""
    if not count:
        return 0.0
    return float(binomtest(successes, count, alternative='greater').proportion_ci(CONFIDENCE, method='exact').low)


class Comparison:
    """Differences of two models' logits, collected batch by batch, of images whose logits are all finite."""

    def __init__(self) -> None:
        self.largest, self.relative, self.broken = 0.0, [], 0  # type: float, list[float], int
        self.images = self.agreed = self.labelled = self.only_first = self.only_second = 0
        self.right = [0, 0]

    @property
    def worst(self) -> float | None:
        """The largest relative difference; None if there is none."""
        return max(self.relative, default=None)

    @property
    def mean(self) -> float | None:
        """The mean relative difference; None if there is none."""
        return sum(self.relative) / len(self.relative) if self.relative else None

    def add(
        self, ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor | None = None, again: bool = False
    ) -> None:
        """Add PyTorch's logits and the file's, (B, classes) each, and the labels, (B,).

        Those of the same images `again`, in another size, are compared and not counted.
        """
        ours, theirs = ours.double(), theirs.double()
        good = (ours - theirs).isfinite().all(1)
        self.broken += int((~good).sum())
        difference = (ours - theirs)[good].abs().amax(1)
        self.largest = max([self.largest, *difference.tolist()])
        self.relative += (difference / ours[good].abs().amax(1).clamp_min(1e-30)).tolist()
        if again:
            return
        self.images += len(ours)
        self.agreed += int((ours.argmax(1) == theirs.argmax(1))[good].sum())
        if labels is not None:
            first, second = (x.argmax(1) == labels for x in (ours, theirs))
            self.labelled += len(labels)
            self.right = [self.right[0] + int(first.sum()), self.right[1] + int(second.sum())]
            self.only_first += int((first & ~second).sum())
            self.only_second += int((second & ~first).sum())


def compare(
    model: nn.Module, exported: ExportedModel, images: Iterable[Batch]
) -> tuple[Comparison, list[tuple[int, int]]]:
    """Run both models on the same images, and return the comparison and the image sizes that were tried.

    A file for any size is tried on a second one too, which is not square: the first batch, cropped. A file with its own
    preprocessing is run on the decoded images.

    Raises:
        CheckpointError: if the runtime cannot run the file on them.
    """
    found, sizes = Comparison(), []  # type: Comparison, list[tuple[int, int]]
    with torch.inference_mode():
        for batch in images:
            if exported.metadata.pixels == 'image':
                theirs = torch.cat([exported.classify(image)[0] for image in batch.decoded])
            else:
                theirs = exported(batch.images)
            found.add(model(batch.images), theirs, batch.labels)
            if not sizes and exported.metadata.size is None and exported.metadata.pixels != 'image':
                height, width = batch.images.shape[2:]
                cut = batch.images[:, :, : height - height // 4, : width - width // 8].contiguous()
                found.add(model(cut), exported(cut), again=True)
                sizes.append((cut.shape[2], cut.shape[3]))
            size = (batch.images.shape[2], batch.images.shape[3])
            sizes += [size] if size not in sizes else []
    return found, sizes


def measure_speed(
    model: nn.Module, exported: ExportedModel, batch: Batch, count: int, rounds: int, seconds: float
) -> Speed:
    """Time PyTorch and the file in turn, on the first `count` images of a batch, repeated if there are fewer."""
    places = [i % len(batch.images) for i in range(count)]
    images = batch.images[places]
    own = exported.metadata.pixels == 'image'
    pixels = [batch.decoded[i][None] for i in places] if own else [exported.metadata.pixels_of(images)]

    def pytorch() -> None:
        with torch.inference_mode():
            model(images)

    def file() -> None:
        for part in pixels:
            exported.run(part)

    found = interleave({'pytorch': pytorch, 'exported': file}, count, rounds, seconds)
    ratios = [b / a for a, b in zip(found['pytorch'], found['exported'])]
    return Speed(
        spread(found['pytorch']),
        spread(found['exported']),
        spread(ratios),
        count,
        rounds,
        torch.get_num_threads(),
        device_name(torch.device('cpu')),
    )


def versions(metadata: Metadata, runtime: str) -> dict[str, str]:
    """Return the versions of what wrote the file and of what ran it."""
    return {**metadata.versions, runtime: version(runtime), 'python': platform.python_version()}


def save(report: Report, path: Path) -> tuple[Path, Path]:
    """Write FILE.report.json and FILE.report.md beside a file."""
    files = path.with_name(f'{path.name}.report.json'), path.with_name(f'{path.name}.report.md')
    tree: dict[str, Any] = {
        **asdict(report),
        'tolerance': report.tolerance._asdict(),
        'disagreement_shown': report.disagreement_shown,
        'top1_loss_shown': report.loss_shown,
        'problems': report.problems,
    }
    files[0].write_text(json.dumps(tree, indent=2, allow_nan=False) + '\n', 'utf-8')
    files[1].write_text(as_markdown(report), 'utf-8')
    return files


def markdown_cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    for old, new in (('\\', '\\\\'), ('|', '\\|'), ('<', '&lt;'), ('$', '\\$'), ('\r', ' '), ('\n', ' ')):
        text = text.replace(old, new)
    return text


def as_markdown(report: Report) -> str:
    """Return a report for people."""
    limit = report.tolerance
    takes = {'image': 'uint8 image of any size, (1, H, W, C): it resizes, crops and normalises'}
    size = f'{report.size[0]}×{report.size[1]}' if report.size else 'any height and width'
    differences = (report.relative_difference, report.mean_relative_difference, report.max_difference)
    worst, mean, largest = ('unknown' if value is None else f'{value:.3g}' for value in differences)
    rows = [
        ('model', report.model),
        ('precision', report.precision),
        *([('opset', str(report.opset))] if report.opset else []),
        ('runtime', report.runtime),
        ('file size', f'{report.bytes / 1e6:.1f} MB'),
        ('input', takes.get(report.pixels, f'{report.pixels}, batch {report.batch or "any"}, {size}')),
        (
            'compared on',
            f'{report.images} images of {report.data}, '
            + ', '.join(f'{height}×{width}' for height, width in report.sizes_tried),
        ),
        ('largest difference of a logit', largest),
        (
            'relative difference, largest and mean over images',
            f'{worst}, {mean} ({"the mean " if limit.of_mean else ""}at most {limit.difference:g})',
        ),
        *([('images with logits that are not finite', str(report.not_finite))] if report.not_finite else []),
        (
            'another first class',
            f'{100 - 100 * report.top1_agreement:.2f} %, shown: at least {100 * report.disagreement_shown:.2f} % '
            f'(at most {100 * limit.disagreement:g} %)',
        ),
    ]
    if report.top1_pytorch is not None and report.top1_exported is not None:
        rows.append(
            (
                'top-1, PyTorch and the file',
                f'{100 * report.top1_pytorch:.2f} %, {100 * report.top1_exported:.2f} % of {report.labelled} images; '
                f'only PyTorch right: {report.only_pytorch}, only the file: {report.only_exported}; '
                f'loss shown: at least {100 * max(report.loss_shown or 0, 0):.2f} points '
                f'(at most {100 * limit.top1_loss:g})',
            )
        )
    if report.calibration:
        rows.append(('calibrated on', report.calibration))
        rows.append(('kept in float by the recipe', f'{len(report.kept_in_float)} operations'))
    if speed := report.speed:
        rows += [
            ('images/s, PyTorch', '{:.1f} ({:.1f}–{:.1f})'.format(*speed.pytorch)),
            ('images/s, the file', '{:.1f} ({:.1f}–{:.1f})'.format(*speed.exported)),
            ('ratio', '{:.2f} ({:.2f}–{:.2f})'.format(*speed.ratio)),
        ]
    if single := report.latency:
        rows += [
            (
                'latency at batch 1, PyTorch and the file',
                f'{1000 / single.pytorch[0]:.2f} ms, {1000 / single.exported[0]:.2f} ms '
                '(ratio of speeds {:.2f}, {:.2f}–{:.2f})'.format(*single.ratio),
            )
        ]
    if speed:
        rows.append(
            (
                'timed',
                f'float32 PyTorch, eager; batch {speed.batch_size}, {speed.rounds} interleaved rounds, '
                f'medians and quartiles, {speed.device}, {speed.threads} threads',
            )
        )
    if report.damaged:
        rows.append(('damaged images left out', f'{len(report.damaged)}: {", ".join(report.damaged[:5])}'))
    rows.append(('versions', ', '.join(f'{name} {number}' for name, number in report.versions.items())))
    verdict = 'Within tolerance.' if not report.problems else 'OUTSIDE TOLERANCE: ' + '; '.join(report.problems) + '.'
    table = '\n'.join(f'| {name} | {markdown_cell(value)} |' for name, value in rows)
    return f'# {report.file}\n\n{verdict}\n\n| | |\n|---|---|\n{table}\n\n`{report.command}`\n'
