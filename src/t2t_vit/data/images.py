"""Images without labels, for prediction: found in files, folders, archives and lists, and opened one by one."""

import glob
import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from .batches import leave_signals
from .decode import Decoded, Raw, convert_image, has_image_suffix, image_size, image_suffixes, pixel_limit, read_image
from .errors import DataError
from .preprocessing import Preprocessing
from .sources import Rows, Source, listed_paths, open_source, read_channels, to_text
from .sources.names import counted, reason_to_skip, scan, suffix_of
from .sources.tar import decode_name, encode_name, read_slice, tar_members

TABLES, LISTS = ('.tar', '.parquet'), ('.csv', '.txt')
PARTS, CONDITIONS = '.parts', '_conditions.json'  # of results: the folder beside FILE, and the record in a folder
RESULTS = 'files that predict or embed wrote'
MAX_PIXELS = 100_000_000  # of an image, before and after it is resized
AT_ONCE = 100_000  # names that are held as Python strings
Piece = tuple[int, int]  # of consecutive images: the first, and the one after the last


class Part(Protocol):
    """Some images of one kind."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name that a person finds the image by."""

    def open(self, index: int) -> Raw:
        """Read an image; raises ImageError if it is damaged."""


class Files:
    """Image files; a path takes about its length in memory."""

    def __init__(self, paths: Iterable[str], channels: int | None = None) -> None:
        self.channels = channels
        rest, chunks = iter(paths), []
        while chunk := list(islice(rest, AT_ONCE)):
            chunks.append(pa.array(map(os.fsencode, chunk), pa.large_binary()))
        self.paths = pa.chunked_array(chunks, pa.large_binary()).combine_chunks()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path; bytes that are not UTF-8 as Python's surrogates."""
        return self.paths[index].as_py().decode('utf-8', 'surrogateescape')

    def open(self, index: int) -> Raw:
        """Read an image."""
        return read_image(os.fsdecode(self.paths[index].as_py()), self.channels)


class Tar:
    """The images of a tar, in WebDataset's layout or any other; labels and other files in it are ignored.

    Raises:
        DataError: for a truncated tar.
    """

    def __init__(self, path: str, skipped: Counter[str], channels: int | None = None) -> None:
        self.path, self.channels = path, channels
        members = (member for member, _, _ in tar_members(Path(path), (), skipped) if has_image_suffix(member.name))
        rows = ((encode_name(member.name), member.offset_data, member.size) for member in members)
        chunks = []
        while chunk := list(islice(rows, AT_ONCE)):
            chunks.append(pa.table(list(map(list, zip(*chunk))), names=['name', 'offset', 'size']))
        self.index = pa.concat_tables(chunks).combine_chunks() if chunks else pa.table({'name': []})

    def __len__(self) -> int:
        return self.index.num_rows

    def name(self, index: int) -> str:
        """Return the path of the tar and of the member in it."""
        return f'{to_text(self.path)}/{decode_name(self.index.column("name")[index].as_py())}'

    def open(self, index: int) -> Raw:
        """Read an image."""
        offset, size = (self.index.column(name)[index].as_py() for name in ('offset', 'size'))
        return read_image(read_slice(self.path, offset, size), self.channels)


class Photos:
    """The two photographs that scikit-learn ships, a pagoda and a flower, of 427×640 pixels."""

    def __init__(self) -> None:
        from sklearn.datasets import load_sample_images  # takes as long to import as torch

        self.photos = load_sample_images()

    def __len__(self) -> int:
        return len(self.photos.images)

    def name(self, index: int) -> str:
        """Return the name of the photograph's file."""
        return f'samples/{Path(self.photos.filenames[index]).name}'

    def open(self, index: int) -> Image.Image:
        """Return a photograph."""
        return Image.fromarray(self.photos.images[index])


class Sample:
    """Twelve of the embedded test digits, spread over them."""

    def __init__(self) -> None:
        self.source = open_source('digits', 'val')
        self.chosen = range(0, len(self.source.labels), len(self.source.labels) // 12)[:12]

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        """Return the digit's index among all digits."""
        return self.source.name(self.chosen[index])

    def open(self, index: int) -> Raw:
        """Return a digit."""
        return self.source.open(self.chosen[index])

    def truth(self, index: int) -> str:
        """Return the class of a digit."""
        return self.source.classes[self.source.labels[self.chosen[index]]]


EMBEDDED: dict[str, Callable[[], Part]] = {'digits': Sample, 'samples': Photos}


class Images:
    """All images of some inputs, in an order that depends on the inputs only.

    `skipped` counts the files in folders and tars that were left out, by reason.
    """

    def __init__(self, parts: Sequence[Part], skipped: 'Counter[str] | None' = None) -> None:
        self.parts, self.skipped = list(parts), Counter() if skipped is None else skipped
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, index: int) -> tuple[Part, int]:
        """Return the part that holds an image, and the image's index in it."""
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def name(self, index: int) -> str:
        """Return the name that a person finds the image by; bytes that are not UTF-8 as Python's surrogates."""
        part, position = self.locate(index)
        return part.name(position)

    def open(self, index: int) -> Raw:
        """Read an image; raises ImageError if it is damaged."""
        part, position = self.locate(index)
        return part.open(position)

    def truth(self, index: int) -> str:
        """Return the class of an image, '' if it is unknown."""
        part, position = self.locate(index)
        return part.truth(position) if isinstance(part, Sample) else ''

    def digest(self) -> str:
        """Return the SHA-256 of all names in their order: the same for the same list of images."""
        sha = hashlib.sha256()
        for part in self.parts:
            for index in range(len(part)):
                sha.update(part.name(index).encode('utf-8', 'surrogateescape') + b'\0')
        return sha.hexdigest()


def find_images(inputs: Sequence[str], channels: int | None = None) -> Images:
    """Find the images of files, folders (at all levels, with the tars and Parquet files in them), globs and lists.

    Args:
        inputs: Each an image; a .tar, WebDataset's or another; a .parquet; a .csv or .txt that lists image files; a
            folder of images, tars and Parquet files; a pattern, as 'photos/**/*.jpg'; `digits` for twelve embedded
            images; or `samples` for two photographs.
        channels: Of the model; 1, 3 and None read what a viewer shows, other numbers all bands (see `read_image`).

    Raises:
        DataError: naming everything that does not exist; for a truncated tar or Parquet file; if no image is found.
    """
    paths: list[str] = []
    missing: list[str] = []
    skipped: Counter[str] = Counter()
    for name in inputs:
        if name in EMBEDDED or os.path.lexists(name):
            paths.append(name)
        elif found := sorted(glob.glob(name, recursive=True)):
            paths += select(found, name, skipped)
        else:
            missing.append(name)
    if missing:
        raise DataError(f'not found: {", ".join(missing)}')
    images = Images(list(gather(walk_all(paths, skipped), skipped, channels)), skipped)
    if not len(images):
        left_out = f' (left out: {counted(skipped)})' if skipped else ''
        if all(kind_of(path) in (*LISTS, '.parquet') for path in paths) and paths:
            raise DataError(f'no images are listed in {", ".join(inputs)}')
        raise DataError(f'no images in {", ".join(inputs)}{left_out}; their names end in {" ".join(image_suffixes())}')
    return images


def select(found: Sequence[str], pattern: str, skipped: Counter[str]) -> Iterator[str]:
    """Yield what a pattern found, sorted: folders, and files that are read in folders or end as the pattern does.

    What is in a folder that the pattern found is left to that folder, so that nothing comes twice.
    """
    folders: set[Path] = set()
    suffixes = (*image_suffixes(), *TABLES, *filter(None, [suffix_of(os.path.basename(pattern))]))
    for path in found:
        if not folders.isdisjoint(Path(path).parents):
            continue
        if os.path.isdir(path):
            folders.add(Path(path))
        elif not path.lower().endswith(suffixes):
            skipped[reason_to_skip(os.path.basename(path))] += 1
            continue
        elif is_result(path):
            skipped[RESULTS] += 1
            continue
        yield path


def walk_all(paths: Iterable[str], skipped: Counter[str]) -> Iterator[str]:
    """Yield the files in folders, and all else as it is."""
    for path in paths:
        if os.path.isdir(path):
            for file in scan(path, (*image_suffixes(), *TABLES), skipped):
                if is_result(whole := os.path.join(path, file)):
                    skipped[RESULTS] += 1
                else:
                    yield whole
        else:
            yield path


def is_result(path: str) -> bool:
    """Return true for a file that `predict` or `embed` wrote, or a part of one: their record is beside it."""
    if not path.lower().endswith(('.parquet', '.npy')):
        return False
    folder = os.path.dirname(path)
    records = [f'{path}.json', os.path.join(folder, CONDITIONS)]
    records += [f'{folder.removesuffix(PARTS)}.json'] if folder.endswith(PARTS) else []
    return any(map(is_record, records))


def is_record(path: str) -> bool:
    """Return true for a record that `predict` or `embed` wrote."""
    try:
        return {'settings', 'environment'} <= set(json.loads(Path(path).read_text('utf-8')))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def kind_of(path: str) -> str:
    """Return the suffix of a table or list, the name of embedded images, and '' for an image file."""
    if path in EMBEDDED and not os.path.exists(path):
        return path
    return suffix_of(path) if path.lower().endswith(TABLES + LISTS) else ''


def gather(paths: Iterable[str], skipped: Counter[str], channels: int | None) -> Iterator[Part]:
    """Yield parts in the order of their paths; consecutive image files are one part."""
    for kind, group in groupby(paths, kind_of):
        if kind == '':
            yield Files(group, channels)
        elif kind in LISTS:
            yield from (Files(listed_paths(Path(path)), channels) for path in group)
        elif kind in EMBEDDED:
            yield from (EMBEDDED[kind]() for _ in group)
        elif kind == '.tar':
            yield from (Tar(path, skipped, channels) for path in group)
        else:
            yield from (Rows(path, channels=channels) for path in group)


class Opened(NamedTuple):
    """A piece: the images that can be read, (n, C, H, W), their indices, and the errors of the others."""

    start: int
    stop: int
    images: torch.Tensor
    good: list[int]
    errors: dict[int, str]


class Opener(Dataset[Opened]):
    """Open the images of a piece and prepare them for a model; runs in worker processes.

    An image of more than `max_pixels`, or one so narrow that it would have as many once it is resized, is an error.
    """

    def __init__(self, images: 'Images | Source', preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> None:
        self.images, self.preprocessing, self.max_pixels = images, preprocessing, max_pixels
        read_channels(images, preprocessing.channels)

    def read(self, index: int) -> Raw:
        """Read an image, unless it or the resized one is too large."""
        with pixel_limit(self.max_pixels):
            image = self.images.open(index)
        before = image_size(image)
        height, width = self.preprocessing.resized(image)
        if height * width > self.max_pixels:
            raise DataError(
                f'{before[0]}x{before[1]} pixels would be resized to {width}x{height}, more than '
                f'{self.max_pixels} in all'
            )
        return image

    def show(self, index: int) -> Decoded:
        """Read an image and convert it to the model's channels."""
        return self.preprocessing.convert(self.read(index))

    def picture(self, index: int) -> Image.Image:
        """Return an image to show to people: as the model gets it, or its first band where it has others than RGB."""
        image = self.show(index)
        return image if isinstance(image, Image.Image) else convert_image(image[0].clamp(0, 1).numpy(), 1)

    def __getitem__(self, piece: Piece) -> Opened:
        tensors, good, errors = [], [], {}
        for index in range(*piece):
            try:
                tensors.append(self.preprocessing.evaluate(self.read(index)))
                good.append(index)
            except Exception as error:  # a damaged image, or one that cannot be read
                errors[index] = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        empty = torch.empty(0, self.preprocessing.channels, *self.preprocessing.size)
        images = self.preprocessing.normalize(torch.stack(tensors)) if tensors else empty
        return Opened(*piece, images.contiguous(memory_format=torch.channels_last), good, errors)


class _Pieces(Sampler[Piece]):
    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)


def open_pieces(
    opener: Opener, pieces: Iterable[Piece], workers: int, device: torch.device | None = None
) -> Iterator[Opened]:
    """Yield the pieces, opened ahead in `workers` processes (0 for none); at most two for each worker are held."""
    pinned = device is not None and device.type == 'cuda'
    return iter(
        DataLoader(
            opener,
            batch_size=None,
            sampler=_Pieces(pieces),
            num_workers=workers,
            pin_memory=pinned,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),
        )
    )
