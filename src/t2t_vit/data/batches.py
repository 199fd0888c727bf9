"""Make batches of a source's images.

`DiskBatches` opens, crops and resizes image by image in worker processes; `MemoryBatches` holds a small set decoded, on
the device. Both augment and normalise whole batches, and return the same ones if their augmentation resamples nothing.

Random numbers are functions of (seed, epoch, sample) in both, so the number of workers, the number of processes that
share a batch, and interruptions do not change a sample.
"""

import itertools
import math
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from torchvision.transforms import InterpolationMode

from .augment import Augment, BatchAugment, as_floats, in_batches
from .decode import Raw, image_size
from .errors import DataError
from .preprocessing import Preprocessing, TrainCrop, TrainTransform, resize_pixels
from .sources import Source, read_channels
from .waiting import DataWatch


class Batch(NamedTuple):
    """Some samples.

    Images are normalised, (B, C, H, W); labels (B,); indices of the samples in the source, (B,). Boxes, (B, 5), say
    which part of the original an image shows: top, left, height and width as fractions of it, then 1 if it is
    mirrored. A box extends beyond the original where padding shows; rotation and shear are not in it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    boxes: torch.Tensor


def derive(*keys: int) -> int:
    """Derive one seed from several numbers, the same on every machine."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_order(count: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of an epoch's samples, (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, epoch, 1)))


class Steps:
    """The samples that a process takes in each step of an epoch.

    A step has `batch_size` consecutive samples of the epoch's order for each of `world` processes. In training every
    step is complete. In evaluation every sample is taken once, and in the last step some processes may have fewer
    samples, or none.
    """

    def __init__(self, count: int, batch_size: int, training: bool, seed: int, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise ValueError(f'rank must be at least 0 and below world, got rank {rank} of world {world}')
        self.count, self.batch_size, self.training = count, batch_size, training
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        steps = self.count / (self.batch_size * self.world)
        return math.floor(steps) if self.training else math.ceil(steps)

    def epoch(self, epoch: int, start: int) -> list[torch.Tensor]:
        """Return the samples of each step from step `start` on."""
        order = epoch_order(self.count, self.seed, epoch) if self.training else torch.arange(self.count)
        steps = order.split(self.batch_size * self.world)[start : len(self)]
        shares = (step.tensor_split(self.world)[self.rank] for step in steps)
        return [samples for samples in shares if len(samples)]


class Finish:
    """Turn opened images into those of a batch: augment them, in training, and normalise.

    Args:
        preprocessing: Of the model.
        augment: Augmentation of training images; None for validation.
        device: Of the images.
        crop: Cut the random crops too, out of the images at the model's size.
    """

    def __init__(
        self, preprocessing: Preprocessing, augment: Augment | None, device: torch.device, crop: bool = False
    ) -> None:
        self.mean = torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1) * 255
        self.augment, self.crop = BatchAugment(augment, self.mean, self.std) if augment else None, crop

    @property
    def columns(self) -> int:
        """Number of random numbers that an image needs."""
        return sum(self.augment.widths) if self.augment else 0

    def __call__(
        self, images: torch.Tensor, uniforms: torch.Tensor, boxes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and boxes as in a `Batch`, from images (B, C, H, W) of values from 0 to 255.

        The result is in channels_last memory, in which convolutions are faster.
        """
        if self.augment:
            images, boxes = self.augment(images, uniforms, None if self.crop else boxes)
        else:
            images = (as_floats(images) - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last), boxes


class DiskBatches:
    """Batches of images opened one by one, in worker processes that persist for all epochs.

    On a GPU, batches are augmented and normalised there, so that a worker only decodes, crops and resizes; on a CPU the
    workers do that too.

    The name of a damaged image is added to `damaged`, and the image is left out of its batch; in training, where every
    batch is complete, the next image of the source replaces it.

    Only one epoch is read at a time: starting another drops the rest of it.
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
        read_channels(source, preprocessing.channels)
        self.damaged: list[str] = []
        self.steps = Steps(len(source.labels), batch_size, augment is not None, seed, rank, world)
        finish = Finish(preprocessing, augment, device) if augment is None or in_batches(augment) else None
        self.order, self.opener = _Order(self.steps), _Opener(source, preprocessing, augment, seed, finish)
        self.finish = None if device.type == 'cpu' else finish
        self.loader = DataLoader(
            self.opener,
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=_Collate(finish if device.type == 'cpu' else None),
            pin_memory=device.type == 'cuda',
            worker_init_fn=leave_signals,
            persistent_workers=workers > 0,
            generator=torch.Generator(),
        )  # or the global generator would be used to seed the workers

    def __len__(self) -> int:
        return len(self.steps)

    def smaller(self, batch_size: int = 8) -> 'DiskBatches':
        """Return the same images in small batches from other workers, to measure speed without a long first wait."""
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
        """End the workers, see `end_workers`."""
        if (iterator := getattr(self.loader, '_iterator', None)) is not None:
            end_workers(iterator)
            self.loader._iterator = None

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from batch `start` on."""
        self.order.epoch, self.order.start = epoch, start
        for batch, damaged in self.loader:
            self.damaged = [*dict.fromkeys([*self.damaged, *damaged])] if damaged else self.damaged
            if batch is not None:
                *parts, uniforms = batch
                images, labels, indices, boxes = (tensor.to(self.device, non_blocking=True) for tensor in parts)
                if self.finish:
                    images, boxes = self.finish(images, uniforms, boxes)
                yield Batch(images, labels, indices, boxes)
            elif self.augment:
                raise DataError('none of the training images can be read')


class _Order(Sampler[list[tuple[int, int]]]):
    """Send the workers a list of (epoch, index) for every step."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.epoch, self.start = steps, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.lists(self.epoch, self.steps.epoch(self.epoch, self.start)))

    @staticmethod
    def lists(epoch: int, steps: Sequence[torch.Tensor]) -> Iterator[list[tuple[int, int]]]:
        """Yield each list when it is needed: converting a million numbers at once takes long."""
        for samples in steps:
            yield [(epoch, index) for index in samples.tolist()]


Sample = tuple[tuple[torch.Tensor, int, int, torch.Tensor, torch.Tensor] | None, list[str]]
# image, label, index, box, random numbers of the batch's augmentation; names of damaged images


class _Opener(Dataset[Sample]):
    """Turn (epoch, index) into a sample; runs in worker processes.

    What `finish` does to batches is left to it; without it, timm's transform augments and normalises each image.
    """

    def __init__(
        self, source: Source, preprocessing: Preprocessing, augment: Augment | None, seed: int, finish: Finish | None
    ) -> None:
        self.source, self.preprocessing, self.seed = source, preprocessing, seed
        self.training, self.columns = augment is not None, finish.columns if finish else 0
        self.crop = TrainCrop(preprocessing, augment) if augment and finish else None
        self.train = TrainTransform(preprocessing, augment) if augment and not finish else None
        self.damaged: set[int] = set()  # not opened again

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        count, names = len(self.source.labels), []
        for i in range(index, index + (count if self.training else 1)):
            if (i := i % count) in self.damaged:
                continue
            try:
                image = self.source.open(i)
                shown = self.read(image)
            except Exception:  # a damaged image, or one that cannot be read
                self.damaged.add(i)
                names.append(self.source.name(i))
                continue
            tensor, box, uniforms = shown if self.evaluating else self.transformed(shown, epoch, index)
            tensor = tensor if self.preprocessing.displayable or self.train else tensor * 255
            return (tensor, self.source.labels[i], i, box, uniforms), names
        return None, names

    @property
    def evaluating(self) -> bool:
        """Return true if images are not augmented."""
        return self.crop is None and self.train is None

    def read(self, image: Raw) -> Any:
        """Return a read image as `transformed` takes it; in evaluation as `transformed` returns it."""
        if self.evaluating:
            box = torch.tensor(self.preprocessing.kept(image))
            return self.preprocessing.evaluate(image), box, torch.empty(0)
        return self.preprocessing.pixels(image) if self.crop else self.preprocessing.convert(image)

    def transformed(self, image: Any, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prepare an image, to train on with the random numbers of its sample; return it, its box and more numbers.

        The main process keeps its generators' state.
        """
        seed = derive(self.seed, epoch, index)
        if self.crop:
            state = None if get_worker_info() else random.getstate()
            random.seed(seed)
            crop, box = self.crop(image)
            if state is not None:
                random.setstate(state)
            return crop, box, torch.rand(self.columns, generator=torch.Generator().manual_seed(seed))
        assert self.train is not None
        states = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond, for all devices
        sample = self.train(image)
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return *sample, torch.empty(0)


class _Collate:
    """Stack samples, and finish the batch if `finish` is given; returns its tensors, and names of damaged images."""

    def __init__(self, finish: Finish | None) -> None:
        self.finish = finish

    def __call__(self, samples: list[Sample]) -> tuple[list[torch.Tensor] | None, list[str]]:
        names = [name for _, damaged in samples for name in damaged]
        good = [sample for sample, _ in samples if sample is not None]
        if not good:
            return None, names
        packed = all(image.permute(1, 2, 0).is_contiguous() for image, *_ in good)  # as decoders and torch return them
        if packed:
            good = [(sample[0].permute(1, 2, 0), *sample[1:]) for sample in good]
        images, labels, indices, boxes, uniforms = default_collate(good)  # which stacks into shared memory
        images = images.permute(0, 3, 1, 2) if packed else images.contiguous(memory_format=torch.channels_last)
        if self.finish:
            images, boxes = self.finish(images, uniforms, boxes)
        return [images, labels, indices, boxes, uniforms], names


def leave_signals(worker: int) -> None:
    """Ignore the signals that go to the whole process group; the main process answers them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(getattr(signal, 'SIGUSR1', signal.SIGTERM), signal.SIG_IGN)


def end_workers(iterator: Any) -> None:
    """End the workers of a loader's iterator, which ignore signals: a process that ends before them would wait forever.

    There are none if the loader opens its items itself.
    """
    workers = list(getattr(iterator, '_workers', ()))
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():  # stuck in a read that does not return
            worker.kill()


class MemoryBatches:
    """Batches of a set that is decoded once, at the model's size, and held on the device (uint8 for grey and RGB).

    Training images are resized without a crop, validation images are prepared as from disk; `BatchAugment` crops and
    augments. A damaged image is left out or, in training, replaced, as from disk.
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
        watch: DataWatch | None = None,
    ) -> None:
        if augment and not in_batches(augment):
            raise DataError(
                f'augment.aa {augment.aa} has operations for single images only: '
                'set data.memory to false, or use a policy like rand-m9-mstd0.5-inc1'
            )
        self.batch_size, self.seed, self.device = batch_size, seed, device
        read_channels(source, preprocessing.channels)
        self.damaged: list[str] = []
        images, indices, boxes = [], [], []

        def read() -> Iterator[tuple[Raw, torch.Tensor] | None]:
            for i in range(len(source.labels)):
                try:
                    image = source.open(i)
                    pixels = preprocessing.pixels(image) if augment else preprocessing.evaluate(image)
                except Exception:  # a damaged image, or one that cannot be read
                    self.damaged.append(source.name(i))
                    yield None
                else:
                    yield image, pixels

        watch = watch or DataWatch()
        with watch.active():
            for i, opened in enumerate(watch.each(read(), source.name)):
                if opened is None:
                    continue
                image, pixels = opened
                if augment:
                    pixels = resize_pixels(pixels, preprocessing.size, InterpolationMode.BICUBIC)
                images.append(pixels if preprocessing.displayable else pixels * 255)
                indices.append(i)
                boxes.append(preprocessing.kept(image))
        if not images:
            raise DataError(f'none of {len(source.labels)} images can be read: {", ".join(self.damaged[:5])}, …')
        self.images = torch.stack(images).to(device)
        self.labels = torch.tensor([source.labels[i] for i in indices], device=device)
        self.indices = torch.tensor(indices, device=device)
        self.boxes = torch.tensor(boxes, device=device)
        self.finish = Finish(preprocessing, augment, device, crop=True)
        samples = torch.arange(len(source.labels)) if augment else torch.tensor(indices)
        self.places = torch.searchsorted(torch.tensor(indices), samples) % len(images)  # of each sample's image
        self.steps = Steps(len(samples), batch_size, augment is not None, seed, rank, world)

    def __len__(self) -> int:
        return len(self.steps)

    def close(self) -> None:
        """Do nothing: there are no workers."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch from batch `start` on."""
        generators = [torch.Generator().manual_seed(derive(self.seed, epoch, key)) for key in (2, 4)]
        count, augment = len(self.places), self.finish.augment
        uniforms = augment.draw(count, generators) if augment else torch.empty(count, 0)
        for samples in self.steps.epoch(epoch, start):
            chosen = self.places[samples].to(self.device, non_blocking=True)
            images, boxes = self.finish(self.images[chosen], uniforms[samples], self.boxes[chosen])
            yield Batch(images, self.labels[chosen], self.indices[chosen], boxes)


def small_images(source: Source, preprocessing: Preprocessing, training: bool) -> bool:
    """Return true if a set is held in memory by default: at most 64×64 pixels an image, and 1 GiB in all.

    Training images must not be much larger than that before they are resized, or a crop would show less detail than
    from disk; sixteen of them are checked.
    """
    pixels, count = preprocessing.size[0] * preprocessing.size[1], len(source.labels)
    width = preprocessing.channels * (1 if preprocessing.displayable else 4)  # bytes a pixel
    if pixels > 64 * 64 or count * pixels * width > 1 << 30:
        return False
    sizes = []
    for i in range(0, count, max(1, count // 16)) if training else ():
        try:
            sizes.append(image_size(source.open(i)))
        except Exception:  # a damaged image, or one that cannot be read
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
    watch: DataWatch | None = None,
) -> 'DiskBatches | MemoryBatches':
    """Return the loader for a source: in memory if `memory` says so, or if it is None and the images are small.

    Args:
        source: The images.
        preprocessing: Of the model.
        batch_size: Images of this process in a step.
        augment: Augmentation of training images; None for validation.
        memory: Hold the set decoded; None for small images only.
        workers: Number of processes that open images.
        seed: Of order and augmentation.
        device: The device of the batches.
        rank: Number of this process among those that share every step.
        world: Number of these processes.
        watch: Limits the time that a set is waited for while it is read into memory.

    Raises:
        DataError: if the augmentation is not available for these images.
        Stalled: if images that are read into memory do not come.
    """
    if augment and not preprocessing.displayable and (augment.aa or augment.color_jitter):
        raise DataError(
            f'augment.aa and augment.color_jitter need 1 or 3 channels, the images have '
            f'{preprocessing.channels}: set them to null and 0'
        )
    if memory is None:
        memory = small_images(source, preprocessing, augment is not None) and (augment is None or in_batches(augment))
    if augment and augment.rotate and not memory:
        raise DataError('augment.rotate needs a set held in memory: set data.memory to true, or augment.rotate to 0')
    args = source, preprocessing, batch_size, augment, workers, seed, device, rank, world
    return MemoryBatches(*args, watch) if memory else DiskBatches(*args)


def measure_input(
    batches: 'DiskBatches | MemoryBatches', seconds: float = 5.0, epochs: Iterable[int] | None = None
) -> float:
    """Measure the images per second that are read and augmented, without a model.

    The first batch of every worker is not counted: workers start with it. Epochs follow each other until the time is
    over, or all given epochs are read; 0.0 if nothing is left to count.

    Raises:
        DataError: if there are no batches.
    """
    if not len(batches):
        raise DataError(f'the images do not fill a batch of {batches.batch_size}')
    counts = (
        len(batch.labels)
        for epoch in (itertools.count() if epochs is None else epochs)
        for batch in batches.epoch(epoch)
    )
    workers = batches.loader.num_workers if isinstance(batches, DiskBatches) else 0
    return images_per_second(counts, batches.device, seconds, max(1, workers))


def images_per_second(counts: Iterator[int], device: torch.device, seconds: float, first: int = 1) -> float:
    """Return the images per second of an iterator of batch sizes; the `first` ones are not counted."""
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
    """Wait until an accelerator has finished all its work."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
