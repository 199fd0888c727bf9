"""Layouts of files: the same classes and counts from a folder, a tar and a Parquet file of it."""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from t2t_vit.cli import main
from t2t_vit.data import DataError, Folder, find_images, open_source
from t2t_vit.data.sources import labels as labels_module
from t2t_vit.data.sources import parquet as parquet_module


def png(color: 'str | tuple[int, int, int]' = 'red') -> bytes:
    Image.new('RGB', (4, 4), color).save(buffer := io.BytesIO(), 'png')
    return buffer.getvalue()


PNG = png()


def write(root: Path, names: 'list[str]', content: bytes = PNG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def as_folder(root: Path, names: 'list[str]') -> Path:
    return write(root / 'folder', names)


def as_tar(root: Path, names: 'list[str]') -> Path:
    with tarfile.open(root / 'a.tar', 'w') as tar:
        tar.add(write(root / 'source', names), arcname='.')
    return root / 'a.tar'


def as_parquet(root: Path, names: 'list[str]') -> Path:
    """By the paths of images, without labels."""
    cells = [{'bytes': PNG, 'path': name} for name in names if not name.endswith('.txt') and '/.' not in name]
    pq.write_table(pa.table({'image': cells}), root / 'a.parquet')
    return root / 'a.parquet'


LAYOUTS = {
    'class folders': (['cat/1.png', 'cat/2.png', 'dog/3.png'], {'cat': 2, 'dog': 1}),
    'upper-case suffixes': (['cat/1.PNG', 'dog/2.Jpg', 'dog/3.JFIF'], {'cat': 1, 'dog': 2}),
    'images in a folder of each class': (['cat/images/1.png', 'dog/images/2.png'], {'cat': 1, 'dog': 1}),
    'mixed depth': (['cat/1.png', 'cat/old/2.png', 'dog/a/b/3.png'], {'cat': 2, 'dog': 1}),
    'a folder around all': (['photos/cat/1.png', 'photos/dog/2.png', 'photos/dog/3.png'], {'cat': 1, 'dog': 2}),
    'two folders around all': (['data/photos/cat/1.png', 'data/photos/dog/x/2.png'], {'cat': 1, 'dog': 1}),
    'numbers': (['1/a.png', '2/b.png', '10/c.png'], {'1': 1, '10': 1, '2': 1}),
    'other files': (['cat/1.png', 'cat/notes.txt', 'dog/.2.png', 'dog/3.png'], {'cat': 1, 'dog': 1}),
}


@pytest.mark.parametrize('store', [as_folder, as_tar, as_parquet])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_have_the_same_classes_in_every_format(store, layout, tmp_path):
    names, expected = LAYOUTS[layout]
    source = open_source(str(store(tmp_path, names)), 'val', str(tmp_path / 'cache'))
    assert source.classes == sorted(expected)
    assert Counter(source.classes[label] for label in source.labels) == expected
    assert all(source.open(i).size == (4, 4) for i in range(len(source.labels)))


@pytest.mark.parametrize('store', [as_folder, as_tar, as_parquet])
def test_images_outside_of_class_folders_are_rejected(store, tmp_path):
    with pytest.raises(DataError, match='1 .*image.* (outside of class folders|without a label), as x.png'):
        open_source(str(store(tmp_path, ['x.png', 'cat/1.png', 'dog/2.png'])), 'val')


@pytest.mark.parametrize('store', [as_folder, as_tar])
def test_splits_inside_of_class_folders_are_understood(store, tmp_path):
    root = store(tmp_path, ['cat/train/1.png', 'cat/train/2.png', 'cat/val/3.png', 'dog/train/4.png', 'dog/val/5.png'])
    for split, count in (('train', 3), ('val', 2)):
        source = open_source(str(root), split, str(tmp_path / 'cache'))
        assert source.classes == ['cat', 'dog'] and len(source.labels) == count


def test_tar_of_split_folders_is_understood(tmp_path):
    root = as_tar(tmp_path, ['Train/cat/1.png', 'Train/dog/2.png', 'test/cat/3.png'])
    train, val = (open_source(str(root), split) for split in ('train', 'val'))
    assert train.classes == ['cat', 'dog'] and val.classes == ['cat'] and len(val.labels) == 1


def test_split_folders_may_be_in_upper_case(tmp_path):
    write(tmp_path, ['Train/cat/1.png', 'Train/dog/2.png', 'VALID/cat/3.png'])
    assert [len(open_source(str(tmp_path), split).labels) for split in ('train', 'val')] == [2, 1]


@pytest.mark.parametrize('name', ['train', 'Train', 'test', 'val'])
def test_class_may_be_named_like_a_split(name, tmp_path):
    write(tmp_path, ['bus/1.png', 'car/1.png', f'{name}/1.png'])
    for split in ('val', 'all'):
        assert sorted(open_source(str(tmp_path), split).classes) == sorted(['bus', 'car', name])
    with pytest.raises(DataError, match='has no train split, it has .*data.val_fraction 0.2'):
        open_source(str(tmp_path), 'train')


def test_split_folders_without_class_folders_are_not_classes(tmp_path):
    with pytest.raises(DataError, match='images outside of class folders'):
        open_source(str(write(tmp_path, ['train/1.png', 'val/2.png'])), 'train')


def test_other_tables_beside_class_folders_are_passed_over(tmp_path):
    (write(tmp_path, ['cat/1.png', 'dog/1.png']) / 'metadata.csv').write_text('path,site\ncat/1.png,n\n')
    for split in ('val', 'all'):
        assert open_source(str(tmp_path), split).classes == ['cat', 'dog']


# shards


def tar_of(file: Path, names: 'list[str]') -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, 'w') as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PNG)
            tar.addfile(member, io.BytesIO(PNG))


def parquet_of(file: Path, labels: 'list[str]') -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({'image': [{'bytes': PNG, 'path': None}] * len(labels), 'label': labels}), file)


SHARDS = [
    ('train_0000', 'val_0000'),
    ('train0000', 'val0000'),
    ('imagenet1k-train-0000', 'imagenet1k-validation-0000'),
    ('train/shard-000000', 'val/shard-000000'),
    ('data/train-00000-of-00002', 'data/test-00000-of-00001'),
    ('TRAIN-0', 'VAL-0'),
    ('default/train/0000', 'default/validation/0000'),
]


@pytest.mark.parametrize('train, val', SHARDS)
@pytest.mark.parametrize('suffix', ['.tar', '.parquet', '.TAR', '.PARQUET'])
def test_usual_names_of_shards_are_understood(train, val, suffix, tmp_path):
    for name, classes in ((train, ['cat', 'dog']), (val, ['dog', 'cat', 'dog'])):
        file = tmp_path / f'{name}{suffix}'
        if suffix.lower() == '.tar':
            tar_of(file, [f'{label}/{i}.png' for i, label in enumerate(classes)])
        else:
            parquet_of(file, classes)
    sources = [open_source(str(tmp_path), split) for split in ('train', 'val')]
    assert [source.classes for source in sources] == [['cat', 'dog']] * 2
    assert [len(source.labels) for source in sources] == [2, 3]


PLAN = ['train', '--dry-run', '--model', 't2t_vit_4_16', '--data.img_size', '16', '--batch_size', '2', '--threads', '1']


def planned(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command says it would train on, in a line."""
    words = ['--data.root', root, '--data.workers', '0', '--augment.mixup', '0', '--augment.cutmix', '0']
    assert main([*PLAN, *map(str, words), '--output', str(root.parent / 'run')]) == 0
    return ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('train, val', SHARDS)
def test_train_command_takes_usual_names_of_shards(train, val, tmp_path, capsys):
    for name, classes in ((train, ['cat', 'dog']), (val, ['dog', 'cat', 'dog'])):
        tar_of(tmp_path / 'data' / f'{name}.tar', [f'{label}/{i}.png' for i, label in enumerate(classes)])
    assert 'training + validation images: cat 1+1, dog 1+2' in planned(tmp_path / 'data', capsys)


@pytest.mark.skipif(os.name != 'posix', reason='links need rights elsewhere')
def test_train_command_follows_links(tmp_path, capsys):
    """A linked class folder, a linked folder in a class, a linked image, and one that leads nowhere."""
    write(tmp_path / 'far', ['dog/1.png', 'more/2.png', '3.png'])
    for split in ('train', 'val'):
        cat = write(tmp_path / 'data' / split, ['cat/0.png']) / 'cat'
        (cat.parent / 'dog').symlink_to(tmp_path / 'far' / 'dog')
        (cat / 'more').symlink_to(tmp_path / 'far' / 'more')
        (cat / '3.png').symlink_to(tmp_path / 'far' / '3.png')
        (cat / '4.png').symlink_to(tmp_path / 'nowhere.png')
    said = planned(tmp_path / 'data', capsys)
    assert 'training + validation images: cat 3+3, dog 1+1' in said and 'left out 2 broken links' in said
    assert '4 validation images are training images too' in said


def test_names_without_a_split_are_shown(tmp_path):
    parquet_of(tmp_path / 'part-0.parquet', ['cat'])
    with pytest.raises(DataError, match=r'has no train split, it has part-0.parquet: expected'):
        open_source(str(tmp_path), 'train')


def test_one_folder_of_classes_names_the_option_that_splits_it(tmp_path):
    with pytest.raises(DataError, match='has no train split, it has cat/, dog/: .*data.val_fraction 0.2'):
        open_source(str(write(tmp_path, ['cat/1.png', 'dog/1.png'])), 'train')


# what is left out


def test_hidden_and_system_files_are_left_out_and_counted(tmp_path):
    write(
        tmp_path,
        [
            'cat/1.png',
            'cat/.ipynb_checkpoints/1-checkpoint.png',
            'dog/@eaDir/2.png/SYNOPHOTO_THUMB_M.jpg',
            'dog/deep/__MACOSX/3.png',
            'dog/2.png',
            'dog/._2.png',
            'dog/Thumbs.db',
            'dog/notes.txt',
            '.git/x.png',
        ],
    )
    expected = {'hidden or system folders': 4, 'hidden or system files': 2, 'files ending in .txt': 1}
    source, images = Folder(tmp_path), find_images([str(tmp_path)])
    assert [Path(file).name for file in source.files] == ['1.png', '2.png'] and source.skipped == expected
    assert len(images) == 2 and images.skipped == expected
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in ('cat', 'dog'):
            tar.add(tmp_path / name, arcname=name)
    packed = open_source(str(tmp_path / 'a.tar'), 'val')
    assert len(packed.labels) == 2 and packed.skipped == {'hidden or system files': 5, 'files ending in .txt': 1}
    assert open_source(str(tmp_path / 'a.tar'), 'val').skipped == packed.skipped  # kept with the index


def test_repeated_names_in_a_tar_count_once(tmp_path):
    tar_of(tmp_path / 'a.tar', ['cat/1.png', 'dog/2.png', 'cat/1.png'])
    source = open_source(str(tmp_path / 'a.tar'), 'val')
    assert len(source.labels) == 2 and source.skipped == {'repeated names': 1}


@pytest.mark.skipif(os.name != 'posix', reason='links need rights elsewhere')
def test_links_are_followed_without_loops(tmp_path):
    write(tmp_path / 'elsewhere', ['9.png', 'deep/8.png'])
    write(tmp_path / 'root', ['cat/1.png', 'dog/2.png'])
    (tmp_path / 'root' / 'cat' / 'more').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'root' / 'cat' / 'again').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'root' / 'cat' / 'up').symlink_to(tmp_path / 'root')
    (tmp_path / 'root' / 'dog' / '3.png').symlink_to(tmp_path / 'elsewhere' / '9.png')
    (tmp_path / 'root' / 'dog' / '4.png').symlink_to(tmp_path / 'nowhere.png')
    (tmp_path / 'root' / 'bird').symlink_to(tmp_path / 'elsewhere')
    source = Folder(tmp_path / 'root')
    counts = Counter(source.classes[label] for label in source.labels)
    assert counts == {'bird': 2, 'cat': 1, 'dog': 2}
    assert source.skipped == {'links to folders already read': 3, 'broken links': 1}


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    write(tmp_path, ['cat/1.png', 'dog/1.png'])
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith('dog'):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(DataError, match='cannot read the folder .*dog: Permission denied'):
        Folder(tmp_path)


# known classes


@pytest.mark.parametrize('store', [as_folder, as_tar, as_parquet])
def test_known_classes_set_names_and_order(store, tmp_path):
    root = str(store(tmp_path, ['cat/1.png', 'dog/2.png']))
    source = open_source(root, 'val', str(tmp_path / 'cache'), classes=['dog', 'bird', 'cat'])
    assert source.classes == ['dog', 'bird', 'cat'] and list(source.labels) == [2, 0]
    with pytest.raises(DataError, match='has images of cat; expected only the 2 classes bird, dog'):
        open_source(root, 'val', str(tmp_path / 'cache'), classes=['bird', 'dog'])


def test_classes_that_differ_in_their_unicode_form_are_explained(tmp_path):
    write(tmp_path, ['cafe\u0301/1.png', 'dog/2.png'])
    with pytest.raises(DataError, match='differ only in how Unicode writes accents'):
        Folder(tmp_path, classes=['caf\u00e9', 'dog'])
    with pytest.raises(DataError, match='has images of cafe\u0301; expected only the 2 classes cat, dog$'):
        Folder(tmp_path, classes=['cat', 'dog'])


def test_single_class_folder_of_a_known_class_is_not_passed_over(tmp_path):
    write(tmp_path, ['cat/2019/1.png', 'cat/2020/2.png'])
    assert Folder(tmp_path, classes=['cat', 'dog']).classes == ['cat', 'dog']
    assert [*Folder(tmp_path, classes=['cat', 'dog']).labels] == [0, 0]


# labelled lists


def test_table_of_paths_and_labels(tmp_path):
    write(tmp_path, ['img/a.png', 'img/b.png'])
    (tmp_path / 'train.csv').write_text('path,label,site\nimg/a.png,cat,n\nimg/b.png,dog,s\nimg/a.png,dog,n\n')
    (tmp_path / 'val.csv').write_text('\ufeffLabel,File\ndog,img/b.png\n', encoding='utf-8')
    train, val = (open_source(str(tmp_path), split) for split in ('train', 'val'))
    assert (train.classes, [*train.labels], train.skipped) == (['dog'], [0, 0], {'repeated names': 1})
    assert val.classes == ['dog'] and val.open(0).size == (4, 4) and val.name(0) == str(tmp_path / 'img' / 'b.png')
    assert train.column('site') == ['n', 's']


def test_blank_rows_of_a_table_are_skipped(tmp_path):
    """Editors leave empty lines in tables, spreadsheets rows of empty cells."""
    (write(tmp_path, ['a.png', 'b.png']) / 'val.csv').write_text('path,label\na.png,cat\n\nb.png,dog\n,\n\n')
    assert open_source(str(tmp_path / 'val.csv'), 'val').classes == ['cat', 'dog']


@pytest.mark.parametrize(
    'text, message',
    [
        ('path,x\na.png,cat\n', r"has the columns \['path', 'x'\]; expected one of paths .* and one of labels"),
        ('path,label\na.png\n', r'has a row of 1 cells'),
        ('path,label\n', 'lists no images'),
        ('path,label\na.png,\0\n', 'is not a list of paths'),
        ('path,label\na.png,\nb.png,cat\nc.png, \n', 'has empty labels for 2 of 3 images: label must name'),
    ],
)
def test_invalid_tables_are_rejected(text, message, tmp_path):
    (tmp_path / 'val.csv').write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / 'val.csv'), 'val')


# limits


def test_sparse_label_is_refused_before_it_is_read(tmp_path):
    """A tar of some kilobytes can claim a label of gigabytes."""
    (tmp_path / 'a.cls').touch()
    os.truncate(tmp_path / 'a.cls', 1 << 36)
    header = tarfile.TarInfo('a.cls')
    header.size = 512
    header.pax_headers = {'GNU.sparse.major': '1', 'GNU.sparse.minor': '0', 'GNU.sparse.realsize': str(1 << 36)}
    with tarfile.open(tmp_path / 'a.tar', 'w', format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header, io.BytesIO(b'1\n0\n0\n'.ljust(512, b'\0')))
    with pytest.raises(DataError, match='a.cls is stored as a sparse file'):
        open_source(str(tmp_path / 'a.tar'), 'val')


def test_large_label_is_refused_before_it_is_read(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        member = tarfile.TarInfo('a.json')
        member.size = labels_module.MAX_LABEL + 1
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(DataError, match='a.json has 1,048,577 bytes; a label may have at most 1,048,576'):
        open_source(str(tmp_path / 'a.tar'), 'val')


@pytest.mark.parametrize(
    'labels, message',
    [
        ([[0], [1]], "column 'label' holds nested values; expected numbers or text"),
        (['a', ''], 'has empty labels for 1 of 2 images: label must name'),
        (['a', 'x' * (parquet_module.MAX_LABEL + 1)], 'a label of 1,048,577 characters; at most 1,048,576'),
    ],
)
def test_odd_parquet_labels_are_refused(labels, message, tmp_path):
    cells = [{'bytes': PNG, 'path': None}] * 2
    pq.write_table(pa.table({'image': cells, 'label': labels}), tmp_path / 'a.parquet')
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / 'a.parquet'), 'val')


def test_large_parquet_cells_are_refused(tmp_path, monkeypatch):
    cells = [{'bytes': bytes(1 << 16), 'path': None}, {'bytes': PNG, 'path': None}, None]
    pq.write_table(pa.table({'image': cells, 'label': ['a', 'b', 'a']}), tmp_path / 'a.parquet', compression='zstd')
    monkeypatch.setattr(parquet_module, 'MAX_IMAGE', 1000)
    source = open_source(str(tmp_path / 'a.parquet'), 'val')
    assert source.open(1).size == (4, 4)
    with pytest.raises(DataError, match='65,536 bytes; an image file may have 1,000'):
        source.open(0)
    with pytest.raises(DataError, match='the row holds no image'):
        source.open(2)
    monkeypatch.setattr(parquet_module, 'MAX_GROUP', 1000)
    with pytest.raises(DataError, match='bytes of image.bytes in a row group; at most 1,000 are read'):
        open_source(str(tmp_path / 'a.parquet'), 'val')


def test_large_images_in_tars_are_refused(tmp_path, monkeypatch):
    tar_of(tmp_path / 'a.tar', ['cat/1.png'])
    source = open_source(str(tmp_path / 'a.tar'), 'val')
    monkeypatch.setattr('t2t_vit.data.sources.tar.MAX_IMAGE', 10)
    with pytest.raises(DataError, match='bytes; an image file may have 10'):
        source.open(0)


# names


ODD = [b'caf\xe9.png', b'new\nline.png', b'"quotes\'.png', b'-rf.png', ' 猫,\u202e.png'.encode(), b'a;b$(c).png']


@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux only')
def test_odd_file_names_pass_through_every_source(tmp_path):
    folder = tmp_path / 'val' / 'caf\u00e9'
    folder.mkdir(parents=True)
    for name in ODD:
        Path(os.fsdecode(os.fsencode(folder) + b'/' + name)).write_bytes(PNG)
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        tar.add(tmp_path / 'val', arcname='.')
    lines = b''.join(b'val/caf\xc3\xa9/' + name + b'\n' for name in ODD if b'\n' not in name)
    (tmp_path / 'a.txt').write_bytes(lines)
    folder_source = open_source(str(tmp_path), 'val')
    tar_source = open_source(str(tmp_path / 'a.tar'), 'val')
    found = (
        find_images([str(tmp_path / 'val')]),
        find_images([str(tmp_path / 'a.tar')]),
        find_images([str(tmp_path / 'a.txt')]),
    )
    for images, count in ((folder_source, 6), (tar_source, 6), *zip(found, (6, 6, 5))):
        names = {os.fsencode(images.name(i)).rpartition(b'/')[2] for i in range(count)}
        assert names <= {*ODD} and len(names) == count
        assert all(images.open(i).size == (4, 4) for i in range(count))
    assert folder_source.classes == tar_source.classes == ['caf\u00e9']
    assert json.loads(json.dumps(folder_source.name(0))) == folder_source.name(0)


@pytest.mark.skipif(os.name != 'posix', reason='there are no pipes in folders elsewhere')
@pytest.mark.timeout(30)
@pytest.mark.parametrize('name', ['a.tar', 'a.parquet', 'a.csv', 'a.txt', 'val/cat/a.png'])
def test_pipes_are_never_opened(name, tmp_path):
    """Nobody writes into them, so opening one would wait forever."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f'{name} is not a regular file but a pipe'):
        find_images([str(tmp_path / name)]).open(0)
    if name != 'a.txt' and '/' not in name:
        with pytest.raises(DataError, match=f'{name} is not a regular file but a pipe'):
            open_source(str(tmp_path / name), 'val')
    if name.endswith('.png'):
        source = open_source(str(tmp_path), 'val')
        assert len(source.labels) == 1
        for read in (source.open, source.content):
            with pytest.raises(DataError, match='is not a regular file but a pipe'):
                read(0)
