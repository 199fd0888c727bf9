"""Write rows about many images: in parts, each complete or absent, continued after an interruption."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from pyarrow import csv

from .data import DataError, Piece
from .data.images import CONDITIONS, PARTS
from .settings import UsageError, flatten

SINGULAR = {'classes': 'class', 'probabilities': 'probability'}
WIDTH, DIGEST = b'width', b'sha256'  # in a part's metadata: values in each of its lists, and the digest of its rows
NAMES = ['index', 'image', 'error']  # columns of every row
FORMULA = ('=', '+', '-', '@', '\t', '\r')  # a cell that begins so is a formula for a spreadsheet


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a draft to write instead of `path`; it takes that name when it is complete and on the disk."""
    draft = path.with_name(f'.{path.name}.{uuid4().hex[:8]}')
    try:
        yield draft
        with draft.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` while the context lasts; the system releases it when the process dies.

    Over hosts it holds where the file system passes locks on (NFS 4 does, many object stores do not).

    Raises:
        UsageError: with the text `busy`, if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(busy) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: afterwards it could be another's
        lock.release()


def portable_name(name: str, line: bool = False) -> str:
    """Return a file's name as text that every format can hold and that leads back to the file.

    That is the name itself, or its address, file:///…, if the name is not UTF-8 (Python then has surrogates in it), or
    is longer than the one `line` that it must fit into. Lists of images may hold both.
    """
    try:
        name.encode('utf-8')
        if not line or name.splitlines() == [name]:
            return name
    except UnicodeEncodeError:
        pass
    return f'file://{quote_from_bytes(os.path.abspath(name).encode("utf-8", "surrogateescape"))}'


def portable_text(text: str) -> str:
    r"""Return text that every format can hold: bytes that are not UTF-8, in Python surrogates, as \xe9."""
    return text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')


def cell(value: Any, spreadsheet: bool) -> Any:
    """Return a value for a CSV file; for a spreadsheet, text that it would execute gets an apostrophe in front."""
    risky = spreadsheet and isinstance(value, str) and value.startswith(FORMULA)
    return f"'{value}" if risky else value


class Results:
    """Rows for `count` images, in their order.

    They come in parts of `shard_size` images, Parquet files that are each written by one process and never rewritten.
    `place` is a folder, which keeps the parts and can be read as one data set; or a file, assembled from the parts when
    the last one is there. A record beside either holds the `settings` that the rows were computed with.
    """

    def __init__(
        self, place: Path, count: int, shard_size: int, settings: dict[str, Any], spreadsheet: bool = False
    ) -> None:
        self.place, self.count, self.shard_size, self.settings = place, count, shard_size, settings
        self.spreadsheet = spreadsheet
        self.one_file = place.suffix in WRITERS
        self.folder = place.with_name(f'{place.name}{PARTS}') if self.one_file else place
        self.files = ([place] if self.one_file else []) + ([names_of(place)] if place.suffix == '.npy' else [])
        self.record = place.with_name(f'{place.name}.json') if self.one_file else place / CONDITIONS
        total = -(-count // shard_size)
        self.parts = [self.folder / f'part-{i:05d}-of-{total:05d}.parquet' for i in range(total)]

    @contextmanager
    def lock(self, rank: int = 0, world: int = 1) -> Iterator[None]:
        """Hold the output while the context lasts, for process `rank` of the `world` that share the work.

        Raises:
            UsageError: if another command writes there: the same process of the same number, or any of another number,
                which would compute the same parts.
        """
        busy = f'another command is writing to {self.place}: wait for it, or choose another --output'
        folder = self.place.parent
        with locked(folder / f'.{self.place.name}.{rank}-of-{world}.lock', busy):
            for other in folder.glob(f'.{escape(self.place.name)}.*-of-*.lock'):
                if not other.name.endswith(f'-of-{world}.lock'):
                    with locked(other, busy):  # left by a process that is gone
                        pass
            yield

    def begin(self, environment: dict[str, Any]) -> None:
        """Create the output, with a record of the settings and of the environment.

        Raises:
            UsageError: if the output holds something else, or rows of other settings; all differences in one message.
        """
        if not self.record.exists():
            held = [*(self.folder.glob('[!.]*') if self.folder.exists() else []), *self.files]
            if found := [str(path) for path in held if path.exists()]:
                raise UsageError(f'{found[0]} exists, and {self.record} does not: choose another output')
            self.folder.mkdir(parents=True, exist_ok=True)
            with appearing(self.record) as draft:
                text = json.dumps(dict(settings=self.settings, environment=environment), indent=2)
                draft.write_text(text + '\n', encoding='utf-8')
        try:
            before = dict(flatten(json.loads(self.record.read_text('utf-8'))['settings']))
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
        """Return the images of a part."""
        return part * self.shard_size, min((part + 1) * self.shard_size, self.count)

    @property
    def complete(self) -> bool:
        """True if the output is one file, and it is there."""
        return self.one_file and self.place.exists()

    def missing(self) -> list[int]:
        """Return the parts that are still to be computed; damaged ones are removed first."""
        if self.complete:
            return []
        there = {path.name for path in self.folder.glob('part-*')}
        return [i for i, path in enumerate(self.parts) if path.name not in there or not self.whole(i)]

    def whole(self, part: int) -> bool:
        """Return whether a part can be read as it was written; a damaged one is removed."""
        try:
            self.read(part)
            return True
        except DataError:
            self.parts[part].unlink(missing_ok=True)
            return False

    def write(self, part: int, rows: pa.Table, width: int) -> None:
        """Write a part whose lists have `width` values; the part says so, as all of its lists may be missing."""
        rows = rows.combine_chunks()
        with appearing(self.parts[part]) as draft:
            pq.write_table(rows.replace_schema_metadata({WIDTH: str(width), DIGEST: digest(rows)}), draft)

    def read(self, part: int) -> pa.Table:
        """Return the rows of a part.

        Raises:
            DataError: if it cannot be read, or is not what was written.
        """
        path, (start, stop) = self.parts[part], self.piece(part)
        try:
            table = pq.ParquetFile(path).read()
            stated = (table.schema.metadata or {}).get(DIGEST)
            whole = stated is None or stated.decode() == digest(table)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f'{path} cannot be read: remove it, and start again ({error})') from None
        if table.num_rows != stop - start or not whole:
            raise DataError(
                f'{path} has {table.num_rows} rows instead of {stop - start}: remove it, and start again'
                if whole
                else f'{path} is damaged, its rows do not have the SHA-256 that it states: remove it, and start again'
            )
        return table

    def finish(self) -> bool:
        """Make the one file if all parts are there, and return whether they are. Any number of processes may try."""
        if self.complete or all(path.exists() for path in self.parts):
            self.assemble()
            return True
        return False

    def assemble(self) -> None:
        """Make the one file of the parts, and remove what is left over."""
        if not self.one_file:
            drafts = list(self.folder.glob('.part-*'))  # of processes that were killed
        elif not self.complete:
            drafts = []
            try:
                WRITERS[self.place.suffix](self.tables, self.count, self.place, self.spreadsheet)
            except (FileNotFoundError, DataError):  # another process was faster, and removed drafts or parts
                if not self.complete:
                    raise
        if self.one_file:
            shutil.rmtree(self.folder, ignore_errors=True)
            drafts = list(self.place.parent.glob(f'.{escape(self.place.name)}.*'))
        for draft in drafts:
            if draft.suffix != '.lock':
                draft.unlink(missing_ok=True)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the parts, one after the other; see `read`."""
        for i in range(len(self.parts)):
            yield self.read(i)


def digest(table: pa.Table) -> str:
    """Return the SHA-256 of a table's values, however they are divided into chunks."""
    sha = hashlib.sha256()
    for name in table.column_names:
        column = table.column(name)
        sha.update(name.encode())
        if pa.types.is_list(column.type):
            sha.update(pc.list_value_length(column).fill_null(-1).to_numpy().tobytes())
            column = pc.list_flatten(column)
        if pa.types.is_string(column.type):
            sha.update(pc.binary_length(column).fill_null(-1).to_numpy().tobytes())
            sha.update(''.join(column.fill_null('').to_pylist()).encode())
        else:
            sha.update(column.to_numpy().tobytes())
    return sha.hexdigest()


def brief(value: Any) -> str:
    """Return a value for a message, at most 70 characters."""
    text = str(value)
    return text if len(text) <= 70 else f'{text[:67]}…'


Tables = Callable[[], Iterable[pa.Table]]


def write_parquet(tables: Tables, count: int, place: Path, spreadsheet: bool) -> None:
    """Write one Parquet file, a row group a part."""
    with appearing(place) as draft:
        rows = (table.replace_schema_metadata({WIDTH: table.schema.metadata[WIDTH]}) for table in tables())
        stream(rows, lambda schema: pq.ParquetWriter(draft, schema))


def write_csv(tables: Tables, count: int, place: Path, spreadsheet: bool) -> None:
    """Write a CSV file with a column for each of the top k."""
    with appearing(place) as draft:
        rows = (safe(spread(table), spreadsheet) for table in tables())
        stream(rows, lambda schema: csv.CSVWriter(draft, schema))


def safe(table: pa.Table, spreadsheet: bool) -> pa.Table:
    """Return a table for a CSV file; for a spreadsheet, `cell` of every text."""
    if not spreadsheet:
        return table
    columns = {
        name: pa.array([cell(value, True) for value in column.to_pylist()], pa.string())
        if pa.types.is_string(column.type)
        else column
        for name, column in zip(table.column_names, table.columns)
    }
    return pa.table(columns)


def stream(tables: Iterable[pa.Table], make: Callable[[pa.Schema], Any]) -> None:
    """Write tables of one schema with the writer that `make` returns for it."""
    rest = iter(tables)
    first = next(rest)
    with make(first.schema) as writer:
        writer.write_table(first)
        for table in rest:
            writer.write_table(table)


def spread(table: pa.Table) -> pa.Table:
    """Return a table with its lists as columns: class_1, probability_1, class_2, …"""
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


def write_jsonl(tables: Tables, count: int, place: Path, spreadsheet: bool) -> None:
    """Write a JSON object a line."""
    with appearing(place) as draft, draft.open('w', encoding='utf-8') as file:
        for table in tables():
            rows = table.to_pylist()
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n' for row in rows)


def names_of(place: Path) -> Path:
    """Return the file of names beside a file of vectors."""
    return place.with_name(f'{place.name}.csv')


def write_npy(tables: Tables, count: int, place: Path, spreadsheet: bool) -> None:
    """Write vectors, (count, D) float32, NaN for images without one; names and errors go to FILE.npy.csv."""
    with appearing(names_of(place)) as names:
        rows = (safe(table.select(NAMES), spreadsheet) for table in tables())
        stream(rows, lambda schema: csv.CSVWriter(names, schema))
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


WRITERS: dict[str, Callable[[Tables, int, Path, bool], None]] = {
    '.csv': write_csv,
    '.jsonl': write_jsonl,
    '.parquet': write_parquet,
    '.npy': write_npy,
}


def check_place(place: str, files: Sequence[str]) -> list[str]:
    """Return what is wrong with an output's name, a sentence each."""
    path = Path(place)
    if path.suffix in files:
        return []
    if path.is_file():
        return [f'output {place} is a file; expected a folder, or a file that ends in {", ".join(files)}']
    version = path.suffix.lstrip('.v').isdecimal()  # as in preds.v2, which is no type of file
    if not path.suffix or version or path.suffix not in WRITERS and (path.is_dir() or place.endswith(('/', os.sep))):
        return []
    return [f'output must be a folder, or a file that ends in {", ".join(files)}; got {place}']


def check_writable(folder: Path) -> None:
    """Check that a folder is there or can be created, before anything is computed for it.

    Raises:
        UsageError: if it or one above it is a file, or nothing can be written to it.
    """
    found = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not found.is_dir():
        raise UsageError(f'{found} is a file; expected a folder')
    if not os.access(found, os.W_OK):
        raise UsageError(f'{found} cannot be written to: choose another output')
