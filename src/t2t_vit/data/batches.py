"""How batches are made of a source.

`DiskBatches` opens and augments image by image in worker processes (timm's transforms); `MemoryBatches` holds a small
set decoded, on the device, and augments whole batches there. Both give the same batches where their augmentation
resamples nothing.

What is random in a sample is a function of (seed, epoch, sample) in both: neither the number of workers, nor how many
processes share a batch, nor where a run was interrupted changes it.
"""

import itertools
import math
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from torchvision import transforms

from .augment import Augment, BatchAugment, in_memory
from .decode import Decoded, image_size
from .errors import DataError
from .preprocessing import Preprocessing, TrainTransform
from .sources import Source


class Batch(NamedTuple):
    """Some samples.

    Images are normalised, (B, C, H, W); labels (B,); indices are the samples' places in the source, (B,). Boxes,
    (B, 5), are what an image shows of the original: top, left, height and width as shares of it, then 1 where it is
    mirrored. A box reaches out of the original where padding is seen, and knows nothing of rotation and shear.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    boxes: torch.Tensor


def derive(*keys: int) -> int:
    """One seed out of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's own generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of an epoch's samples, (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, epoch, 1)))


class Steps:
    """Which samples of an epoch a process takes in each step.

    A step has `batch_size` samples of each of `world` processes, in the order of the epoch; they are shared out in one
    piece each. In training every step is whole. Else every sample is taken once, and the last step may give some
    processes fewer samples, or none.
    """

    def __init__(self, count: int, batch_size: int, training: bool, seed: int, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise ValueError(f'rank is at least 0 and below world, got rank {rank} of world {world}')
        self.count, self.batch_size, self.training = count, batch_size, training
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        steps = self.count / (self.batch_size * self.world)
        return math.floor(steps) if self.training else math.ceil(steps)

    def epoch(self, epoch: int, start: int) -> list[torch.Tensor]:
        """The samples of each step from the `start`-th on."""
        order = epoch_order(self.count, self.seed, epoch) if self.training else torch.arange(self.count)
        steps = order.split(self.batch_size * self.world)[start : len(self)]
        own = (step.tensor_split(self.world)[self.rank] for step in steps)
        return [samples for samples in own if len(samples)]


class DiskBatches:
    """Batches from images opened one by one, in worker processes, which stay for all epochs.

    The name of a damaged image is added to `damaged`. It is left out of its batch; in training, where every step has a
    whole batch, the next image of the source stands in for it.

    One epoch is under way at a time: where another begins, what is left of it is dropped.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        batch_size: int,
        augment: Augment | None = None,
        workers: int = 2,
        seed: int = 0,
        device: torch.device = torch.device('cpu'),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source, self.batch_size, self.augment, self.device = source, batch_size, augment, device
        self.damaged: list[str] = []
        self.steps = Steps(len(source.labels), batch_size, augment is not None, seed, rank, world)
        self.order, self.opener = _Order(self.steps), _Opener(source, preprocessing, augment, seed)
        self.loader = DataLoader(
            self.opener,
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == 'cuda',
            worker_init_fn=leave_signals,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )  # which gives workers seeds that nobody uses

    def __len__(self) -> int:
        return len(self.steps)

    def smaller(self, batch_size: int = 8) -> 'DiskBatches':
        """The same images in small batches by other workers: to measure, since these come at once."""
        return DiskBatches(
            self.source,
            self.opener.preprocessing,
            batch_size,
            self.augment,
            self.loader.num_workers,
            self.steps.seed,
            self.device,
            self.steps.rank,
            self.steps.world,
        )

    def close(self) -> None:
        """End the workers. They answer no signal, so a process that ends before them would wait for ever."""
        if (iterator := getattr(self.loader, '_iterator', None)) is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from the `start`-th on."""
        self.order.epoch, self.order.start = epoch, start
        for batch, damaged in self.loader:
            self.damaged = [*dict.fromkeys([*self.damaged, *damaged])] if damaged else self.damaged
            if batch is not None:
                yield Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
            elif self.augment:
                raise DataError('not one training image can be read')


class _Order(Sampler[list[tuple[int, int]]]):
    """What the workers are sent: for every step a list of (epoch, index)."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.epoch, self.start = steps, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.lists(self.epoch, self.steps.epoch(self.epoch, self.start)))

    @staticmethod
    def lists(epoch: int, steps: Sequence[torch.Tensor]) -> Iterator[list[tuple[int, int]]]:
        """Each when it is asked for: a million numbers as Python's take long."""
        for samples in steps:
            yield [(epoch, index) for index in samples.tolist()]


Sample = tuple[tuple[torch.Tensor, int, int, torch.Tensor] | None, list[str]]  # as in Batch; names of damaged images


class _Opener(Dataset[Sample]):
    """What a worker process runs: (epoch, index) -> sample."""

    def __init__(self, source: Source, preprocessing: Preprocessing, augment: Augment | None, seed: int) -> None:
        self.source, self.preprocessing, self.seed = source, preprocessing, seed
        self.train = TrainTransform(preprocessing, augment) if augment else None
        self.evaluate = preprocessing.transform()
        self.damaged: set[int] = set()  # opened once, not again

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        count, names = len(self.source.labels), []
        for i in range(index, index + (count if self.train else 1)):
            if (i := i % count) in self.damaged:
                continue
            try:
                image = self.preprocessing.convert(self.source.open(i))
            except Exception:  # whatever a decoder may raise over damaged bytes
                self.damaged.add(i)
                names.append(self.source.name(i))
                continue
            tensor, box = self.transformed(image, epoch, index)
            return (tensor, self.source.labels[i], i, box), names
        return None, names

    def transformed(self, image: Decoded, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The image and its box, by random numbers of the sample's own; the main process keeps its state."""
        if self.train is None:
            return self.evaluate(image), torch.tensor(self.preprocessing.kept(image))
        states = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
        seed = derive(self.seed, epoch, index)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices, which takes a millisecond
        sample = self.train(image)
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return sample


def _collate(samples: list[Sample]) -> tuple[Batch | None, list[str]]:
    names = [name for _, damaged in samples for name in damaged]
    good = [sample for sample, _ in samples if sample is not None]
    if not good:
        return None, names
    return Batch(*default_collate(good)), names  # which stacks straight into the memory that processes share


def leave_signals(worker: int) -> None:
    """Ctrl-C, and what else goes to the whole group of processes, is the main one's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(getattr(signal, 'SIGUSR1', signal.SIGTERM), signal.SIG_IGN)


class MemoryBatches:
    """Batches of a set that is decoded once, at the model's size, and lives on the device as uint8.

    Images to train on are resized whole; the others are prepared as from disk. `BatchAugment` does the rest.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        batch_size: int,
        augment: Augment | None = None,
        workers: int = 0,
        seed: int = 0,
        device: torch.device = torch.device('cpu'),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if augment and not in_memory(augment):
            raise DataError(
                f'augment.aa {augment.aa} has operations for single images only: '
                'set data.memory to false, or take a policy as rand-m9-mstd0.5-inc1'
            )
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.damaged: list[str] = []
        resize = transforms.Resize(preprocessing.size, transforms.InterpolationMode.BICUBIC)
        whole = transforms.Compose([resize, *([transforms.PILToTensor()] if preprocessing.displayable else [])])
        prepare = whole if augment else preprocessing.transform(normalize=False)
        images, indices, boxes = [], [], []
        for i in range(len(source.labels)):
            try:
                image = preprocessing.convert(source.open(i))
            except Exception:  # whatever a decoder may raise over damaged bytes
                self.damaged.append(source.name(i))
                continue
            images.append(prepare(image) * (1 if preprocessing.displayable else 255))
            indices.append(i)
            boxes.append(preprocessing.kept(image))
        if not images:
            raise DataError(f'not one of {len(source.labels)} images can be read: {", ".join(self.damaged[:5])}, …')
        self.images = torch.stack(images).to(device)
        self.labels = torch.tensor([source.labels[i] for i in indices], device=device)
        self.indices = torch.tensor(indices, device=device)
        self.boxes = torch.tensor(boxes, device=device)
        self.mean = torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1) * 255
        self.augment = BatchAugment(augment, self.mean, self.std) if augment else None
        self.steps = Steps(len(images), batch_size, augment is not None, seed, rank, world)

    def __len__(self) -> int:
        return len(self.steps)

    def close(self) -> None:
        """There is nothing to end."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from the `start`-th on."""
        chances = (
            self.augment.chances(
                len(self.labels), [torch.Generator().manual_seed(derive(self.seed, epoch, key)) for key in (2, 4)]
            )
            if self.augment
            else None
        )
        for samples in self.steps.epoch(epoch, start):
            chosen = samples.to(self.device, non_blocking=True)
            if self.augment and chances is not None:
                images, boxes = self.augment(self.images[chosen], chances[samples])
            else:
                images, boxes = (self.images[chosen] - self.mean) / self.std, self.boxes[chosen]
            yield Batch(images, self.labels[chosen], self.indices[chosen], boxes)


def small_images(source: Source, preprocessing: Preprocessing, training: bool) -> bool:
    """Whether a set is held in memory by default: at most 64² pixels and 1 GiB at the model's size.

    To train on, its images must not be much larger than that themselves, or a crop would show less than from disk;
    sixteen of them are looked at.
    """
    pixels, count = preprocessing.size[0] * preprocessing.size[1], len(source.labels)
    width = preprocessing.channels * (1 if preprocessing.displayable else 4)  # bytes a pixel
    if pixels > 64 * 64 or count * pixels * width > 1 << 30:
        return False
    sizes = []
    for i in range(0, count, max(1, count // 16)) if training else ():
        try:
            sizes.append(image_size(source.open(i)))
        except Exception:  # whatever a decoder may raise over damaged bytes
            continue
    return all(width * height <= 2 * pixels for width, height in sizes)


def open_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    augment: Augment | None,
    memory: bool | None,
    workers: int = 2,
    seed: int = 0,
    device: torch.device = torch.device('cpu'),
    rank: int = 0,
    world: int = 1,
) -> 'DiskBatches | MemoryBatches':
    """The loader that fits: in memory where asked for, or where `memory` is None and the set is of small images.

    Args:
        source: Where the images come from.
        preprocessing: The model's.
        batch_size: Images a step, of this process.
        augment: What is done to training images; None for validation.
        memory: Whether to hold the set decoded.
        workers: Processes that open images.
        seed: Of order and augmentation.
        device: Where batches go.
        rank: This process's number among those that share every step.
        world: How many these are.
    """
    if augment and not preprocessing.displayable and (augment.aa or augment.color_jitter):
        raise DataError(
            f'augment.aa and augment.color_jitter need 1 or 3 channels, the images have '
            f'{preprocessing.channels}: set them to null and 0'
        )
    if memory is None:
        memory = small_images(source, preprocessing, augment is not None) and (augment is None or in_memory(augment))
    if augment and augment.rotate and not memory:
        raise DataError('augment.rotate works on sets held in memory only: set data.memory to true, or rotate to 0')
    loader = MemoryBatches if memory else DiskBatches
    return loader(source, preprocessing, batch_size, augment, workers, seed, device, rank, world)


def measure_input(
    batches: 'DiskBatches | MemoryBatches', seconds: float = 5.0, epochs: Iterable[int] | None = None
) -> float:
    """Images per second that the input side alone delivers.

    The first batch of every worker is not counted: workers start with it. Epochs follow each other until the time is
    over, or until those that are given are; 0.0 where nothing was left to count.

    Raises:
        DataError: if there are no batches.
    """
    if not len(batches):
        raise DataError(f'the images make no batch of {batches.batch_size}')
    counts = (
        len(batch.labels)
        for epoch in (itertools.count() if epochs is None else epochs)
        for batch in batches.epoch(epoch)
    )
    workers = batches.loader.num_workers if isinstance(batches, DiskBatches) else 0
    return images_per_second(counts, batches.device, seconds, max(1, workers))


def images_per_second(counts: Iterator[int], device: torch.device, seconds: float, first: int = 1) -> float:
    """How fast batches come, by the number of images in each; the `first` ones are not counted."""
    for _ in itertools.islice(counts, first):
        continue
    synchronize(device)
    begun, images = time.perf_counter(), 0
    for count in counts:
        images += count
        if time.perf_counter() - begun >= seconds:
            break
    synchronize(device)
    return images / (time.perf_counter() - begun)


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of an accelerator."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
