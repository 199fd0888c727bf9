"""Measure data loading without a model: JPEG decoders, and loaders of photos and of small images against timm's.

    python scripts/input_speed.py --data FOLDER --output results

FOLDER is any data.root of small images, such as CIFAR-10. The photos are crops of scikit-learn's two sample photos with
grain, 500×375 pixels (ImageNet's average size), as JPEG. All loaders make the same batches of the ImageNet recipe, in
one process of one thread. What is counted is the processor time of that process, which other load on the machine moves
less than the clock's. They are timed in turn, and each ratio is to timm's loader (or Pillow's decoder) in that turn.
"""

import argparse
import csv
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from torch.utils.data import Dataset
from torchvision.io import decode_jpeg

from t2t_vit.data import Augment, DiskBatches, MemoryBatches, Opener, Preprocessing, Source, open_source
from t2t_vit.timing import device_name

CIFAR = dict(aa=None, reprob=0.0, scale=(1.0, 1.0), pad=4)  # pad, crop and mirror, nothing else
Loader = Callable[[float], float]  # seconds -> images per second
COLUMNS = ('loader', 'size', 'batch', 'median', 'least', 'most', 'ratio', 'ratio_least', 'ratio_most', 'turns')


class Images(Dataset[tuple[Image.Image, int]]):
    """Wrap a source for timm's loader."""

    def __init__(self, source: Source) -> None:
        self.source, self.transform = source, None

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.open(io.BytesIO(self.source.content(index))).convert('RGB')
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
            pixels = np.asarray(image.resize((500, 375), Image.Resampling.BICUBIC))
            grained = (pixels + chance.normal(0, 6, (375, 500, 1))).clip(0, 255).astype(np.uint8)
            Image.fromarray(grained).save(folder / f'train/{kind}/{i:03}.jpg', quality=90)


def processor_rate(counts: Iterator[int], seconds: float) -> float:
    """Return the images per second of processor time; the first count is not timed."""
    next(counts)
    begun, images = time.process_time(), 0
    while (spent := time.process_time() - begun) < seconds:
        images += next(counts)
    return images / spent


def by_timm(source: Source, preprocessing: Preprocessing, batch_size: int, augment: Augment | None) -> Loader:
    """Return timm's loader with the same recipe, or that of validation."""
    recipe = (
        dict(
            is_training=True,
            re_prob=augment.reprob,
            re_mode=augment.remode,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.aa,
            interpolation=augment.interpolation,
        )
        if augment
        else dict(interpolation=preprocessing.interpolation, crop_pct=preprocessing.crop_pct)
    )
    loader = create_loader(
        Images(source),
        (3, *preprocessing.size),
        batch_size,
        use_prefetcher=False,
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=0,
        persistent_workers=False,
        **recipe,
    )

    def endless() -> Iterator[int]:
        for _ in itertools.count():
            for _, labels in loader:
                yield len(labels)

    return lambda seconds: processor_rate(endless(), seconds)


def by_batches(batches: DiskBatches | MemoryBatches) -> Loader:
    """Return one of the package's loaders."""
    return lambda s: processor_rate((len(batch.labels) for e in itertools.count() for batch in batches.epoch(e)), s)


def for_gpu(batches: DiskBatches) -> Loader:
    """Return what is left for a processor if a GPU augments and normalises: the loader's own batches, of bytes."""
    batches.loader.collate_fn.finish = None
    return lambda s: processor_rate((len(found[1]) for _ in itertools.count() for found, _ in batches.loader), s)


def decoders(files: list[bytes]) -> dict[str, Loader]:
    """Return the decoders that are installed, by name."""

    def timed(decode: Callable[[bytes], Any]) -> Loader:
        return lambda s: processor_rate((bool(decode(content) is not None) for content in itertools.cycle(files)), s)

    def pillow(content: bytes, size: tuple[int, int] | None = None) -> Image.Image:
        image = Image.open(io.BytesIO(content), formats=['JPEG'])
        if size:
            image.draft('RGB', size)
        image.load()
        return image

    found = {
        'Pillow': timed(pillow),
        'Pillow, as an array': timed(lambda content: np.asarray(pillow(content))),
        'Pillow, draft at half the size': timed(lambda content: pillow(content, (250, 188))),
        'torchvision.io': timed(lambda content: decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))),
    }
    if find_spec('simplejpeg'):
        import simplejpeg

        found['simplejpeg'] = timed(lambda content: simplejpeg.decode_jpeg(content, 'RGB'))
        found['simplejpeg, fast DCT and upsampling'] = timed(
            lambda content: simplejpeg.decode_jpeg(content, 'RGB', fastdct=True, fastupsample=True)
        )
    if find_spec('kornia_rs'):
        from kornia_rs.io import decode_image_jpegturbo

        found['kornia-rs'] = timed(lambda content: decode_image_jpegturbo(content, 'rgb'))
    return found


def loaders(args: argparse.Namespace, folder: Path) -> dict[str, tuple[int, int, str, Loader]]:
    """Return all that is timed, by name: size, batch, the name of its baseline, and what times it."""
    small, large = (
        Preprocessing((size, size), 3, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) for size in (args.size, 224)
    )
    photos = open_source(str(folder), 'train')
    files = [photos.content(i) for i in range(len(photos.labels))]
    args.bytes = statistics.mean(map(len, files))
    base, found = 'photos, timm', {name: (375, 1, 'Pillow', timed) for name, timed in decoders(files).items()}
    found[base] = 224, 32, base, by_timm(photos, large, 32, Augment())
    found['photos, from disk, all on the CPU'] = 224, 32, base, by_batches(DiskBatches(photos, large, 32, Augment(), 0))
    found['photos, from disk, a GPU augments'] = 224, 32, base, for_gpu(DiskBatches(photos, large, 32, Augment(), 0))
    found['validation, timm'] = 224, 32, 'validation, timm', by_timm(photos, large, 32, None)
    found['validation, from disk'] = 224, 32, 'validation, timm', by_batches(DiskBatches(photos, large, 32, None, 0))
    pieces = Opener(photos, large)
    found['validation, as predict reads'] = (
        224,
        32,
        'validation, timm',
        lambda s: processor_rate((len(pieces[i, i + 32].good) for i in itertools.cycle(range(0, 160, 32))), s),
    )
    if args.prepared:
        ready = open_source(args.prepared, 'train')
        batches = [DiskBatches(ready, large, 32, Augment(), 0) for _ in range(2)]
        found['prepared, all on the CPU'] = 224, 32, base, by_batches(batches[0])
        found['prepared, a GPU augments'] = 224, 32, base, for_gpu(batches[1])
    if args.data:
        images, batch = open_source(args.data, 'train'), args.batch_size
        args.images, base = len(images.labels), 'small, timm'
        found[base] = args.size, batch, base, by_timm(images, small, batch, Augment())
        for name, augment in (('RandAugment', Augment()), ('pad and mirror', Augment(**CIFAR))):
            held = MemoryBatches(images, small, batch, augment)
            found[f'small, in memory, {name}'] = args.size, batch, base, by_batches(held)
    return found


def conditions(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Describe the conditions of the measurement."""
    table = '\n'.join(
        f'| {row["loader"]} | {row["size"]} | {row["median"]:,.0f} ({row["least"]:,.0f} to {row["most"]:,.0f}) | '
        f'{row["ratio"]:.2f} ({row["ratio_least"]:.2f} to {row["ratio_most"]:.2f}) |'
        for row in rows
    )
    small = f' Small images: {args.images:,} of {args.size}², batch {args.batch_size}.' if args.data else ''
    return f"""# Images per second of one core: decoding and data loading

| what | size | images per second of processor time: median (range) | ratio to the baseline in the same turn |
|---|---|---|---|
{table}

{device_name(torch.device('cpu'))}; torch {torch.__version__} with 1 thread, timm {timm.__version__}, Pillow
{PIL.__version__}. {args.rounds} turns of {args.seconds:g} s of processor time each, interleaved; the first batch of a
turn is not counted. Ratios are medians and ranges over the turns, of decoders to Pillow and of loaders to timm's.
Photos: {args.photos} JPEGs of 500×375, {args.bytes / 1000:.0f} kB on average, drawn from scikit-learn's samples; batch
32.{small}

    python scripts/input_speed.py{f' --data {Path(args.data).name}' if args.data else ''} --rounds {args.rounds} \
        --seconds {args.seconds:g}
"""


def main() -> None:
    """Time all loaders, print and write what they deliver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', help='small images: any data.root')
    parser.add_argument('--size', type=int, default=32, help='their pixels')
    parser.add_argument('--batch_size', type=int, default=256, help='of small images')
    parser.add_argument('--photos', type=int, default=200, help='how many to draw')
    parser.add_argument('--keep', help='folder to draw the photos into; by default a temporary one')
    parser.add_argument('--prepared', help='the same photos after `t2t-vit prepare`')
    parser.add_argument('--rounds', type=int, default=9, help='how often each is timed')
    parser.add_argument('--seconds', type=float, default=2.0, help='how long each time')
    parser.add_argument('--output', help='folder for input.csv and input.md')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        if not (folder / 'train').exists():
            draw_photos(folder, args.photos)
        timed = loaders(args, folder)
        turns: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(args.rounds):
            for name, (*_, measure) in timed.items():
                turns[name].append(measure(args.seconds))
                print(f'{name:38}{turns[name][-1]:12,.0f} images/s', flush=True)
    rows = []
    for name, (size, batch, base, _) in timed.items():
        rates, ratios = turns[name], [rate / other for rate, other in zip(turns[name], turns[base])]
        numbers = [f(values) for values in (rates, ratios) for f in (statistics.median, min, max)]
        rows.append(dict(zip(COLUMNS, (name, size, batch, *(round(n, 3) for n in numbers), args.rounds))))
    print(conditions(args, rows))
    if args.output:
        target = Path(args.output)
        target.mkdir(parents=True, exist_ok=True)
        with (target / 'input.csv').open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
        (target / 'input.md').write_text(conditions(args, rows), encoding='utf-8')


if __name__ == '__main__':
    main()
