"""The command `prepare`: shards that hold the same images, reduced; restarted, checked, and read from a server."""

import errno
import http.server
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from t2t_vit import prepare as module
from t2t_vit.cli import main
from t2t_vit.data import (
    Augment,
    DataError,
    DiskBatches,
    Preprocessing,
    SplitOptions,
    convert_image,
    image_size,
    open_source,
    open_train_val,
)

PREPROCESSING = Preprocessing((32, 32), 3, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope='module')
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the photos prepared in shards of five; read-only."""
    output = tmp_path_factory.mktemp('prepared') / 'out'
    assert main(['prepare', str(photos), str(output), '--short_side', '48', '--shard_images', '5']) == 0
    return output


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Ranges(Quiet):
    """Answer requests of a range of bytes, as object storage does."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        content, asked = Path(self.translate_path(self.path)).read_bytes(), self.headers.get('Range')
        first, last = 0, len(content) - 1
        if asked:
            self.asked.append(asked)
            first, last = (int(number) for number in asked.removeprefix('bytes=').split('-'))
        self.send_response(206 if asked else 200)
        self.send_header('Content-Range', f'bytes {first}-{last}/{len(content)}')
        part = content[first : last + 1]
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header('Accept-Ranges', 'bytes')
        super().end_headers()


@contextmanager
def serving(folder: Path, handler: type[Quiet] = Quiet) -> Iterator[str]:
    """Yield the address of an HTTP server of a folder."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def address(prepared: Path) -> Iterator[str]:
    """Return the address of a server of the prepared photos."""
    with serving(prepared) as address:
        yield address


@pytest.fixture
def bucket(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of the prepared photos in object storage: a local server that speaks S3."""
    moto, s3fs = pytest.importorskip('moto.server'), pytest.importorskip('s3fs')
    server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ('AWS_ENDPOINT_URL', f'http://{host}:{port}'),
        ('AWS_ACCESS_KEY_ID', 'test'),
        ('AWS_SECRET_ACCESS_KEY', 'test'),
        ('AWS_DEFAULT_REGION', 'us-east-1'),
    ):
        monkeypatch.setenv(name, value)
    storage = s3fs.S3FileSystem(skip_instance_cache=True)
    storage.mkdir('photos')
    storage.put(f'{prepared}/', 'photos/prepared/', recursive=True)
    yield 's3://photos/prepared'
    server.stop()


def test_prepared_images_are_the_originals_reduced(photos, prepared):
    for split, count in (('train', 24), ('val', 12)):
        source, original = (open_source(str(root), split) for root in (prepared, photos))
        assert source.classes == original.classes and len(source.labels) == count
        numbers = [int(Path(source.name(i)).stem) for i in range(count)]
        assert sorted(numbers) == list(range(count))
        for i, number in enumerate(numbers):
            assert source.labels[i] == original.labels[number]
            before = convert_image(original.open(number))
            expected = before.resize((round(before.width * 48 / 64), 48), Image.Resampling.BICUBIC)
            difference = np.asarray(convert_image(source.open(i))).astype(int) - np.asarray(expected)
            assert image_size(source.open(i)) == expected.size and abs(difference).mean() < 8


def test_shards_are_tars_in_the_layout_of_webdataset(prepared):
    with tarfile.open(prepared / 'train' / '000000.tar') as tar:
        names = tar.getnames()
        assert len(names) == 10 and names[0].endswith('.jpg') and names[1] == names[0].replace('.jpg', '.cls')
        assert Image.open(io.BytesIO(tar.extractfile(names[0]).read())).format == 'JPEG'


@pytest.mark.filterwarnings('ignore')  # of the other package
def test_shards_are_read_by_webdataset(prepared):
    webdataset = pytest.importorskip('webdataset')
    found = list(webdataset.WebDataset(str(prepared / 'train' / '000000.tar'), shardshuffle=False).decode('pil'))
    assert len(found) == 5 and {sample['cls'] for sample in found} <= {0, 1, 2}


def test_small_plain_jpeg_keeps_its_bytes(photos, tmp_path):
    assert main(['prepare', str(photos), str(tmp_path / 'out'), '--workers', '0']) == 0
    source, original = (open_source(str(root), 'val') for root in (tmp_path / 'out', photos))
    kept = 0
    for i in range(12):
        before = original.content(int(Path(source.name(i)).stem))
        kept += source.content(i) == before
        assert (source.content(i) == before) == before.startswith(b'\xff\xd8')
    assert kept == 6


def test_turned_photo_is_stored_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / 'in' / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 30), 'red').save(tmp_path / 'in' / split / name / '1.jpg', exif=exif)
    assert main(['prepare', str(tmp_path / 'in'), str(tmp_path / 'out'), '--workers', '0']) == 0
    assert image_size(open_source(str(tmp_path / 'out'), 'val').open(0)) == (30, 40)


def test_interrupted_command_continues(photos, prepared, tmp_path, monkeypatch):
    words = ['prepare', str(photos), str(tmp_path / 'out'), '--short_side', '48', '--shard_images', '5']
    write = module.ShardWriter.__getitem__

    def stop(self: module.ShardWriter, number: int) -> object:
        if number == 2:
            raise KeyboardInterrupt
        return write(self, number)

    monkeypatch.setattr(module.ShardWriter, '__getitem__', stop)
    assert main([*words, '--workers', '0']) == 130
    with pytest.raises(DataError, match='is not complete'):
        open_source(str(tmp_path / 'out'), 'train')
    made: list[int] = []
    monkeypatch.setattr(
        module.ShardWriter, '__getitem__', lambda self, number: made.append(number) or write(self, number)
    )
    assert main([*words, '--workers', '0']) == 0 and made == [2, 3, 4, 0, 1, 2]
    for file in ('prepared.json', 'train/000001.tar', 'val/000002.tar', 'train/index.parquet'):
        assert (tmp_path / 'out' / file).read_bytes() == (prepared / file).read_bytes()


def test_interrupted_workers_end_within_a_shard(photos, tmp_path, monkeypatch, capsys):
    reduce, main_process = module.reduce_image, os.getpid()

    def slow(*args: object) -> bytes:
        if not (tmp_path / 'asked').exists():
            (tmp_path / 'asked').touch()
            os.kill(main_process, signal.SIGINT)
        time.sleep(0.5)
        return reduce(*args)

    monkeypatch.setattr(module, 'reduce_image', slow)
    began, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:  # a shell may have started the tests with the signal ignored
        assert main(['prepare', str(photos), str(tmp_path / 'out'), '--workers', '1']) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 8  # a shard of 24 images takes 12 s
    assert 'the same command continues' in capsys.readouterr().err


@pytest.mark.parametrize('workers', ['0', '1'])
def test_full_disk_is_an_error_of_one_line(workers, photos, tmp_path, monkeypatch, capsys):
    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, 'hash_file', full)
    assert main(['prepare', str(photos), str(tmp_path / 'out'), '--workers', workers]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'cannot write the shards in' in line and line.endswith('No space left on device')


def test_killed_worker_is_an_error_of_one_line(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, 'reduce_image', lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert main(['prepare', str(photos), str(tmp_path / 'out'), '--workers', '1']) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'a process that opens images died: DataLoader worker' in line


def test_other_settings_are_rejected(photos, prepared, capsys):
    assert main(['prepare', str(photos), str(prepared), '--short_side', '64', '--shard_images', '5']) == 2
    assert 'was begun with other short_side' in capsys.readouterr().err
    assert main(['prepare', str(photos), str(photos)]) == 2
    assert 'is not empty, and holds no prepared images' in capsys.readouterr().err
    assert main(['prepare', str(photos), 's3://a/b', '--quality', '99', '--short_side', '0', '--background', 'x']) == 2
    error = capsys.readouterr().err
    for part in ('output must be a folder', 'quality must be', 'short_side must be', 'background is no colour'):
        assert part in error


def test_complete_folder_is_checked(photos, tmp_path, capsys):
    words = ['prepare', str(photos), str(tmp_path / 'out'), '--workers', '0']
    assert main(words) == 0 and main(words) == 0
    assert 'nothing left to do' in capsys.readouterr().out
    shard = tmp_path / 'out' / 'train' / '000000.tar'
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)
    assert main(words) == 2
    assert '1 of 4 files' in (error := capsys.readouterr().err) and 'train/000000.tar' in error


def test_other_images_are_rejected(tmp_path, capsys):
    """Of the same classes and number, whether the folder is complete or not; a copy of the same images is accepted."""
    for root, names in (('a', '12'), ('b', '13'), ('c', '12'), ('d', '12')):
        for split in ('train', 'val'):
            for label in ('cat', 'dog'):
                (tmp_path / root / split / label).mkdir(parents=True)
                for name in names:
                    image = Image.new('RGB', (40, 40 if root == 'c' else 30))
                    image.save(tmp_path / root / split / label / f'{name}.png')

    def prepare(root: str, output: str = 'out') -> int:
        return main(['prepare', str(tmp_path / root), str(tmp_path / output), '--workers', '0'])

    assert prepare('a') == 0
    for root in 'bc':
        assert prepare(root) == 2 and 'out was begun with other images' in capsys.readouterr().err
    assert prepare('d') == 0 and 'nothing left to do' in capsys.readouterr().out
    record = json.loads((tmp_path / 'out' / 'prepared.json').read_text())
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'preparing.json').write_text(json.dumps(record))
    assert prepare('b', 'new') == 2 and 'new was begun with other images' in capsys.readouterr().err
    assert not list(tmp_path.rglob('.lock'))


def test_images_of_one_file_are_the_same_in_another_folder(parquet, tmp_path):
    (original,) = parquet.glob('val*')
    copy = shutil.copy(original, tmp_path)
    found, expected = (module.fingerprint(open_source(root, 'all'), root) for root in (str(copy), str(original)))
    assert found == expected


@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux only')
def test_names_that_are_not_utf8_are_prepared(tmp_path):
    for split in ('train', 'val'):
        for label in (b'cat\xe9', b'dog'):
            folder = tmp_path / 'in' / split / os.fsdecode(label)
            folder.mkdir(parents=True)
            Image.new('RGB', (40, 30), 'red').save(folder / '1.png')
            (folder / os.fsdecode(b'kaputt\xe9.jpg')).write_bytes(b'not an image')
    words = ['prepare', str(tmp_path / 'in'), str(tmp_path / 'out'), '--workers', '0']
    assert main(words) == 0 and main(words) == 0
    assert open_source(str(tmp_path / 'out'), 'val').classes == [os.fsdecode(b'cat\xe9'), 'dog']
    damaged = json.loads((tmp_path / 'out' / 'prepared.json').read_text(encoding='utf-8'))['damaged']
    assert len(damaged) == 4 and damaged[0].endswith(os.fsdecode(b'kaputt\xe9.jpg'))


def test_validation_images_may_lack_classes(tmp_path, capsys):
    for folder in ('train/cat', 'train/dog', 'val/dog', 'strange/train/cat', 'strange/train/dog', 'strange/val/emu'):
        (tmp_path / folder).mkdir(parents=True)
        Image.new('RGB', (40, 30), 'red').save(tmp_path / folder / '1.png')
    assert main(['prepare', str(tmp_path), str(tmp_path / 'out'), '--workers', '0']) == 0
    train, val = (open_source(str(tmp_path / 'out'), split) for split in ('train', 'val'))
    assert train.classes == val.classes == ['cat', 'dog'] and list(val.labels) == [1]
    assert main(['prepare', str(tmp_path / 'strange'), str(tmp_path / 'new'), '--workers', '0']) == 2
    assert 'has images of emu; expected only the 2 classes' in capsys.readouterr().err


def test_images_that_are_not_divided_are_prepared(photos, tmp_path):
    words = ['prepare', str(photos / 'train'), str(tmp_path / 'out'), '--workers', '0']
    assert main(words) == 0 and main(words) == 0
    root = str(tmp_path / 'out')
    for split in ('val', 'all'):
        assert len(open_source(root, split).labels) == 24
    with pytest.raises(DataError, match='is not divided: set data.val_fraction'):
        open_source(root, 'train')
    train, val, _ = open_train_val(root, options=SplitOptions(val_fraction=0.25))
    assert train.classes == ['flower', 'roof', 'sky'] and (len(train.labels), len(val.labels)) == (18, 6)


def test_index_that_does_not_fit_is_an_error(photos, tmp_path):
    assert main(['prepare', str(photos), str(tmp_path / 'out'), '--workers', '0']) == 0
    index = tmp_path / 'out' / 'val' / 'index.parquet'
    index.write_bytes((tmp_path / 'out' / 'train' / 'index.parquet').read_bytes())
    with pytest.raises(DataError, match='index.parquet is not the index that prepared.json names'):
        open_source(str(tmp_path / 'out'), 'val')
    index.unlink()
    with pytest.raises(DataError, match='cannot be read without its index, so prepare the images again'):
        open_source(str(tmp_path / 'out'), 'val')


def test_folder_killed_at_the_end_is_finished(photos, tmp_path):
    words = ['prepare', str(photos), str(tmp_path / 'out'), '--workers', '0']
    assert main(words) == 0
    (tmp_path / 'out' / 'preparing.json').write_text('{}')
    (tmp_path / 'out' / 'train' / '000000.json').write_text('{}')
    assert main(words) == 0 and len(open_source(str(tmp_path / 'out'), 'train').labels) == 24
    assert not (tmp_path / 'out' / 'train' / '000000.json').exists()


@pytest.mark.parametrize('name', ['prepared.json', 'preparing.json'])
@pytest.mark.parametrize('text', ['[]', '{"short'])
def test_damaged_record_is_named(name, text, photos, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert main(['prepare', str(photos), str(tmp_path), '--workers', '0']) == 2
    assert f'{name} is damaged, so prepare the images again' in capsys.readouterr().err
    with pytest.raises(DataError, match='prepared.json is damaged' if name == 'prepared.json' else 'is not complete'):
        open_source(str(tmp_path), 'train')


def test_damaged_images_are_left_out_and_named(tmp_path, capsys):
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / 'in' / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 30), 'red').save(tmp_path / 'in' / split / name / '1.png')
    (tmp_path / 'in' / 'train' / 'a' / '2.jpg').write_bytes(b'not an image')
    assert main(['prepare', str(tmp_path / 'in'), str(tmp_path / 'out'), '--workers', '0']) == 0
    assert '1 damaged images were left out' in capsys.readouterr().out
    assert json.loads((tmp_path / 'out' / 'prepared.json').read_text())['damaged'][0].endswith('2.jpg')
    assert len(open_source(str(tmp_path / 'out'), 'train').labels) == 2


@pytest.mark.parametrize('workers', [0, 2])
def test_batches_from_a_server_equal_those_of_the_folder(prepared, address, tmp_path, workers):
    """Two ranks, from the second step on, as a resumed run asks for them."""
    found, expected = (
        [
            batch
            for rank in range(2)
            for batch in DiskBatches(
                open_source(root, 'train', str(tmp_path)), PREPROCESSING, 4, Augment(), workers, 5, rank=rank, world=2
            ).epoch(1, start=1)
        ]
        for root in (address, str(prepared))
    )
    assert len(found) == 4
    for pair in zip(found, expected):
        assert all(torch.equal(one, other) for one, other in zip(*pair))


def same_images(root: str, folder: Path, cache: Path) -> bool:
    """Return true if a prepared set has the images and labels of a folder."""
    found, expected = open_source(root, 'train', str(cache)), open_source(str(folder), 'train')
    contents = zip(map(found.content, range(len(found.labels))), map(expected.content, range(len(expected.labels))))
    return found.labels == expected.labels and all(one == other for one, other in contents)


def test_server_with_ranges(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranges, 'asked', [])
    with serving(prepared, Ranges) as address:
        assert same_images(address, prepared, tmp_path)
    assert Ranges.asked


def test_object_storage(bucket, prepared, tmp_path):
    assert same_images(bucket, prepared, tmp_path / 'cache')
    words = ['train', '--data', bucket, '--data.cache', str(tmp_path / 'cache'), '--output', str(tmp_path / 'run')]
    words += ['--model', 't2t_vit_4_16', '--model_args.depth', '1', '--imgsz', '16', '--epochs', '1', '--batch', '8']
    assert main([*words, '--data.memory', 'false', '--workers', '2', '--device', 'cpu']) == 0
    with pytest.raises(DataError, match='cannot fetch s3://photos/none/prepared.json: FileNotFoundError'):
        open_source('s3://photos/none', 'train', str(tmp_path / 'cache'))


def test_damaged_download_is_an_error(prepared, address, tmp_path, monkeypatch):
    source = open_source(address, 'train', str(tmp_path))
    source.shards[0]['sha256'] = '0' * 64
    with pytest.raises(DataError, match='000000.tar is damaged: its SHA-256 is'):
        source.open(0)
    with pytest.raises(DataError, match=r'cannot fetch http://127.0.0.1:\d+/none/prepared.json: FileNotFoundError'):
        open_source(f'{address}/none', 'train', str(tmp_path))


def test_prepared_images_train(prepared, tmp_path):
    words = ['train', '--data', str(prepared), '--model', 't2t_vit_4_16', '--model_args.depth', '1', '--imgsz', '16']
    words += ['--epochs', '1', '--batch', '8', '--data.memory', 'false', '--workers', '0']
    assert main([*words, '--output', str(tmp_path / 'run')]) == 0
    assert (tmp_path / 'run' / 'model.safetensors').exists()
