"""Images with labels: where they come from, and how batches are made of them.

A source knows its classes and opens its i-th image. Two loaders make batches of a source, with the same augmentation
where both have it: `DiskBatches` opens and augments image by image in worker processes (timm's transforms);
`MemoryBatches` holds a small set decoded, on the device, and augments whole batches there.

What is random in a sample is a function of (seed, epoch, sample) in both: neither the number of workers nor where a
run was interrupted changes it.
"""

import io
import json
import math
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Sequence, Set, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

SPLITS = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid', 'test')}
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm', '.pgm')


class DataError(ValueError):
    """Data that cannot be used: what was found, what was expected."""


class Source(Protocol):
    """Labelled images."""

    classes: List[str]
    labels: Sequence[int]

    def open(self, index: int) -> Image.Image:
        """The decoded image; raises where it is damaged."""

    def name(self, index: int) -> str:
        """What a person finds the image by."""


class Digits:
    """scikit-learn's handwritten digits: 1,797 scans of 8×8 grey pixels, in a fixed stratified split of 80 to 20 %."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        chosen = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)[split != 'train']
        self.classes = [str(digit) for digit in range(10)]
        self.indices = np.sort(chosen)
        self.labels: Sequence[int] = digits.target[self.indices].tolist()
        self.pixels = np.rint(digits.images[self.indices] * (255 / 16)).astype(np.uint8)

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f'digits/{self.indices[index]}'


class Folder:
    """A folder of class folders, each with its images at any depth."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
        if not self.classes:
            raise DataError(f'{root} holds no class folders; expected {root}/CLASS/IMAGE')
        samples = [(file, i) for i, name in enumerate(self.classes) for file in list_images(root / name)]
        if not samples:
            raise DataError(f'no images in the class folders of {root}; they end in {" ".join(SUFFIXES)}')
        self.files = [file for file, _ in samples]
        self.labels: Sequence[int] = [label for _, label in samples]

    def open(self, index: int) -> Image.Image:
        return decode(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


class Parquet:
    """Files in the Hub's Parquet layout: a column of images {bytes, path} and one of integer or text labels."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        self.files = [str(file) for file in files]
        try:
            table = pa.concat_tables([pq.read_table(file) for file in self.files])
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f'cannot read {", ".join(self.files)} as Parquet: {error}') from error
        columns = table.column_names
        image = next((c for c in ('image', 'img', 'jpg', 'png') if c in columns), None)
        label = next((c for c in ('label', 'labels', 'fine_label', 'cls', 'target') if c in columns), None)
        if image is None or label is None:
            raise DataError(
                f'{self.files[0]} has the columns {columns}; expected one of images (image, img, jpg or png) and '
                'one of labels (label, labels, fine_label, cls or target)')
        column = table.column(image)
        self.images = pc.struct_field(column, 'bytes') if pa.types.is_struct(column.type) else column
        values = table.column(label).to_pylist()
        found = set(values)
        if not found or not (all(isinstance(v, str) for v in found) or all(isinstance(v, int) for v in found)):
            raise DataError(f'{self.files[0]} has no whole column of integer or text labels: {label} holds '
                            f'{", ".join(sorted({type(v).__name__ for v in found})) or "nothing"}')
        names = self.class_names(table.schema.metadata or {}, label)
        if names and isinstance(values[0], int):
            if outside := sorted(found - set(range(len(names)))):
                raise DataError(f'{self.files[0]} names {len(names)} classes, and has the labels {outside[:5]}')
            places = {i: i for i in range(len(names))}
        else:
            places = {value: i for i, value in enumerate(sorted(found))}
        self.classes = names or [str(value) for value in places]
        self.labels: Sequence[int] = [places[value] for value in values]

    @staticmethod
    def class_names(metadata: Dict[bytes, bytes], label: str) -> List[str]:
        """The names that the Hub's library writes into the schema, if it did."""
        features = json.loads(metadata.get(b'huggingface', b'{}')).get('info', {}).get('features', {})
        return list(features.get(label, {}).get('names', []))

    def open(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self.images[index].as_py()))

    def name(self, index: int) -> str:
        return f'{self.files[0]}[{index}]'


def list_images(folder: Path) -> List[Path]:
    """The images of a folder and those in it, sorted; hidden files are none."""
    return sorted(p for p in folder.rglob('*') if p.suffix.lower() in SUFFIXES and not p.name.startswith('.'))


def decode(file: Any) -> Image.Image:
    """An image with its pixels read, so that a damaged one raises here."""
    image = Image.open(file)
    image.load()
    return image


def open_source(root: str, split: str) -> Source:
    """The images of one split.

    Args:
        root: `digits`; a folder with a folder per split (train and val, validation or test) of class folders; a
            folder with a Parquet file (or several) per split, named after it. For `val`, a folder of class folders,
            or a single Parquet file, will also do.
        split: train or val.

    Raises:
        DataError: if there is nothing of that kind.
    """
    if root == 'digits':
        return Digits(split)
    path = Path(root).expanduser()
    if not path.exists():
        raise DataError(f"no data at {path}; data.root is 'digits', a folder with train/ and val/ of class folders, "
                        'or a folder with train*.parquet and val*.parquet')
    if path.is_file():
        if path.suffix != '.parquet':
            raise DataError(f'{path} is a file but not .parquet')
        if split == 'train':
            raise DataError(f'{path} is one file, which leaves nothing to validate on; '
                            'expected a folder with train*.parquet and val*.parquet')
        return Parquet([path])
    for name in SPLITS[split]:
        if files := sorted(p for p in path.glob('*.parquet') if p.stem.split('-')[0] == name):
            return Parquet(files)
        if (path / name).is_dir():
            return Folder(path / name)
    if split == 'val' and not any((path / name).is_dir() for name in SPLITS['train']):
        return Folder(path)
    raise DataError(f'{path} has no {split} split: expected {path}/{split}/CLASS/IMAGE or {path}/{split}*.parquet')


def check_same_classes(train: Source, val: Source) -> None:
    """Raises DataError where train and val do not have the same classes, and says which are on one side only."""
    if train.classes == val.classes:
        return
    only = [f'only in {side}: {", ".join(names[:5])}' + (f' and {len(names) - 5} more' if len(names) > 5 else '')
            for side, names in (('train', sorted(set(train.classes) - set(val.classes))),
                                ('val', sorted(set(val.classes) - set(train.classes)))) if names]
    raise DataError(
        f'train has {len(train.classes)} classes and val {len(val.classes)}, and they differ '
        f'({"; ".join(only) or "the same names in another order"}); every score would be wrong')


@dataclass
class Preprocessing:
    """How an image becomes a tensor, in timm's words; travels with a model as its pretrained_cfg."""

    size: Tuple[int, int]
    channels: int
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 0.9
    crop_mode: str = 'center'

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f'images are read with 1 or 3 channels, the model has {self.channels}')

    @classmethod
    def of(cls, cfg: Dict[str, Any]) -> 'Preprocessing':
        """What a model's pretrained_cfg says."""
        channels, height, width = cfg['input_size']
        mean, std = tuple(cfg['mean']), tuple(cfg['std'])
        if len(mean) != channels:  # an RGB model rebuilt for another number of channels
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return cls((height, width), channels, mean, std, cfg['interpolation'], cfg['crop_pct'],
                   cfg.get('crop_mode') or 'center')

    def as_cfg(self) -> Dict[str, Any]:
        """The same for a pretrained_cfg."""
        return dict(input_size=(self.channels, *self.size), mean=self.mean, std=self.std, crop_pct=self.crop_pct,
                    interpolation=self.interpolation, crop_mode=self.crop_mode)

    def convert(self, image: Image.Image) -> Image.Image:
        """To the model's channels: grey for 1, RGB for 3."""
        return image.convert({1: 'L', 3: 'RGB'}[self.channels])

    def transform(self, normalize: bool = True) -> Callable[[Image.Image], torch.Tensor]:
        """For evaluation: resize, crop, normalise; without the last, uint8."""
        return create_transform(
            (self.channels, *self.size), mean=self.mean, std=self.std, interpolation=self.interpolation,
            crop_pct=self.crop_pct, crop_mode=self.crop_mode, normalize=normalize)


@dataclass
class Augment:
    """What is done to training images.

    Args:
        scale: Share of the image's area that the random crop keeps, least and most; 1 and 1 for no crop.
        ratio: Aspect of the crop, least and most.
        hflip: Chance of a mirror image; 0 for digits and letters.
        rotate: Largest random rotation, degrees either way (small sets held in memory only).
        color_jitter: Strength of brightness, contrast and saturation jitter (not with auto_augment).
        auto_augment: timm's policy, as rand-m9-mstd0.5-inc1.
        interpolation: bilinear, bicubic or random.
        erase: Chance that a random rectangle is erased.
        erase_mode: pixel (noise), rand (one colour) or const (black).
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        switch: Chance of cutmix where both are on.
        smoothing: Label smoothing.
    """

    scale: Tuple[float, float] = (0.08, 1.0)
    ratio: Tuple[float, float] = (0.75, 1.3333)
    hflip: float = 0.5
    rotate: float = 0.0
    color_jitter: float = 0.0
    auto_augment: Optional[str] = 'rand-m9-mstd0.5-inc1'
    interpolation: str = 'random'
    erase: float = 0.25
    erase_mode: str = 'pixel'
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1


def derive(*keys: int) -> int:
    """One seed out of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's own generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class DiskBatches:
    """Batches from images opened one by one, in worker processes.

    The name of a damaged image is added to `damaged`. It is left out of its batch; in training, where every step has a
    whole batch, the next image of the source stands in for it.
    """

    def __init__(
            self,
            source: Source,
            preprocessing: Preprocessing,
            batch_size: int,
            augment: Optional[Augment] = None,
            workers: int = 2,
            seed: int = 0,
            device: torch.device = torch.device('cpu'),
    ) -> None:
        self.source, self.preprocessing, self.batch_size = source, preprocessing, batch_size
        self.augment, self.workers, self.seed, self.device = augment, workers, seed, device
        self.damaged: List[str] = []
        self.transform = preprocessing.transform() if augment is None else create_transform(
            (preprocessing.channels, *preprocessing.size), is_training=True, mean=preprocessing.mean,
            std=preprocessing.std, scale=augment.scale, ratio=augment.ratio, hflip=augment.hflip,
            color_jitter=augment.color_jitter, auto_augment=augment.auto_augment,
            interpolation=augment.interpolation, re_prob=augment.erase, re_mode=augment.erase_mode)

    def __len__(self) -> int:
        count = len(self.source.labels) / self.batch_size
        return math.floor(count) if self.augment else math.ceil(count)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch from the `start`-th on: normalised images (B, C, H, W) and labels (B,)."""
        order = epoch_order(len(self.source.labels), self.seed, epoch) if self.augment \
            else torch.arange(len(self.source.labels))
        batches = order.split(self.batch_size)[start:len(self)]
        loader = DataLoader(
            _Opener(self, epoch), batch_sampler=[batch.tolist() for batch in batches], num_workers=self.workers,
            collate_fn=_collate, pin_memory=self.device.type == 'cuda', worker_init_fn=_leave_signals,
            generator=torch.Generator())  # which gives workers seeds that nobody uses
        for images, labels, damaged in loader:
            self.damaged += damaged
            if len(labels):
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            elif self.augment:
                raise DataError('not one training image can be read')


Sample = Tuple[Optional[torch.Tensor], int, List[str]]  # image, label, names of damaged images met on the way


class _Opener(Dataset[Sample]):
    """What a worker process runs: index -> sample."""

    def __init__(self, batches: DiskBatches, epoch: int) -> None:
        self.source, self.convert = batches.source, batches.preprocessing.convert
        self.transform, self.seeds = batches.transform, (batches.seed, epoch) if batches.augment else None
        self.damaged: Set[int] = set()  # opened once, not again

    def __getitem__(self, index: int) -> Sample:
        count, names = len(self.source.labels), []
        for i in range(index, index + (count if self.seeds else 1)):
            if (i := i % count) in self.damaged:
                continue
            try:
                image = self.convert(self.source.open(i))
            except Exception:  # whatever a decoder may raise over damaged bytes
                self.damaged.add(i)
                names.append(self.source.name(i))
                continue
            return self.augmented(image, index), self.source.labels[i], names
        return None, 0, names

    def augmented(self, image: Image.Image, index: int) -> torch.Tensor:
        """The transformed image, by random numbers of the sample's own; the process keeps its state."""
        if self.seeds is None:
            return self.transform(image)
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed_all(derive(*self.seeds, index))
        tensor = self.transform(image)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return tensor


def _collate(samples: List[Sample]) -> Tuple[torch.Tensor, torch.Tensor, List[str]]:
    good = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), [name for _, _, names in samples for name in names]


def _leave_signals(worker: int) -> None:
    """Ctrl-C, and what else goes to the whole group of processes, is the main one's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch's samples, (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, epoch, 1)))


class MemoryBatches:
    """Batches of a set that is decoded once, at the model's size, and lives on the device as uint8.

    Crop, mirror and rotation are one resampling of the batch; erasing is one masked fill. Images to train on are
    resized whole; the others are prepared as from disk.
    """

    def __init__(
            self,
            source: Source,
            preprocessing: Preprocessing,
            batch_size: int,
            augment: Optional[Augment] = None,
            workers: int = 0,
            seed: int = 0,
            device: torch.device = torch.device('cpu'),
    ) -> None:
        if augment and not in_memory(augment):
            raise DataError('auto_augment and color_jitter work on single images: '
                            'set both off, or data.memory to false')
        self.batch_size, self.augment, self.seed, self.device = batch_size, augment, seed, device
        self.damaged: List[str] = []
        whole = transforms.Compose([
            transforms.Resize(preprocessing.size, transforms.InterpolationMode.BICUBIC), transforms.PILToTensor()])
        prepare = whole if augment else preprocessing.transform(normalize=False)
        images, labels = [], []
        for i, label in enumerate(source.labels):
            try:
                image = preprocessing.convert(source.open(i))
            except Exception:  # whatever a decoder may raise over damaged bytes
                self.damaged.append(source.name(i))
                continue
            images.append(prepare(image))
            labels.append(label)
        if not images:
            raise DataError(f'not one of {len(source.labels)} images can be read: {", ".join(self.damaged[:5])}, …')
        self.images = torch.stack(images).to(device)
        self.labels = torch.tensor(labels, device=device)
        self.mean = torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1) * 255

    def __len__(self) -> int:
        count = len(self.labels) / self.batch_size
        return math.floor(count) if self.augment else math.ceil(count)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one epoch from the `start`-th on: normalised images (B, C, H, W) and labels (B,)."""
        if self.augment is None:
            for chosen in torch.arange(len(self.labels)).split(self.batch_size)[start:]:
                yield (self.images[chosen] - self.mean) / self.std, self.labels[chosen]
            return
        order = epoch_order(len(self.labels), self.seed, epoch).to(self.device)
        generator = torch.Generator().manual_seed(derive(self.seed, epoch, 2))
        chances = torch.rand(len(self.labels), 12, generator=generator).to(self.device)  # a row for every sample
        for chosen in order.split(self.batch_size)[start:len(self)]:
            images = resample(self.images[chosen].float(), self.augment, chances[chosen])
            images = erase((images - self.mean) / self.std, self.augment, chances[chosen])
            yield images, self.labels[chosen]


def in_memory(augment: Augment) -> bool:
    """Whether batches can be augmented so in memory."""
    return not augment.auto_augment and not augment.color_jitter


def _box(area: torch.Tensor, log_ratio: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Height and width, as shares of the image, of a box with this share of its area."""
    return (area * (-log_ratio).exp()).sqrt().clamp(max=1), (area * log_ratio.exp()).sqrt().clamp(max=1)


def resample(images: torch.Tensor, augment: Augment, chances: torch.Tensor) -> torch.Tensor:
    """Random crop, mirror and rotation of each image, (B, C, H, W), by its row of numbers in [0, 1), (B, ≥ 6)."""
    u = chances.unbind(1)
    low, high = augment.scale
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    height, width = _box(low + (high - low) * u[0], log_low + (log_high - log_low) * u[1])
    angle = (2 * u[2] - 1) * math.radians(augment.rotate)
    mirror = 1 - 2 * (u[3] < augment.hflip).float()
    aspect = images.shape[-2] / images.shape[-1]
    theta = torch.stack([
        torch.stack([width * mirror * angle.cos(), -height * aspect * angle.sin(), (2 * u[4] - 1) * (1 - width)], 1),
        torch.stack([width * mirror * angle.sin() / aspect, height * angle.cos(), (2 * u[5] - 1) * (1 - height)], 1),
    ], 1)  # output place -> input place, both in [-1, 1]: (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=False)


def erase(images: torch.Tensor, augment: Augment, chances: torch.Tensor) -> torch.Tensor:
    """Fill a random rectangle, 2 to 33 % of the area, of some normalised images, (B, C, H, W).

    The last six of each image's chances, (B, ≥ 6), say which and where.
    """
    if augment.erase == 0:
        return images
    u = chances[:, -6:].unbind(1)
    rows, cols = images.shape[-2:]
    height, width = _box(0.02 + 0.31 * u[1], math.log(10 / 3) * (2 * u[2] - 1))
    y, x = torch.arange(rows, device=images.device) / rows, torch.arange(cols, device=images.device) / cols
    top, left = (u[3] * (1 - height))[:, None], (u[4] * (1 - width))[:, None]
    in_rows, in_cols = (y >= top) & (y < top + height[:, None]), (x >= left) & (x < left + width[:, None])
    inside = in_rows[:, :, None] & in_cols[:, None] & (u[0] < augment.erase)[:, None, None]
    if augment.erase_mode == 'const':
        noise = torch.zeros_like(images)
    else:  # each sample's own window of one long row of noise
        length = images[0].numel()
        bank = torch.randn(4096 + length, generator=torch.Generator().manual_seed(0)).to(images.device)
        starts = (u[5] * 4096).long()[:, None]
        span = torch.arange(length, device=images.device)
        if augment.erase_mode == 'rand':
            span = span // (rows * cols)
        noise = bank[starts + span].view_as(images)
    return torch.where(inside[:, None], noise, images)


def open_batches(
        source: Source,
        preprocessing: Preprocessing,
        batch_size: int,
        augment: Optional[Augment],
        memory: Optional[bool],
        workers: int = 2,
        seed: int = 0,
        device: torch.device = torch.device('cpu'),
) -> 'DiskBatches | MemoryBatches':
    """The loader that fits: in memory where asked for, or where `memory` is None and the set is of small images."""
    if memory is None:
        pixels = preprocessing.size[0] * preprocessing.size[1]
        memory = pixels <= 64 * 64 and len(source.labels) * pixels * preprocessing.channels <= 1 << 30 \
            and (augment is None or in_memory(augment))
    if augment and augment.rotate and not memory:
        raise DataError('augment.rotate works on sets held in memory only: set data.memory to true, or rotate to 0')
    loader = MemoryBatches if memory else DiskBatches
    return loader(source, preprocessing, batch_size, augment, workers, seed, device)
