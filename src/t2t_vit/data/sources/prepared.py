"""Images that `t2t-vit prepare` reduced: tars in WebDataset's layout with an index, in a folder or at an address."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from ...integrity import hash_file
from ..decode import Raw, read_image
from ..errors import DataError, Undivided
from .labels import number_labels
from .names import to_text
from .tar import decode_name, read_slice

MANIFEST = 'prepared.json'  # in the folder of prepared images: its splits, and their shards with checksums
PREPARING = 'preparing.json'  # in an unfinished one
VERSION = 1
WHOLE = 'all'  # the name of the one split of images that are not divided
INDEX = pa.schema(
    [('name', pa.string()), ('shard', pa.int32()), ('offset', pa.int64()), ('size', pa.int64()), ('label', pa.int32())]
)


def is_remote(root: str) -> bool:
    """Return true for an address that fsspec reads, as https://… or s3://…."""
    return '://' in root


def is_prepared(root: str) -> bool:
    """Return true for an address, and for a folder that `t2t-vit prepare` wrote."""
    folder = Path(root).expanduser()
    return is_remote(root) or any(os.path.isfile(folder / name) for name in (MANIFEST, PREPARING))


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object that `t2t-vit prepare` wrote.

    Raises:
        DataError: naming the file, if it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise ValueError(f'it holds a {type(found).__name__}, expected an object')
    except (OSError, ValueError) as error:
        raise DataError(f'{path} is damaged, so prepare the images again, in a new folder: {error}') from None
    return found


class Prepared:
    """One split of the images that `t2t-vit prepare` wrote, opened at random.

    A shard at an address is fetched as a whole when its first image is read, checked, and kept in the cache under its
    checksum.

    Args:
        root: The folder, or an address that fsspec reads.
        split: train, val, or all: the training images, or all where they are not divided; those are for val too.
        cache: The folder for what is fetched.
        channels: Of the images, see `read_image`.
        classes: Names and order of the classes, as of a training set; by default those prepared.

    Raises:
        Undivided: for train, if the images are not divided.
        DataError: if there is nothing prepared, or its index does not fit its manifest.
    """

    def __init__(
        self, root: str, split: str, cache: Path, channels: int | None = None, classes: Sequence[str] | None = None
    ) -> None:
        self.root, self.split, self.channels = root.rstrip('/'), split, channels
        self.folder = Path(self.root).expanduser()
        if is_remote(root):
            self.folder = cache / f'prepared-{hashlib.sha256(self.root.encode()).hexdigest()[:16]}'
            fetch(f'{self.root}/{MANIFEST}', self.folder / MANIFEST)
        elif (self.folder / PREPARING).is_file():
            raise DataError(f'{root} is not complete: the same t2t-vit prepare continues it')
        manifest = read_record(self.folder / MANIFEST)
        try:
            splits, names = manifest['splits'], manifest['classes']
            if WHOLE in splits and split == 'train':
                raise Undivided(f'{root} is not divided: set data.val_fraction, as --data.val_fraction 0.2')
            found = splits[WHOLE if WHOLE in splits else 'train' if split == WHOLE else split]
            self.shards, index = found['shards'], found['index']
        except (LookupError, TypeError) as error:
            raise DataError(f'{root} has no prepared images of the split {split}: {error}') from error
        if manifest.get('version', 0) > VERSION:
            raise DataError(f'{root} was prepared by a newer version of this package: update it')
        try:
            path = self.path(index)
            if hash_file(path) != index['sha256']:
                raise DataError(f'{path} is not the index that {MANIFEST} names: prepare the images again')
            self.index = pq.read_table(path, schema=INDEX).combine_chunks()
        except OSError as error:  # Arrow's too
            raise DataError(f'{root} cannot be read without its index, so prepare the images again: {error}') from None
        self.places = [self.index.column(name).to_numpy() for name in ('shard', 'offset', 'size')]
        self.classes, self.labels = number_labels(self.index.column('label').to_pylist(), names, root, 'label', classes)

    def path(self, record: dict[str, Any]) -> Path:
        """Return the path of a file of the manifest; one of an address is fetched first, if it is not there.

        Raises:
            DataError: if it cannot be fetched, or is damaged.
        """
        if not is_remote(self.root):
            return self.folder / record['name']
        path = self.folder / f'{record["sha256"]}{Path(record["name"]).suffix}'
        if not path.exists():
            fetch(f'{self.root}/{record["name"]}', path, record['sha256'])
        return path

    def row(self, index: int) -> tuple[dict[str, Any], int, int]:
        """Return the shard, the offset and the size of an image."""
        shard, offset, size = (int(column[index]) for column in self.places)
        return self.shards[shard], offset, size

    def open(self, index: int) -> Raw:
        return read_image(self.content(index), self.channels)

    def name(self, index: int) -> str:
        name = decode_name(self.index.column('name')[index].as_py())
        return f'{to_text(self.root)}/{self.row(index)[0]["name"]}/{name}'

    def content(self, index: int) -> bytes:
        shard, offset, size = self.row(index)
        return read_slice(self.path(shard), offset, size)

    def content_sizes(self) -> list[int]:
        if is_remote(self.root):
            raise DataError(f'{self.root} would have to be fetched')
        return self.index.column('size').to_pylist()


def fetch(address: str, path: Path, sha256: str | None = None) -> None:
    """Download a file as a whole; of several processes one does it, and the others wait.

    Raises:
        DataError: if it cannot be downloaded, or does not have the checksum.
    """
    import fsspec

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f'{path.name}.part')
    with FileLock(f'{path}.lock'):
        if sha256 and path.exists():
            return
        try:
            with fsspec.open(address, 'rb') as source, draft.open('wb') as target:
                while chunk := source.read(1 << 22):
                    target.write(chunk)
        except Exception as error:  # every file system of fsspec has errors of its own
            raise DataError(f'cannot fetch {address}: {type(error).__name__}: {error}') from error
        if sha256 and (found := hash_file(draft)) != sha256:
            raise DataError(f'{address} is damaged: its SHA-256 is {found}, expected {sha256}')
        os.replace(draft, path)
