"""Open the images of a split by one syntax, which `data.root` has."""

import os
from collections.abc import Sequence
from pathlib import Path

from ...settings import nearest
from ..decode import check_regular
from ..errors import DataError, Undivided
from .base import Source
from .digits import Digits
from .folder import Folder
from .hub import HubSet
from .lists import LabelledList
from .names import subfolders
from .parquet import Parquet
from .prepared import Prepared, is_prepared
from .splits import EVERY_SPLIT, LISTS, SHARDS, SPLITS, find_files, split_folder, split_named
from .tar import Shards
from .torchvision import open_torch_set

CACHE = '~/.cache/t2t-vit'


def open_source(
    root: str,
    split: str,
    cache: str | None = None,
    download: bool = False,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """Open the labelled images of one split.

    Args:
        root: A folder that `t2t-vit prepare` wrote, or its address; `digits`; `torch/NAME`, a set of torchvision;
            `hfds/NAME`, one of the Hub; a folder with a folder of class folders for each split (train and val,
            validation or test); a folder, or folders in it, with Parquet files, tars or a .csv for each split, with
            the split's name in theirs. For `val`, a folder of class folders or a single Parquet file, tar or .csv will
            also do.
        split: train, val, or all: the training split, or everything where there are no splits.
        cache: The folder of torch/ and hfds/ sets, and of what is kept about tars in folders that cannot be written to;
            by default ~/.cache/t2t-vit, and the Hub's named for hfds/.
        download: Fetch a torch/ set that is not there. The package `datasets` fetches hfds/ sets by itself.
        channels: Of the images; 1, 3 and None read what a viewer shows, other numbers all bands (see `read_image`).
        classes: Names and order of the classes, as of the training set or of a model. The images may lack some of
            them, and may not have others. By default the classes found, sorted.

    Raises:
        Undivided: if the images are not divided, so that only all of them can be opened.
        DataError: if there is no such data; says what was found and what was expected.
    """
    folder, one = Path(cache or CACHE).expanduser(), 'train' if split == 'all' else split
    if root == 'digits' and not Path(root).exists():
        return Digits(one, classes)
    if is_prepared(root):
        return Prepared(root, split, folder, channels, classes)
    path = Path(root).expanduser()
    prefix, _, name = root.partition('/')
    if prefix == 'torch' and name and not path.exists():
        return open_torch_set(name, one, folder, download, channels, classes)
    if prefix == 'hfds' and name and not path.exists():
        return HubSet(name, one, cache, channels, classes)
    if not os.path.exists(path):  # which is false for a name that is too long
        raise DataError(
            f"no data at {path}{nearest(prefix, ('torch', 'hfds', 'digits'))}; data.root is 'digits', "
            "'torch/NAME', 'hfds/NAME', a folder with train/ and val/ of class folders, "
            'or a folder with train*.parquet and val*.parquet, or train*.tar and val*.tar'
        )
    if not path.is_dir():
        check_regular(path)
        return open_files([path], folder, channels, classes, split)
    if split == 'all' and not has_splits(path):
        files = find_files(str(path), (*SHARDS, *LISTS) if not subfolders(str(path)) else SHARDS)
        if files:
            return open_files([path / file for file in files], folder, channels, classes, split)
        return Folder(path, channels, classes)
    return open_folder(path, one, folder, channels, classes)


def has_splits(path: Path) -> bool:
    """Return true if a folder has a training split."""
    return any(split_folder(str(path), name) for name in SPLITS['train']) or any(
        split_named(file) in SPLITS['train'] for file in find_files(str(path), (*SHARDS, *LISTS))
    )


def open_folder(path: Path, split: str, cache: Path, channels: int | None, classes: Sequence[str] | None) -> Source:
    """Open a split of a folder, by the names of the folders and files in it."""
    files = find_files(str(path), (*SHARDS, *LISTS))
    for name in SPLITS[split]:
        named = [file for file in files if split_named(file) == name]
        if shards := [path / file for file in named if file.lower().endswith(SHARDS)]:
            return open_files(shards, cache, channels, classes)
        found = split_folder(str(path), name)
        if found is not None and subfolders(found):
            return Folder(Path(found), channels, classes)
        if lists := [path / file for file in named if file.lower().endswith(LISTS)]:
            return open_files(lists, cache, channels, classes)
        if found is not None:
            return Folder(Path(found), channels, classes)
    names = subfolders(str(path))
    inner = {inner.lower() for name in names for inner in subfolders(str(path / name))}
    other = next((key for key in SPLITS if key != split), '')
    if inner and inner <= EVERY_SPLIT and inner & {*SPLITS[split]}:  # CLASS/train, CLASS/val
        return Folder(path, channels, classes, split)
    held = [file for file in files if split_named(file) or not names]  # others beside class folders are of no split
    if split == 'val' and not held and not any(split_folder(str(path), name) for name in SPLITS[other]):
        return Folder(path, channels, classes)
    shown = [*(f'{name}/' for name in names), *files]
    undivided = names and not any([*map(split_named, files), *(split_folder(str(path), name) for name in EVERY_SPLIT)])
    hint = '; to split one folder of class folders, set data.val_fraction, as --data.val_fraction 0.2' * bool(undivided)
    raise (Undivided if undivided else DataError)(
        f'{path} has no {split} split, it has {", ".join(shown[:5]) or "nothing"}{", …" if len(shown) > 5 else ""}: '
        f'expected {path}/{split}/CLASS/IMAGE, {path}/{split}*.parquet or {path}/{split}*.tar{hint}'
    )


def open_files(
    files: Sequence[Path], cache: Path, channels: int | None, classes: Sequence[str] | None, split: str | None = None
) -> Source:
    """Open Parquet files, tars or a .csv; of several kinds, those of the first of these.

    A single file is a validation set, unless it is a tar of folders that are named after splits.
    """
    for suffix in (*SHARDS, *LISTS):
        chosen = [file for file in files if file.name.lower().endswith(suffix)]
        if not chosen:
            continue
        if suffix == '.tar':
            source = Shards(chosen, cache, channels, classes, None if split == 'all' else split)
            if split != 'train' or source.divided:
                return source
        if split == 'train':
            raise Undivided(
                f'{files[0]} is one file, which leaves nothing to validate on; expected a folder with train*{suffix} '
                f'and val*{suffix}, or data.val_fraction to split it'
            )
        if suffix == '.parquet':
            return Parquet(chosen, channels, classes)
        if len(chosen) > 1:
            raise DataError(f'several lists for one split: {", ".join(map(str, chosen))}')
        return LabelledList(chosen[0], channels, classes)
    raise DataError(f'{files[0]} is a file but not .parquet, .tar or .csv')
