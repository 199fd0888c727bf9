"""Sources: their images and labels, the inputs they reject, and the syntax that names them."""

import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from conftest import CLASSES, crops, write_parquet
from PIL import Image

from t2t_vit.data import DataError, Digits, Folder, Parquet, Part, Shards, image_size, open_source, report_data
from t2t_vit.data.sources import hub as hub_module
from t2t_vit.data.sources import parquet as parquet_module
from t2t_vit.data.sources import tar
from t2t_vit.data.sources.hub import count_unused


def test_digits_split_is_fixed():
    train, val = Digits('train'), Digits('val')
    assert (len(train.labels), len(val.labels)) == (1437, 360)
    assert sorted([*train.indices, *val.indices]) == list(range(1797))
    assert val.indices[:5].tolist() == Digits('val').indices[:5].tolist() == [21, 24, 28, 34, 35]


def test_digits_are_stratified():
    train, val = (Counter(Digits(split).labels) for split in ('train', 'val'))
    assert all(abs(val[i] / (train[i] + val[i]) - 0.2) < 0.01 for i in range(10))


def test_digits_are_grey_images():
    image = Digits('val').open(0)
    assert (image.mode, image.size, image.getextrema()) == ('L', (8, 8), (0, 255))


@pytest.mark.parametrize('split, count', [('train', 24), ('val', 12)])
def test_folder_and_parquet_agree(photos, parquet, split, count):
    sources = [open_source(str(root), split) for root in (photos, parquet)]
    for source in sources:
        assert source.classes == CLASSES
        assert list(source.labels) == [label for label in range(3) for _ in range(count // 3)]
        assert image_size(source.open(0))[1] == 64
    sizes = [sorted(image_size(source.open(i)) for i in range(count)) for source in sources]
    assert sizes[0] == sizes[1]


def test_folder_finds_images_at_any_depth_except_hidden_ones(photos, tmp_path):
    image = (photos / 'val' / 'sky').iterdir().__next__().read_bytes()
    for name in ('a/deep/er/1.PNG', 'a/.2.png', 'a/note.txt', 'b/3.webp', '.cache/4.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image)
    source = Folder(tmp_path)
    assert source.classes == ['a', 'b']
    assert [Path(file).name for file in source.files] == ['1.PNG', '3.webp']


def test_folder_of_class_folders_is_a_validation_set(photos):
    assert len(open_source(str(photos / 'val'), 'val').labels) == 12


def test_parquet_without_class_names(tmp_path):
    for labels, classes in (([7, 3, 7], ['3', '7']), (['cat', 'ant', 'cat'], ['ant', 'cat'])):
        write_parquet(tmp_path / 'a.parquet', [b''] * 3, labels, [])
        source = Parquet([tmp_path / 'a.parquet'])
        assert (source.classes, list(source.labels)) == (classes, [1, 0, 1])


@pytest.mark.parametrize(
    'labels, names, message',
    [
        ([0, None], ['a', 'b'], 'label holds NoneType, int'),
        ([0.5, 1.5], [], 'label holds float'),
        ([], [], 'label holds nothing'),
        ([0, -1], ['a', 'b'], r'names 2 classes, and has the labels \[-1\]'),
    ],
)
def test_parquet_rejects_invalid_labels(tmp_path, labels, names, message):
    write_parquet(tmp_path / 'a.parquet', [b''] * len(labels), labels, names)
    with pytest.raises(DataError, match=message):
        Parquet([tmp_path / 'a.parquet'])


def test_large_parquet_files_are_read_by_row_group(parquet, tmp_path, monkeypatch):
    """Small files are read as a whole when the first image is opened."""
    table = pq.read_table(next(parquet.glob('train*')))
    pq.write_table(table.slice(0, 10), tmp_path / 'train-0.parquet', row_group_size=4)
    pq.write_table(table.slice(10), tmp_path / 'train-1.parquet', row_group_size=4)
    small = open_source(str(tmp_path), 'train')
    monkeypatch.setattr(parquet_module, 'AT_ONCE', 0)
    large = open_source(str(tmp_path), 'train')
    assert list(small.labels) == list(large.labels) == table.column('label').to_pylist()
    for index in (23, 0, 9, 10):
        assert np.array_equal(np.asarray(small.open(index)), np.asarray(large.open(index)))
    assert small.name(10) == f'{tmp_path}/train-1.parquet[0]'
    assert [[len(rows.held[1]) for rows in source.parts] for source in (small, large)] == [[10, 14], [2, 4]]


def test_parquet_without_images_is_rejected(tmp_path):
    pq.write_table(pa.table({'text': ['a']}), tmp_path / 'a.parquet')
    with pytest.raises(DataError, match=r"has the columns \['text'\]; expected one of images"):
        Parquet([tmp_path / 'a.parquet'])
    (tmp_path / 'b.parquet').write_text('not Parquet')
    with pytest.raises(DataError, match='cannot read .*b.parquet as Parquet'):
        Parquet([tmp_path / 'b.parquet'])


def test_invalid_roots_are_rejected(photos, parquet, tmp_path):
    (tmp_path / 'a.zip').touch()
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'empty').mkdir()
    for root, split, message in (
        (tmp_path / 'nowhere', 'train', 'no data at'),
        (tmp_path / 'a.zip', 'train', 'is a file but not .parquet, .tar or .csv'),
        (tmp_path / 'empty', 'train', 'has no train split, it has nothing: expected .*/train/CLASS/IMAGE'),
        (tmp_path / 'empty', 'val', 'no images in'),
        (tmp_path, 'train', 'no images in'),
        (tmp_path, 'val', 'has no val split'),
        (photos / 'val', 'train', 'has no train split'),
        (next(parquet.glob('train*')), 'train', 'is one file, which leaves nothing to validate on'),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(root), split)


# torchvision's sets


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a dozen images in CIFAR-10's Python format, and let torchvision accept their hashes."""
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / 'cache' / kind.base_folder
    folder.mkdir(parents=True)
    for name, count in (('data_batch_1', 8), ('test_batch', 4)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({'data': pixels, 'labels': [9 - i for i in range(count)]}))
    names = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': names}))
    monkeypatch.setattr(kind, 'train_list', [['data_batch_1', None]])
    monkeypatch.setattr(kind, 'test_list', [['test_batch', None]])
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': None})
    return tmp_path / 'cache'


def test_torchvision_set(cifar):
    train, val = (open_source('torch/cifar10', split, str(cifar)) for split in ('train', 'val'))
    assert (len(train.labels), list(val.labels)) == (8, [9, 8, 7, 6])
    assert train.classes == val.classes and train.classes[9] == 'truck'
    image = val.open(3)
    pixels = pickle.loads((cifar / 'cifar-10-batches-py' / 'test_batch').read_bytes())['data'][3]
    assert np.array_equal(np.asarray(image), pixels.reshape(3, 32, 32).transpose(1, 2, 0))
    assert val.name(3) == 'torch/cifar10/val[3]'


def test_torchvision_set_not_downloaded(tmp_path):
    with pytest.raises(DataError, match='no torch/cifar10 in .*: --data.download true fetches it, --data.cache says'):
        open_source('torch/cifar10', 'train', str(tmp_path))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    """Serve a folder; return its address."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(QuietHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_imagenette_is_downloaded_checked_and_named(tmp_path, monkeypatch, address):
    rng = np.random.default_rng(0)
    for split, wnids in (('train', ('n01440764', 'n03028079')), ('val', ('n03028079',))):
        for wnid in wnids:
            folder = tmp_path / 'made' / 'imagenette2-160' / split / wnid
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(folder / f'{i}.JPEG')
    archive = shutil.make_archive(str(tmp_path / 'imagenette2-160'), 'gztar', tmp_path / 'made')
    archive = Path(archive).rename(tmp_path / 'imagenette2-160.tgz')
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    kind = torchvision.datasets.Imagenette

    monkeypatch.setattr(kind, '_ARCHIVES', {**kind._ARCHIVES, '160px': (f'{address}/{archive.name}', '0' * 32)})
    with pytest.raises(DataError, match='no torch/imagenette in .*: cannot download it'):
        open_source('torch/imagenette', 'train', str(tmp_path / 'damaged'), download=True)

    monkeypatch.setattr(kind, '_ARCHIVES', {**kind._ARCHIVES, '160px': (f'{address}/{archive.name}', md5)})
    with pytest.raises(DataError, match='--data.download true fetches it'):
        open_source('torch/imagenette', 'train', str(tmp_path / 'cache'))
    train = open_source('torch/imagenette', 'train', str(tmp_path / 'cache'), download=True)
    assert train.classes == ['tench', 'church'] and list(train.labels) == [0, 0, 1, 1]
    val = open_source('torch/imagenette', 'val', str(tmp_path / 'cache'), classes=train.classes)
    assert val.classes == train.classes and list(val.labels) == [1, 1]
    made = tmp_path / 'made' / 'imagenette2-160' / 'val' / 'n03028079' / '0.JPEG'
    assert np.array_equal(np.asarray(val.open(0)), np.asarray(Image.open(made)))


# the Hub's sets


@pytest.fixture
def hub(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with a set me/photos, which the package `datasets` reads as it reads those of the Hub."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, 'me/photos')
    return tmp_path


def test_hub_set(hub):
    train, val = (open_source('hfds/me/photos', split, str(hub / 'cache')) for split in ('train', 'val'))
    assert train.classes == val.classes == CLASSES
    assert (len(train.labels), list(val.labels)) == (24, [0] * 4 + [1] * 4 + [2] * 4)
    files = sorted((hub / 'me' / 'photos' / 'val').glob('*/*'))
    assert np.array_equal(np.asarray(val.open(5)), np.asarray(Image.open(files[5])))
    assert val.content(5) == files[5].read_bytes() and val.content_sizes()[5] == files[5].stat().st_size
    assert val.name(5) == 'hfds/me/photos/validation[5]'


def test_hub_set_in_parquet(hub, parquet):
    shutil.copytree(parquet, 'me/rows')
    val, rows = (open_source(root, 'val', str(hub / 'cache')) for root in ('hfds/me/rows', 'me/rows'))
    assert list(val.labels) == list(rows.labels) and val.classes == rows.classes
    assert val.content(7) == rows.content(7) and list(val.content_sizes()) == list(rows.content_sizes())


def test_files_that_a_hub_set_leaves_out_are_counted_once(hub):
    (hub / 'me' / 'photos' / 'train' / 'sky' / 'notes.txt').touch()
    (hub / 'me' / 'photos' / 'README.md').touch()
    sources = [open_source('hfds/me/photos', split, str(hub / 'cache')) for split in ('train', 'val')]
    report = report_data(*sources)
    assert report.skipped == {'files ending in .txt': 1} and report.unknown == []
    assert count_unused('nowhere', frozenset(['a'])) == ({}, 'what the package datasets leaves out is not counted')


def test_unknown_hub_set_is_rejected(hub):
    with pytest.raises(DataError, match='cannot open hfds/me/other: .*other'):
        open_source('hfds/me/other', 'train', str(hub / 'cache'))


def test_hub_set_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(hub_module, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match='hfds/me/photos needs the package datasets: pip install datasets'):
        open_source('hfds/me/photos', 'train')


# tars


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, 'w') as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, 'jpeg')
    return buffer.getvalue()


JPEG = jpeg(Image.new('RGB', (8, 8), 'red'))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write the photos as WebDataset shards: two for training with .cls, one for validation with .json, and names."""
    parts: dict[str, list[tuple[str, bytes]]] = {'train-000000': [], 'train-000001': [], 'val-000000': []}
    for i, (split, name, image) in enumerate(crops()):
        shard = f'{split}-{i % 2 if split == "train" else 0:06}'
        number = CLASSES.index(name)
        label = ('cls', b'%d\n' % number) if split == 'train' else ('json', json.dumps({'label': number}).encode())
        parts[shard] += [(f'{i:04}.jpg', jpeg(image)), (f'{i:04}.{label[0]}', label[1])]
    for name, members in parts.items():
        write_tar(tmp_path / 'set' / f'{name}.tar', members)
    (tmp_path / 'set' / 'classes.txt').write_text('\n'.join(CLASSES))
    return tmp_path / 'set'


def test_shards(shards):
    train, val = (open_source(str(shards), split) for split in ('train', 'val'))
    assert isinstance(train, Shards) and train.classes == val.classes == CLASSES
    order = [i for part in range(2) for i, crop in enumerate(crops()) if crop[0] == 'train' and i % 2 == part]
    photos = [*crops()]
    assert list(train.labels) == [CLASSES.index(photos[i][1]) for i in order]
    for position in (20, 0, 13):
        expected = Image.open(io.BytesIO(jpeg(photos[order[position]][2])))
        assert np.array_equal(np.asarray(train.open(position)), np.asarray(expected))
    assert train.name(0) == f'{shards}/train-000000.tar/{order[0]:04}.jpg'


def test_shards_are_indexed_again_only_when_they_change(shards, monkeypatch):
    before = open_source(str(shards), 'train')
    with monkeypatch.context() as context:
        context.setattr(tar, 'index_tar', lambda *_: pytest.fail('indexed again'))
        assert open_source(str(shards), 'train').labels == before.labels
    write_tar(shards / 'train-000001.tar', [('a.jpg', JPEG), ('a.cls', b'2')])
    assert len(open_source(str(shards), 'train').labels) == 13
    os.utime(shards / 'train-000001.tar', (0, 0))
    with monkeypatch.context() as context, pytest.raises(AssertionError):
        context.setattr(tar, 'index_tar', lambda *_: (_ for _ in ()).throw(AssertionError))
        open_source(str(shards), 'train')


def test_index_of_shards_in_a_read_only_folder_is_cached(shards, tmp_path, monkeypatch):
    """Their index is kept in the cache; without a cache it is rebuilt."""
    replace = os.replace

    def refusing(draft: Path, path: Path) -> None:
        if path.parent == shards:
            raise PermissionError
        replace(draft, path)

    monkeypatch.setattr(os, 'replace', refusing)
    source = open_source(str(shards), 'train', str(tmp_path / 'cache'))
    assert [path.name.split('.', 1)[1] for path in (tmp_path / 'cache').iterdir()] == ['train-000000.index']
    monkeypatch.setattr(tar, 'index_tar', lambda *_: pytest.fail('indexed again'))
    assert open_source(str(shards), 'train', str(tmp_path / 'cache')).labels == source.labels


def test_tars_of_class_folders(photos, tmp_path):
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            tar.add(photos / split, arcname='.')
    train, val, expected = (
        open_source(str(tmp_path), 'train'),
        open_source(str(tmp_path / 'val.tar'), 'val'),
        open_source(str(photos), 'val'),
    )
    assert train.classes == val.classes == CLASSES and len(train.labels) == 24
    assert sorted(val.labels) == sorted(expected.labels)
    sizes = [sorted(image_size(source.open(i)) for i in range(12)) for source in (val, expected)]
    assert sizes[0] == sizes[1]


def test_tar_with_text_labels_and_hidden_files(tmp_path):
    write_tar(
        tmp_path / 'val.tar',
        [
            ('x/a.jpg', JPEG),
            ('x/._a.jpg', b''),
            ('x/a.cls', b'ant'),
            ('b.png', JPEG),
            ('b.json', b'{"label": "bee", "width": 8}'),
            ('b.txt', b'a caption'),
        ],
    )
    source = open_source(str(tmp_path / 'val.tar'), 'val')
    assert (source.classes, list(source.labels)) == (['ant', 'bee'], [0, 1])


@pytest.mark.parametrize(
    'members, message',
    [
        ([('a.jpg', JPEG)], 'has 1 images without a label, as a.jpg; expected CLASS/IMAGE, or KEY.cls'),
        ([('a.jpg', JPEG), ('a.cls', b'0'), ('b.jpg', JPEG)], 'but none for 1 of 2 images, as b.jpg'),
        ([('a.jpg', JPEG), ('a.cls', b'0'), ('cat/b.jpg', JPEG)], 'but none for 1 of 2 images, as cat/b.jpg'),
        ([('a.jpg', JPEG), ('a.json', b'{"caption": "red"}')], 'without a label'),
        (
            [('a.jpg', JPEG), ('a.json', b'{"label": 0.5}')],
            'a.json holds no label: expected a whole number or text, got',
        ),
        ([('a.jpg', JPEG), ('a.json', b'[')], 'a.json holds no label'),
        ([('a.jpg', JPEG), ('a.cls', b'')], 'a.cls holds no label'),
        ([('a.jpg', JPEG), ('a.cls', b'9' * 5000)], 'a.cls holds no label'),
        ([('a.jpg', JPEG), ('a.cls', b'007'), ('b.jpg', JPEG), ('b.cls', b'7')], 'labels 007 and 7, which are one'),
        ([('a.1.jpg', JPEG), ('a.2.jpg', JPEG), ('a.cls', b'0')], 'several images of the name a;'),
        ([('a.jpg', JPEG), ('a.cls', b'0'), ('b.jpg', JPEG), ('b.cls', b'bee')], 'label holds int, str'),
        ([('a.txt', b'')], 'no images in'),
    ],
)
def test_invalid_tars_are_rejected(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        open_source(str(write_tar(tmp_path / 'val.tar', members)), 'val')


@pytest.mark.parametrize('end', [300, 1100, 2048, 4096])
def test_truncated_tars_are_rejected(tmp_path, end):
    """Within a header, within an image, between two members, before the mark at the end."""
    image = bytes(range(256)) * 4
    whole = write_tar(tmp_path / 'whole.tar', [('a/1.jpg', image[:512]), ('a/2.jpg', image), ('b/3.jpg', image)])
    truncated = tmp_path / 'val.tar'
    truncated.write_bytes(whole.read_bytes()[:end])
    with pytest.raises(DataError, match='val.tar is truncated, or not an uncompressed tar'):
        open_source(str(truncated), 'val')


def test_numbers_without_a_class_name_are_rejected(shards):
    (shards / 'classes.txt').write_text('flower\nroof')
    with pytest.raises(DataError, match=r'names 2 classes, and has the labels \[2\]'):
        open_source(str(shards), 'train')


@pytest.mark.parametrize(
    'root, message',
    [
        ('torch/cifar11', 'unknown set torch/cifar11, did you mean cifar10?; there are torch/cifar10, torch/cifar100'),
        ('tourch/cifar10', 'no data at tourch/cifar10, did you mean torch?; data.root is'),
        ('hfd/me/photos', 'no data at hfd/me/photos, did you mean hfds?'),
        ('digit', 'no data at digit, did you mean digits?'),
        ('wds/photos', "no data at wds/photos; data.root is 'digits', 'torch/NAME', 'hfds/NAME', a folder with train/"),
    ],
)
def test_unknown_names_get_the_nearest_choice(root, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        open_source(root, 'train')
    assert str(error.value).startswith(message)


def test_part_has_the_same_fraction_of_every_class():
    whole = open_source('digits', 'train')
    part = Part(whole, 200)
    counts = [part.labels.count(label) for label in range(10)]
    assert len(part.labels) == 200 and max(counts) - min(counts) <= 1
    assert all(whole.labels[int(i)] == label for i, label in zip(part.indices, part.labels))
    assert part.name(3) == whole.name(int(part.indices[3])) and part.open(3).size == (8, 8)
    assert Part(whole, 10**6).labels == whole.labels
