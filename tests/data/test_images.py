"""Images to predict on: finding them in every kind of input, and opening them safely."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import crops
from PIL import Image

from t2t_vit.data import DataError, Opener, Preprocessing, find_images, open_pieces

SMALL = Preprocessing((16, 16), 3, (0.5,) * 3, (0.5,) * 3)


def encode(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), 'png')
    return buffer.getvalue()


def write_tar(file: Path, members: 'dict[str, bytes]') -> None:
    with tarfile.open(file, 'w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def claiming(width: int, height: int) -> bytes:
    """Return a PNG file of a hundred bytes whose header claims this size."""
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(bytes(64))), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.fixture(scope='module')
def inputs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same eight images as every kind of input; read-only."""
    root = tmp_path_factory.mktemp('inputs_root')
    pictures = [encode(image) for _, (_, _, image) in zip(range(8), crops())]
    (root / 'folder' / 'deep').mkdir(parents=True)
    for i, content in enumerate(pictures):
        (root / 'folder' / ('deep' if i > 5 else '') / f'{i}.png').write_bytes(content)
    (root / 'folder' / '.hidden.png').write_bytes(pictures[0])
    (root / 'folder' / 'notes.md').write_text('no image')
    members = {f'{i:03}.png': content for i, content in enumerate(pictures)}
    write_tar(root / 'shard-0.tar', {**members, '000.cls': b'3', '000.json': b'{}', '.x.png': b''})
    pq.write_table(
        pa.table({'image': [{'bytes': c, 'path': None} for c in pictures]}), root / 'hub.parquet', row_group_size=3
    )
    pq.write_table(pa.table({'png': pictures, 'label': range(8)}), root / 'bytes.parquet')
    paths = [f'folder/{"deep/" if i > 5 else ""}{i}.png' for i in range(8)]
    (root / 'list.txt').write_text('\ufeff' + '\n'.join(paths) + '\n\n')  # as some editors begin a file
    (root / 'bare.csv').write_text('\n'.join(paths))
    (root / 'table.csv').write_text('\ufeffFile,label\n' + ''.join(f'{path},"a, b"\n' for path in paths))
    return root


@pytest.mark.parametrize(
    'name',
    ['folder', 'folder/**/*.png', 'shard-0.tar', 'hub.parquet', 'bytes.parquet', 'list.txt', 'bare.csv', 'table.csv'],
)
def test_every_kind_of_input_finds_the_same_images(inputs_root, name):
    images = find_images([str(inputs_root / name)])
    expected = [np.asarray(image) for _, (_, _, image) in zip(range(8), crops())]
    assert all(np.array_equal(np.asarray(images.open(i)), expected[i]) for i in range(8)) and len(images) == 8
    assert len({images.name(i) for i in range(8)}) == 8 and images.name(0).startswith(str(inputs_root))


@pytest.mark.parametrize('pattern', ['**', '**/*', '*'])
def test_pattern_finds_each_image_of_its_folders_once(inputs_root, pattern):
    folder = inputs_root / 'folder'
    images, expected = find_images([str(folder / pattern)]), find_images([str(folder)])
    names = [images.name(i) for i in range(len(images))]
    assert sorted(names) == sorted(expected.name(i) for i in range(8)) and names[0] == str(folder / '0.png')
    assert images.skipped['files ending in .md'] == 1


def test_pattern_reads_lists_only_if_it_names_them(inputs_root):
    assert len(find_images([str(inputs_root / 'l*.txt')])) == 8
    with pytest.raises(DataError, match=r'no images in .*left out: 1 files ending in .txt'):
        find_images([str(inputs_root / 'l*')])


def test_inputs_keep_their_order(inputs_root, tmp_path):
    (tmp_path / 'mixed').mkdir()
    for name in ('shard-0.tar', 'hub.parquet', 'folder/1.png', 'folder/0.png', 'list.txt'):
        (tmp_path / 'mixed' / Path(name).name).symlink_to(inputs_root / name)
    images = find_images([str(tmp_path / 'mixed'), 'digits', str(inputs_root / 'folder' / '5.png')])
    names = [images.name(i).removeprefix(f'{tmp_path}/mixed/') for i in range(len(images))]
    assert names[:2] == ['0.png', '1.png'] and names[2:10] == [f'hub.parquet[{i}]' for i in range(8)]
    assert names[10:18] == [f'shard-0.tar/{i:03}.png' for i in range(8)]  # a list in a folder is no input
    assert len(names) == 31 and all(name.startswith('digits/') for name in names[18:30])
    assert images.truth(18) in '0123456789' and images.truth(0) == ''
    assert (
        images.digest()
        == find_images([str(tmp_path / 'mixed'), 'digits', str(inputs_root / 'folder' / '5.png')]).digest()
    )
    assert (
        images.digest()
        != find_images([str(inputs_root / 'folder' / '5.png'), str(tmp_path / 'mixed'), 'digits']).digest()
    )


def test_list_paths_may_start_in_the_working_directory(inputs_root, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs_root)
    (tmp_path / 'a.txt').write_text('folder/0.png\r\nfolder/nowhere.png\r\n')
    images = find_images([str(tmp_path / 'a.txt')])
    assert images.name(0) == 'folder/0.png' and len(images) == 2 and images.open(0)


def test_folder_takes_precedence_over_embedded_images(inputs_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'samples').symlink_to(inputs_root / 'folder')
    assert find_images(['samples']).name(0) == 'samples/0.png'


def test_rows_hold_one_row_group(inputs_root):
    rows = find_images([str(inputs_root / 'hub.parquet')]).parts[0]
    rows.open(7)
    assert rows.held[0] == 2 and len(rows.held[1]) == 2


@pytest.mark.skipif(os.name != 'posix', reason='names are text elsewhere')
def test_names_that_are_not_utf8_are_kept(inputs_root, tmp_path):
    os.symlink(inputs_root / 'folder' / '0.png', os.fsencode(tmp_path) + b'/\xff.png')
    images = find_images([str(tmp_path)])
    assert images.open(0) and os.fsencode(images.name(0)).endswith(b'\xff.png')


@pytest.mark.parametrize(
    'inputs, message',
    [
        (['nowhere', 'else*.png'], 'not found: nowhere, else\\*.png'),
        (['empty'], 'no images in empty'),
        (['empty.csv', 'header.csv', 'empty.parquet'], 'no images are listed in empty.csv, header.csv, empty.parquet$'),
        (['truncated.tar'], 'truncated.tar is truncated'),
        (['truncated.parquet'], 'cannot read truncated.parquet as Parquet'),
        (['other.parquet'], "has the columns \\['x'\\]; expected one of images"),
        (['text.parquet'], 'text.parquet: its column image holds string; expected bytes, or {bytes, path}'),
        (['numbers.parquet'], 'its column image holds int64; expected bytes'),
        (['fields.parquet'], 'its column image holds struct<bytes: string>; expected bytes'),
        (['other.csv'], "has the columns \\['a', 'b'\\]; expected one of paths"),
        (['bytes.csv'], 'is not a list of paths'),
        (['column.csv'], "has the columns \\['photo'\\]; expected one of paths"),
    ],
)
def test_inputs_without_images_are_rejected(inputs_root, tmp_path, monkeypatch, inputs, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'truncated.tar').write_bytes((inputs_root / 'shard-0.tar').read_bytes()[:2000])
    (tmp_path / 'truncated.parquet').write_bytes((inputs_root / 'hub.parquet').read_bytes()[:2000])
    columns = {'text': [str(inputs_root / 'folder' / '0.png')], 'numbers': [1], 'fields': [{'bytes': 'a'}]}
    for name, column in columns.items():
        pq.write_table(pa.table({'image': column}), tmp_path / f'{name}.parquet')
    pq.write_table(pa.table({'x': [1]}), tmp_path / 'other.parquet')
    pq.write_table(pa.table({'image': pa.array([], pa.binary())}), tmp_path / 'empty.parquet')
    (tmp_path / 'empty.csv').touch()
    (tmp_path / 'header.csv').write_text('image,label\n')
    (tmp_path / 'other.csv').write_text('a,b\n1,2\n')
    (tmp_path / 'column.csv').write_text('photo\n1.png\n')
    (tmp_path / 'bytes.csv').write_bytes(b'\xff\xfe\0')
    with pytest.raises(DataError, match=message):
        find_images(inputs)


def test_damaged_images_are_reported_with_their_error(inputs_root, tmp_path):
    good = (inputs_root / 'folder' / '0.png').read_bytes()
    for name, content in {'a': good, 'b': good[: len(good) // 2], 'c': b'text', 'd': b''}.items():
        (tmp_path / f'{name}.png').write_bytes(content)
    (tmp_path / 'e.txt').write_text('a.png\nnowhere.png\n')
    images = find_images([str(tmp_path), str(tmp_path / 'e.txt')])
    opened = list(open_pieces(Opener(images, SMALL), [(0, 2), (2, 6)], 1))
    assert [piece.good for piece in opened] == [[0], [4]] and [len(piece.images) for piece in opened] == [1, 1]
    errors = {**opened[0].errors, **opened[1].errors}
    assert [*errors] == [1, 2, 3, 5] and 'truncated' in errors[1] and errors[2].startswith('ImageError: not an image')
    assert errors[5].startswith('FileNotFoundError') and opened[0].images.shape == (1, 3, 16, 16)
    assert opened[0].images.is_contiguous(memory_format=torch.channels_last)


def test_pixel_limit_holds_before_and_after_resizing(tmp_path, monkeypatch):
    """The limit is that of the opener, even if it is above Pillow's."""
    (tmp_path / 'a.png').write_bytes(claiming(2000, 2000))
    (tmp_path / 'b.png').write_bytes(encode(Image.new('RGB', (2, 900))))
    (tmp_path / 'c.png').write_bytes(encode(Image.new('RGB', (50, 50))))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    opener = Opener(find_images([str(tmp_path)]), SMALL, max_pixels=2600)
    opened = opener[0, 3]
    assert opened.good == [2] and Image.MAX_IMAGE_PIXELS == 1000
    assert opened.errors[0] == 'ImageError: more than 2,600 pixels; larger images are not decoded'
    assert opened.errors[1] == 'DataError: 2x900 pixels would be resized to 17x8000, more than 2600 in all'
    wide = Opener(opener.images, SMALL, max_pixels=4_000_000)[0, 3]
    assert wide.good == [1, 2] and 'more than' not in wide.errors[0]  # it was looked into


@pytest.mark.parametrize('mode, size', [('center', (17, 8000)), ('squash', (17, 17)), ('border', (0, 17))])
def test_resized_size_by_crop_mode(mode, size):
    width, height = Preprocessing((16, 16), 3, (0.5,), (0.5,), crop_mode=mode).resized(Image.new('L', (900, 2)))
    assert (width, height) == size
