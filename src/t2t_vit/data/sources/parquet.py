"""Parquet files with a column of images and one of labels."""

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..decode import Raw, check_regular, read_image
from ..errors import DataError, ImageError
from .labels import IMAGE_COLUMNS, LABEL_COLUMNS, MAX_LABEL, find_columns, label_paths, number_labels
from .tar import MAX_IMAGE

AT_ONCE = 1 << 28  # bytes of files that are held as a whole
MAX_SIZED = 1 << 31  # bytes of files that are read to find the sizes of their images
BINARY = ('binary', 'large_binary', 'binary_view', 'null')  # not text, which could be the path of any file
MAX_GROUP = 1 << 32  # bytes of a column of a row group, uncompressed


class Rows:
    """The column of images of one Parquet file, as bytes or the Hub's {bytes, path}; one row group at a time is held.

    With `whole`, all row groups are read as one, for random access to what fits into memory.

    Raises:
        DataError: if the file cannot be read, has no such column, or a row group of more than MAX_GROUP bytes.
    """

    def __init__(self, path: str, whole: bool = False, channels: int | None = None) -> None:
        self.path, self.channels = path, channels
        check_regular(path)
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError) as error:
            raise DataError(f'cannot read {path} as Parquet: {error}') from error
        column = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if column is None:
            raise DataError(
                f'{path} has the columns {schema.names}; expected one of images, {", ".join(IMAGE_COLUMNS)}'
            )
        kind = schema.field(column).type
        nested = pa.types.is_struct(kind)
        place = kind.get_field_index('bytes') if nested else 0
        if place < 0 or str(kind[place].type if nested else kind) not in BINARY:
            raise DataError(f'{path}: its column {column} holds {kind}; expected bytes, or {{bytes, path}}')
        self.column, self.leaf = column, f'{column}.bytes' if nested else column
        self.paths = f'{column}.path' if nested and kind.get_field_index('path') >= 0 else ''
        sizes = [group_size(metadata, i, self.leaf, path) for i in range(metadata.num_row_groups)]
        groups = list(range(metadata.num_row_groups))
        self.groups = [groups] if whole and sum(sizes) <= 2 * AT_ONCE else [[group] for group in groups]
        self.ends = list(accumulate(sum(metadata.row_group(i).num_rows for i in some) for some in self.groups))
        self.held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def name(self, index: int) -> str:
        """Return the file's path and the row's number."""
        return f'{self.path}[{index}]'

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'held': (-1, None)}  # worker processes read their own

    def content_sizes(self) -> list[int]:
        """Return the bytes of each image, 0 for one that is missing; reads the whole column."""
        found: list[int] = []
        with pq.ParquetFile(self.path) as file:
            for group in range(file.metadata.num_row_groups):
                cells = file.read_row_group(group, columns=[self.leaf], use_threads=False).column(self.column)
                found += byte_counts(cells).to_pylist()
        return found

    def content(self, index: int) -> bytes:
        """Return the bytes of an image."""
        group = bisect_right(self.ends, index)
        if self.held[0] != group:
            self.held = (-1, None)  # the one before goes first
            with pq.ParquetFile(self.path) as file:  # opened again in every process that reads
                table = file.read_row_groups(self.groups[group], columns=[self.leaf], use_threads=False)
            self.held = (group, table.column(self.column))
        cell = self.held[1][index - (self.ends[group - 1] if group else 0)]
        cell = cell['bytes'] if isinstance(cell, pa.StructScalar) and cell.is_valid else cell
        if not cell.is_valid:
            raise ImageError('the row holds no image')
        if (size := len(cell.as_buffer()) if hasattr(cell, 'as_buffer') else 0) > MAX_IMAGE:
            raise ImageError(f'{size:,} bytes; an image file may have {MAX_IMAGE:,}')
        return cell.as_py()

    def open(self, index: int) -> Raw:
        """Read an image."""
        return read_image(self.content(index), self.channels)


class Parquet:
    """Files in the Hub's Parquet layout: a column of images {bytes, path} and one of whole numbers or text as labels.

    Without a column of labels, an image's path says its class, as in `Folder`. Files of at most `AT_ONCE` bytes
    together are held as they are by every process that opens images; of larger ones, which are read by row group, the
    last row group.

    Args:
        files: The files.
        channels: Of the images, see `read_image`.
        classes: Names and order of the classes, as of a training set; by default those found.

    Raises:
        DataError: if they cannot be read, or have no labels.
    """

    def __init__(
        self, files: Sequence[Path], channels: int | None = None, classes: Sequence[str] | None = None
    ) -> None:
        self.files = [str(file) for file in files]
        whole = sum(file.stat().st_size for file in files) <= AT_ONCE
        self.parts = [Rows(file, whole, channels) for file in self.files]
        self.ends = list(accumulate(map(len, self.parts)))
        self.skipped: Counter[str] = Counter()
        names = pq.read_schema(self.files[0]).names
        if self.parts[0].paths and not any(name in names for name in LABEL_COLUMNS):
            paths = self.column(self.parts[0].column, 'path')
            if all(paths):
                found = label_paths(paths, (), self.files[0], classes)
                self.classes, self.labels = number_labels(found.names, (), self.files[0], 'path', classes)
                return
        _, label = find_columns(names, self.files[0])
        values = self.column(label)
        if (long := max((len(value) for value in {*values} if isinstance(value, str)), default=0)) > MAX_LABEL:
            raise DataError(f'{self.files[0]} has a label of {long:,} characters; at most {MAX_LABEL:,} are read')
        self.classes, self.labels = number_labels(values, self.class_names(label), self.files[0], label, classes)

    def column(self, name: str, leaf: str = '') -> list[Any]:
        """Return the values of a column, or of a field of it, of all files.

        Raises:
            DataError: if there is no such column, or it cannot be read.
        """
        found: list[Any] = []
        for path in self.files:
            try:
                with pq.ParquetFile(path, read_dictionary=None if leaf else [name]) as file:
                    if name not in file.schema_arrow.names:
                        raise DataError(f'{path} has no column {name!r}; it has {file.schema_arrow.names}')
                    for i in range(file.metadata.num_row_groups):
                        group_size(file.metadata, i, f'{name}.{leaf}' if leaf else name, path)
                    values = file.read(columns=[f'{name}.{leaf}' if leaf else name], use_threads=False).column(name)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f'cannot read {path} as Parquet: {error}') from error
            except KeyError as error:  # pyarrow's, for lists and structs
                raise DataError(f'{path}: column {name!r} holds nested values; expected numbers or text') from error
            found += [row and row[leaf] for row in values.to_pylist()] if leaf else values.to_pylist()
        return found

    def class_names(self, label: str) -> list[str]:
        """Return the names that the Hub's library writes into the schema, if it did."""
        metadata = pq.read_schema(self.files[0]).metadata or {}
        try:
            names = json.loads(metadata.get(b'huggingface', b'{}'))['info']['features'][label]['names']
        except (KeyError, TypeError, ValueError, RecursionError):  # another's metadata
            return []
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def locate(self, index: int) -> tuple[Rows, int]:
        """Return the file that holds an image, and the image's row in it."""
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def open(self, index: int) -> Raw:
        rows, row = self.locate(index)
        return rows.open(row)

    def name(self, index: int) -> str:
        rows, row = self.locate(index)
        return rows.name(row)

    def content(self, index: int) -> bytes:
        rows, row = self.locate(index)
        return rows.content(row)

    def content_sizes(self) -> Sequence[int]:
        if sum(map(os.path.getsize, self.files)) > MAX_SIZED:
            raise DataError(f'the Parquet files have more than {MAX_SIZED / 2**30:g} GiB')
        return [size for rows in self.parts for size in rows.content_sizes()]


def byte_counts(cells: Any) -> Any:
    """Return the number of bytes of each cell of a column of images, bytes or {bytes, path}; 0 for none."""
    cells = pc.struct_field(cells, 'bytes') if pa.types.is_struct(cells.type) else cells
    return pc.fill_null(pc.binary_length(cells), 0)


def group_size(metadata: Any, group: int, leaf: str, origin: str) -> int:
    """Return the uncompressed bytes of a column of a row group.

    Raises:
        DataError: if these are more than MAX_GROUP.
    """
    found = metadata.row_group(group)
    columns = (found.column(i) for i in range(found.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)
    if size > MAX_GROUP:
        raise DataError(f'{origin} has {size:,} bytes of {leaf} in a row group; at most {MAX_GROUP:,} are read')
    return size
