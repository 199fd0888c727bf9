"""Make damaged and hostile images, and tars and tables of them."""

import io
import json
import random
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
from fuzz import Case
from fuzz_damage import mangle, mangle_tree
from fuzz_twins import digest, random_image
from fuzz_weights import SMALL
from PIL import Image
from sklearn.datasets import load_sample_image

from t2t_vit import cli
from t2t_vit.data import Augment, DiskBatches, Preprocessing, open_source
from t2t_vit.data.decode import decode_image
from t2t_vit.trained import save_folder


def drawn() -> Image.Image:
    return Image.fromarray(load_sample_image('china.jpg')[100:164, 100:180])


def png(width: int, height: int, depth: int = 8, color: int = 2, pixels: bool = False, chunks: bytes = b'') -> bytes:
    """Write a PNG that claims a size, with all its pixels black or with hardly any."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    row = 1 + (width * depth * {0: 1, 2: 3}[color] + 7) // 8
    packer, data = zlib.compressobj(9), b''
    for _ in range(height if pixels else 1):
        data += packer.compress(bytes(row if pixels else 100))
    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunks
        + chunk(b'IDAT', data + packer.flush())
        + chunk(b'IEND', b'')
    )


def bombs() -> dict[str, bytes]:
    """Return small files that claim or contain enormous images."""
    deflated = zlib.compress(bytes(1 << 28), 9)
    text = b'Comment\0\0' + deflated
    profile = b'icc\0\0' + deflated
    return {
        'png of 30000²': png(30000, 30000),
        'png of 2³¹': png(2**31 - 1, 2**31 - 1),
        'png of 13000² black': png(13000, 13000, 1, 0, True),
        'png of 20000×4000 black': png(20000, 4000, 1, 0, True),
        'png of 1×3000000': png(1, 3_000_000, 8, 0, True),
        'png of 3000000×1': png(3_000_000, 1, 8, 0, True),
        'png of 60000000×1': png(60_000_000, 1, 1, 0, True),
        'png text': png(
            8,
            8,
            8,
            0,
            True,
            struct.pack('>I', len(text)) + b'zTXt' + text + struct.pack('>I', zlib.crc32(b'zTXt' + text)),
        ),
        'png profile': png(
            8,
            8,
            8,
            0,
            True,
            struct.pack('>I', len(profile)) + b'iCCP' + profile + struct.pack('>I', zlib.crc32(b'iCCP' + profile)),
        ),
        'ppm': b'P6\n100000 100000\n255\n' + bytes(100),
        'ppm of 0': b'P6\n0 0\n255\n',
        'pgm of words': b'P2\n9 9\n65535\n' + b'1 ' * 9,
        'gif': b'GIF89a'
        + struct.pack('<HH', 65535, 65535)
        + b'\xf0\0\0'
        + bytes(6)
        + b','
        + bytes(4)
        + struct.pack('<HH', 65535, 65535)
        + b'\0\x02\x02D\x01\0;',
        'bmp': b'BM'
        + struct.pack('<IHHI', 54, 0, 0, 54)
        + struct.pack('<IiiHHIIiiII', 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        'bmp of 40000²': b'BM'
        + struct.pack('<IHHI', 54, 0, 0, 54)
        + struct.pack('<IiiHHIIiiII', 40, 40000, 40000, 1, 1, 0, 0, 0, 0, 2, 2),
        'eps': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n',
        'tga': bytes(2) + b'\x02' + bytes(9) + struct.pack('<HH', 65535, 65535) + b'\x18\0',
        'xpm': b'/* XPM */\nstatic char *x[] = {\n"9 9 1 1",\n"a c #000000",\n};',
        'empty': b'',
        'html': b'<html></html>',
    }


class Images:
    """Make image files of every format: intact, damaged, or built to exhaust memory."""

    def __init__(self, seeds: Path) -> None:
        image, self.seeds = drawn(), []
        palette, deep = image.convert('P'), Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
        ways: list[tuple[Image.Image, str, dict[str, Any]]] = [
            (image, 'jpeg', {}),
            (image, 'jpeg', dict(progressive=True, quality=30)),
            (image.convert('CMYK'), 'jpeg', {}),
            (image.convert('L'), 'jpeg', {}),
            (image, 'png', {}),
            (palette, 'png', dict(transparency=3)),
            (deep, 'png', {}),
            (image.convert('LA'), 'png', {}),
            (image.convert('1'), 'png', {}),
            (palette, 'gif', {}),
            (palette, 'gif', dict(save_all=True, append_images=[palette.rotate(90)], loop=0)),
            (image, 'bmp', {}),
            (palette, 'bmp', {}),
            (image, 'webp', {}),
            (image, 'webp', dict(lossless=True)),
            (image.convert('RGBA'), 'webp', {}),
            (image, 'tiff', {}),
            (image, 'tiff', dict(compression='tiff_lzw')),
            (image, 'tiff', dict(compression='jpeg')),
            (image, 'tiff', dict(compression='tiff_deflate')),
            (deep, 'tiff', {}),
            (image.convert('1'), 'tiff', dict(compression='group4')),
            (image, 'ppm', {}),
        ]
        for picture, format, options in ways:
            picture.save(file := io.BytesIO(), format, **options)
            self.seeds.append((format, file.getvalue()))
        self.bombs = bombs()
        self.run = seeds / 'run'
        self.run.mkdir()
        save_folder(timm.create_model('t2t_vit_4_16', **SMALL), self.run, SMALL)
        self.preprocessing = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3)

    def make(self, rng: random.Random, folder: Path) -> Case:
        """Make one input."""
        if rng.random() < 0.3:
            return self.twin(rng, folder)
        format, content = rng.choice(self.seeds)
        if rng.random() < 0.08:
            what = rng.choice([*self.bombs])
            content = self.bombs[what]
            if rng.random() < 0.3:
                content, how = mangle(rng, content[:10000])
                what = f'{what}, {how}'
        else:
            content, how = mangle(rng, content, [content for _, content in self.seeds])
            what = f'{format}: {how}'
        (folder / 'data' / 'a').mkdir(parents=True)
        file = folder / 'data' / 'a' / f'1.{rng.choice((format, format, "jpg", "png", "tif", "gif"))}'
        file.write_bytes(content)
        if rng.random() < 0.3:
            return Case(
                f'predict, {what}',
                lambda: cli.call(
                    'predict', [str(file), '--checkpoint', str(self.run), '--device', 'cpu', '--batch_size', '1']
                ),
            )
        augment = Augment() if rng.random() < 0.4 else None
        return Case(
            f'{"train" if augment else "eval"}, {what}',
            lambda: batches(str(folder / 'data'), self.preprocessing, augment),
        )

    def twin(self, rng: random.Random, folder: Path) -> Case:
        """Make an intact image in an unusual encoding, whose pixels are known."""
        content, format, what, shown = random_image(rng)
        if trailing := format in ('png', 'gif', 'bmp', 'ppm') and rng.random() < 0.3:  # readers ignore it there
            content += rng.randbytes(rng.randrange(1, 40))
        file = folder / f'1.{rng.choice((format, "jpg", "png", "tif"))}'
        file.write_bytes(content)
        return Case(
            f'decode, {what}{", trailing bytes" if trailing else ""}, as {file.name}',
            lambda: digest(decode_image(str(file))),
            expected=digest(shown),
            refusable=False,
        )


def batches(root: str, preprocessing: Preprocessing, augment: Any = None) -> int:
    """Decode every image of a source; return how many were good."""
    loader = DiskBatches(open_source(root, 'val'), preprocessing, 1, augment, workers=0)
    return sum(len(images) for images, *_ in loader.epoch()) if augment is None or len(loader.source.labels) > 0 else 0


class Sources:
    """Make tars of both layouts and Parquet files, with labels of any kind."""

    def __init__(self, seeds: Path) -> None:
        drawn().resize((12, 10)).save(file := io.BytesIO(), 'png')
        self.image, self.preprocessing = file.getvalue(), Preprocessing((16, 16), 3, (0.5,) * 3, (0.5,) * 3)
        table = pa.table({'image': [{'bytes': self.image, 'path': None}] * 3, 'label': [0, 1, 0]})
        named = {
            'huggingface': json.dumps({'info': {'features': {'label': {'names': ['a', 'b'], '_type': 'ClassLabel'}}}})
        }
        self.tables = [table, table.replace_schema_metadata(named)]

    def make(self, rng: random.Random, folder: Path) -> Case:
        """Make one input."""
        content, suffix, what = (self.tar if rng.random() < 0.6 else self.parquet)(rng)
        if not what or rng.random() < 0.3:
            content, how = mangle(rng, content)
            what = f'{what} {how}'
        (folder / f'val.{suffix}').write_bytes(content)
        if rng.random() < 0.2:
            (folder / 'classes.txt').write_bytes(rng.choice((b'', b'a\nb\n', b'\xff\xfe', b'a', b'\0\n' * 9)))
        return Case(f'{suffix}, {what}', lambda: batches(str(folder), self.preprocessing), ('.val.index',))

    def tar(self, rng: random.Random) -> tuple[bytes, str, str]:
        labels: list[bytes] = [
            b'0',
            b'1',
            b'cat',
            b'',
            b'-1',
            b'\xff',
            b'9' * 400,
            b'9' * 5000,
            b'{"label": 1}',
            b'{"label": null}',
            b'[1]',
            b'{"label": [1]}',
            b'{"label": 1e999}',
            b'{"label": true}',
            b'[' * 100000,
            'Ⅷ²'.encode(),
            b'1.5',
        ]
        names = ['a/1', 'b/2', '3', '../4', '/5', 'a/' * 200 + '6', 'ü/7', '\x1b[2J/8', 'a/.9', 'a/b.c', '']
        usual, file = rng.random() < 0.5, io.BytesIO()
        with tarfile.open(fileobj=file, mode='w', format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
            for i in range(3):
                key = names[i % 2] if usual else rng.choice(names)
                for kind, content in (
                    ('png', self.image),
                    (
                        'cls' if usual else rng.choice(('cls', 'json', 'txt')),
                        rng.choice(labels[:3] if usual else labels),
                    ),
                ):
                    member = tarfile.TarInfo(f'{key}{i}.{kind}')
                    member.size = len(content)
                    if rng.random() < 0.05:
                        member.type, member.linkname = (
                            rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)),
                            '/etc/passwd',
                        )
                    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
        return file.getvalue(), 'tar', '' if usual else 'odd labels and names'

    def parquet(self, rng: random.Random) -> tuple[bytes, str, str]:
        table, what = rng.choice(self.tables), ''
        if rng.random() < 0.5:
            column = rng.choice(
                (
                    [None] * 3,
                    [0.5] * 3,
                    ['a', None, 'b'],
                    [0, 1, 7],
                    [-1, 0, 1],
                    [[0]] * 3,
                    [True] * 3,
                    [b'\xff'] * 3,
                    [2**62] * 3,
                    ['x' * 4000] * 3,
                )
            )
            name = rng.choice(('label', 'label', 'image', 'img', 'cls'))
            table = (
                table.set_column(table.column_names.index(name), name, pa.array(column))
                if name in table.column_names
                else table.rename_columns([name, 'label'])
            )
            what = f'{name} of {str(column)[:30]}'
        if rng.random() < 0.4:
            info, how = mangle_tree(rng, {'info': {'features': {'label': {'names': ['a', 'b']}}}})
            table, what = table.replace_schema_metadata({'huggingface': json.dumps(info, default=str)}), f'{what} {how}'
        pq.write_table(table, file := io.BytesIO())
        return file.getvalue(), 'parquet', what
