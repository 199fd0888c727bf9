"""The report on a run's images: counts, what was left out, and warnings."""

import io
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2t_vit.data import DataError, DataReport, Digits, Parquet, SplitOptions, open_source, open_train_val, report_data
from t2t_vit.data import report as report_module
from t2t_vit.data.sources import names as names_module
from t2t_vit.data.sources import parquet as parquet_module


def image(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), 'bmp')  # all of one size
    return buffer.getvalue()


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Many cats, one emu; one cat in both splits, and some files that are not images."""
    number = 0
    for split, counts in (('train', {'cat': 12, 'emu': 1}), ('val', {'cat': 2})):
        for name, count in counts.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f'{i}.bmp').write_bytes(image(number := number + 1))
    (tmp_path / 'val' / 'cat' / 'again.bmp').write_bytes(image(3))
    (tmp_path / 'train' / 'cat' / 'notes.txt').touch()
    (tmp_path / 'val' / 'cat' / '.DS_Store').touch()
    return tmp_path


def test_report_counts_and_warns(animals):
    train, val, _ = open_train_val(str(animals))
    report = report_data(train, val)
    assert (report.classes, report.train, report.val) == (['cat', 'emu'], [12, 1], [3, 0])
    assert report.skipped == {'files ending in .txt': 1, 'hidden or system files': 1}
    assert report.duplicates == [(f'{animals}/train/cat/2.bmp', f'{animals}/val/cat/again.bmp')]
    assert report.lines() == [
        '2 classes, 13 images to train on, 3 to validate on',
        '  cat        12         3',
        '  emu         1         0',
        'left out: 1 files ending in .txt, 1 hidden or system files',
    ]
    unbalanced, few, missing, duplicates = report.warnings()
    assert unbalanced == 'classes are unbalanced: 12 training images of cat, 1 of emu'
    assert few == 'fewer than 10 training images: emu (1)'
    assert missing == 'no validation images: emu; scores say nothing about them'
    assert duplicates.startswith('1 validation image is a training image too, as ')


def test_balanced_images_make_no_warnings():
    report = report_data(Digits('train'), Digits('val'))
    assert report.warnings() == [] and report.duplicates == report.unknown == [] and len(report.lines()) == 11


def test_duplicates_are_found_between_a_folder_and_a_tar(animals, tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        tar.add(animals / 'val', arcname='.')
    train, val = open_source(str(animals), 'train'), open_source(str(tmp_path / 'a.tar'), 'val')
    assert len(report_data(train, val).duplicates) == 1


def rows(folder: Path, numbers: 'list[int]') -> Parquet:
    """Return a Parquet file in row groups of three images, by their numbers."""
    cells = [{'bytes': image(number), 'path': None} for number in numbers]
    file = folder / f'{numbers[0]}.parquet'
    pq.write_table(pa.table({'image': cells, 'label': ['cat'] * len(cells)}), file, row_group_size=3)
    return Parquet([file])


def test_duplicates_are_found_in_parquet(tmp_path):
    train, val = rows(tmp_path, [*range(1, 9)]), rows(tmp_path, [20, 7, 21, 2])
    assert report_data(train, val).duplicates == [(train.name(6), val.name(1)), (train.name(1), val.name(3))]
    assert pickle.loads(pickle.dumps(train)).parts[0].held[1] is None  # workers are not sent the images


def test_duplicates_are_found_in_held_pixels():
    train = Digits('train')
    assert len(report_data(train, train).duplicates) == len(train.labels)


def test_duplicates_are_checked_as_far_as_they_are_cheap(tmp_path, monkeypatch):
    train, val = rows(tmp_path, [*range(1, 9)]), rows(tmp_path, [20, 7, 21, 2])
    monkeypatch.setattr(report_module, 'MAX_READ', 10 * len(image(0)))  # 8 training images and 2 others
    assert report_data(train, val).unknown == [
        'only 2 of 4 validation images are checked for being training images too'
    ]
    monkeypatch.setattr(report_module, 'MAX_READ', 100)
    assert report_data(train, val).unknown == [
        'not checked for duplicates between training and validation images: 0 MB would have to be read'
    ]


def test_report_says_why_duplicates_are_not_checked(animals, tmp_path, monkeypatch):
    train, val, _ = open_train_val(str(animals))
    monkeypatch.setattr(names_module, 'MAX_SIZES', 12)
    report = report_data(train, val)
    sentence = 'not checked for duplicates between training and validation images'
    assert report.unknown == [f'{sentence}: there are more than 12 files'] and report.unknown[0] in report.lines()
    monkeypatch.setattr(parquet_module, 'MAX_SIZED', 10)
    assert 'the Parquet files have more than' in report_data(rows(tmp_path, [1, 2]), val).unknown[0]
    custom = SimpleNamespace(classes=train.classes, labels=train.labels, name=train.name)
    assert report_data(custom, val).unknown == [f'{sentence}: the data cannot be compared by their bytes']


def test_files_left_out_of_a_divided_folder_count_once(animals):
    (animals / 'val' / 'emu').mkdir()
    for i in range(4):
        (animals / 'val' / 'emu' / f'{i}.bmp').write_bytes(image(100 + i))
    train, val, _ = open_train_val(str(animals / 'val'), options=SplitOptions(0.5))
    assert report_data(train, val).skipped == {'hidden or system files': 1}


def test_many_classes_are_summed_up():
    report = DataReport([f'class {i}' for i in range(1000)], [20 + i for i in range(1000)], [5] * 1000)
    assert len(report.lines()) == 12 and report.lines()[-1] == '  … and 990 more classes, of 20 to 1,019 images each'
    assert max(map(len, report.lines())) < 80


def test_odd_class_names_are_printable():
    report = DataReport(['caf\udce9', 'new\nline'], [100, 100], [1, 1])
    assert '\\xe9' in report.lines()[1] and '\\n' in report.lines()[2]
    ''.join(report.lines()).encode()


def test_class_without_training_images_stops_the_run(animals):
    (animals / 'train' / 'fox').mkdir()
    with pytest.raises(DataError, match='no training images of fox: add images, or remove the class folders or names'):
        open_train_val(str(animals))


def test_single_class_stops_the_run(animals):
    (animals / 'train' / 'emu' / '0.bmp').unlink()
    (animals / 'train' / 'emu').rmdir()
    with pytest.raises(DataError, match='of one class, cat; a classifier needs at least two'):
        open_train_val(str(animals))


def test_validation_images_of_another_class_are_rejected(animals):
    (animals / 'val' / 'fox').mkdir()
    (animals / 'val' / 'fox' / '1.bmp').write_bytes(image(1))
    with pytest.raises(DataError, match='has images of fox; expected only the 2 classes cat, emu'):
        open_train_val(str(animals))
