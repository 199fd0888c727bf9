"""Batches: randomness by seed, epoch and sample only; sharing among processes; workers; speed; preprocessing."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import to_tensor

from t2t_vit.data import (
    Augment,
    Batch,
    DataError,
    Digits,
    DiskBatches,
    Folder,
    MemoryBatches,
    Preprocessing,
    derive,
    measure_input,
    open_batches,
    open_source,
    seed_all,
)
from t2t_vit.data.preprocessing import TrainTransform

SMALL = Preprocessing((32, 32), 3, (0.5,) * 3, (0.25,) * 3)
GREY = Preprocessing((16, 16), 1, (0.3,), (0.4,), crop_pct=1.0)
PLAIN = dict(aa=None, mixup=0.0, cutmix=0.0)
STILL = Augment(**PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, reprob=0.0)


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) > 0 and all(
        torch.equal(x, y) for pair in zip(found, expected) for x, y in zip(*pair)
    )


def break_some(folder: Path) -> list[str]:
    """Truncate one image and add a text file named as an image; return their names."""
    truncated, text = sorted(folder.rglob('*.jpg'))[0], folder / CLASSES[0] / 'text.png'
    truncated.write_bytes(truncated.read_bytes()[:200])
    text.write_text('not an image')
    return sorted([str(truncated), str(text)])


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> tuple[Folder, list[str]]:
    """Return the training photos, two of them damaged, and the names of those two."""
    for file in sorted(path for path in (photos / 'train').rglob('*') if path.is_file()):
        copy = tmp_path / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    names = break_some(tmp_path / 'train')
    return Folder(tmp_path / 'train'), names


def batches_of(photos: Path, workers: int = 0, **changes: object) -> DiskBatches:
    augment = Augment(**{'aa': 'rand-m9-mstd0.5-inc1', **changes})
    return DiskBatches(open_source(str(photos), 'train'), SMALL, 7, augment, workers, seed=5)


def test_batches_do_not_depend_on_the_number_of_workers(photos):
    assert same(list(batches_of(photos).epoch(1)), list(batches_of(photos, workers=2).epoch(1)))


def memory_of_digits() -> MemoryBatches:
    return MemoryBatches(Digits('train'), GREY, 256, Augment(**PLAIN, rotate=10.0), seed=5)


@pytest.mark.parametrize('make', [batches_of, lambda photos: memory_of_digits()], ids=['disk', 'memory'])
def test_batches_do_not_depend_on_where_an_epoch_starts(photos, make):
    batches = make(photos)
    assert same(list(batches.epoch(1, start=2)), list(make(photos).epoch(1))[2:])


def test_batches_are_in_channels_last_memory(photos):
    """In which convolutions are faster on CPUs; also if timm augments single images, and from worker processes."""
    train, val = (open_source(str(photos), split) for split in ('train', 'val'))
    loaders = [batches_of(photos), batches_of(photos, workers=1), batches_of(photos, aa='augmix-m5')]
    loaders += [
        DiskBatches(val, SMALL, 5, workers=0),
        MemoryBatches(val, SMALL, 5),
        MemoryBatches(train, SMALL, 5, STILL),
    ]
    for loader in loaders:
        images = next(iter(loader.epoch())).images
        assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


@pytest.mark.parametrize('make', [batches_of, lambda photos: memory_of_digits()], ids=['disk', 'memory'])
def test_epochs_differ(photos, make):
    """In their order and in the augmentation of each image."""
    batches = make(photos)
    first, second = (
        {index: image for batch in batches.epoch(epoch) for index, image in zip(batch.indices.tolist(), batch.images)}
        for epoch in range(2)
    )
    assert list(first) != list(second) and len({*first} & {*second}) > len(first) / 2
    assert not [index for index in {*first} & {*second} if torch.equal(first[index], second[index])]


def test_training_drops_the_incomplete_last_batch(photos):
    sizes = [len(labels) for _, labels, *_ in batches_of(photos).epoch()]
    assert sizes == [7, 7, 7] and len(batches_of(photos)) == 3


def test_validation_takes_every_image_once_in_order(photos):
    batches = DiskBatches(open_source(str(photos), 'val'), SMALL, 5, workers=0)
    labels = [labels.tolist() for _, labels, *_ in batches.epoch()]
    assert labels == [[0] * 4 + [1], [1] * 3 + [2] * 2, [2] * 2] and len(batches) == 3


def test_memory_and_disk_prepare_validation_images_alike(photos):
    loaders = (loader(open_source(str(photos), 'val'), SMALL, 5, workers=0) for loader in (DiskBatches, MemoryBatches))
    for (one, labels, *_), (other, other_labels, *_) in zip(*(loader.epoch() for loader in loaders)):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_memory_and_disk_replace_damaged_training_images_alike(damaged):
    source, names = damaged
    memory, disk = (make(source, SMALL, 5, STILL, 0, seed=5) for make in (MemoryBatches, DiskBatches))
    assert len(memory) == len(disk) == len(source.labels) // 5
    for one, other in zip(memory.epoch(1), disk.epoch(1)):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.labels, other.labels)
    assert sorted(memory.damaged) == names


def test_memory_and_disk_agree_on_whole_training_images():
    source = Digits('train')
    memory = MemoryBatches(source, GREY, 64, STILL, seed=5)
    disk = DiskBatches(source, GREY, 64, Augment(**{**vars(STILL), 'interpolation': 'bicubic'}), 0, seed=5)
    for (one, labels, *_), (other, other_labels, *_) in zip(memory.epoch(3), disk.epoch(3)):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def generator_states() -> Iterator[object]:
    yield random.getstate()
    yield np.random.get_state()[1].tolist()
    yield torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    'make',
    [batches_of, lambda photos: batches_of(photos, workers=1), lambda photos: memory_of_digits()],
    ids=['disk', 'worker', 'memory'],
)
def test_loading_leaves_the_global_generators_alone(photos, make):
    before = list(generator_states())
    assert list(make(photos).epoch())
    assert list(generator_states()) == before


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
def test_damaged_validation_images_are_left_out_and_named(damaged, loader):
    source, names = damaged
    batches = loader(source, SMALL, 4, workers=0)
    labels = torch.cat([labels for _, labels, *_ in batches.epoch()])
    assert sorted(batches.damaged) == names and len(labels) == len(source.labels) - 2


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_training_images_leave_no_gap(damaged, workers):
    """Mixup needs even batches, and a resumed run counts them."""
    source, names = damaged
    batches = DiskBatches(source, SMALL, 1, Augment(), workers, seed=5)
    assert len(list(batches.epoch())) == len(source.labels)
    assert sorted({*batches.damaged}) == names


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
def test_only_damaged_images_are_rejected(tmp_path, loader):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / '1.png').write_text('not an image')
    with pytest.raises(DataError, match='none of'):
        list(loader(Folder(tmp_path), SMALL, 1, Augment(**PLAIN), workers=0).epoch())


@pytest.mark.parametrize(
    'augment, memory, message',
    [
        (Augment(aa='augmix-m3'), True, 'aa augmix-m3 has operations for single images only'),
        (Augment(aa='rand-m9-t3a'), True, 'aa rand-m9-t3a has operations for single images only'),
        (Augment(aa='v0', rotate=5.0), None, 'rotate needs a set held in memory'),
        (Augment(**PLAIN, rotate=5.0), False, 'rotate needs a set held in memory'),
    ],
)
def test_unavailable_augmentation_is_rejected(photos, augment, memory, message):
    with pytest.raises(DataError, match=message):
        open_batches(open_source(str(photos), 'train'), SMALL, 4, augment, memory)


@pytest.mark.parametrize(
    'size, augment, kind',
    [
        (64, None, MemoryBatches),
        (64, Augment(**PLAIN), MemoryBatches),
        (64, Augment(), MemoryBatches),
        (64, Augment(aa='v0'), DiskBatches),
        (65, None, DiskBatches),
        (32, None, MemoryBatches),
        (32, Augment(), DiskBatches),
    ],
)
def test_small_images_are_held_in_memory(photos, size, augment, kind):
    """Training images only if they are not reduced much."""
    preprocessing = Preprocessing((size, size), 3, (0.5,) * 3, (0.25,) * 3)
    assert type(open_batches(open_source(str(photos), 'val'), preprocessing, 4, augment, None)) is kind


# what a batch holds beside images


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
@pytest.mark.parametrize('augment', [None, Augment()], ids=['val', 'train'])
def test_samples_know_their_index_in_the_source(damaged, loader, augment):
    source, names = damaged
    for _, labels, indices, boxes in loader(source, SMALL, 4, augment, workers=0).epoch():
        assert [source.labels[i] for i in indices] == labels.tolist()
        assert not {source.name(i) for i in indices} & {*names}
        assert boxes.shape == (len(labels), 5)


def test_training_transform_equals_timm(photos):
    """Bit for bit, with the same random numbers."""
    source = open_source(str(photos), 'train')
    augment = Augment()
    ours = TrainTransform(SMALL, augment)
    theirs = create_transform(
        (3, 32, 32),
        is_training=True,
        mean=SMALL.mean,
        std=SMALL.std,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=0.5,
        color_jitter=0,
        auto_augment=augment.aa,
        interpolation='random',
        re_prob=0.25,
        re_mode='pixel',
    )
    for i in range(24):
        image = SMALL.convert(source.open(i))
        seed_all(i)
        expected = theirs(image)
        seed_all(i)
        assert torch.equal(ours(image)[0], expected)


def test_crops_equal_those_of_timm(photos):
    """With the same random numbers, to 2 of 255: the filters round differently."""
    source = open_source(str(photos), 'train')
    still = Augment(aa=None, hflip=0.0, reprob=0.0)
    preprocessing = Preprocessing((32, 32), 3, (0.0,) * 3, (1.0,) * 3)
    theirs = RandomResizedCropAndInterpolation((32, 32), still.scale, still.ratio, 'random')
    for images, _, indices, _ in DiskBatches(source, preprocessing, 8, still, 0, seed=5).epoch(3):
        for image, index in zip(images, indices.tolist()):
            random.seed(derive(5, 3, index))
            expected = to_tensor(theirs(SMALL.convert(source.open(index))))
            torch.testing.assert_close(image, expected, rtol=0, atol=2.01 / 255)
            assert (image - expected).abs().mean() < 0.1 / 255


def test_workers_leave_the_augmentation_to_another_device(photos):
    """The images that they return are bytes, and become the same batch there."""
    made, left = (batches_of(photos, reprob=0.5, pad=2, aa='rand-m9-mstd0.5-inc1-p1') for _ in range(2))
    left.finish, left.loader.collate_fn.finish = left.loader.collate_fn.finish, None
    raw, _ = next(iter(left.loader))
    assert raw[0].dtype == torch.uint8 and raw[0].shape == (7, 3, 32, 32)
    assert same(list(made.epoch(2)), list(left.epoch(2)))


def test_policies_for_single_images_work_from_disk(photos):
    source = open_source(str(photos), 'train')
    for augment in (Augment(aa='augmix-m3'), Augment(recount=3, reprob=1.0)):
        batches = [list(DiskBatches(source, SMALL, 8, augment, 0, seed=5).epoch()) for _ in range(2)]
        assert same(*batches) and batches[0][0].images.dtype == torch.float32


class Places:
    """Images whose red value is the column and whose green value is the row, from 0 to 255."""

    classes, labels = ['position'], [0] * 40

    def open(self, index: int) -> Image.Image:
        rows, cols = np.mgrid[:256, : (256 if index % 2 else 384)]
        return Image.fromarray(np.stack([cols * 255 // cols.max(), rows, 0 * rows], 2).astype(np.uint8))

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
@pytest.mark.parametrize(
    'augment, crop_mode',
    [(Augment(**PLAIN, reprob=0.0, pad=4), ''), (None, 'center'), (None, 'squash'), (None, 'border')],
)
def test_boxes_match_the_visible_pixels(loader, augment, crop_mode):
    """Read from the pixels in the middle, to 2 % of the image."""
    preprocessing = Preprocessing((64, 64), 3, (0.0,) * 3, (1.0,) * 3, crop_mode=crop_mode or 'center')
    for images, _, _, boxes in loader(Places(), preprocessing, 10, augment, workers=0).epoch():
        top, left, height, width, mirrored = boxes.unbind(1)
        for edge in (24, 40):
            position = (edge + 0.5) / 64
            across = torch.where(mirrored > 0, 1 - position, position)
            torch.testing.assert_close(images[:, 0, 32, edge], left + width * across, rtol=0, atol=0.02)
            torch.testing.assert_close(images[:, 1, edge, 32], top + height * position, rtol=0, atol=0.02)
        assert augment is not None or not mirrored.any()


# processes


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
def test_processes_share_every_step(photos, loader):
    """One process with batches of eight, two with four, four with two: the same images, augmented the same."""
    source, augment = open_source(str(photos), 'train'), Augment(reprob=0.5, pad=2)
    (whole,), *parts = (
        [
            list(loader(source, SMALL, 8 // world, augment, 0, 5, rank=rank, world=world).epoch(1, start=1))
            for rank in range(world)
        ]
        for world in (1, 2, 4)
    )
    assert len(whole) == 2
    for ranks in parts:
        for expected, step in zip(whole, zip(*ranks)):
            for one, pieces in zip(expected, zip(*step)):
                torch.testing.assert_close(torch.cat(pieces), one)


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
@pytest.mark.parametrize('batch_size, world', [(5, 2), (3, 4), (1, 5), (40, 3)])
def test_processes_validate_every_image_once(photos, loader, batch_size, world):
    loaders = [
        loader(open_source(str(photos), 'val'), SMALL, batch_size, None, 0, rank=rank, world=world)
        for rank in range(world)
    ]
    indices = torch.cat([batch.indices for batches in loaders for batch in batches.epoch()])
    assert sorted(indices.tolist()) == list(range(12))
    assert {len(batches) for batches in loaders} == {-(-12 // (batch_size * world))}


def test_invalid_rank_is_rejected(photos):
    with pytest.raises(ValueError, match='rank must be at least 0 and below world, got rank 2 of world 2'):
        DiskBatches(open_source(str(photos), 'val'), SMALL, 4, rank=2, world=2)


# workers


def workers_of(batches: DiskBatches) -> list[int]:
    return [worker.pid for worker in batches.loader._iterator._workers]


def test_workers_persist_for_all_epochs(photos):
    batches = batches_of(photos, workers=2)
    first, pids = list(batches.epoch(0)), workers_of(batches)
    second = list(batches.epoch(1))
    assert workers_of(batches) == pids
    assert same(first, list(batches_of(photos).epoch(0))) and same(second, list(batches_of(photos).epoch(1)))


def test_interrupted_epoch_leaves_no_batches(photos):
    """The workers' queues are empty when the next one starts."""
    batches = batches_of(photos, workers=2)
    next(batches.epoch(0))
    assert same(list(batches.epoch(1, start=1)), list(batches_of(photos).epoch(1, start=1)))


def test_damaged_images_are_named_once(damaged):
    source, names = damaged
    for batches in (DiskBatches(source, SMALL, 4, augment, 2) for augment in (None, Augment())):
        for epoch in range(2):
            assert list(batches.epoch(epoch))
        assert sorted(batches.damaged) == names


# speed


def test_input_speed_is_measured(photos):
    assert measure_input(batches_of(photos), 0.05) > 0
    few = batches_of(photos, workers=1).smaller(3)
    assert measure_input(few, 9, [0]) > 0 and len(few) == 8  # until its one epoch is over
    few.close()
    assert few.loader._iterator is None and measure_input(batches_of(photos).smaller(24), 9, [0]) == 0
    with pytest.raises(DataError, match='do not fill a batch of 99'):
        measure_input(DiskBatches(open_source(str(photos), 'train'), SMALL, 99, Augment(), 0), 0.05)


# preprocessing


class Fields:
    """Twelve images of five bands; in each, band b has the value b / 10 everywhere."""

    classes, labels = ['wheat', 'maize'], [0, 1] * 6

    def open(self, index: int) -> np.ndarray:
        return np.broadcast_to(np.arange(5, dtype=np.float32) / 10, (20, 24, 5))

    def name(self, index: int) -> str:
        return f'field {index}'


@pytest.mark.parametrize('memory', [False, True])
@pytest.mark.parametrize('augment', [None, Augment(**PLAIN, reprob=0.0)], ids=['val', 'train'])
def test_images_of_five_bands_make_batches(memory, augment):
    preprocessing = Preprocessing((16, 16), 5, (0.0, 0.1, 0.2, 0.3, 0.4), (0.5,) * 5)
    batches = open_batches(Fields(), preprocessing, 4, augment, memory, workers=0)
    assert batches.damaged == [] and isinstance(batches, MemoryBatches) is memory
    for batch in batches.epoch():
        assert batch.images.shape == (4, 5, 16, 16) and batch.images.abs().max() < 1e-5


def test_colour_augmentation_of_bands_is_rejected():
    preprocessing = Preprocessing((16, 16), 5, (0.0,) * 5, (0.5,) * 5)
    with pytest.raises(DataError, match='aa and augment.color_jitter need 1 or 3 channels, the images have 5'):
        open_batches(Fields(), preprocessing, 4, Augment(), None)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(channels=0, mean=(), std=()), 'channels must be at least 1, got 0'),
        (dict(channels=4, crop_mode='border'), 'crop_mode border needs 1 or 3 channels, got 4'),
    ],
)
def test_impossible_preprocessing_is_rejected(change, message):
    with pytest.raises(DataError, match=message):
        Preprocessing(**{**vars(SMALL), **change})


def test_mean_and_std_of_a_colour_model_made_grey():
    cfg = dict(input_size=(1, 8, 8), mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3), interpolation='bicubic', crop_pct=1.0)
    grey = Preprocessing.of(cfg)
    assert (grey.mean, grey.std) == (pytest.approx((0.4,)), pytest.approx((0.2,)))


def test_image_is_converted_to_the_channels_of_the_model():
    image = Image.new('RGBA', (4, 4), 'red')
    assert (SMALL.convert(image).mode, GREY.convert(image).mode) == ('RGB', 'L')
