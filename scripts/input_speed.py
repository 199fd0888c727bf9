"""Measure data loading without a model: small images in memory and photos from disk, compared with timm's loader.

    python scripts/input_speed.py --data FOLDER --output results

FOLDER is any data.root of small images, such as CIFAR-10. The photos are crops of scikit-learn's two sample photos,
500×375 pixels (ImageNet's average size), in JPEG. All loaders make the same batches of the ImageNet recipe. They are
timed in turn, so that other load on the machine affects all of them.
"""

import argparse
import csv
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from torch.utils.data import Dataset

from t2t_vit.data import Augment, DiskBatches, MemoryBatches, Preprocessing, Source, measure_input, open_source
from t2t_vit.data.batches import images_per_second
from t2t_vit.timing import device_name

CIFAR = dict(aa=None, reprob=0.0, scale=(1.0, 1.0), pad=4)  # pad, crop and mirror, nothing else
Loader = Callable[[float], float]  # seconds -> images per second


class Images(Dataset[tuple[Image.Image, int]]):
    """Wrap a source for timm's loader."""

    def __init__(self, source: Source) -> None:
        self.source, self.transform = source, None

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.source.open(index).convert('RGB')
        return self.transform(image) if self.transform else image, self.source.labels[index]


def draw_photos(folder: Path, count: int) -> None:
    """Write crops of the sample photos to two class folders."""
    chance = np.random.default_rng(0)
    for kind, photo in enumerate(load_sample_images().images):
        (folder / f'train/{kind}').mkdir(parents=True)
        for i in range(count // 2):
            height = int(chance.integers(240, 427))
            width = height * 4 // 3
            top, left = chance.integers(427 - height + 1), chance.integers(640 - width + 1)
            image = Image.fromarray(photo[top : top + height, left : left + width])
            image.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f'train/{kind}/{i:03}.jpg', quality=90)


def by_timm(source: Source, preprocessing: Preprocessing, batch_size: int, augment: Augment, workers: int) -> Loader:
    """Return timm's loader with the same recipe."""
    loader = create_loader(
        Images(source),
        (3, *preprocessing.size),
        batch_size,
        is_training=True,
        use_prefetcher=False,
        re_prob=augment.reprob,
        re_mode=augment.remode,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.aa,
        interpolation=augment.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def endless() -> Iterator[int]:
        for _ in itertools.count():
            for _, labels in loader:
                yield len(labels)

    return lambda seconds: images_per_second(endless(), torch.device('cpu'), seconds)


def loaders(args: argparse.Namespace, photos: Path) -> dict[str, tuple[int, int, int, Loader]]:
    """By name: size, batch, workers, and what times it."""
    small, large = (
        Preprocessing((size, size), 3, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) for size in (args.size, 224)
    )
    images, folder = open_source(args.data, 'train'), open_source(str(photos), 'train')
    memory = [MemoryBatches(images, small, args.batch_size, augment) for augment in (Augment(), Augment(**CIFAR))]
    disk = DiskBatches(folder, large, 32, Augment(), args.workers)
    return {
        'small, in memory, RandAugment': (args.size, args.batch_size, 0, lambda s: measure_input(memory[0], s)),
        'small, in memory, pad and mirror': (args.size, args.batch_size, 0, lambda s: measure_input(memory[1], s)),
        'small, timm, RandAugment': (
            args.size,
            args.batch_size,
            args.workers,
            by_timm(images, small, args.batch_size, Augment(), args.workers),
        ),
        'photos, from disk, RandAugment': (224, 32, args.workers, lambda s: measure_input(disk, s)),
        'photos, timm, RandAugment': (224, 32, args.workers, by_timm(folder, large, 32, Augment(), args.workers)),
    }


def conditions(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Describe the conditions of the measurement."""
    table = '\n'.join(
        f'| {row["loader"]} | {row["size"]} | {row["batch"]} | {row["workers"]} | {row["median"]:,.0f} | '
        f'{row["least"]:,.0f} to {row["most"]:,.0f} |'
        for row in rows
    )
    return f"""# Images per second of data loading alone

| loader | size | batch | workers | median | least to most |
|---|---|---|---|---|---|
{table}

{device_name(torch.device('cpu'))}, {os.cpu_count()} cores;
torch {torch.__version__} with {torch.get_num_threads()} threads, timm
{timm.__version__}, float32. {args.rounds} turns of {args.seconds:g} s each, interleaved; the first batch of a turn is
not counted. Small images: {args.images:,} of {args.size}²; photos: {args.photos} JPEGs of 500×375 drawn from
scikit-learn's samples, decoded every time. RandAugment stands for the ImageNet recipe: crop, mirror,
rand-m9-mstd0.5-inc1, erasing 0.25. timm's loader opens the small images anew in every epoch; in memory they stand
decoded, which took its time before.

    python scripts/input_speed.py --data CIFAR10 --workers {args.workers} --rounds {args.rounds} \\
        --seconds {args.seconds:g}
"""


def main() -> None:
    """Time all loaders, print and write what they deliver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='small images: any data.root')
    parser.add_argument('--size', type=int, default=32, help='their pixels')
    parser.add_argument('--batch_size', type=int, default=256, help='of small images')
    parser.add_argument('--photos', type=int, default=200, help='how many to draw')
    parser.add_argument('--workers', type=int, default=1, help='processes that open images')
    parser.add_argument('--rounds', type=int, default=3, help='how often each loader is timed')
    parser.add_argument('--seconds', type=float, default=5.0, help='how long each time')
    parser.add_argument('--output', help='folder for input.csv and input.md')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw_photos(Path(folder), args.photos)
        timed = loaders(args, Path(folder))
        args.images = len(open_source(args.data, 'train').labels)
        turns: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(args.rounds):
            for name, (*_, measure) in timed.items():
                turns[name].append(measure(args.seconds))
                print(f'{name:34}{turns[name][-1]:12,.0f} images/s', flush=True)
    rows = [
        dict(
            loader=name,
            size=size,
            batch=batch,
            workers=workers,
            median=round(statistics.median(turns[name]), 1),
            least=round(min(turns[name]), 1),
            most=round(max(turns[name]), 1),
            turns=args.rounds,
        )
        for name, (size, batch, workers, _) in timed.items()
    ]
    csv.DictWriter(sys.stdout, rows[0]).writerows(rows)
    if args.output:
        target = Path(args.output)
        target.mkdir(parents=True, exist_ok=True)
        with (target / 'input.csv').open('w', newline='') as file:
            writer = csv.DictWriter(file, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        (target / 'input.md').write_text(conditions(args, rows), encoding='utf-8')


if __name__ == '__main__':
    main()
