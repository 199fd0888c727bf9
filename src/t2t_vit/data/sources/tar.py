"""Tar files of images, read at random by an index of their members."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..decode import Raw, check_regular, has_image_suffix, read_image
from ..errors import DataError, ImageError
from .labels import MAX_LABEL, label_paths, number_labels, read_lines
from .names import is_hidden, reason_to_skip, to_text
from .splits import select_split
from .webdataset import LABEL_KINDS, label_samples, read_label, sample_key

MAX_IMAGE = 1 << 29  # bytes of an encoded image
INDEX_VERSION = 3
INDEX = pa.schema(
    [
        ('name', pa.string()),
        ('shard', pa.int32()),
        ('offset', pa.int64()),
        ('size', pa.int64()),
        ('label', pa.string()),  # as it is written; null if the tar has no labels beside its images
        ('numbered', pa.bool_()),
    ]
)


class Shards:
    """Tar files whose images are opened at random, by the offsets in an index that is made once.

    They hold either samples as WebDataset has them, where `classes.txt` beside the shards may name the numbers, a line
    each; or class folders as `Folder` has them.

    timm's readers of tars are not used. The one of WebDataset returns a stream, shuffled in a buffer: an epoch's order
    then depends on the number of workers and on where the epoch was entered, and a run cannot be resumed exactly. The
    one of class folders reads all bytes for its index, keeps it unchecked, and shares open files among workers.

    Args:
        files: The tars.
        cache: Where to keep the index if it cannot be written beside the tars.
        channels: Of the images, see `read_image`.
        classes: Names and order of the classes, as of a training set; by default those found.
        split: Keep only this split, where the images are in SPLIT/CLASS/ or CLASS/SPLIT/; by default keep all.

    Raises:
        DataError: for truncated tars, and for images without a label.
    """

    def __init__(
        self,
        files: Sequence[Path],
        cache: Path,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
        split: str | None = None,
    ) -> None:
        self.files, self.channels, origin = list(files), channels, str(files[0])
        self.divided = False  # whether it holds folders of splits, of which one is kept
        self.index = load_index(self.files, cache)
        self.skipped: Counter[str] = Counter(json.loads((self.index.schema.metadata or {}).get(b'skipped', b'{}')))
        if not self.index.num_rows:
            raise DataError(f'no images in {origin}; expected CLASS/IMAGE, or KEY.jpg with KEY.cls or KEY.json')
        found = self.index.column('label')
        if found.null_count == 0:
            names, numbered = files[0].parent / 'classes.txt', self.index.column('numbered').to_pylist()
            texts = found.to_pylist()
            values = [int(text) if number else text for text, number in zip(texts, numbered)]
            written: dict[int | str, str] = {}
            for value, text in zip(values, texts):
                if written.setdefault(value, text) != text:
                    raise DataError(
                        f'{origin} has the labels {written[value]} and {text}, which are one number: write it in one '
                        'way, or as names that are no numbers'
                    )
            self.classes, self.labels = number_labels(
                values, read_lines(names) if names.exists() and all(numbered) else [], origin, 'label', classes
            )
            return
        if found.null_count < len(found):
            raise DataError(f'{origin} and the other tars differ: some have .cls or .json files, some none')
        paths = [tidy(decode_name(name)) for name in self.index.column('name').to_pylist()]
        if split is not None and (selected := select_split(paths, split)):
            indices, paths = selected
            self.index, self.divided = self.index.take(indices), True
        named = label_paths(paths, (), origin, classes)
        self.classes, self.labels = number_labels(named.names, (), origin, 'folders', classes)

    def row(self, index: int) -> tuple[Path, int, int]:
        """Return the tar, the offset and the size of an image."""
        shard, offset, size = (self.index.column(name)[index].as_py() for name in ('shard', 'offset', 'size'))
        return self.files[shard], offset, size

    def open(self, index: int) -> Raw:
        return read_image(self.content(index), self.channels)

    def name(self, index: int) -> str:
        shard, name = (self.index.column(column)[index].as_py() for column in ('shard', 'name'))
        return f'{to_text(str(self.files[shard]))}/{decode_name(name)}'

    def content(self, index: int) -> bytes:
        return read_slice(*self.row(index))

    def content_sizes(self) -> Sequence[int]:
        return self.index.column('size').to_pylist()


def tidy(name: str) -> str:
    """Return a member's path without ./ at its start."""
    return '/'.join(part for part in name.split('/') if part not in ('', '.'))


def encode_name(name: str) -> str:
    """Return a name that may not be UTF-8 as one that is, to be stored; `decode_name` reverses it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return '\0' + name.encode('utf-8', 'surrogateescape').hex()  # no name of a file begins so
    return name


def decode_name(text: str) -> str:
    """Reverse `encode_name`."""
    return bytes.fromhex(text[1:]).decode('utf-8', 'surrogateescape') if text.startswith('\0') else text


def read_slice(path: 'Path | str', offset: int, size: int) -> bytes:
    """Read a part of a file.

    Raises:
        ImageError: if it is larger than an image may be.
    """
    if size > MAX_IMAGE:
        raise ImageError(f'{size:,} bytes; an image file may have {MAX_IMAGE:,}')
    with open(path, 'rb') as file:  # opened for each: a file that workers share has one position for all
        file.seek(offset)
        return file.read(size)


def load_index(files: Sequence[Path], cache: Path) -> pa.Table:
    """Load the index of the images of tar files, a row each, or make it.

    It is kept beside the tars, or in `cache` if that folder cannot be written to, and rebuilt when a tar's size or
    time changes.
    """
    stamp = json.dumps(
        [INDEX_VERSION, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
    ).encode()
    key = hashlib.sha256(os.fsencode(files[0].resolve())).hexdigest()[:16]
    name = f'{files[0].stem}.index'
    targets = (files[0].parent / f'.{name}', cache / f'{key}.{name}')
    for path in targets:
        try:
            table = pq.read_table(pa.BufferReader(path.read_bytes()))
        except (pa.ArrowException, OSError):
            continue
        if (table.schema.metadata or {}).get(b'stamp') == stamp:
            return table
    skipped: Counter[str] = Counter()
    rows = [row for shard, file in enumerate(files) for row in index_tar(file, shard, skipped)]
    table = pa.Table.from_pylist(rows, INDEX.with_metadata({b'stamp': stamp, b'skipped': json.dumps(skipped).encode()}))
    for path in targets:
        draft = path.with_name(f'{path.name}.{os.getpid()}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, draft)
            os.replace(draft, path)
        except OSError:
            continue
        break
    return table


def index_tar(path: Path, shard: int, skipped: Counter[str]) -> list[dict[str, Any]]:
    """Return where the images of a tar are, and their labels if it has any beside them.

    Raises:
        DataError: for a truncated tar, and for images without a label where others have one.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, Any] = {}
    for member, kind, content in tar_members(path, LABEL_KINDS, skipped):
        if has_image_suffix(member.name):
            if images.pop(member.name, None) is not None:  # the last one counts, as when a tar is unpacked
                skipped['repeated names'] += 1
            images[member.name] = member
        elif kind in LABEL_KINDS:
            found = read_label(content, kind, f'{path}/{member.name}')
            labels.update({sample_key(member.name): found} if found is not None else {})
        else:
            skipped[reason_to_skip(tidy(member.name).rpartition('/')[2])] += 1
    if not labels and (bare := [name for name in images if '/' not in tidy(name)]):
        raise DataError(
            f'{path} has {len(bare)} images without a label, as {tidy(bare[0])}; '
            'expected CLASS/IMAGE, or KEY.cls or KEY.json with "label" beside KEY.jpg'
        )
    values = label_samples([*images], labels, str(path)) if labels else [None] * len(images)
    return [
        dict(
            name=encode_name(name),
            shard=shard,
            offset=member.offset_data,
            size=member.size,
            label=None if value is None else str(value),
            numbered=str(value).isdecimal() or isinstance(value, int),
        )
        for (name, member), value in zip(images.items(), values)
    ]


def tar_members(
    path: Path, read: Collection[str] = (), skipped: 'Counter[str] | None' = None
) -> Iterator[tuple[tarfile.TarInfo, str, bytes]]:
    """Yield the visible files of a tar: member, what follows the first dot of its name, and of the kinds in `read` the
    content.

    Raises:
        DataError: for a truncated tar, a sparse member, and a label of more than MAX_LABEL bytes.
    """
    skipped = Counter() if skipped is None else skipped
    check_regular(path)
    try:
        with tarfile.open(path, 'r:', encoding='utf-8', errors='surrogateescape') as tar:
            for member in tar:
                parts = [part for part in member.name.split('/') if part not in ('', '.')]
                if not member.isreg() or not parts:
                    if not member.isdir() and parts:
                        skipped['links, pipes and devices in a tar'] += 1
                    continue
                if any(map(is_hidden, parts)):
                    skipped['hidden or system files'] += 1
                    continue
                if member.issparse():
                    raise DataError(f'{path}/{member.name} is stored as a sparse file; pack the tar without --sparse')
                kind = parts[-1].partition('.')[2]
                if kind in read and member.size > MAX_LABEL:
                    raise DataError(
                        f'{path}/{member.name} has {member.size:,} bytes; a label may have at most {MAX_LABEL:,}'
                    )
                content = tar.extractfile(member) if kind in read else None
                yield member, kind, content.read() if content else b''
            end = tar.offset
        with path.open('rb') as file:  # tarfile takes a file that is cut between members for a whole one
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError('no end mark')
    except tarfile.TarError as error:
        raise DataError(f'{path} is truncated, or not an uncompressed tar: {error}') from error
