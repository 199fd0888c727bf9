"""Decoding: every way into an image ends in the pixels that its plain 8-bit twin has."""

import io
import os
import socket
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
import torch
from conftest import crops
from PIL import Image, ImageCms, ImageSequence

from t2t_vit.data import (
    DataError,
    ImageError,
    Preprocessing,
    convert_image,
    decode,
    decode_image,
    image_size,
    image_suffixes,
    pixel_limit,
    read_image,
)

PHOTO = next(image for _, _, image in crops())
GREY = PHOTO.convert('L')
RED = Image.new('RGB', (6, 4), (200, 30, 10))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def same(image: Any, expected: Image.Image, tolerance: int = 0) -> bool:
    """Return true if an image has the mode, the size and, to within the tolerance, the pixels of another."""
    difference = np.asarray(image).astype(int) - np.asarray(expected)
    return image.mode == expected.mode and image.size == expected.size and int(abs(difference).max()) <= tolerance


# plain JPEG, which simplejpeg decodes


def decoders(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets, for every JPEG that simplejpeg is asked for, whether it decoded it."""
    decode, calls = simplejpeg.decode_jpeg, []

    def count(*args: Any) -> np.ndarray:
        calls.append(False)
        found = decode(*args)
        calls[-1] = True
        return found

    monkeypatch.setattr(simplejpeg, 'decode_jpeg', count)
    return calls


@pytest.mark.parametrize('size', [(64, 64), (61, 35), (1, 7)])
@pytest.mark.parametrize(
    'options',
    [{}, dict(quality=20), dict(quality=95, subsampling=0), dict(subsampling=1), dict(progressive=True)],
    ids=['plain', 'coarse', '444', '422', 'progressive'],
)
def test_plain_jpeg_has_the_pixels_of_pillow(size, options, monkeypatch):
    content, calls = encode(PHOTO.resize(size), 'jpeg', **options), decoders(monkeypatch)
    assert np.array_equal(read_image(content), np.asarray(Image.open(io.BytesIO(content)))) and calls == [True]


def test_decoded_jpeg_is_an_image(tmp_path):
    (tmp_path / 'a.jpg').write_bytes(content := encode(PHOTO, 'jpeg'))
    for source in (content, tmp_path / 'a.jpg', io.BytesIO(content)):
        assert same(decode_image(source), Image.open(io.BytesIO(content)))


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_other_jpeg_is_decoded_by_pillow(mode, monkeypatch):
    content, calls = encode(PHOTO.convert(mode), 'jpeg'), decoders(monkeypatch)
    assert same(decode_image(content), Image.open(io.BytesIO(content)).convert('RGB')) and not calls


@pytest.mark.parametrize('tag', [2, 6])
def test_turned_jpeg_is_decoded_by_pillow(tag, monkeypatch):
    exif, calls = Image.Exif(), decoders(monkeypatch)
    exif[0x0112] = tag
    assert isinstance(read_image(encode(PHOTO, 'jpeg', exif=exif)), Image.Image) and not calls


def test_faulty_jpeg_is_judged_by_pillow(monkeypatch):
    """Zeros among the compressed values are read on over, as before; a cut end is not."""
    content, calls = encode(PHOTO, 'jpeg', quality=95), decoders(monkeypatch)
    middle = len(content) // 2
    faulty = content[:middle] + bytes(40) + content[middle + 40 :]
    assert same(decode_image(faulty), Image.open(io.BytesIO(faulty))) and calls == [False]
    with pytest.raises(ImageError, match='damaged: image file is truncated'):
        decode_image(content[:-40])
    assert calls == [False, False]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'


@pytest.mark.filterwarnings('ignore:Image appears to be a malformed MPO file')
@pytest.mark.parametrize('marker, segment', [(0xE1, XMP), (0xE2, b'MPF\0')], ids=['XMP', 'MPF'])
def test_metadata_says_whether_a_jpeg_is_turned(marker, segment, monkeypatch):
    content, calls = encode(PHOTO, 'jpeg'), decoders(monkeypatch)
    added = bytes([0xFF, marker]) + (len(segment) + 2).to_bytes(2, 'big') + segment
    image, turned = read_image(content[:2] + added + content[2:]), marker == 0xE1
    assert isinstance(image, Image.Image) == turned and calls == ([] if turned else [True])
    expected = read_image(content)
    assert np.array_equal(image, np.rot90(expected, -1) if turned else expected)


@pytest.mark.parametrize('kind, options', [('jpeg', {}), ('mpo', dict(save_all=True, append_images=[PHOTO.rotate(9)]))])
def test_upright_photo_of_a_camera_has_the_pixels_of_pillow(kind, options, monkeypatch):
    """Cameras write EXIF data into every photo, telephones often a second image behind it."""
    exif, calls = Image.Exif(), decoders(monkeypatch)
    exif[0x010F], exif[0x0112] = 'maker', 1
    content = encode(PHOTO, kind, exif=exif, **options)
    assert np.array_equal(read_image(content), np.asarray(Image.open(io.BytesIO(content)))) and calls == [True]


def test_jpeg_without_simplejpeg_has_the_same_pixels(monkeypatch):
    content = encode(PHOTO, 'jpeg')
    expected = decode_image(content)
    monkeypatch.setattr(decode, '_simplejpeg', lambda: None)
    assert isinstance(read_image(content), Image.Image) and same(decode_image(content), expected)


# orientation

STORED = {  # how an upright image is stored for each value of the EXIF tag
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize('kind', ['png', 'webp', 'tiff', 'jpeg', 'avif'])
@pytest.mark.parametrize('tag', STORED)
def test_images_are_turned_upright_by_exif(tag, kind):
    if kind.upper() not in Image.SAVE:
        pytest.skip(f'this Pillow cannot write {kind}')
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = PHOTO if STORED[tag] is None else PHOTO.transpose(STORED[tag])
    options = dict(lossless=True) if kind == 'webp' else dict(quality=100) if kind in ('jpeg', 'avif') else {}
    found = decode_image(encode(stored, kind, exif=exif, **options))
    assert same(found, PHOTO, 0 if kind in ('png', 'webp', 'tiff') else 40)
    assert same(decode_image(found), found)  # not turned again


def test_unreadable_exif_leaves_the_image_as_it_is_stored():
    content = encode(PHOTO, 'png', exif=b'Exif\0\0MM\0*\xff\xff\xff\xff')
    assert same(decode_image(content), PHOTO)


# modes


def with_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return an RGBA image whose right half is transparent, and what it looks like on white."""
    layer = image.convert('RGBA')
    layer.paste((9, 99, 9, 0), (image.width // 2, 0, image.width, image.height))
    expected = image.convert('RGB')
    expected.paste('white', (image.width // 2, 0, image.width, image.height))
    return layer, expected


def palette_with(transparency: 'int | bytes') -> bytes:
    image = Image.new('P', (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (2, 0, 4, 2))
    return encode(image, 'png', transparency=transparency)


BLUE_AND_WHITE = Image.fromarray(np.array([[[0, 0, 255]] * 2 + [[255] * 3] * 2] * 2, np.uint8))
LAYER, ON_WHITE = with_alpha(PHOTO)
GREY_ON_WHITE = with_alpha(GREY.convert('RGB'))[1]
DEEP = np.asarray(GREY).astype(np.uint16) * 257
LAB = ImageCms.applyTransform(
    PHOTO, ImageCms.buildTransform(ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), 'RGB', 'LAB')
)
MODES: dict[str, tuple[Any, Image.Image, int]] = {  # content or image, its twin in 8 bits, tolerance
    '1': (PHOTO.convert('1'), PHOTO.convert('1').convert('RGB'), 0),
    'L': (GREY, GREY.convert('RGB'), 0),
    'LA': (LAYER.convert('LA'), GREY_ON_WHITE, 0),
    'La': (LAYER.convert('LA').convert('La'), GREY_ON_WHITE, 0),
    'P': (PHOTO.convert('P'), PHOTO.convert('P').convert('RGB'), 0),
    'P, colour key': (palette_with(0), BLUE_AND_WHITE, 0),
    'P, opacities': (palette_with(b'\0\xff'), BLUE_AND_WHITE, 0),
    'PA': (GREY.convert('P').convert('PA'), GREY.convert('RGB'), 0),
    'RGB, colour key': (encode(BLUE_AND_WHITE, 'png', transparency=(0, 0, 255)), Image.new('RGB', (4, 2), 'white'), 0),
    'L, colour key': (encode(Image.new('L', (4, 2), 7), 'png', transparency=7), Image.new('RGB', (4, 2), 'white'), 0),
    '1, colour key': (encode(Image.new('1', (4, 2), 0), 'png', transparency=0), Image.new('RGB', (4, 2), 'white'), 0),
    'RGBA': (LAYER, ON_WHITE, 0),
    'RGBa': (LAYER.convert('RGBa'), ON_WHITE, 0),
    'RGBA, opaque': (PHOTO.convert('RGBA'), PHOTO, 0),
    'RGBX': (PHOTO.convert('RGBX'), PHOTO, 0),
    'CMYK': (PHOTO.convert('CMYK'), PHOTO, 0),
    'YCbCr': (PHOTO.convert('YCbCr'), PHOTO, 3),
    'HSV': (PHOTO.convert('HSV'), PHOTO, 8),
    'LAB': (LAB, PHOTO, 24),
    'I of 8 bits': (GREY.convert('I'), GREY.convert('RGB'), 0),
    'I of 16 bits': (Image.fromarray(DEEP.astype(np.int32)), GREY.convert('RGB'), 0),
    'I;16': (Image.fromarray(DEEP), GREY.convert('RGB'), 0),
    'I;16B': (Image.frombytes('I;16B', GREY.size, DEEP.astype('>u2').tobytes()), GREY.convert('RGB'), 0),
    'I;16L': (Image.frombytes('I;16L', GREY.size, DEEP.astype('<u2').tobytes()), GREY.convert('RGB'), 0),
    'F of 0 to 1': (Image.fromarray(np.asarray(GREY, np.float32) / 255), GREY.convert('RGB'), 0),
    'F of 0 to 255': (GREY.convert('F'), GREY.convert('RGB'), 0),
    'F of 0 to 65535': (Image.fromarray(DEEP.astype(np.float32)), GREY.convert('RGB'), 0),
    'PNG of 16 bits': (encode(Image.fromarray(DEEP), 'png'), GREY.convert('RGB'), 0),
    'PGM of 16 bits': (b'P5 %d %d 65535\n' % GREY.size + DEEP.astype('>u2').tobytes(), GREY.convert('RGB'), 0),
    'TIFF of 16 bits': (encode(Image.fromarray(DEEP), 'tiff'), GREY.convert('RGB'), 0),
    'TIFF of 32 bits': (encode(GREY.convert('I'), 'tiff'), GREY.convert('RGB'), 0),
    'TIFF of floats': (encode(GREY.convert('F'), 'tiff'), GREY.convert('RGB'), 0),
    'TIFF, CMYK': (encode(PHOTO.convert('CMYK'), 'tiff'), PHOTO, 0),
    'TIFF, LAB': (encode(LAB, 'tiff'), PHOTO, 24),
    'PNG, LA': (encode(LAYER.convert('LA'), 'png'), GREY_ON_WHITE, 0),
    'WebP, RGBA': (encode(LAYER, 'webp', lossless=True), ON_WHITE, 0),
    'GIF': (encode(GREY, 'gif'), GREY.convert('RGB'), 0),
    'array': (np.asarray(PHOTO), PHOTO, 0),
    'array of 16 bits': (np.asarray(PHOTO).astype(np.uint16) * 257, PHOTO, 0),
    'array of floats, bands first': (np.moveaxis(np.asarray(PHOTO), -1, 0) / 255, PHOTO, 0),
    'array of booleans': (np.asarray(GREY) > 99, GREY.point(lambda v: 255 * (v > 99)).convert('RGB'), 0),
}


@pytest.mark.parametrize('name', MODES)
def test_every_mode_equals_its_8_bit_twin(name):
    image, twin, tolerance = MODES[name]
    assert same(decode_image(image), twin, tolerance)
    assert same(decode_image(image, channels=1), twin.convert('L'), tolerance)
    assert same(decode_image(decode_image(image)), decode_image(image))


def test_the_first_frame_is_decoded():
    frames = [Image.new('RGB', (8, 8), color) for color in ('red', 'blue')]
    for kind in ('gif', 'tiff', 'webp', 'png'):
        content = encode(
            frames[0], kind, save_all=True, append_images=frames[1:], **({'lossless': True} if kind == 'webp' else {})
        )
        assert len([*ImageSequence.Iterator(Image.open(io.BytesIO(content)))]) == 2
        assert same(decode_image(content), frames[0])


def test_background_is_configurable():
    found = decode_image(LAYER, background='#102030')
    assert found.getpixel((PHOTO.width - 1, 0)) == (16, 32, 48) and found.getpixel((0, 0)) == PHOTO.getpixel((0, 0))
    half = Image.new('RGBA', (2, 2), (255, 0, 0, 128))
    assert decode_image(half).getpixel((0, 0)) == (255, 127, 127)


def test_transparent_grey_of_16_bits_is_white():
    """Pillow leaves the transparency of such a PNG to the caller."""
    values = np.full((2, 4), 1000, np.uint16)
    values[:, 2:] = 51400
    content = encode(Image.fromarray(values), 'png')
    end = content.index(b'IDAT') - 4
    key = b'tRNS' + struct.pack('>H', 1000)
    content = content[:end] + struct.pack('>I', 2) + key + struct.pack('>I', zlib.crc32(key)) + content[end:]
    assert np.asarray(decode_image(content, channels=1))[0].tolist() == [255, 255, 200, 200]


def test_icc_profile_does_not_change_the_pixels():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    for content in (profile, b'damaged profile'):
        assert same(decode_image(encode(PHOTO, 'png', icc_profile=content)), PHOTO)


@pytest.mark.parametrize(
    'values, message',
    [
        (np.array([[np.nan, 1.0]], np.float32), 'expected the range 0 to 1'),
        (np.array([[0, 70000]], np.int32), 'values up to 70000; expected the range'),
        (np.zeros((4, 4, 5), np.uint8), 'shape 4x4x5; expected 3 bands'),
        (np.zeros((2, 2, 2, 2)), '4 dimensions; expected height x width'),
        (np.zeros((4, 4), complex), 'values of the type complex128'),
    ],
)
def test_values_without_a_known_range_are_rejected(values, message):
    with pytest.raises(ImageError, match=message):
        decode_image(values)


# bands

BANDS = np.random.default_rng(0).integers(0, 60000, (12, 10, 5), dtype=np.uint16)


def npy(array: np.ndarray) -> bytes:
    np.save(buffer := io.BytesIO(), array)
    return buffer.getvalue()


@pytest.mark.parametrize('shape, channels', [((1, 30, 20), 1), ((1, 30, 20), 3), ((3, 30, 20), 3), ((2, 30, 20), 2)])
def test_bands_first_are_measured_like_bands_last(shape, channels):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for source in (array, npy(array)):
        first, last = read_image(source, channels), read_image(np.moveaxis(array, 0, -1), channels)
        assert image_size(first) == image_size(last) == (20, 30) and np.array_equal(first, last)
    kept = Preprocessing((16, 16), channels, (0.5,) * channels, (0.5,) * channels).kept(first)
    assert kept[2] < kept[3] < 1  # of a portrait


@pytest.mark.parametrize('size', [(40, 1), (1, 40)])
def test_image_of_one_pixel_in_height_keeps_its_colours(size):
    for kind in ('jpeg', 'png'):
        content = encode(PHOTO.resize(size), kind)
        assert same(decode_image(content), Image.open(io.BytesIO(content)))


@pytest.mark.parametrize('shape', [(0, 4, 3), (4, 0, 3), (4, 4, 0), (0, 4)])
def test_array_without_pixels_is_rejected(shape):
    with pytest.raises(ImageError, match='has no pixels'):
        read_image(np.zeros(shape, np.uint8))


def tiff(array: np.ndarray, **options: Any) -> bytes:
    tifffile.imwrite(buffer := io.BytesIO(), array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    'content',
    [
        npy(BANDS),
        npy(np.moveaxis(BANDS, -1, 0)),
        tiff(BANDS, photometric='minisblack', planarconfig='contig'),
        tiff(BANDS, photometric='minisblack', planarconfig='contig', compression='zlib'),
        tiff(np.moveaxis(BANDS, -1, 0), photometric='minisblack', planarconfig='separate'),
        tiff(np.moveaxis(BANDS, -1, 0), photometric='minisblack'),
    ],
    ids=['npy', 'npy bands first', 'tiff', 'tiff deflated', 'tiff planes', 'tiff pages'],
)
def test_bands_are_read_as_they_are_stored(content, tmp_path):
    expected = torch.from_numpy(np.moveaxis(BANDS, -1, 0).astype(np.float32)) / 65535
    (tmp_path / 'a').write_bytes(content)
    for source in (content, tmp_path / 'a', io.BytesIO(content)):
        torch.testing.assert_close(decode_image(source, channels=5), expected)
    with pytest.raises(ImageError, match='expected 4 bands'):
        decode_image(content, channels=4)


def test_four_bands_keep_their_depth_and_their_alpha():
    values = BANDS[..., :4]
    found = decode_image(tiff(values), channels=4)  # written as RGB and alpha
    torch.testing.assert_close(found, torch.from_numpy(np.moveaxis(values, -1, 0).astype(np.float32)) / 65535)
    assert torch.equal(
        decode_image(encode(LAYER, 'png'), channels=4),
        torch.from_numpy(np.asarray(LAYER) / np.float32(255)).permute(2, 0, 1),
    )


def test_floats_of_bands_stay_as_they_are():
    values = np.linspace(-2, 3, 24, dtype=np.float32).reshape(4, 3, 2)
    assert torch.equal(decode_image(npy(values), channels=2), torch.from_numpy(values).permute(2, 0, 1))
    values[0, 0, 0] = np.inf
    with pytest.raises(ImageError, match='not finite'):
        decode_image(npy(values), channels=2)


@pytest.mark.parametrize(
    'content, message',
    [
        (npy(BANDS)[:-1], 'damaged: 1,200 bytes of values expected, 1,199 found'),
        (npy(np.array([[{}]], object)), 'Python objects'),
        (npy(BANDS).replace(b'(12, 10, 5)', b'(99999999, 99999999, 5)'), 'pixels'),
        (npy(BANDS)[:9], 'damaged'),
    ],
)
def test_damaged_npy_files_are_rejected_before_they_are_read(content, message):
    with pytest.raises(ImageError, match=message):
        decode_image(content)


# ways in


def test_paths_bytes_files_images_and_arrays_are_decoded_alike(tmp_path):
    content = encode(PHOTO, 'png')
    (tmp_path / 'a').write_bytes(content)
    ways = (
        tmp_path / 'a',
        str(tmp_path / 'a'),
        content,
        memoryview(content),
        io.BytesIO(content),
        PHOTO,
        np.asarray(PHOTO),
    )
    assert all(same(decode_image(way), PHOTO) for way in ways)


def test_reading_and_converting_are_the_two_steps_of_decoding():
    assert read_image(encode(LAYER, 'png')).mode == 'RGBA'
    assert same(convert_image(read_image(encode(LAYER, 'png'))), ON_WHITE)


def test_decoding_leaves_a_given_image_as_it_is():
    image = PHOTO.copy()
    assert decode_image(image) is not image and decode_image(image, max_side=8).width == 8 and same(image, PHOTO)


def test_max_side_reduces_the_image():
    large = PHOTO.resize((1600, 800))
    found = decode_image(encode(large, 'jpeg', quality=95), max_side=400)
    assert found.size == (400, 200) and same(found, large.resize((400, 200)), 60)
    assert decode_image(encode(PHOTO, 'png'), max_side=10**4).size == PHOTO.size


@pytest.mark.skipif(os.name != 'posix', reason='there are no pipes in folders elsewhere')
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / 'b.png'))
        (tmp_path / 'c.png').mkdir()
        for name, kind in (('a.png', 'pipe'), ('b.png', 'socket'), ('c.png', 'folder')):
            with pytest.raises(ImageError, match=f'{name} is not a regular file but a {kind}'):
                decode_image(tmp_path / name)
        with pytest.raises(ImageError, match='/dev/zero is not a regular file but a device'):
            decode_image('/dev/zero')


def test_missing_files_are_the_systems_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / 'nowhere.png')


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'not an image of a known format'),
        (b'<html></html>', 'not an image of a known format'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', 'not an image of a known format'),
        (encode(PHOTO, 'png')[:500], 'damaged: '),
        (encode(PHOTO, 'jpeg')[:700], 'damaged: image file is truncated'),
        (encode(Image.new('L', (501, 1)), 'png'), '501x1 pixels: its sides are more than 500 to 1'),
    ],
)
def test_errors_are_the_same_for_the_same_bytes(content, message):
    """They hold no object's address."""
    with pytest.raises(ImageError, match=message) as first:
        decode_image(content)
    with pytest.raises(ImageError) as second:
        decode_image(bytes(bytearray(content)))
    assert str(first.value) == str(second.value) and '0x' not in str(first.value)


def test_pixel_limit_holds_for_every_kind_of_image():
    with pixel_limit(100):
        bands = tiff(BANDS, photometric='minisblack', planarconfig='contig')
        for content in (encode(PHOTO, 'png'), encode(PHOTO, 'jpeg'), npy(BANDS), bands, np.asarray(PHOTO), PHOTO):
            for channels in (1, 3, 5):
                with pytest.raises(ImageError, match='100'):
                    decode_image(content, channels)
    assert same(decode_image(encode(PHOTO, 'png')), PHOTO)


# formats


def test_suffixes_are_what_is_decoded(tmp_path):
    assert {'.jpg', '.jfif', '.jpe', '.jp2', '.png', '.webp', '.tif', '.gif', '.mpo', '.npy'} <= {*image_suffixes()}
    assert not {'.eps', '.psd', '.ico', '.txt', ''} & {*image_suffixes()}
    kinds = Image.registered_extensions()
    for suffix in image_suffixes():
        kind = kinds.get(suffix)
        if suffix == '.npy' or kind in ('HEIF', 'PPM') or kind not in Image.SAVE:
            continue
        RED.save(tmp_path / f'a{suffix}', kind, **({'lossless': True} if kind == 'WEBP' else {}))
        assert decode_image(tmp_path / f'a{suffix}').size == RED.size


def test_heic_is_decoded_where_its_package_is_installed():
    heif = pytest.importorskip('pillow_heif')
    heif.register_heif_opener()
    content = encode(PHOTO, 'heif', quality=100)
    assert same(decode_image(content), PHOTO, 60) and {'.heic', '.heif'} <= {*image_suffixes()}


def test_heic_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    monkeypatch.setattr('t2t_vit.data.decode.find_spec', lambda name: None)
    monkeypatch.delitem(Image.OPEN, 'HEIF', raising=False)
    image_suffixes.cache_clear()
    with pytest.raises(ImageError, match='needs the package pillow-heif: pip install pillow-heif'):
        decode_image(b'\0\0\0\x18ftypheic' + bytes(40))
    assert '.heic' not in image_suffixes()
    image_suffixes.cache_clear()


def test_image_errors_are_data_errors():
    assert issubclass(ImageError, DataError) and issubclass(DataError, ValueError)


def test_decoding_is_documented():
    text = (Path(__file__).parents[2] / 'docs' / 'data.md').read_text(encoding='utf-8')
    assert all(word in text for word in ('EXIF', 'data.background', 'I;16', 'pillow-heif', 'ICC', 'first frame'))
