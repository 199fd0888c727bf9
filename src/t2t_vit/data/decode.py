"""Turn a file, bytes, a PIL image or an array into the image that a model is given.

`decode_image` is the only decoder of the package. It works in two steps, which are public too because the sources of a
data set read (`read_image`) before the model's preprocessing converts (`convert_image`). docs/data.md states the rules.
"""

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any, Literal, overload

import numpy as np
import torch
from PIL import Image, ImageColor

from .errors import ImageError

# Only these are decoded, whatever a file's name says; Pillow would hand some others, as PostScript, to other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM', 'AVIF', 'JPEG2000')
HEIF_BRANDS = (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
HEIF_SUFFIXES = ('.heic', '.heif')
JPEG_MAGIC = b'\xff\xd8\xff'
NPY_MAGIC = b'\x93NUMPY'
TIFF_MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
MAX_ASPECT = 500  # longer side divided by the shorter one
MAX_BANDS = 16  # times the largest number of pixels: the values of an image of many bands
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # how to turn an image upright, by the value of that tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Raw = Image.Image | np.ndarray  # as read: a PIL image of any mode, or an array (H, W) or (H, W, bands)
Decoded = Image.Image | torch.Tensor  # an image of mode L or RGB, or a float tensor (bands, H, W)


def decode_image(
    source: Any,
    channels: int = 3,
    background: str | None = 'white',
    max_side: int | None = None,
    max_aspect: float = MAX_ASPECT,
) -> Decoded:
    """Decode an image as a viewer would show it: first frame, upright, on a background, in 8 bits.

    Args:
        source: A path, the bytes of a file, a binary file object (read from its start), a PIL image, or an array (H, W)
            or (H, W, bands).
        channels: 1 for a grey image, 3 for RGB. For any other number the file's bands are returned as they are stored,
            as a float tensor (channels, H, W): integers divided by the largest value of their type, floats unchanged.
        background: The colour that shows through transparent pixels, a name or #rrggbb. With None the image stays
            transparent, in mode RGBA.
        max_side: Reduce the image to at most this many pixels a side; a JPEG is then decoded faster.
        max_aspect: Reject an image whose longer side is more than this many times the shorter one.

    Raises:
        ImageError: if it is not an image, is damaged, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (see
            `pixel_limit`), is too narrow, or has other bands than `channels`. Nothing is decoded before the size is
            checked.
        OSError: if the file cannot be opened.
    """
    raw = read_image(source, channels, max_side, max_aspect)
    image = convert_image(raw, channels, background)
    if isinstance(image, Image.Image):
        image = image.copy() if image is source else image
        if max_side is not None:
            image.thumbnail((max_side, max_side))
    return image


def read_image(
    source: Any, channels: int | None = None, max_side: int | None = None, max_aspect: float = MAX_ASPECT
) -> Raw:
    """Read the first frame of an image, upright, in the mode it is stored in.

    Arguments and errors are those of `decode_image`. With `channels` other than 1 and 3, TIFF files are read with all
    their bands and their full depth. Arrays are returned with their bands last, where these are known by `channels`.
    """
    if isinstance(source, np.ndarray):
        _check_shape(source.shape, channels, max_aspect)
        return _bands_last(source, channels)
    if isinstance(source, (str, os.PathLike)):
        with open_regular(source) as file:
            return read_image(file, channels, max_side, max_aspect)
    file = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
    try:
        if isinstance(file, Image.Image):
            return _load_upright(file, max_side, max_aspect)
        file.seek(0)
        head = file.read(12)
        file.seek(0)
        if head.startswith(NPY_MAGIC):
            return _read_npy(file, channels, max_aspect)
        if head.startswith(TIFF_MAGIC) and channels not in (None, 1, 3):
            return _read_bands(file, channels, max_aspect)
        try:
            if head.startswith(JPEG_MAGIC) and max_side is None:
                content = file.read()
                if (pixels := _decode_plain_jpeg(content, max_aspect)) is not None:
                    return pixels
                file = io.BytesIO(content)
            with Image.open(file, formats=_formats(head)) as image:
                return _load_upright(image, max_side, max_aspect)
        except Image.UnidentifiedImageError:
            if not head.startswith(TIFF_MAGIC):
                raise
            file.seek(0)
            return _read_bands(file, channels, max_aspect)  # Pillow knows neither many bands nor floats in three
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        if head[4:8] == b'ftyp' and head[8:12] in HEIF_BRANDS and 'HEIF' not in Image.OPEN:
            raise ImageError('a HEIC image, which needs the package pillow-heif: pip install pillow-heif') from None
        raise ImageError(f'not an image of a known format ({", ".join(FORMATS)}, HEIC, npy)') from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f'more than {Image.MAX_IMAGE_PIXELS:,} pixels; larger images are not decoded') from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:  # the file system's, not the decoder's
            raise
        raise ImageError(f'damaged: {" ".join(str(error).split()) or type(error).__name__}') from None


@overload
def convert_image(image: Raw, channels: Literal[1, 3] = 3, background: str | None = 'white') -> Image.Image: ...


@overload
def convert_image(image: Raw, channels: int = 3, background: str | None = 'white') -> Decoded: ...


def convert_image(image: Raw, channels: int = 3, background: str | None = 'white') -> Decoded:
    """Convert a read image to mode L (1 channel) or RGB (3), or to a float tensor of its bands (other numbers).

    With `background` None, an image with transparent pixels is converted to mode RGBA.

    Raises:
        ImageError: if it has other bands than `channels`, or values without a known range.
    """
    if channels not in (1, 3):
        return _to_bands(image, channels)
    if isinstance(image, np.ndarray):
        image = _from_array(image, channels)
    try:
        shown, mode = _shown(image, background), 'L' if channels == 1 else 'RGB'
        return shown if shown.mode in (mode, 'RGBA') else shown.convert(mode)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f'cannot be converted from mode {image.mode}: {error}') from None


def image_size(image: 'Raw | Decoded') -> tuple[int, int]:
    """Return the width and height of an image, an array (H, W) or (H, W, bands), or a tensor (bands, H, W)."""
    if isinstance(image, torch.Tensor):
        return image.shape[-1], image.shape[-2]
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        return width, height
    return image.size


def is_color(text: str) -> bool:
    """Return true if the text names a colour: a CSS name, #rrggbb, rgb(…) or hsl(…)."""
    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True


@lru_cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the files that are decoded, in lower case, by what is installed."""
    Image.init()
    formats = {*FORMATS, 'MPO'} & {*Image.OPEN, 'MPO'}  # MPO, several JPEG images in a file, is read as JPEG
    found = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return tuple(sorted(found | {'.npy'} | ({*HEIF_SUFFIXES} if find_spec('pillow_heif') else set())))


def has_image_suffix(name: str) -> bool:
    """Return true if a file's name ends in one of `image_suffixes`, in upper or lower case."""
    return name.lower().endswith(image_suffixes())


def open_regular(path: 'str | os.PathLike[str]') -> IO[bytes]:
    """Open a regular file for reading.

    Raises:
        ImageError: if it is not a regular file.
        OSError: if it cannot be opened.
    """
    check_regular(path)
    return open(path, 'rb')


def check_regular(path: 'str | os.PathLike[str]') -> None:
    """Check that a path leads to a regular file: opening a pipe could wait forever, and a device never ends.

    Raises:
        ImageError: if it leads to something else.
        OSError: if it leads nowhere.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: 'folder', stat.S_IFIFO: 'pipe', stat.S_IFSOCK: 'socket'}
        raise ImageError(f'{os.fspath(path)} is not a regular file but a {kinds.get(stat.S_IFMT(mode), "device")}')


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Refuse larger images before they are decoded, by Pillow's own limit, while the context lasts."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _formats(head: bytes) -> list[str]:
    """Return the formats to try, those that this Pillow has; HEIF too for files that begin so."""
    Image.init()
    if head[4:8] == b'ftyp' and head[8:12] in HEIF_BRANDS and find_spec('pillow_heif'):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in (*FORMATS, 'HEIF') if name in Image.OPEN]


def _check_size(width: int, height: int, max_aspect: float) -> None:
    if not min(width, height):
        raise ImageError(f'{width}x{height} pixels: an image has at least one')
    if max(width, height) > max_aspect * min(width, height):
        raise ImageError(f'{width}x{height} pixels: its sides are more than {max_aspect:g} to 1')
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ImageError(f'{width}x{height} pixels; at most {Image.MAX_IMAGE_PIXELS:,} are decoded')


def _decode_plain_jpeg(content: bytes, max_aspect: float) -> np.ndarray | None:
    """Decode an RGB JPEG that needs no turning by simplejpeg: the pixels that Pillow returns, in less time.

    None for all other images, and for a JPEG in which it finds any fault: Pillow then decides what is damaged.
    """
    if (simplejpeg := _simplejpeg()) is None:
        return None
    if _has_metadata(content):
        with Image.open(io.BytesIO(content), formats=['JPEG']) as image:  # reads the header only
            if _turn(image) is not None:
                return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content)
        if space != 'YCbCr' or width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        _check_size(width, height, max_aspect)
        return simplejpeg.decode_jpeg(content, 'RGB')  # strict: warnings are errors
    except ImageError:
        raise
    except ValueError:
        return None


def _has_metadata(content: bytes) -> bool:
    """Return true for a JPEG that may have to be turned (EXIF, XMP) or has several images (MPF); also for no JPEG."""
    at = 2
    while content[at : at + 1] == b'\xff':
        marker, size = content[at + 1], int.from_bytes(content[at + 2 : at + 4], 'big')
        if marker == 0xDA:  # the pixels begin
            return False
        if marker == 0xE1 or (marker == 0xE2 and content[at + 4 : at + 8] == b'MPF\0'):
            return True
        at += 2 + size
    return True


@lru_cache
def _simplejpeg() -> Any:
    """Return the module, None if it is not installed."""
    return import_module('simplejpeg') if find_spec('simplejpeg') else None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return how to turn an image upright, None if it is."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF data that cannot be read says nothing
        return None


def _load_upright(image: Image.Image, max_side: int | None, max_aspect: float) -> Image.Image:
    """Decode the pixels, turned as the EXIF orientation says."""
    _check_size(*image.size, max_aspect)
    if max_side is not None:
        image.draft(None, (max_side, max_side))
    image.load()
    turn = _turn(image)
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.format = image.format
    for key in ('exif', 'xmp', 'XML:com.adobe.xmp', 'Raw profile type exif'):  # or it would be turned again
        upright.info.pop(key, None)
    return upright


def _shown(image: Image.Image, background: str | None) -> Image.Image:
    """Convert an image of any mode to 8 bits: L or RGB, or RGBA if it has transparent pixels and no background."""
    mode, key = image.mode, image.info.get('transparency')
    if mode in ('L', 'RGB') and key is None:
        return image
    if mode in ('I', 'F') or mode.startswith('I;16'):
        values = np.asarray(image)
        deep = mode != 'F' and (mode != 'I' or image.format in ('PNG', 'PPM'))  # which store 16 bits, read as 32
        shades = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8) if deep else _to_8_bits(values))
        if not isinstance(key, int):
            return shades
        image = Image.merge('LA', (shades, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))
    elif mode in ('La', 'RGBa'):  # colours multiplied by their opacity
        image = image.convert(mode[:-1] + 'A')
    elif mode not in ('LA', 'PA', 'RGBA') and key is None:
        return image.convert('L' if mode == '1' else 'RGB')
    layer = image if image.mode == 'RGBA' else image.convert('RGBA')
    if layer.getchannel('A').getextrema() == (255, 255):
        return layer.convert('RGB')
    if background is None:
        return layer
    return Image.alpha_composite(Image.new('RGBA', layer.size, background), layer).convert('RGB')


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Convert values of another type to uint8, by the narrowest usual range that holds them all.

    The ranges are 0 to 1 (floats only), 0 to 255 and 0 to 65535; what is below 0 is black.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind not in 'iuf':
        raise ImageError(f'values of the type {values.dtype}; expected numbers')
    top = values.max()
    if not np.isfinite(values).all() or top > 65535:
        raise ImageError(f'values up to {top:g}; expected the range 0 to 1, to 255 or to 65535')
    values = values.clip(0, None)
    if values.dtype.kind == 'f' and top <= 1:
        values = values * 255
    elif top > 255:
        values = np.floor(values / 256)
    return np.rint(values).astype(np.uint8)


def _band_axis(shape: Sequence[int], channels: int | None) -> int | None:
    """Return the axis of an array's bands, the last or else the first that has as many as the image; None if none has.

    A grey or RGB image (`channels` is 1, 3 or not known) has one band or three.
    """
    counts = (1, 3) if channels in (None, 1, 3) else (channels,)
    return next((axis for axis in (2, 0) if shape[axis] in counts), None) if len(shape) == 3 else None


def _bands_last(array: np.ndarray, channels: int | None) -> np.ndarray:
    """Return an array as (H, W, bands), if it is known to be (bands, H, W); others as they are."""
    return np.moveaxis(array, 0, -1) if _band_axis(array.shape, channels) == 0 else array


def _check_bands(array: np.ndarray, channels: int) -> None:
    if array.ndim != 3 or array.shape[-1] != channels:
        raise ImageError(
            f'an image of the shape {"x".join(map(str, array.shape))}; expected {channels} bands (height x width x '
            f'{channels}), as data.channels or the model says'
        )


def _from_array(array: np.ndarray, channels: int) -> Image.Image:
    """Convert an array of grey values (H, W) or of colours (H, W, 3) to a PIL image."""
    array = _bands_last(array, channels)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        _check_bands(array, 3)
    return Image.fromarray(np.ascontiguousarray(_to_8_bits(array)))


def _to_bands(image: Raw, channels: int) -> torch.Tensor:
    """Convert the bands of an image, as they are stored, to a float tensor (channels, H, W)."""
    array = np.asarray(image)
    array = _bands_last(array[..., None] if array.ndim == 2 else array, channels)
    _check_bands(array, channels)
    if array.dtype.kind not in 'iufb':
        raise ImageError(f'values of the type {array.dtype}; expected numbers')
    top = np.iinfo(array.dtype).max if array.dtype.kind in 'iu' else 1
    values = np.ascontiguousarray(np.moveaxis(array, -1, 0), np.float32) / np.float32(top)
    if not np.isfinite(values).all():
        raise ImageError('values that are not finite (NaN or infinity)')
    return torch.from_numpy(values)


def _check_shape(shape: Sequence[int], channels: int | None, max_aspect: float) -> None:
    """Check the size of an array (H, W), (H, W, bands) or (bands, H, W) before it is read."""
    if len(shape) not in (2, 3):
        raise ImageError(f'{len(shape)} dimensions; expected height x width, or height x width x bands')
    if 0 in shape:
        raise ImageError(f'an image of the shape {"x".join(map(str, shape))} has no pixels')
    axis = _band_axis(shape, channels)
    height, width = sorted(shape)[-2:] if axis is None else (side for i, side in enumerate(shape) if i != axis)
    _check_size(width, height, max_aspect)
    if math.prod(shape) > MAX_BANDS * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ImageError(f'an image of the shape {"x".join(map(str, shape))} has too many values')


def _read_npy(file: IO[bytes], channels: int | None, max_aspect: float) -> np.ndarray:
    """Read an array from a .npy file; its header is checked first, and no pickled objects are read."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    _check_shape(shape, channels, max_aspect)
    if dtype.hasobject:
        raise ImageError('an array of Python objects; expected numbers')
    position = file.tell()
    size = file.seek(0, os.SEEK_END) - position
    if (expected := math.prod(shape) * dtype.itemsize) > size:
        raise ImageError(f'damaged: {expected:,} bytes of values expected, {size:,} found')
    file.seek(0)
    return _bands_last(np.load(file, allow_pickle=False), channels)


def _read_bands(file: IO[bytes], channels: int | None, max_aspect: float) -> np.ndarray:
    """Read a TIFF with all its bands, stored in one image or as an image each."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        pages = tiff.series[0] if page.samplesperpixel == 1 else page
        _check_shape(pages.shape, channels, max_aspect)
        return _bands_last(pages.asarray(), channels)
