"""Every command, source and mode of image: a model gets the pixels of the image's plain 8-bit upright twin.

`PATHS` lead from files to a model, each by the functions that a command calls; test_every_command.py runs the commands.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import timm
import torch
import torchvision
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from t2t_vit import Classifier
from t2t_vit.data import DiskBatches, MemoryBatches, Opener, Preprocessing, find_images, open_source
from t2t_vit.explore.command import class_images
from t2t_vit.explore.explorer import Explorer, Limits
from t2t_vit.export.command import calibrate
from t2t_vit.export.images import batches, open_images
from t2t_vit.look import opened
from t2t_vit.models.t2t_vit import TokensToToken

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
MODES = [
    *('1', 'L', 'LA', 'P', 'P, transparent', 'RGB', 'RGBA', 'CMYK', 'LAB', 'I;16', 'I;16B', 'I', 'F'),
    *('GIF frames', 'npy', 'npy floats'),
]
COUNT = len(MODES)  # images, each of a class of its own


def png(image: Image.Image, kind: str = 'png', **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def stored(pixels: np.ndarray, mode: str, tag: int, hidden: np.ndarray) -> tuple[str, bytes, bytes]:
    """Return a suffix, an image file of this mode and orientation, and its upright 8-bit RGB twin as PNG.

    Pixels that are `hidden` are transparent in modes with transparency. Files without EXIF are stored upright.
    """
    colour = mode in ('P', 'P, transparent', 'RGB', 'RGBA', 'CMYK', 'LAB', 'GIF frames')
    image = Image.fromarray(pixels if colour else pixels[..., 0])
    if mode == '1':
        image = image.point(lambda value: 255 * (value > 127)).convert('1')
    elif mode in ('P', 'P, transparent', 'GIF frames'):
        image = image.quantize(15)
    elif mode == 'LAB':  # which does not hold every colour
        image = image.convert(mode)
    twin, options = image.convert('RGB'), {}
    if mode in ('LA', 'RGBA', 'P, transparent'):
        twin.paste('white', mask=Image.fromarray(hidden))
    if mode in ('LA', 'RGBA'):
        image.putalpha(Image.fromarray(~hidden))
    elif mode == 'P, transparent':
        image.putpalette([*(image.getpalette() or []), *[0] * 48][:48])  # 16 colours
        image.paste(15, mask=Image.fromarray(hidden))
        options = {'transparency': 15}
    elif mode.startswith('I;16'):
        deep = np.asarray(image).astype(np.uint16) * 257
        image = Image.fromarray(deep.astype('>u2' if mode == 'I;16B' else '<u2'))
        assert image.mode == mode
    elif mode in ('I', 'F', 'CMYK'):
        image = image.convert(mode)
    if mode.startswith('npy'):
        values = np.asarray(image)
        np.save(buffer := io.BytesIO(), values.astype(np.float32) / 255 if mode == 'npy floats' else values)
        return '.npy', buffer.getvalue(), png(twin)
    if mode == 'GIF frames':
        return '.gif', png(image, 'gif', save_all=True, append_images=[Image.new('P', image.size)]), png(twin)
    if (turn := TURNED[tag]) is not None:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = tag
    kind = 'tiff' if mode in ('I', 'I;16B', 'F', 'CMYK', 'LAB') else 'png'
    return f'.{kind}', png(image, kind, exif=exif, **options), png(twin)


def write_tar(file: Path, members: 'list[tuple[str, bytes]]') -> str:
    with tarfile.open(file, 'w') as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(file)


def write_rows(file: Path, files: 'list[tuple[str, bytes]]') -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{'bytes': content, 'path': None} for _, content in files]
    pq.write_table(pa.table({'image': cells, 'label': [f'c{i:02}' for i in range(len(files))]}), file)
    return str(file)


def write_sources(folder: Path, files: 'list[tuple[str, bytes]]') -> 'dict[str, str]':
    """Write the same images, each of its own class, for every kind of source; returns what a user types."""
    names = [f'c{i:02}/{i:02}{suffix}' for i, (suffix, _) in enumerate(files)]
    for name, (_, content) in zip(names, files):
        (folder / 'set' / name).parent.mkdir(parents=True)
        (folder / 'set' / name).write_bytes(content)
    samples = [(name.partition('/')[2], content) for name, (_, content) in zip(names, files)]
    labels = [(f'{i:02}.cls', f'c{i:02}'.encode()) for i in range(len(files))]
    (folder / 'a.csv').write_text('path,label\n' + ''.join(f'set/{name},{name[:3]}\n' for name in names))
    write_rows(folder / 'hub' / 'validation.parquet', files)
    return {
        'folder': str(folder / 'set'),
        'tar of class folders': write_tar(folder / 'folders.tar', [(n, c) for n, (_, c) in zip(names, files)]),
        'WebDataset tar': write_tar(folder / 'samples.tar', sorted([*samples, *labels])),
        'Parquet': write_rows(folder / 'a.parquet', files),
        'list (.csv)': str(folder / 'a.csv'),
        'Hub set': f'hfds/{folder / "hub"}',
    }


@lru_cache
def classifier_for(channels: int = 3, background: str = 'white', count: int = COUNT) -> Classifier:
    """Return a classifier with random weights of images of 16×16 pixels."""
    net = timm.create_model(
        't2t_vit_4_16', num_classes=count, in_chans=channels, img_size=(16, 16), depth=1, token_dim=16
    )
    prepared = Preprocessing(
        (16, 16), channels, (0.5,) * channels, (0.25,) * channels, crop_pct=1.0, background=background
    )
    net.pretrained_cfg.update(prepared.as_cfg(), num_classes=count, label_names=[f'c{i:02}' for i in range(count)])
    return Classifier.of(net)


@contextmanager
def model_inputs() -> 'Iterator[list[torch.Tensor]]':
    """Yield a list that receives every batch of images that a T2T-ViT is given while the context lasts."""
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any) -> None:
        if isinstance(module, TokensToToken) and type(args[0]) is torch.Tensor:  # not those that torch.export traces
            seen.append(args[0].detach().clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def batch_of(loader: Any) -> 'Callable[[str, Classifier], torch.Tensor]':
    """Return what a run validates on, read from disk or held in memory."""

    def read(root: str, model: Classifier) -> torch.Tensor:
        loaded = loader(open_source(root, 'val'), model.preprocessing, COUNT, workers=0)
        (batch,) = loaded.epoch()
        assert not loaded.damaged
        return batch.images

    return read


def watched(call: 'Callable[[Classifier, str], Any]') -> 'Callable[[str, Classifier], torch.Tensor]':
    """Return the images that reach the model while the classifier's method runs."""

    def read(root: str, model: Classifier) -> torch.Tensor:
        with model_inputs() as seen:
            call(model, root)
        return torch.cat(seen)[-len(model.classes) :]  # embed asks with an empty image first how long its vectors are

    return read


def evaluate(model: Classifier, root: str) -> None:
    with patch('t2t_vit.metrics.measure'):  # scores take half a second
        model.evaluate(root, workers=0)


def visualize(root: str, model: Classifier) -> torch.Tensor:
    photos = opened.open_images([root], None, model.preprocessing.channels)
    return opened.prepare(photos, model.preprocessing)[0]


def explore(root: str, model: Classifier) -> torch.Tensor:
    """Examples of the page: an image of each class, of ten classes."""
    source = open_source(root, 'val', channels=model.preprocessing.channels)
    photos = class_images(source, root, model.preprocessing.channels)
    return opened.prepare(photos, model.preprocessing)[0]


def upload(root: str, model: Classifier) -> torch.Tensor:
    """Send files to the page."""
    one = opened.OpenModel('one', '', model.net, model.preprocessing, model.classes)
    page = Explorer({'one': lambda: one}, torch.device('cpu'), Limits())
    photos = [page.read(file, 'one') for file in sorted(Path(root).glob('*/*'))]
    return torch.cat([page.see('one', photo).images for photo in photos])


def compare(root: str, model: Classifier) -> torch.Tensor:
    pictures = open_images(root, 'val', None, model.match)
    return torch.cat([batch.images for batch in batches(pictures, model.preprocessing, 5, None, [])])


def calibration(root: str, model: Classifier) -> torch.Tensor:
    pictures = calibrate(root, 'val', None)[0]
    return torch.cat([batch.images for batch in batches(pictures, model.preprocessing, 1, COUNT, [])])


PATHS: 'dict[str, Callable[[str, Classifier], torch.Tensor]]' = {
    'train, from disk': batch_of(DiskBatches),
    'train, in memory': batch_of(MemoryBatches),
    'eval': watched(evaluate),
    'predict': watched(lambda model, root: model.predict(root)),
    'embed': watched(lambda model, root: model.embed(root)),
    'visualize': visualize,
    'explore, examples': explore,
    'explore, uploads': upload,
    'export, comparison': compare,
    'export, calibration': calibration,
}
WITHOUT_LABELS = ('predict', 'embed', 'visualize')  # these take files, not names of labelled sets


def offered(path: str, source: str) -> bool:
    """Return true if a command takes this kind of source."""
    if path == 'explore, uploads':
        return source == 'folder'
    return source != 'Hub set' or path not in WITHOUT_LABELS


@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data(), st.sampled_from([1, 3]))
def test_every_mode_from_every_source_reaches_every_model_as_its_8_bit_twin(tmp_path_factory, data, channels):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    height, width = (data.draw(st.integers(3, 9)) for _ in range(2))
    files, twins = [], []
    for mode in MODES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels[0, 0], pixels[-1, -1] = 0, 255  # floats are scaled by their range
        suffix, content, twin = stored(pixels, mode, data.draw(st.integers(1, 8)), rng.random((height, width)) < 0.3)
        files.append((suffix, content))
        twins.append(('.png', twin))
    model, folder = classifier_for(channels), tmp_path_factory.mktemp('modes')
    sources, expected = write_sources(folder / 'a', files), write_sources(folder / 'b', twins)['folder']
    for path, read in PATHS.items():
        twin = read(expected, model)
        for source, root in sources.items():
            if offered(path, source):
                found = read(root, model)
                differ = [MODES[i] for i in range(len(found)) if not torch.equal(found[i], twin[i])]
                assert found.shape == twin.shape and not differ, (path, source, differ)


@pytest.mark.parametrize('background', ['black', '#336699'])
def test_background_of_the_model_is_used_by_every_command_and_source(background, tmp_path):
    sources = write_sources(tmp_path, [('.png', png(Image.new('RGBA', (16, 16), (9, 9, 9, 0))))] * 2)
    model = classifier_for(3, background, 2)
    expected = (np.asarray(Image.new('RGB', (1, 1), background))[0, 0] / 255 - 0.5) / 0.25
    for path, read in PATHS.items():
        for source, root in sources.items():
            if offered(path, source):
                assert np.allclose(read(root, model)[0, :, 8, 8], expected, atol=1e-5), (path, source)


def test_bands_reach_every_model_that_needs_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 4), np.uint16)
    tifffile.imwrite(buffer := io.BytesIO(), values)  # RGB and alpha, of which Pillow keeps 8 bits
    sources, model = write_sources(tmp_path, [('.tif', buffer.getvalue())] * 2), classifier_for(4, count=2)
    expected = (torch.from_numpy(np.moveaxis(values, -1, 0).astype(np.float32) / 65535) - 0.5) / 0.25
    for path, read in PATHS.items():
        for source, root in sources.items():
            if offered(path, source):
                torch.testing.assert_close(read(root, model)[0], expected, msg=f'{path}, {source}')


def test_torchvision_set_reaches_every_model_like_its_images_in_a_folder(tmp_path, monkeypatch):
    kind, pixels = torchvision.datasets.CIFAR10, np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    names = [f'c{i:02}' for i in range(10)]
    (tmp_path / 'cache' / kind.base_folder).mkdir(parents=True)
    for file, content in (
        ('test_batch', {'data': pixels.transpose(0, 3, 1, 2).reshape(10, -1), 'labels': list(range(10))}),
        ('batches.meta', {'label_names': names}),
    ):
        (tmp_path / 'cache' / kind.base_folder / file).write_bytes(pickle.dumps(content))
    for field, value in (('train_list', [['test_batch', None]]), ('test_list', [['test_batch', None]])):
        monkeypatch.setattr(kind, field, value)
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': None})
    monkeypatch.setattr('t2t_vit.data.sources.opening.CACHE', str(tmp_path / 'cache'))
    expected = write_sources(tmp_path, [('.png', png(Image.fromarray(image))) for image in pixels])['folder']
    for path, read in PATHS.items():
        if path not in (*WITHOUT_LABELS, 'explore, uploads'):
            model = classifier_for(3, 'white', 10)
            assert torch.equal(read('torch/cifar10', model), read(expected, model)), path


def test_a_damaged_image_is_named_by_every_source(tmp_path):
    good = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)))
    model = classifier_for(count=2)
    for name, root in write_sources(tmp_path, [('.png', good), ('.png', good[:150])]).items():
        source = open_source(root, 'val')
        batches = DiskBatches(source, model.preprocessing, 2, workers=0)
        assert len(list(batches.epoch())[0].labels) == 1 and batches.damaged == [source.name(1)]
        assert json.dumps(batches.damaged)
        for images in (source, *([find_images([root])] if name != 'Hub set' else [])):
            opened = Opener(images, model.preprocessing)[0, 2]
            assert opened.good == [0] and opened.errors[1].startswith('ImageError: ')
