"""Lists of image files: a path a line (.txt), or a table with a column of paths (.csv)."""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ..decode import Raw, check_regular, has_image_suffix, open_regular, read_image
from ..errors import DataError
from .labels import LABEL_COLUMNS, number_labels
from .names import file_sizes, to_text

PATH_COLUMNS = ('image', 'path', 'file', 'filename', 'file_name', 'filepath', 'image_path')


class LabelledList:
    """Image files named in a .csv with a column of paths and one of labels.

    Paths are relative to the folder of the list, or to the working directory if the first of them is not there.

    Raises:
        DataError: if it is not a table in UTF-8 with such columns.
    """

    def __init__(self, file: Path, channels: int | None = None, classes: Sequence[str] | None = None) -> None:
        self.file, self.channels = file, channels
        self.skipped: Counter[str] = Counter()
        rows = read_table(file)
        header = next(rows, [])
        names = [name.strip().lower() for name in header]
        path = next((name for name in PATH_COLUMNS if name in names), None)
        label = next((name for name in LABEL_COLUMNS if name in names and name != path), None)
        if path is None or label is None:
            raise DataError(
                f'{file} has the columns {header}; expected one of paths ({", ".join(PATH_COLUMNS)}) and '
                f'one of labels ({", ".join(LABEL_COLUMNS)})'
            )
        self.header, found = names, {}
        for row in rows:
            if len(row) != len(names):
                raise DataError(f'{file} has a row of {len(row)} cells, {row[:3]}; its header has {len(names)}')
            if row[names.index(path)] in found:  # the last one counts
                self.skipped['repeated names'] += 1
            found[row[names.index(path)]] = row
        self.rows = list(found.values())
        if not self.rows:
            raise DataError(f'{file} lists no images')
        self.paths = list(resolve_paths(list(found), file))
        self.classes, self.labels = number_labels(self.column(label), (), str(file), label, classes)

    def column(self, name: str) -> list[str]:
        """Return a further value of each image.

        Raises:
            DataError: if there is no such column.
        """
        if name not in self.header:
            raise DataError(f'{self.file} has no column {name!r}; it has {self.header}')
        return [row[self.header.index(name)].strip() for row in self.rows]

    def open(self, index: int) -> Raw:
        return read_image(self.paths[index], self.channels)

    def name(self, index: int) -> str:
        return to_text(self.paths[index])

    def content(self, index: int) -> bytes:
        with open_regular(self.paths[index]) as file:
            return file.read()

    def content_sizes(self) -> Sequence[int]:
        return file_sizes(self.paths)


def listed_paths(file: Path) -> Iterator[str]:
    """Yield the paths that a list names: a .txt one a line, a .csv in its column of paths, or in its only column.

    Raises:
        DataError: if it is not text in UTF-8, or has several columns and none of the usual names.
    """
    check_regular(file)
    if file.suffix.lower() == '.txt':
        with file.open(newline='', encoding='utf-8-sig', errors='surrogateescape') as stream:
            lines = [line.rstrip('\r\n') for line in stream]
        if any('\0' in line for line in lines[:100]):
            raise DataError(f'{file} is not a list of paths: it holds zero bytes')
        yield from resolve_paths(list(filter(None, lines)), file)
    else:
        yield from resolve_paths(list(filter(None, column_of_paths(read_table(file), file))), file)


def read_table(file: Path) -> Iterator[list[str]]:
    """Yield the rows of a .csv that are not blank.

    Raises:
        DataError: if it is not text with comma-separated values.
    """
    check_regular(file)
    with file.open(newline='', encoding='utf-8-sig', errors='surrogateescape') as stream:
        try:
            for row in csv.reader(stream):
                if any('\0' in cell for cell in row):
                    raise csv.Error('it holds zero bytes')
                if any(row):
                    yield row
        except csv.Error as error:
            raise DataError(f'{file} is not a list of paths: {error}') from None


def resolve_paths(paths: Sequence[str], file: Path) -> Iterator[str]:
    """Yield the paths of a list from its folder, or from the working directory if the first is not in that folder."""
    in_folder = bool(paths) and os.path.exists(os.path.join(file.parent, to_system(paths[0])))
    for path in paths:
        yield os.path.join(file.parent, to_system(path)) if in_folder else to_system(path)


def to_system(text: str) -> str:
    """Return a path, or an address file:///…, that is read from UTF-8 as the system's functions expect a path."""
    if text.startswith('file:///'):  # as predict writes names that are not UTF-8
        return os.fsdecode(unquote_to_bytes(text.removeprefix('file://')))
    return os.fsdecode(text.encode('utf-8', 'surrogateescape'))


def column_of_paths(rows: Iterator[list[str]], file: Path) -> Iterator[str]:
    """Yield the cells that name files."""
    header = next(rows, [])
    names = [name.strip().lower() for name in header]
    known = next((name for name in PATH_COLUMNS if name in names), None)
    first = header[0] if len(header) == 1 else ''
    if known is None and header and not (has_image_suffix(first) or os.sep in first or '/' in first):
        raise DataError(f'{file} has the columns {header}; expected one of paths, {", ".join(PATH_COLUMNS)}')
    if known is None:
        yield from header
    position = names.index(known) if known else 0
    yield from (row[position] for row in rows if len(row) > position)
