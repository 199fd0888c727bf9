"""Every source, however an image is stored: the pixels are those of its plain 8-bit twin."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from t2t_vit.data import DiskBatches, MemoryBatches, Opener, Preprocessing, find_images, open_source

TURNED = {  # the EXIF tag, and how an upright image is stored with it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
MODES = ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F', 'npy', 'npy floats']


def png(image: Image.Image, kind: str = 'png', **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def stored(pixels: np.ndarray, mode: str, tag: int, hidden: np.ndarray) -> tuple[str, bytes, bytes]:
    """Return a suffix, an image file of this mode and orientation, and its upright 8-bit RGB twin as PNG.

    Pixels that are `hidden` are transparent in modes with transparency.
    """
    grey = mode in ('1', 'L', 'LA', 'I;16', 'I', 'F') or mode.startswith('npy')
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    if mode == '1':
        image = image.point(lambda value: 255 * (value > 127))
    elif mode == 'P':
        image = image.quantize(16).convert('RGB')  # as many colours as a palette holds
    twin = image.convert('RGB')
    if mode in ('LA', 'RGBA'):
        twin.paste('white', mask=Image.fromarray(hidden))
        image.putalpha(Image.fromarray(~hidden))
    if mode.startswith('npy'):
        values = np.asarray(image)
        np.save(buffer := io.BytesIO(), values.astype(np.float32) / 255 if mode == 'npy floats' else values)
        return '.npy', buffer.getvalue(), png(twin)
    if (turn := TURNED[tag]) is not None:
        image = image.transpose(turn)
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif mode == 'I':
        image = Image.fromarray(np.asarray(image).astype(np.int32))
    elif mode != 'P':
        image = image.convert(mode)
    else:
        image = image.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = tag
    kind = 'png' if mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16') else 'tiff'
    return f'.{kind}', png(image, kind, exif=exif), png(twin)


def sources(folder: Path, files: 'list[tuple[str, bytes]]') -> Iterator[Any]:
    """Yield the same images, of one class, from every kind of source."""
    (folder / 'set' / 'class').mkdir(parents=True)
    for i, (suffix, content) in enumerate(files):
        (folder / 'set' / 'class' / f'{i}{suffix}').write_bytes(content)
    yield open_source(str(folder / 'set'), 'val')
    for name, layout in (('folders.tar', 'class/{}'), ('samples.tar', '{}')):
        with tarfile.open(folder / name, 'w') as tar:
            for i, (suffix, content) in enumerate(files):
                members = [(layout.format(f'{i}{suffix}'), content)]
                members += [(f'{i}.cls', b'class')] if name == 'samples.tar' else []
                for member, data in members:
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        yield open_source(str(folder / name), 'val')
    cells = [{'bytes': content, 'path': None} for _, content in files]
    pq.write_table(pa.table({'image': cells, 'label': ['class'] * len(files)}), folder / 'a.parquet')
    yield open_source(str(folder / 'a.parquet'), 'val')
    rows = [f'set/class/{i}{suffix},class' for i, (suffix, _) in enumerate(files)]
    (folder / 'a.csv').write_text('path,label\n' + '\n'.join(rows))
    yield open_source(str(folder / 'a.csv'), 'val')
    for name in ('set', 'folders.tar', 'samples.tar', 'a.parquet', 'a.csv'):
        yield find_images([str(folder / name)])


def tensors(source: Any, preprocessing: Preprocessing, count: int) -> 'Iterator[torch.Tensor]':
    """Yield the images that a model gets from a source, from disk and from memory, or opened for prediction."""
    if hasattr(source, 'labels'):
        for loader in (DiskBatches, MemoryBatches):
            batches = loader(source, preprocessing, count, workers=0)
            (batch,) = batches.epoch()
            assert not batches.damaged
            yield batch.images
    yield Opener(source, preprocessing)[0, count].images


@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data(), st.sampled_from([1, 3]))
def test_every_mode_from_every_source_equals_its_8_bit_twin(tmp_path_factory, data, channels):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    height, width = (data.draw(st.integers(3, 9)) for _ in range(2))
    files, twins = [], []
    for mode in MODES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[0, 0], pixels[-1, -1] = 0, 255  # floats are scaled by their range
        suffix, content, twin = stored(pixels, mode, data.draw(st.integers(1, 8)), rng.random((height, width)) < 0.3)
        files.append((suffix, content))
        twins.append(('.png', twin))
    preprocessing = Preprocessing((8, 8), channels, (0.5,) * channels, (0.25,) * channels)
    folder = tmp_path_factory.mktemp('modes')
    for image_source, twin_source in zip(sources(folder / 'a', files), sources(folder / 'b', twins)):
        found = list(tensors(image_source, preprocessing, len(files)))
        for images, expected in zip(found, tensors(twin_source, preprocessing, len(files)), strict=True):
            torch.testing.assert_close(images, expected, rtol=0, atol=0)


@pytest.mark.parametrize('background', ['white', 'black', '#336699'])
def test_background_reaches_every_source(background, tmp_path):
    content = png(Image.new('RGBA', (4, 4), (9, 9, 9, 0)))
    preprocessing = Preprocessing((4, 4), 3, (0.0,) * 3, (1.0,) * 3, crop_pct=1.0, background=background)
    expected = np.asarray(Image.new('RGB', (1, 1), background))[0, 0] / 255
    for source in sources(tmp_path, [('.png', content)]):
        for images in tensors(source, preprocessing, 1):
            assert np.allclose(images[0, :, 2, 2], expected, atol=1e-6)


def test_a_damaged_image_is_named_by_every_source(tmp_path):
    good = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)))
    preprocessing = Preprocessing((4, 4), 3, (0.0,) * 3, (1.0,) * 3)
    for source in sources(tmp_path, [('.png', good), ('.png', good[:150])]):
        opened = Opener(source, preprocessing)[0, 2]
        assert opened.good == [0] and opened.errors[1].startswith('ImageError: ')
        if hasattr(source, 'labels'):
            batches = DiskBatches(source, preprocessing, 2, workers=0)
            assert len(list(batches.epoch())[0].labels) == 1 and batches.damaged == [source.name(1)]
            assert json.dumps(batches.damaged)


def test_bands_are_read_from_every_source_as_the_model_needs_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (6, 6, 4), np.uint16)
    tifffile.imwrite(buffer := io.BytesIO(), values)  # RGB and alpha, of which Pillow keeps 8 bits
    preprocessing = Preprocessing((6, 6), 4, (0.0,) * 4, (1.0,) * 4, crop_pct=1.0)
    expected = torch.from_numpy(np.moveaxis(values, -1, 0).astype(np.float32) / 65535)
    for source in sources(tmp_path, [('.tif', buffer.getvalue())]):
        for images in tensors(source, preprocessing, 1):
            torch.testing.assert_close(images[0], expected)
