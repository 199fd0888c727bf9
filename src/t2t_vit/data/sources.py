"""Where images come from: each source knows its classes and opens its i-th image.

`data.root` names a source in one syntax, which `open_source` reads.
"""

import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from timm.data import create_dataset

from ..settings import nearest
from .decode import Raw, image_suffixes, read_image
from .errors import DataError

SPLITS = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid', 'test')}
TORCH_SETS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')
IMAGE_COLUMNS = ('image', 'img', 'jpg', 'png')
LABEL_COLUMNS = ('label', 'labels', 'fine_label', 'cls', 'target')
AT_ONCE = 1 << 28  # bytes of Parquet files
CACHE = '~/.cache/t2t-vit'


class Source(Protocol):
    """Labelled images."""

    classes: list[str]
    labels: Sequence[int]

    def open(self, index: int) -> Raw:
        """The decoded image; raises where it is damaged."""

    def name(self, index: int) -> str:
        """What a person finds the image by."""


class Digits:
    """scikit-learn's handwritten digits: 1,797 scans of 8×8 grey pixels, in a fixed stratified split of 80 to 20 %."""

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        chosen = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)[
            split != 'train'
        ]
        self.classes = [str(digit) for digit in range(10)]
        self.indices = np.sort(chosen)
        self.labels: Sequence[int] = digits.target[self.indices].tolist()
        self.pixels = np.rint(digits.images[self.indices] * (255 / 16)).astype(np.uint8)

    def open(self, index: int) -> Raw:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f'digits/{self.indices[index]}'


class Folder:
    """A folder of class folders, each with its images at any depth."""

    def __init__(self, root: Path) -> None:
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
        if not self.classes:
            raise DataError(f'{root} holds no class folders; expected {root}/CLASS/IMAGE')
        samples = [(file, i) for i, name in enumerate(self.classes) for file in list_images(root / name)]
        if not samples:
            raise DataError(f'no images in the class folders of {root}; they end in {" ".join(image_suffixes())}')
        self.files = [file for file, _ in samples]
        self.labels: Sequence[int] = [label for _, label in samples]

    def open(self, index: int) -> Raw:
        return read_image(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


class Rows:
    """The column of images of a Parquet file, as bytes or the Hub's {bytes, path}; one row group at a time is held.

    With `whole`, all row groups are read as one, for reading at random what fits into memory.

    Raises:
        DataError: if it cannot be read, or has no such column.
    """

    def __init__(self, path: str, whole: bool = False) -> None:
        self.path = path
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
        if pa.types.is_struct(kind) and kind.get_field_index('bytes') < 0:
            raise DataError(f'{path} has images of {kind}; expected bytes, or {{bytes, path}}')
        self.column, self.leaf = column, f'{column}.bytes' if pa.types.is_struct(kind) else column
        groups = list(range(metadata.num_row_groups))
        self.groups = [groups] if whole else [[group] for group in groups]
        self.ends = list(accumulate(sum(metadata.row_group(i).num_rows for i in some) for some in self.groups))
        self.held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def name(self, index: int) -> str:
        """The file's path and the row's number."""
        return f'{self.path}[{index}]'

    def open(self, index: int) -> Raw:
        """The decoded image."""
        group = bisect_right(self.ends, index)
        if self.held[0] != group:
            self.held = (-1, None)  # the one before goes first
            with pq.ParquetFile(self.path) as file:  # opened anew in every process that reads
                table = file.read_row_groups(self.groups[group], columns=[self.leaf], use_threads=False)
            self.held = (group, table.column(self.column))
        value = self.held[1][index - (self.ends[group - 1] if group else 0)].as_py()
        content = value['bytes'] if isinstance(value, dict) else value
        if content is None:
            raise DataError('the row holds no image')
        return read_image(content)


class Parquet:
    """Files in the Hub's Parquet layout: a column of images {bytes, path} and one of integer or text labels.

    Files of at most `AT_ONCE` bytes together are held as they are, by every process that opens images; of larger ones,
    which are read by row group, the last row group of each.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(file) for file in files]
        try:
            _, label = find_columns(pq.read_schema(self.files[0]).names, self.files[0])
            table = pa.concat_tables([pq.read_table(file, columns=[label]) for file in self.files])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f'cannot read {", ".join(self.files)} as Parquet: {error}') from error
        whole = sum(file.stat().st_size for file in files) <= AT_ONCE
        self.parts = [Rows(file, whole) for file in self.files]
        self.ends = list(accumulate(map(len, self.parts)))
        names = self.class_names(table.schema.metadata or {}, label)
        self.classes, self.labels = number_labels(table.column(label).to_pylist(), names, self.files[0], label)

    @staticmethod
    def class_names(metadata: dict[bytes, bytes], label: str) -> list[str]:
        """The names that the Hub's library writes into the schema, if it did."""
        try:
            names = json.loads(metadata.get(b'huggingface', b'{}'))['info']['features'][label]['names']
        except (KeyError, TypeError, ValueError, RecursionError):  # another's metadata
            return []
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def locate(self, index: int) -> tuple[Rows, int]:
        """The file that holds the image, and the image's row in it."""
        part = bisect_right(self.ends, index)
        return self.parts[part], index - (self.ends[part - 1] if part else 0)

    def open(self, index: int) -> Raw:
        rows, row = self.locate(index)
        return rows.open(row)

    def name(self, index: int) -> str:
        rows, row = self.locate(index)
        return rows.name(row)


class TorchSet:
    """One of torchvision's small sets, by timm's create_dataset; it is held decoded."""

    def __init__(self, name: str, split: str, cache: str | None, download: bool) -> None:
        if name not in TORCH_SETS:
            raise DataError(
                f'unknown set torch/{name}{nearest(name, TORCH_SETS)}; '
                f'there are {", ".join(f"torch/{known}" for known in TORCH_SETS)}'
            )
        folder = Path(cache or CACHE).expanduser()
        try:
            self.images = create_dataset(
                f'torch/{name}', str(folder), 'train' if split == 'train' else 'validation', download=download
            )
        except (RuntimeError, OSError) as error:  # not there, or torn; or there is no network
            hint = 'cannot download it' if download else '--data.download true fetches it, --data.cache says where to'
            raise DataError(f'no torch/{name} in {folder}: {hint} ({error})') from error
        self.classes = list(self.images.classes)
        self.labels: Sequence[int] = [int(label) for label in self.images.targets]
        self.place = f'torch/{name}/{split}'

    def open(self, index: int) -> Raw:
        return read_image(self.images[index][0])

    def name(self, index: int) -> str:
        return f'{self.place}[{index}]'


class HubSet:
    """A data set of the Hub's, by timm's reader of the package `datasets`."""

    def __init__(self, name: str, split: str, cache: str | None) -> None:
        if find_spec('datasets') is None:
            raise DataError(f'hfds/{name} needs the package datasets: pip install datasets')
        from datasets import load_dataset_builder

        folder = str(Path(cache).expanduser()) if cache else None
        try:
            info = load_dataset_builder(name, cache_dir=folder).info
        except Exception as error:  # the Hub's own kinds, which differ between versions
            raise DataError(f'cannot open hfds/{name}: {error}') from error
        found = list(info.splits or SPLITS[split])
        chosen = next((known for known in SPLITS[split] if known in found), None)
        if chosen is None:
            raise DataError(
                f'hfds/{name} has the splits {", ".join(found)}; expected one of {", ".join(SPLITS[split])}'
            )
        image, label = find_columns(list(info.features or ('image', 'label')), f'hfds/{name}')
        self.reader = create_dataset(f'hfds/{name}', folder, chosen, input_key=image, target_key=label).reader
        numbers = self.reader.class_to_idx  # empty where the labels are bare numbers or text
        self.classes, self.labels = number_labels(
            list(self.reader.dataset[label]), sorted(numbers, key=numbers.get), f'hfds/{name}', label
        )
        self.place = f'hfds/{name}/{chosen}'

    def open(self, index: int) -> Raw:
        with self.reader[index][0] as file:
            return read_image(file)

    def name(self, index: int) -> str:
        return f'{self.place}[{index}]'


def read_lines(file: Path) -> list[str]:
    """Lines of a text file; DataError where it is none."""
    try:
        return file.read_text(encoding='utf-8').splitlines()
    except ValueError:
        raise DataError(f'{file} is no text in UTF-8') from None


class Shards:
    """Tar files, read at random by the offsets in an index that is made once.

    Either of WebDataset's layout, where an image KEY.jpg has its label beside it, as text or number in KEY.cls or as
    "label" in KEY.json, and where `classes.txt` beside the shards may name the numbers, a line each; or of class
    folders, an image's label being the name of the folder that it is in.

    timm's readers of tars are not used. The one of WebDataset gives a stream, shuffled in a buffer: an epoch's order
    then depends on the number of workers and on where the epoch was entered, and a run cannot be resumed exactly. The
    one of class folders reads all bytes for its index, keeps it unchecked, and shares open files among workers.
    """

    def __init__(self, files: Sequence[Path], cache: str | None) -> None:
        self.files, folder = list(files), files[0].parent
        self.index = load_index(self.files, Path(cache or CACHE).expanduser())
        if not self.index.num_rows:
            raise DataError(f'no images in {self.files[0]}; they end in {" ".join(image_suffixes())}')
        names = folder / 'classes.txt'
        numbered = self.index.column('numbered').to_pylist()
        self.classes, self.labels = number_labels(
            [
                int(label) if number else label
                for label, number in zip(self.index.column('label').to_pylist(), numbered)
            ],
            read_lines(names) if names.exists() and all(numbered) else [],
            str(self.files[0]),
            'label',
        )

    def open(self, index: int) -> Raw:
        shard, offset, size = (self.index.column(name)[index].as_py() for name in ('shard', 'offset', 'size'))
        return decode_slice(self.files[shard], offset, size)

    def name(self, index: int) -> str:
        return f'{self.files[self.index.column("shard")[index].as_py()]}/{self.index.column("name")[index].as_py()}'


def load_index(files: Sequence[Path], cache: Path) -> pa.Table:
    """The images of tar files, a row each; kept beside them, or in `cache` where that cannot be written to.

    An index that was made of files of other sizes or times is made anew.
    """
    stamp = json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]).encode()
    place = hashlib.sha256(str(files[0].resolve()).encode()).hexdigest()[:16]
    name = f'{files[0].stem.split("-")[0]}.index'
    places = (files[0].parent / f'.{name}', cache / f'{place}.{name}')
    for path in places:
        try:
            table = pq.read_table(pa.BufferReader(path.read_bytes()))
        except (pa.ArrowInvalid, OSError):
            continue
        if (table.schema.metadata or {}).get(b'stamp') == stamp:
            return table
    table = pa.Table.from_pylist(
        [row for shard, file in enumerate(files) for row in index_tar(file, shard)],
        pa.schema(
            [
                ('name', pa.string()),
                ('shard', pa.int32()),
                ('offset', pa.int64()),
                ('size', pa.int64()),
                ('label', pa.string()),
                ('numbered', pa.bool_()),
            ],
            {b'stamp': stamp},
        ),
    )
    for path in places:
        draft = path.with_name(f'{path.name}.{os.getpid()}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, draft)
            os.replace(draft, path)
        except OSError:
            continue
        break
    return table


def index_tar(path: Path, shard: int) -> list[dict[str, Any]]:
    """Where the images of a tar are, and their labels.

    Raises:
        DataError: for a torn tar, and for images without a label.
    """
    images: list[tarfile.TarInfo] = []
    labels: dict[str, Any] = {}
    for member, kind, content in tar_members(path, read=('cls', 'json')):
        if is_image(kind):
            images.append(member)
        elif kind in ('cls', 'json'):
            found = read_label(content, kind, f'{path}/{member.name}')
            labels.update({sample_key(member.name): found} if found is not None else {})
    return [
        dict(
            name=image.name,
            shard=shard,
            offset=image.offset_data,
            size=image.size,
            label=str(label),
            numbered=isinstance(label, int),
        )
        for image, label in zip(images, label_images(images, labels, path))
    ]


def tar_members(path: Path, read: Sequence[str] = ()) -> Iterator[tuple[tarfile.TarInfo, str, bytes]]:
    """The visible files of a tar: member, what follows the first dot of its name, and of the kinds in `read` its bytes.

    Raises:
        DataError: for a torn tar.
    """
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                key, _, kind = member.name.rpartition('/')[2].partition('.')
                if member.isreg() and key:  # hidden files have no key
                    content = tar.extractfile(member) if kind in read else None
                    yield member, kind, content.read() if content else b''
            end = tar.offset
        with path.open('rb') as file:  # tarfile takes a file that is cut between members for a whole one
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError('no end mark')
    except tarfile.TarError as error:
        raise DataError(f'{path} is torn, or no tar: {error}') from error


def is_image(kind: str) -> bool:
    """Whether what follows the first dot of a file's name ends as an image's does."""
    return f'.{kind.rpartition(".")[2].lower()}' in image_suffixes()


def sample_key(name: str) -> str:
    """WebDataset's name of a sample: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition('/')
    return f'{folder}{slash}{file.partition(".")[0]}'


def read_label(content: bytes, kind: str, name: str) -> 'int | str | None':
    """What a .cls or .json file says; None for JSON of something else.

    Raises:
        DataError: if it is neither a number nor text.
    """
    try:
        text = content.decode().strip()
        value = json.loads(text).get('label') if kind == 'json' else text
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f'{name} holds no label: {error}') from error
    if value is not None and (value == '' or isinstance(value, bool) or not isinstance(value, (int, str))):
        raise DataError(f'{name} holds no label: expected a whole number or text, got {value!r}')
    return value


def label_images(images: Sequence[tarfile.TarInfo], labels: dict[str, Any], path: Path) -> list[Any]:
    """The label of each image: the one beside it where the tar has such, else the name of its folder."""
    if not labels:
        folders = [Path(image.name).parent.name for image in images]
        if bare := [image.name for image, folder in zip(images, folders) if not folder]:
            raise DataError(
                f'{path} has {len(bare)} images without a label, as {bare[0]}; '
                'expected CLASS/IMAGE, or KEY.cls or KEY.json with "label" beside KEY.jpg'
            )
        return folders
    keys = [sample_key(image.name) for image in images]
    if bare := [image.name for image, key in zip(images, keys) if key not in labels]:
        raise DataError(
            f'{path} has labels in .cls or .json files, but none for {len(bare)} of {len(images)} images, as {bare[0]}'
        )
    if len({*keys}) < len(keys):
        double = Counter(keys).most_common(1)[0][0]
        raise DataError(f'{path} has several images of the name {double}; a label belongs to one')
    return [labels[key] for key in keys]


def find_columns(columns: Sequence[str], place: str) -> tuple[str, str]:
    """The columns of images and of labels in a table.

    Raises:
        DataError: if there are none of the usual names.
    """
    image = next((name for name in IMAGE_COLUMNS if name in columns), None)
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    if image is None or label is None:
        raise DataError(
            f'{place} has the columns {list(columns)}; expected one of images (image, img, jpg or png) and '
            'one of labels (label, labels, fine_label, cls or target)'
        )
    return image, label


def number_labels(values: Sequence[Any], names: list[str], place: str, column: str) -> tuple[list[str], Sequence[int]]:
    """The classes, and each label as a place among them; without names, classes are the labels found, sorted.

    Raises:
        DataError: if labels are not all numbers or all text, or numbers that have no name.
    """
    kinds = {type(value) for value in values}
    if kinds not in ({str}, {int}, {bool}):
        raise DataError(
            f'{place} has no integer or text label for every image: {column} holds '
            f'{", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"}'
        )
    found = {*values}
    if names and isinstance(values[0], int):
        if outside := sorted(found - {*range(len(names))}):
            raise DataError(f'{place} names {len(names)} classes, and has the labels {outside[:5]}')
        return names, list(values)
    places = {value: i for i, value in enumerate(sorted(found))}
    return [str(value) for value in places], [places[value] for value in values]


def list_images(folder: Path) -> list[Path]:
    """The images of a folder and those in it, sorted; hidden files are none."""
    return sorted(map(Path, walk(folder, image_suffixes())))


def walk(folder: 'Path | str', suffixes: Sequence[str]) -> Iterator[str]:
    """The visible files of a folder and those in it that end so, folder by folder, in the order of their names."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (
            os.path.join(place, name)
            for name in sorted(files)
            if name.lower().endswith(tuple(suffixes)) and not name.startswith('.')
        )


def decode_slice(path: 'Path | str', offset: int, size: int) -> Raw:
    """Read an image that is a part of a file, as of a tar."""
    with open(path, 'rb') as file:  # opened anew: a file that workers share has one position for all
        file.seek(offset)
        return read_image(file.read(size))


def open_source(root: str, split: str, cache: str | None = None, download: bool = False) -> Source:
    """The images of one split.

    Args:
        root: `digits`; `torch/NAME`, a set of torchvision's; `hfds/NAME`, one of the Hub's; a folder with a folder
            per split (train and val, validation or test) of class folders; a folder with a Parquet file or tar (or
            several) per split, named after it. For `val`, a folder of class folders, or a single Parquet file or
            tar, will also do.
        split: train or val.
        cache: The folder of torch/ and hfds/ sets, and of what is kept about tars that stand where nothing can be
            written; by default ~/.cache/t2t-vit, and the Hub's own for hfds/.
        download: Fetch a torch/ set that is not there. What hfds/ fetches is its own package's business.

    Raises:
        DataError: if there is nothing of that kind.
    """
    if root == 'digits':
        return Digits(split)
    path = Path(root).expanduser()
    prefix, _, name = root.partition('/')
    if prefix == 'torch' and name and not path.exists():
        return TorchSet(name, split, cache, download)
    if prefix == 'hfds' and name and not path.exists():
        return HubSet(name, split, cache)
    if not path.exists():
        raise DataError(
            f"no data at {path}{nearest(prefix, ('torch', 'hfds', 'digits'))}; data.root is 'digits', "
            "'torch/NAME', 'hfds/NAME', a folder with train/ and val/ of class folders, "
            'or a folder with train*.parquet and val*.parquet, or train*.tar and val*.tar'
        )
    if path.is_file():
        if path.suffix not in ('.parquet', '.tar'):
            raise DataError(f'{path} is a file but not .parquet or .tar')
        if split == 'train':
            raise DataError(
                f'{path} is one file, which leaves nothing to validate on; '
                f'expected a folder with train*{path.suffix} and val*{path.suffix}'
            )
        return Parquet([path]) if path.suffix == '.parquet' else Shards([path], cache)
    for name in SPLITS[split]:
        if files := split_files(path, name, '.parquet'):
            return Parquet(files)
        if files := split_files(path, name, '.tar'):
            return Shards(files, cache)
        if (path / name).is_dir():
            return Folder(path / name)
    if split == 'val' and not any((path / name).is_dir() for name in SPLITS['train']):
        return Folder(path)
    raise DataError(
        f'{path} has no {split} split: '
        f'expected {path}/{split}/CLASS/IMAGE, {path}/{split}*.parquet or {path}/{split}*.tar'
    )


def split_files(folder: Path, name: str, suffix: str) -> list[Path]:
    """The files of a split, as train.tar or train-000000.tar, in their order."""
    return sorted(p for p in folder.glob(f'*{suffix}') if p.stem.split('-')[0] == name)


class Part:
    """Some of a source's images: the first of every class, the same share of each class, in the source's order."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.classes = source, source.classes
        labels, seen = np.asarray(source.labels), Counter[int]()
        shares = np.empty(len(labels))
        sizes = np.bincount(labels, minlength=len(self.classes))
        for i, label in enumerate(labels.tolist()):
            shares[i] = seen[label] / sizes[label]
            seen[label] += 1
        self.indices = np.sort(np.argsort(shares, kind='stable')[:count])
        self.labels: Sequence[int] = labels[self.indices].tolist()

    def open(self, index: int) -> Raw:
        return self.source.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


def check_same_classes(train: Source, val: Source) -> None:
    """Raises DataError where train and val do not have the same classes, and says which are on one side only."""
    if train.classes == val.classes:
        return
    only = [
        f'only in {side}: {", ".join(names[:5])}' + (f' and {len(names) - 5} more' if len(names) > 5 else '')
        for side, names in (
            ('train', sorted(set(train.classes) - set(val.classes))),
            ('val', sorted(set(val.classes) - set(train.classes))),
        )
        if names
    ]
    raise DataError(
        f'train has {len(train.classes)} classes and val {len(val.classes)}, and they differ '
        f'({"; ".join(only) or "the same names in another order"}); every score would be wrong'
    )
