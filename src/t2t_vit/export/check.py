"""An exported file beside the PyTorch model it was made of: the same images, the same answers, at what speed."""

import json
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..timing import device_name, interleave, spread
from .images import Batch
from .metadata import Metadata
from .runtime import ExportedModel


class Tolerance(NamedTuple):
    """What a precision may cost: logits' relative difference, images whose first class changes, top-1."""

    difference: float
    disagreement: float
    top1_loss: float
    of_mean: bool = False  # the difference is the images' mean, else that of the worst


TOLERANCES = {
    'float32': Tolerance(1e-3, 0.002, 0.001),
    'fp16': Tolerance(2e-2, 0.01, 0.005),
    'bf16': Tolerance(1e-1, 0.03, 0.005),
    'int8': Tolerance(0.2, 0.10, 0.005, True),  # of ten thousand images one has logits that are all small
}


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
    """What became of a model in a file; differences are of logits."""

    file: str
    bytes: int
    model: str
    precision: str
    runtime: str
    pixels: str
    dynamic: str
    batch: int | None
    size: tuple[int, int] | None
    data: str
    images: int
    max_difference: float
    not_finite: int  # images whose logits have what is no number, in either; the differences are of the others
    relative_difference: float  # the largest over images: |a - b| at most, over |b| at most
    mean_relative_difference: float
    top1_agreement: float
    top1_pytorch: float | None
    top1_exported: float | None
    damaged: list[str]
    sizes_tried: list[tuple[int, int]]
    kept_in_float: list[str]
    calibration: str | None
    speed: Speed | None
    tolerance: Tolerance
    versions: dict[str, str]
    command: str

    @property
    def problems(self) -> list[str]:
        """What lies outside the tolerance, a sentence each."""
        limit, loss = self.tolerance, None
        difference = self.mean_relative_difference if limit.of_mean else self.relative_difference
        if self.top1_pytorch is not None and self.top1_exported is not None:
            loss = self.top1_pytorch - self.top1_exported
        return [
            sentence
            for wrong, sentence in (
                (self.not_finite > 0, f'{self.not_finite} images have logits that are not finite'),
                (
                    not difference <= limit.difference,  # not a number is no success
                    f'{"mean " if limit.of_mean else ""}relative difference {difference:.2g}, '
                    f'at most {limit.difference:g} allowed',
                ),
                (
                    not 1 - self.top1_agreement <= limit.disagreement,
                    f'first class agrees on {100 * self.top1_agreement:.2f} % of {self.images} images, '
                    f'at least {100 - 100 * limit.disagreement:g} % expected',
                ),
                (
                    loss is not None and loss > limit.top1_loss,
                    f'top-1 falls by {100 * (loss or 0):.2f} points, at most {100 * limit.top1_loss:g} allowed',
                ),
            )
            if wrong
        ]


class Comparison:
    """Differences of two models' logits, gathered batch by batch; of images whose logits are all finite."""

    def __init__(self) -> None:
        self.largest, self.relative, self.broken = 0.0, [], 0  # type: float, list[float], int
        self.images = self.agreed = self.labelled = 0
        self.right = [0, 0]

    @property
    def worst(self) -> float:
        """The largest relative difference; not a number where there is none."""
        return max(self.relative, default=math.nan)

    def add(
        self, ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor | None = None, again: bool = False
    ) -> None:
        """PyTorch's logits and the file's, (B, classes) each, and the truth, (B,).

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
            self.labelled += len(labels)
            self.right = [n + int((x.argmax(1) == labels).sum()) for n, x in zip(self.right, (ours, theirs))]


def compare(
    model: nn.Module, exported: ExportedModel, images: Iterable[Batch]
) -> tuple[Comparison, list[tuple[int, int]]]:
    """Both models on the same images, and the sizes of images that were tried.

    A file of any size is tried on a second one too, that is not square: the first batch, cut.

    Raises:
        CheckpointError: if the runtime cannot run the file on them.
    """
    found, sizes = Comparison(), []  # type: Comparison, list[tuple[int, int]]
    with torch.inference_mode():
        for batch in images:
            found.add(model(batch.images), exported(batch.images), batch.labels)
            if not sizes and exported.metadata.size is None:
                height, width = batch.images.shape[2:]
                cut = batch.images[:, :, : height - height // 4, : width - width // 8].contiguous()
                found.add(model(cut), exported(cut), again=True)
                sizes.append((cut.shape[2], cut.shape[3]))
            size = (batch.images.shape[2], batch.images.shape[3])
            sizes += [size] if size not in sizes else []
    return found, sizes


def measure_speed(
    model: nn.Module, exported: ExportedModel, images: torch.Tensor, rounds: int, seconds: float
) -> Speed:
    """PyTorch and the file in turn, on the same images, (B, C, H, W)."""
    pixels = exported.metadata.pixels_of(images)

    def pytorch() -> None:
        with torch.inference_mode():
            model(images)

    def file() -> None:
        exported.run(pixels)

    found = interleave({'pytorch': pytorch, 'exported': file}, len(images), rounds, seconds)
    ratios = [b / a for a, b in zip(found['pytorch'], found['exported'])]
    return Speed(
        spread(found['pytorch']),
        spread(found['exported']),
        spread(ratios),
        len(images),
        rounds,
        torch.get_num_threads(),
        device_name(torch.device('cpu')),
    )


def versions(metadata: Metadata, runtime: str) -> dict[str, str]:
    """What the file was made with, and what ran it."""
    return {**metadata.versions, runtime: version(runtime), 'python': platform.python_version()}


def save(report: Report, path: Path) -> tuple[Path, Path]:
    """FILE.report.json and FILE.report.md beside a file."""
    files = path.with_name(f'{path.name}.report.json'), path.with_name(f'{path.name}.report.md')
    tree: dict[str, Any] = {**asdict(report), 'tolerance': report.tolerance._asdict(), 'problems': report.problems}
    files[0].write_text(json.dumps(tree, indent=2) + '\n')
    files[1].write_text(as_markdown(report))
    return files


def as_markdown(report: Report) -> str:
    """A report for people."""
    limit = report.tolerance
    rows = [
        ('model', report.model),
        ('precision', report.precision),
        ('runtime', report.runtime),
        ('size of the file', f'{report.bytes / 1e6:.1f} MB'),
        (
            'takes',
            f'{report.pixels}, batch {report.batch or "any"}, '
            + (f'{report.size[0]}×{report.size[1]}' if report.size else 'any height and width'),
        ),
        (
            'compared on',
            f'{report.images} images of {report.data}, '
            + ', '.join(f'{height}×{width}' for height, width in report.sizes_tried),
        ),
        ('largest difference of a logit', f'{report.max_difference:.3g}'),
        (
            'relative difference, largest and mean over images',
            f'{report.relative_difference:.3g}, {report.mean_relative_difference:.3g} '
            f'({"the mean " if limit.of_mean else ""}at most {limit.difference:g})',
        ),
        *([('images with logits that are not finite', str(report.not_finite))] if report.not_finite else []),
        ('same first class', f'{100 * report.top1_agreement:.2f} % (at least {100 - 100 * limit.disagreement:g} %)'),
    ]
    if report.top1_pytorch is not None and report.top1_exported is not None:
        rows.append(
            (
                'top-1, PyTorch and the file',
                f'{100 * report.top1_pytorch:.2f} %, {100 * report.top1_exported:.2f} % '
                f'(may fall by {100 * limit.top1_loss:g})',
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
            (
                'timed',
                f'float32 PyTorch, eager; batch {speed.batch_size}, {speed.rounds} interleaved rounds, '
                f'medians and quartiles, {speed.device}, {speed.threads} threads',
            ),
        ]
    if report.damaged:
        rows.append(('damaged images left out', f'{len(report.damaged)}: {", ".join(report.damaged[:5])}'))
    rows.append(('versions', ', '.join(f'{name} {number}' for name, number in report.versions.items())))
    verdict = 'Within tolerance.' if not report.problems else 'OUTSIDE TOLERANCE: ' + '; '.join(report.problems) + '.'
    table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
    return f'# {report.file}\n\n{verdict}\n\n| | |\n|---|---|\n{table}\n\n`{report.command}`\n'
