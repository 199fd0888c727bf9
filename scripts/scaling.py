"""Estimate how long the recipes for images of 224 pixels take on 1 to 512 GPUs, from compute and communication.

    python scripts/scaling.py                              # from the training steps measured on an H200, in results/
    python scripts/scaling.py --speed t2t_vit_14=2900@256  # from images/s of a training step measured at that batch

Prints the tables of docs/scaling.md, which explains the assumptions and limitations.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'src'))

from t2t_vit.benchmark import count_macs  # noqa: E402
from t2t_vit.models.listing import build, count_parameters  # noqa: E402
from t2t_vit.settings import read_settings, recipes  # noqa: E402

IMAGES = {'torch/cifar10': 50_000, 'torch/cifar100': 50_000}  # training images; other recipes use ImageNet
IMAGENET = 1_281_167
MODELS = (
    't2t_vit_7',
    't2t_vit_10',
    't2t_vit_12',
    't2t_vit_14',
    't2t_vit_19',
    't2t_vit_24',
    't2t_vit_t_14',
    't2t_vit_t_19',
    't2t_vit_t_24',
)
RECIPES = [name for name in recipes() if name.startswith(('imagenet-', 'distill-', 'token-', 'cifar10-', 'cifar100-'))]
GPUS = (1, 8, 64, 512)
MEASURED = ROOT / 'results' / 'speed-epyc-2026-11-24' / 'family' / 'bench.csv'
MEASURED_GPU = ROOT / 'results' / 'speed-h200-2026-11-26' / 'eager' / 'bench.csv'


class Machine(NamedTuple):
    """Describe a GPU's connections; defaults are data sheet values of an H100 or H200 node, times usual efficiency."""

    half: float = 64  # assumption: images per GPU and step that reach half of the full speed; launches take the rest
    inside: float = 450e9 * 0.8  # bytes/s a GPU sends within a node (NVLink)
    outside: float = 50e9 * 0.8  # bytes/s a GPU sends between nodes (400 Gb/s each)
    latency: float = 10e-6  # seconds for each of a ring's messages
    node: int = 8  # GPUs
    hidden: float = 0.6  # fraction of the compute that hides communication: most of the backward pass


H100 = Machine()


class Estimate(NamedTuple):
    """Hold the times of one model on a number of GPUs."""

    local: int  # images per GPU and step
    compute: float  # seconds
    reduce: float
    exposed: float  # the part that is not hidden
    hours: float
    input: float  # images/s that the loaders of each node must deliver


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Return the seconds for a ring of n GPUs to sum `size` bytes: each sends 2(n-1)/n of them in 2(n-1) messages."""
    if gpus == 1:
        return 0.0
    wire = machine.inside if gpus <= machine.node else machine.outside
    return 2 * (gpus - 1) / gpus * size / wire + 2 * (gpus - 1) * machine.latency


class Run(NamedTuple):
    """Hold the cost of a recipe."""

    model: str
    images: int
    epochs: int
    batch: int
    macs: float  # of one image, forward
    size: float  # bytes of gradients
    teacher: float = 0.0  # multiply-adds of one image, forward only

    @property
    def reference(self) -> str:
        """Return the measured model that is assumed to be as fast per multiply-add: same token layer, similar width."""
        if self.model in ('t2t_vit_7', 't2t_vit_10', 't2t_vit_12'):
            return 't2t_vit_7'
        return 't2t_vit_t_14' if self.model.startswith('t2t_vit_t_') else 't2t_vit_14'

    def speed(self, speeds: dict[str, float]) -> float:
        """Return images/s at full batches; the backward pass counts twice, a teacher has none."""
        return speeds[self.reference] * count(self.reference, 224)[1] / (self.macs + self.teacher / 3)


def estimate(run: Run, speed: float, gpus: int, machine: Machine = H100) -> Estimate:
    """Estimate the times for `speed` images/s on one GPU at full batches."""
    local = run.batch // gpus
    compute = (local + machine.half) / speed
    reduce = all_reduce(run.size, gpus, machine)
    exposed = max(0.0, reduce - machine.hidden * compute)
    step = compute + exposed
    hours = run.epochs * (run.images // run.batch) * step / 3600
    return Estimate(local, compute, reduce, exposed, hours, min(gpus, machine.node) * local / step)


def full_speed(measured: float, batch: float, machine: Machine = H100) -> float:
    """Return images/s at full batches, from a measurement at one batch size."""
    return measured * (batch + machine.half) / batch


def models_of(recipe: str) -> list[str]:
    """Return the models that a recipe's header lists, or else its own."""
    own = [value for _, key, value, _ in read_settings(recipes()[recipe]) if key == 'model'][-1]
    return re.findall(r'^#   --model (\S+)', recipes()[recipe].read_text(encoding='utf-8'), re.MULTILINE) or [own]


@cache
def count(name: str, img_size: int) -> tuple[int, float]:
    """Return a model's trainable parameters and the multiply-adds of an image."""
    with torch.device('meta'):
        model = build(name, img_size)
    return count_parameters(model)[1], count_macs(model, img_size)[0]


def run_of(recipe: str, model: str) -> Run:
    """Return the cost of a recipe with a model."""
    settings: dict[str, Any] = {key: value for _, key, value, _ in read_settings(recipes()[recipe])}
    learned, macs = count(model, settings.get('data.img_size', 224))
    teacher = str(settings.get('objective.teacher', '')).partition('.')[0]
    return Run(
        model,
        IMAGES.get(settings.get('data.root', ''), IMAGENET),
        settings['epochs'],
        settings['batch_size'],
        macs,
        4 * learned,
        count(teacher, 224)[1] if teacher else 0.0,
    )


def measured() -> dict[str, float]:
    """Read images/s at full batches of the models whose training step was timed on a GPU."""
    rows = csv.DictReader(MEASURED_GPU.read_text(encoding='utf-8').splitlines())
    return {
        row['model']: full_speed(float(row['images_per_second']), int(row['batch_size']))
        for row in rows
        if row['mode'] == 'train' and row['model'] in MODELS
    }


def tables(speeds: dict[str, float], names: Sequence[str] = RECIPES, machine: Machine = H100) -> list[str]:
    """Return the lines of two Markdown tables: hours of each recipe and model, then the parts of a step of nine models.

    `speeds` are images/s at full batches by model, which replace the measured ones; they do not apply to distillation
    and 384 pixels.
    """
    speeds = {**measured(), **speeds}
    runs = [(recipe, run_of(recipe, model)) for recipe in names for model in models_of(recipe)]
    cores = {
        row['model']: float(row['images_per_second'])
        for row in csv.DictReader(MEASURED.read_text(encoding='utf-8').splitlines())
    }
    lines = [
        '| recipe | model | all-reduce MB | GMAC forward | images/s, one CPU core (measured) | images/s, one GPU '
        f'| hours on {" | ".join(f"{gpus} GPUs" for gpus in GPUS).replace("1 GPUs", "1 GPU", 1)} |',
        f'|{"---|" * (6 + len(GPUS))}',
    ]
    parts = []
    for recipe, run in runs:
        plain = not run.teacher and recipe != 'imagenet-14-384'
        speed = speeds[run.model] if plain and run.model in speeds else run.speed(speeds)
        found = {gpus: estimate(run, speed, gpus, machine) for gpus in GPUS if gpus <= run.batch}
        core = f'{cores[run.model]:.1f}' if plain and run.model in cores else '–'
        lines.append(
            f'| {recipe} | {run.model} | {run.size / 1e6:.0f} | {run.macs / 1e9:.2f} | {core} | {speed:,.0f}'
            f'{"" if plain and run.model in speeds else f" (as {run.reference})"} | '
            f'{" | ".join(f"{found[gpus].hours:.1f}" if gpus in found else "–" for gpus in GPUS)} |'
        )
        if recipe.startswith('imagenet-') and run.model in MODELS and plain:
            parts += [(run.model, gpus, e) for gpus, e in found.items()]
    lines += [
        '',
        '| model | GPUs | images each | compute ms | all-reduce ms | of it exposed | hours | GPU-hours '
        '| input, images/s a node |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    lines += [
        f'| {name} | {gpus} | {e.local} | {1e3 * e.compute:.1f} | {1e3 * e.reduce:.1f} | {1e3 * e.exposed:.1f} '
        f'| {e.hours:.1f} | {e.hours * gpus:,.0f} | {e.input:,.0f} |'
        for name, gpus, e in sorted(parts, key=lambda part: MODELS.index(part[0]))
    ]
    return lines


def read_speed(word: str) -> tuple[str, float]:
    """Parse MODEL=IMAGES_PER_SECOND@BATCH into the model and its speed at full batches."""
    name, _, value = word.partition('=')
    measured, _, batch = value.partition('@')
    try:
        return name, full_speed(float(measured), int(batch))
    except ValueError:
        message = f'--speed must be MODEL=IMAGES_PER_SECOND@BATCH, such as t2t_vit_14=2900@256; got {word}'
        raise SystemExit(message) from None


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--speed', action='append', default=[], metavar='MODEL=IMAGES_PER_SECOND@BATCH')
    print('\n'.join(tables(dict(map(read_speed, parser.parse_args().speed)))))
