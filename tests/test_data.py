"""Sources, what they refuse, and batches whose randomness depends on nothing but seed, epoch and sample."""

import random
from collections import Counter
from pathlib import Path
from typing import Iterator, List, Tuple

import numpy as np
import pytest
import torch
from conftest import CLASSES, write_parquet
from PIL import Image

from t2t_vit.data import (
    Augment,
    DataError,
    Digits,
    DiskBatches,
    Folder,
    MemoryBatches,
    Parquet,
    Preprocessing,
    check_same_classes,
    erase,
    list_images,
    open_batches,
    open_source,
    resample,
)

SMALL = Preprocessing((32, 32), 3, (0.5,) * 3, (0.25,) * 3)
GREY = Preprocessing((16, 16), 1, (0.3,), (0.4,), crop_pct=1.0)
PLAIN = dict(auto_augment=None, mixup=0.0, cutmix=0.0)
STILL = Augment(**PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, erase=0.0)
Batch = Tuple[torch.Tensor, torch.Tensor]


def same(found: List[Batch], expected: List[Batch]) -> bool:
    return len(found) == len(expected) > 0 and all(
        torch.equal(x, y) for pair in zip(found, expected) for x, y in zip(*pair))


def break_some(folder: Path) -> List[str]:
    """Cut one image short and add a text that calls itself an image; gives their names."""
    torn, text = sorted(folder.rglob('*.jpg'))[0], folder / CLASSES[0] / 'text.png'
    torn.write_bytes(torn.read_bytes()[:200])
    text.write_text('not an image')
    return sorted([str(torn), str(text)])


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Tuple[Folder, List[str]]:
    """The photos to train on, two of them damaged, and the names of these."""
    for file in list_images(photos / 'train'):
        copy = tmp_path / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    names = break_some(tmp_path / 'train')
    return Folder(tmp_path / 'train'), names


# sources


def test_digits_are_split_once_and_for_all():
    train, val = Digits('train'), Digits('val')
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    assert sorted([*train.indices, *val.indices]) == list(range(1797))
    assert val.indices[:5].tolist() == Digits('val').indices[:5].tolist() == [21, 24, 28, 34, 35]


def test_digits_are_stratified():
    train, val = (Counter(Digits(split).labels) for split in ('train', 'val'))
    assert all(abs(val[i] / (train[i] + val[i]) - 0.2) < 0.01 for i in range(10))


def test_digits_are_grey_images_of_all_shades():
    image = Digits('val').open(0)
    assert (image.mode, image.size, image.getextrema()) == ('L', (8, 8), (0, 255))


@pytest.mark.parametrize('split, count', [('train', 24), ('val', 12)])
def test_folder_and_parquet_hold_the_same(photos, parquet, split, count):
    sources = [open_source(str(root), split) for root in (photos, parquet)]
    for source in sources:
        assert source.classes == CLASSES
        assert list(source.labels) == [label for label in range(3) for _ in range(count // 3)]
        assert source.open(0).size[1] == 64
    sizes = [sorted(source.open(i).size for i in range(count)) for source in sources]
    assert sizes[0] == sizes[1]


def test_folder_takes_images_at_any_depth_but_hidden_ones(photos, tmp_path):
    image = (photos / 'val' / 'sky').iterdir().__next__().read_bytes()
    for name in ('a/deep/er/1.PNG', 'a/.2.png', 'a/note.txt', 'b/3.webp', '.cache/4.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image)
    source = Folder(tmp_path)
    assert source.classes == ['a', 'b']
    assert [Path(file).name for file in source.files] == ['1.PNG', '3.webp']


def test_a_folder_of_class_folders_is_a_validation_set(photos):
    assert len(open_source(str(photos / 'val'), 'val').labels) == 12


def test_parquet_without_names_of_classes(tmp_path):
    for labels, classes in (([7, 3, 7], ['3', '7']), (['cat', 'ant', 'cat'], ['ant', 'cat'])):
        write_parquet(tmp_path / 'a.parquet', [b''] * 3, labels, [])
        source = Parquet([tmp_path / 'a.parquet'])
        assert (source.classes, list(source.labels)) == (classes, [1, 0, 1])


@pytest.mark.parametrize('labels, names, message', [
    ([0, None], ['a', 'b'], 'label holds NoneType, int'),
    ([0.5, 1.5], [], 'label holds float'),
    ([], [], 'label holds nothing'),
    ([0, -1], ['a', 'b'], r'names 2 classes, and has the labels \[-1\]')])
def test_parquet_labels_that_are_none(tmp_path, labels, names, message):
    write_parquet(tmp_path / 'a.parquet', [b''] * len(labels), labels, names)
    with pytest.raises(DataError, match=message):
        Parquet([tmp_path / 'a.parquet'])


def test_parquet_of_something_else(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({'text': ['a']}), tmp_path / 'a.parquet')
    with pytest.raises(DataError, match=r"has the columns \['text'\]; expected one of images"):
        Parquet([tmp_path / 'a.parquet'])
    (tmp_path / 'b.parquet').write_text('not Parquet')
    with pytest.raises(DataError, match='cannot read .*b.parquet as Parquet'):
        Parquet([tmp_path / 'b.parquet'])


def test_roots_that_are_none(photos, parquet, tmp_path):
    (tmp_path / 'a.zip').touch()
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    for root, split, message in (
            (tmp_path / 'nowhere', 'train', 'no data at'),
            (tmp_path / 'a.zip', 'train', 'is a file but not .parquet'),
            (tmp_path / 'empty', 'train', 'has no train split: expected .*/train/CLASS/IMAGE'),
            (tmp_path / 'empty', 'val', 'holds no class folders'),
            (tmp_path, 'train', 'no images in the class folders'),
            (tmp_path, 'val', 'has no val split'),
            (photos / 'val', 'train', 'has no train split'),
            (next(parquet.glob('train*')), 'train', 'is one file, which leaves nothing to validate on')):
        with pytest.raises(DataError, match=message):
            open_source(str(root), split)


def test_other_classes_are_refused_by_name(photos, tmp_path):
    for name in ('flower', 'roof', 'wall'):
        (tmp_path / name).mkdir()
    (tmp_path / 'wall' / '1.png').write_bytes(b'')
    train, val = open_source(str(photos), 'train'), Folder(tmp_path)
    check_same_classes(train, train)
    with pytest.raises(DataError, match='only in train: sky; only in val: wall'):
        check_same_classes(train, val)


# batches


def batches_of(photos: Path, workers: int = 0, **changes: object) -> DiskBatches:
    augment = Augment(**{'auto_augment': 'rand-m9-mstd0.5-inc1', **changes})
    return DiskBatches(open_source(str(photos), 'train'), SMALL, 7, augment, workers, seed=5)


def test_batches_do_not_depend_on_the_number_of_workers(photos):
    assert same(list(batches_of(photos).epoch(1)), list(batches_of(photos, workers=2).epoch(1)))


def memory_of_digits() -> MemoryBatches:
    return MemoryBatches(Digits('train'), GREY, 256, Augment(**PLAIN, rotate=10.0), seed=5)


@pytest.mark.parametrize('make', [batches_of, lambda photos: memory_of_digits()], ids=['disk', 'memory'])
def test_batches_do_not_depend_on_where_an_epoch_is_entered(photos, make):
    batches = make(photos)
    assert same(list(batches.epoch(1, start=2)), list(make(photos).epoch(1))[2:])


@pytest.mark.parametrize('make', [batches_of, lambda photos: memory_of_digits()], ids=['disk', 'memory'])
def test_every_epoch_is_another(photos, make):
    batches = make(photos)
    first, second = (torch.cat([images for images, _ in batches.epoch(epoch)]) for epoch in range(2))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_training_leaves_out_the_incomplete_last_batch(photos):
    sizes = [len(labels) for _, labels in batches_of(photos).epoch()]
    assert sizes == [7, 7, 7] and len(batches_of(photos)) == 3


def test_validation_takes_every_image_once_in_order(photos):
    batches = DiskBatches(open_source(str(photos), 'val'), SMALL, 5, workers=0)
    labels = [labels.tolist() for _, labels in batches.epoch()]
    assert labels == [[0] * 4 + [1], [1] * 3 + [2] * 2, [2] * 2] and len(batches) == 3


def test_memory_and_disk_prepare_validation_images_alike(photos):
    loaders = (loader(open_source(str(photos), 'val'), SMALL, 5, workers=0) for loader in (DiskBatches, MemoryBatches))
    for (one, labels), (other, other_labels) in zip(*(loader.epoch() for loader in loaders)):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_memory_and_disk_agree_on_whole_training_images():
    source = Digits('train')
    memory = MemoryBatches(source, GREY, 64, STILL, seed=5)
    disk = DiskBatches(source, GREY, 64, Augment(**{**vars(STILL), 'interpolation': 'bicubic'}), 0, seed=5)
    for (one, labels), (other, other_labels) in zip(memory.epoch(3), disk.epoch(3)):
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def generator_states() -> Iterator[object]:
    yield random.getstate()
    yield np.random.get_state()[1].tolist()
    yield torch.get_rng_state().tolist()


@pytest.mark.parametrize('make', [
    batches_of, lambda photos: batches_of(photos, workers=1), lambda photos: memory_of_digits(),
], ids=['disk', 'worker', 'memory'])
def test_loading_leaves_the_global_generators_alone(photos, make):
    before = list(generator_states())
    assert list(make(photos).epoch())
    assert list(generator_states()) == before


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
def test_damaged_validation_images_are_left_out_and_named(damaged, loader):
    source, names = damaged
    batches = loader(source, SMALL, 4, workers=0)
    labels = torch.cat([labels for _, labels in batches.epoch()])
    assert sorted(batches.damaged) == names and len(labels) == len(source.labels) - 2


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_training_images_leave_no_gap(damaged, workers):
    """Mixup needs even batches, and a resumed run counts them."""
    source, names = damaged
    batches = DiskBatches(source, SMALL, 1, Augment(), workers, seed=5)
    assert len(list(batches.epoch())) == len(source.labels)
    assert sorted({*batches.damaged}) == names


@pytest.mark.parametrize('loader', [DiskBatches, MemoryBatches])
def test_only_damaged_images(tmp_path, loader):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / '1.png').write_text('not an image')
    with pytest.raises(DataError, match='not one'):
        list(loader(Folder(tmp_path), SMALL, 1, Augment(**PLAIN), workers=0).epoch())


@pytest.mark.parametrize('augment, memory, message', [
    (Augment(), True, 'auto_augment and color_jitter work on single images'),
    (Augment(**PLAIN, color_jitter=0.4), True, 'auto_augment and color_jitter work on single images'),
    (Augment(rotate=5.0), None, 'rotate works on sets held in memory only'),
    (Augment(**PLAIN, rotate=5.0), False, 'rotate works on sets held in memory only')])
def test_augmentation_that_a_loader_does_not_have(photos, augment, memory, message):
    with pytest.raises(DataError, match=message):
        open_batches(open_source(str(photos), 'train'), SMALL, 4, augment, memory)


@pytest.mark.parametrize('size, augment, kind', [
    (64, None, MemoryBatches), (64, Augment(**PLAIN), MemoryBatches), (64, Augment(), DiskBatches),
    (65, None, DiskBatches)])
def test_small_images_are_held_in_memory(photos, size, augment, kind):
    preprocessing = Preprocessing((size, size), 3, (0.5,) * 3, (0.25,) * 3)
    assert type(open_batches(open_source(str(photos), 'val'), preprocessing, 4, augment, None)) is kind


def test_channels_that_images_do_not_have():
    with pytest.raises(DataError, match='1 or 3 channels, the model has 4'):
        Preprocessing((8, 8), 4, (0.5,) * 4, (0.5,) * 4)


def test_statistics_of_a_colour_model_made_grey():
    cfg = dict(input_size=(1, 8, 8), mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3), interpolation='bicubic', crop_pct=1.0)
    grey = Preprocessing.of(cfg)
    assert (grey.mean, grey.std) == (pytest.approx((0.4,)), pytest.approx((0.2,)))


# augmentation in memory


def images_and_chances(count: int = 4, rows: int = 9, cols: int = 9) -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 2, rows, cols, generator=generator), torch.rand(count, 12, generator=generator)


@pytest.mark.parametrize('rows, cols', [(9, 9), (8, 12)])
def test_resampling_by_nothing_is_the_image(rows, cols):
    images, chances = images_and_chances(rows=rows, cols=cols)
    torch.testing.assert_close(resample(images, STILL, chances), images)


def test_mirror():
    images, chances = images_and_chances()
    mirrored = resample(images, Augment(**{**vars(STILL), 'hflip': 1.0}), chances)
    torch.testing.assert_close(mirrored, images.flip(-1))


def test_rotation_by_the_largest_angle_either_way():
    images, chances = images_and_chances(2)
    chances[:, 2] = torch.tensor([0.0, 1.0])
    turned = resample(images, Augment(**{**vars(STILL), 'rotate': 90.0}), chances)
    torch.testing.assert_close(turned[0], images[0].rot90(-1, (1, 2)))
    torch.testing.assert_close(turned[1], images[1].rot90(1, (1, 2)))


def test_crop_keeps_to_the_image_and_to_its_share():
    ramp = torch.linspace(0, 1, 64).expand(1000, 1, 64, 64)
    chances = torch.rand(1000, 12, generator=torch.Generator().manual_seed(0))
    cropped = resample(ramp, Augment(**{**vars(STILL), 'scale': (0.25, 0.25)}), chances)
    widths = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    torch.testing.assert_close(widths, torch.full_like(widths, 0.5), rtol=0, atol=0.01)
    assert cropped.min() < 0.02 and cropped.max() > 0.98


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_erased_share(mode):
    images, chances = torch.full((2000, 1, 32, 32), 7.0), images_and_chances(2000)[1]
    erased = erase(images, Augment(erase=0.25, erase_mode=mode), chances) != 7
    touched = erased.flatten(1).any(1)
    shares = erased[touched].float().flatten(1).mean(1)
    assert abs(touched.float().mean() - 0.25) < 0.03
    assert shares.min() > 0.01 and shares.max() < 0.37 and abs(shares.mean() - 0.175) < 0.02


def test_erasing_nothing_is_the_image():
    images, chances = images_and_chances()
    assert erase(images, STILL, chances) is images


def test_grey_and_colour_of_one_image():
    image = Image.new('RGBA', (4, 4), 'red')
    assert (SMALL.convert(image).mode, GREY.convert(image).mode) == ('RGB', 'L')
