"""Rows about many images on disk: made in parts, each whole or not there, and going on from those that are there."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from .data import DataError, Piece
from .settings import UsageError, flatten

SINGULAR = {'classes': 'class', 'probabilities': 'probability'}
WIDTH = b'width'  # in a part's metadata: values in each of its lists
NAMES = ['index', 'image', 'error']  # columns of every row


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A draft to write instead of `path`: what is written takes that name at the end, when it is all on the disk."""
    draft = path.with_name(f'.{path.name}.{uuid4().hex[:8]}')
    try:
        yield draft
        with draft.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class Results:
    """Rows for `count` images, in their order.

    They come in parts of `shard_size` images, Parquet files that are each the work of one process, and that are not
    made again. `place` is a folder, which the parts stay in, and which reads as one data set; or a file, which is made
    of them when the last one is there. Beside either stands under which `settings` the rows were made.
    """

    def __init__(self, place: Path, count: int, shard_size: int, settings: dict[str, Any]) -> None:
        self.place, self.count, self.shard_size, self.settings = place, count, shard_size, settings
        self.one_file = place.suffix in WRITERS
        self.folder = place.with_name(f'{place.name}.parts') if self.one_file else place
        self.files = ([place] if self.one_file else []) + ([names_of(place)] if place.suffix == '.npy' else [])
        self.record = place.with_name(f'{place.name}.json') if self.one_file else place / '_conditions.json'
        total = -(-count // shard_size)
        self.parts = [self.folder / f'part-{i:05d}-of-{total:05d}.parquet' for i in range(total)]

    def begin(self, environment: dict[str, Any]) -> None:
        """Make the place, with a record of the settings and of what else there is to know.

        Raises:
            UsageError: if the place holds something else, or rows of other settings; all differences in one message.
        """
        if not self.record.exists():
            held = [*(self.folder.glob('[!.]*') if self.folder.exists() else []), *self.files]
            if found := [str(path) for path in held if path.exists()]:
                raise UsageError(f'{found[0]} is there already, and {self.record} is not: choose another output')
            self.folder.mkdir(parents=True, exist_ok=True)
            with appearing(self.record) as draft:
                draft.write_text(json.dumps(dict(settings=self.settings, environment=environment), indent=2) + '\n')
        try:
            before = dict(flatten(json.loads(self.record.read_text())['settings']))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(
                f'{self.record} is no record of `t2t-vit predict` or `embed`, or it is damaged: choose another output'
            ) from None
        saved, asked = before, dict(flatten(json.loads(json.dumps(self.settings))))
        if changed := [key for key in {**saved, **asked} if saved.get(key) != asked.get(key)]:
            raise UsageError(
                '\n'.join(
                    f'{key} is {brief(saved.get(key))} in {self.record}, and cannot become '
                    f'{brief(asked.get(key))} there: choose another output'
                    for key in changed
                )
            )

    def piece(self, part: int) -> Piece:
        """The images of a part."""
        return part * self.shard_size, min((part + 1) * self.shard_size, self.count)

    @property
    def complete(self) -> bool:
        """Whether the one file is there."""
        return self.one_file and self.place.exists()

    def missing(self) -> list[int]:
        """The parts that are still to be made."""
        if self.complete:
            return []
        there = {path.name for path in self.folder.glob('part-*')}
        return [i for i, path in enumerate(self.parts) if path.name not in there]

    def write(self, part: int, rows: pa.Table, width: int) -> None:
        """Make a part, whose lists have `width` values; it says so, as all of them may be missing."""
        with appearing(self.parts[part]) as draft:
            pq.write_table(rows.replace_schema_metadata({WIDTH: str(width)}), draft)

    def finish(self) -> bool:
        """If all parts are there, make the one file of them; whether they are. Any number of processes may try."""
        if self.missing():
            return False
        if not self.one_file:
            drafts = list(self.folder.glob('.part-*'))  # of processes that were killed
        elif not self.complete:
            drafts = []
            try:
                WRITERS[self.place.suffix](self.tables, self.count, self.place)
            except FileNotFoundError:  # another process was faster
                if not self.complete:
                    raise
        if self.one_file:
            shutil.rmtree(self.folder, ignore_errors=True)
            drafts = list(self.place.parent.glob(f'.{escape(self.place.name)}.*'))
        for draft in drafts:
            draft.unlink(missing_ok=True)
        return True

    def tables(self) -> Iterator[pa.Table]:
        """The parts, one after the other.

        Raises:
            DataError: for one that cannot be read, or has too few rows.
        """
        for i, path in enumerate(self.parts):
            start, stop = self.piece(i)
            try:
                table = pq.ParquetFile(path).read()
            except pa.ArrowException as error:
                raise DataError(f'{path} cannot be read: remove it, and start again ({error})') from None
            if table.num_rows != stop - start:
                raise DataError(
                    f'{path} has {table.num_rows} rows instead of {stop - start}: remove it, and start again'
                )
            yield table


def brief(value: Any) -> str:
    """A value for a message."""
    text = str(value)
    return text if len(text) <= 70 else f'{text[:67]}…'


Tables = Callable[[], Iterable[pa.Table]]


def write_parquet(tables: Tables, count: int, place: Path) -> None:
    """One file, a row group a part."""
    with appearing(place) as draft:
        stream(tables(), lambda schema: pq.ParquetWriter(draft, schema))


def write_csv(tables: Tables, count: int, place: Path) -> None:
    """A column for each of the top k."""
    with appearing(place) as draft:
        stream(map(spread, tables()), lambda schema: csv.CSVWriter(draft, schema))


def stream(tables: Iterable[pa.Table], make: Callable[[pa.Schema], Any]) -> None:
    """Tables of one schema to a writer of it."""
    rest = iter(tables)
    first = next(rest)
    with make(first.schema) as writer:
        writer.write_table(first)
        for table in rest:
            writer.write_table(table)


def spread(table: pa.Table) -> pa.Table:
    """A table whose lists are columns: class_1, probability_1, class_2, …"""
    lists = {name: column for name, column in zip(table.column_names, table.columns) if name not in NAMES}
    return pa.table(
        {
            **{name: table.column(name) for name in NAMES},
            **{
                f'{SINGULAR[name]}_{i + 1}': pc.list_element(column, i)
                for i in range(int(table.schema.metadata[WIDTH]))
                for name, column in lists.items()
            },
        }
    )


def write_jsonl(tables: Tables, count: int, place: Path) -> None:
    """An object a line."""
    with appearing(place) as draft, draft.open('w', encoding='utf-8') as file:
        for table in tables():
            file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in table.to_pylist())


def names_of(place: Path) -> Path:
    """What stands beside vectors."""
    return place.with_name(f'{place.name}.csv')


def write_npy(tables: Tables, count: int, place: Path) -> None:
    """Vectors, (count, D) in float32, nan for what cannot be read; and their images and errors in FILE.npy.csv."""
    with appearing(names_of(place)) as names:
        stream((table.select(NAMES) for table in tables()), lambda schema: csv.CSVWriter(names, schema))
    with appearing(place) as draft:
        start, vectors = 0, None
        for table in tables():
            column = table.column('embedding').combine_chunks()
            if vectors is None:
                shape = (count, int(table.schema.metadata[WIDTH]))
                vectors = np.lib.format.open_memmap(draft, 'w+', np.dtype('float32'), shape)
            there = np.flatnonzero(column.is_valid())
            vectors[start : start + len(column)] = np.nan
            vectors[start + there] = column.drop_null().flatten().to_numpy().reshape(len(there), -1)
            start += len(column)
        if vectors is not None:
            vectors.flush()


WRITERS: dict[str, Callable[[Tables, int, Path], None]] = {
    '.csv': write_csv,
    '.jsonl': write_jsonl,
    '.parquet': write_parquet,
    '.npy': write_npy,
}


def check_place(place: str, files: Sequence[str]) -> list[str]:
    """What is wrong with an output's name, in a sentence."""
    suffix = Path(place).suffix
    return (
        []
        if suffix in ('', *files)
        else [f'output is a folder, or a file that ends in {", ".join(files)}; got {place}']
    )
