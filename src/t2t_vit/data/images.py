"""Images without labels, for prediction: found in any order of magnitude, opened one by one, none of them trusted."""

import csv
import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from .batches import leave_signals
from .decode import Decoded, Raw, convert_image, image_size, image_suffixes, pixel_limit, read_image
from .errors import DataError
from .preprocessing import Preprocessing
from .sources import Rows, Source, decode_slice, is_image, open_source, tar_members, walk

TABLES, LISTS = ('.tar', '.parquet'), ('.csv', '.txt')
PATH_COLUMNS = ('image', 'path', 'file', 'filename', 'file_name', 'filepath', 'image_path')
MAX_PIXELS = 100_000_000  # of an image, before and after it is resized
AT_ONCE = 100_000  # names that are held as Python's strings
Piece = tuple[int, int]  # of consecutive images: the first, and the one behind the last


class Part(Protocol):
    """Some images of one kind."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person finds the image by."""

    def open(self, index: int) -> Raw:
        """The decoded image; raises where it is damaged."""


class Files:
    """Image files; a path takes about its length in memory."""

    def __init__(self, paths: Iterable[str]) -> None:
        rest, chunks = iter(paths), []
        while chunk := list(islice(rest, AT_ONCE)):
            chunks.append(pa.array(map(os.fsencode, chunk), pa.large_binary()))
        self.paths = pa.chunked_array(chunks, pa.large_binary()).combine_chunks()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Its path."""
        return self.paths[index].as_py().decode(errors='replace')

    def open(self, index: int) -> Raw:
        """The decoded image."""
        return read_image(os.fsdecode(self.paths[index].as_py()))


class Tar:
    """The images of a tar, WebDataset's or any other; labels and all else in it are passed over.

    Raises:
        DataError: for a torn tar.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        members = (member for member, kind, _ in tar_members(Path(path)) if is_image(kind))
        rows = (
            (os.fsencode(member.name).decode(errors='replace'), member.offset_data, member.size) for member in members
        )
        chunks = []
        while chunk := list(islice(rows, AT_ONCE)):
            chunks.append(pa.table(list(map(list, zip(*chunk))), names=['name', 'offset', 'size']))
        self.index = pa.concat_tables(chunks).combine_chunks() if chunks else pa.table({'name': []})

    def __len__(self) -> int:
        return self.index.num_rows

    def name(self, index: int) -> str:
        """The tar's path and the member's."""
        return f'{self.path}/{self.index.column("name")[index].as_py()}'

    def open(self, index: int) -> Raw:
        """The decoded image."""
        offset, size = (self.index.column(name)[index].as_py() for name in ('offset', 'size'))
        return decode_slice(self.path, offset, size)


class Photos:
    """The two that scikit-learn ships, a pagoda and a flower, of 427×640 pixels."""

    def __init__(self) -> None:
        from sklearn.datasets import load_sample_images  # as long to import as torch

        self.photos = load_sample_images()

    def __len__(self) -> int:
        return len(self.photos.images)

    def name(self, index: int) -> str:
        """Its file's."""
        return f'samples/{Path(self.photos.filenames[index]).name}'

    def open(self, index: int) -> Raw:
        """The image."""
        return Image.fromarray(self.photos.images[index])


class Sample:
    """Twelve of the embedded test digits, spread over them."""

    def __init__(self) -> None:
        self.source = open_source('digits', 'val')
        self.chosen = range(0, len(self.source.labels), len(self.source.labels) // 12)[:12]

    def __len__(self) -> int:
        return len(self.chosen)

    def name(self, index: int) -> str:
        """Its place among all digits."""
        return self.source.name(self.chosen[index])

    def open(self, index: int) -> Raw:
        """The image."""
        return self.source.open(self.chosen[index])

    def truth(self, index: int) -> str:
        """What it is."""
        return self.source.classes[self.source.labels[self.chosen[index]]]


EMBEDDED: dict[str, Callable[[], Part]] = {'digits': Sample, 'samples': Photos}


class Images:
    """All images that were asked for, in an order that only the inputs decide."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, index: int) -> tuple[Part, int]:
        """The part that holds the image, and the image's place in it."""
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def name(self, index: int) -> str:
        """What a person finds the image by."""
        part, place = self.locate(index)
        return part.name(place)

    def open(self, index: int) -> Raw:
        """The decoded image; raises where it is damaged."""
        part, place = self.locate(index)
        return part.open(place)

    def truth(self, index: int) -> str:
        """What the image is, '' where that is unknown."""
        part, place = self.locate(index)
        return part.truth(place) if isinstance(part, Sample) else ''

    def digest(self) -> str:
        """SHA-256 of all names in their order: the same for the same list of images."""
        sha = hashlib.sha256()
        for part in self.parts:
            for index in range(len(part)):
                sha.update(part.name(index).encode() + b'\0')
        return sha.hexdigest()


def find_images(inputs: Sequence[str]) -> Images:
    """The images of files, folders (all levels, with the tars and Parquet files in them), globs and lists.

    Args:
        inputs: Each an image; a .tar, WebDataset's or another; a .parquet; a .csv or .txt, which lists image files; a
            folder of these but lists; a pattern of such, as 'photos/**/*.jpg'; `digits` for twelve embedded ones; or
            `samples` for two photos.

    Raises:
        DataError: naming everything that is not there; for a torn tar or Parquet file; if no image is found.
    """
    places: list[str] = []
    missing: list[str] = []
    for name in inputs:
        found = [name] if name in EMBEDDED or os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        places += found
        missing += [] if found else [name]
    if missing:
        raise DataError(f'not there: {", ".join(missing)}')
    images = Images(list(gather(walk_all(places))))
    if not len(images):
        raise DataError(
            f'no images in {", ".join(inputs)}; in folders and tars they end in {" ".join(image_suffixes())}'
        )
    return images


def walk_all(places: Iterable[str]) -> Iterator[str]:
    """Folders as what is in them, all else as it is."""
    for place in places:
        yield from walk(place, (*image_suffixes(), *TABLES)) if os.path.isdir(place) else (place,)


def gather(places: Iterable[str]) -> Iterator[Part]:
    """Parts in the order of their places; image files that follow each other are one."""
    for kind, group in groupby(
        places,
        lambda place: (
            place if place in EMBEDDED else Path(place).suffix.lower() if place.lower().endswith(TABLES + LISTS) else ''
        ),
    ):
        if kind == '':
            yield Files(group)
        elif kind in LISTS:
            yield from (Files(listed(Path(place))) for place in group)
        elif kind in EMBEDDED:
            yield from (EMBEDDED[kind]() for _ in group)
        else:
            yield from (Tar(place) if kind == '.tar' else Rows(place) for place in group)


def listed(file: Path) -> Iterator[str]:
    """The paths that a list names: a .txt one a line; a .csv in the column of paths, or in its only one.

    They start from the folder that the list stands in, or from the working directory where the first of them is not
    there.

    Raises:
        DataError: if it is no text, or has several columns and none of the usual names.
    """
    with file.open(newline='', encoding='utf-8-sig') as stream:
        try:
            paths = (
                (line.rstrip('\r\n') for line in stream)
                if file.suffix.lower() == '.txt'
                else column_of_paths(csv.reader(stream), file)
            )
            folder = None
            for path in filter(None, paths):
                if folder is None:
                    folder = str(file.parent) if (file.parent / path).exists() else ''
                yield os.path.join(folder, path)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f'{file} is no list of paths: {error}') from None


def column_of_paths(rows: Iterator[list[str]], file: Path) -> Iterator[str]:
    """The cells that name files."""
    header = next(rows, [])
    names = [name.strip().lower() for name in header]
    known = next((name for name in PATH_COLUMNS if name in names), None)
    first = header[0] if len(header) == 1 else ''
    if known is None and header and not (first.lower().endswith(image_suffixes()) or os.sep in first or '/' in first):
        raise DataError(f'{file} has the columns {header}; expected one of paths, {", ".join(PATH_COLUMNS)}')
    if known is None:
        yield from header
    place = names.index(known) if known else 0
    yield from (row[place] for row in rows if len(row) > place)


class Opened(NamedTuple):
    """A piece: the images that can be read, (n, C, H, W), their places, and what is wrong with the others."""

    start: int
    stop: int
    images: torch.Tensor
    good: list[int]
    errors: dict[int, str]


class Opener(Dataset[Opened]):
    """What a worker process runs: a piece's images, opened and prepared for a model.

    An image of more than `max_pixels`, or one so narrow that it would have as many once it is resized, is refused.
    """

    def __init__(self, images: 'Images | Source', preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> None:
        self.images, self.preprocessing, self.max_pixels = images, preprocessing, max_pixels
        self.transform = preprocessing.transform()

    def show(self, index: int) -> Decoded:
        """An image with the model's channels."""
        with pixel_limit(self.max_pixels):
            image = self.images.open(index)
            before = image_size(image)
        height, width = self.preprocessing.resized(image)
        if height * width > self.max_pixels:
            raise DataError(
                f'{before[0]}x{before[1]} pixels would be resized to {width}x{height}, more than '
                f'{self.max_pixels} in all'
            )
        return self.preprocessing.convert(image)

    def picture(self, index: int) -> Image.Image:
        """Return an image to show to people: as the model gets it, or its first band where it has others than RGB."""
        image = self.show(index)
        return image if isinstance(image, Image.Image) else convert_image(image[0].clamp(0, 1).numpy(), 1)

    def __getitem__(self, piece: Piece) -> Opened:
        tensors, good, errors = [], [], {}
        for index in range(*piece):
            try:
                tensors.append(self.transform(self.show(index)))
                good.append(index)
            except Exception as error:  # whatever a decoder may raise over damaged bytes
                errors[index] = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
        empty = torch.empty(0, self.preprocessing.channels, *self.preprocessing.size)
        return Opened(*piece, torch.stack(tensors) if tensors else empty, good, errors)


class _Pieces(Sampler[Piece]):
    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)


def open_pieces(
    opener: Opener, pieces: Iterable[Piece], workers: int, device: torch.device | None = None
) -> Iterator[Opened]:
    """The pieces, opened ahead in `workers` processes (0 for none); no more than two of each are held."""
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
