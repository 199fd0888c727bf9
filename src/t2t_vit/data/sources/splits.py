"""Recognise training and validation splits by the names of folders and files."""

import os
import re
from collections.abc import Iterable, Sequence

from ..decode import has_image_suffix
from .names import is_hidden, subfolders

SPLITS = {'train': ('train', 'training'), 'val': ('val', 'validation', 'valid', 'test')}  # in order of preference
EVERY_SPLIT = {name for names in SPLITS.values() for name in names}
SHARDS = ('.parquet', '.tar')
LISTS = ('.csv',)
MAX_DEPTH = 3  # folders below the root in which shards are looked for


def split_named(path: str) -> 'str | None':
    """Return the split that a file's name says it is of, or else the folders on its relative path, nearest first.

    So train_0000.tar, imagenet1k-train-0000.tar, train/shard-000000.tar and data/train-00000-of-00002.parquet are of
    `train`, in upper case too.
    """
    *folders, file = path.lower().split('/')
    for part in (file.rpartition('.')[0], *reversed(folders)):
        if name := next((word for word in re.findall('[a-z]+', part) if word in EVERY_SPLIT), None):
            return name
    return None


def find_files(root: str, suffixes: tuple[str, ...]) -> list[str]:
    """Return the relative paths of files with these suffixes, sorted; folders with images in them are passed over."""
    found: list[str] = []

    def visit(prefix: str, depth: int) -> None:
        files, folders = [], []
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(suffixes):
                    files.append(prefix + entry.name)
                elif prefix and has_image_suffix(entry.name):
                    return
        found.extend(files)
        for name in folders if depth < MAX_DEPTH else ():
            visit(f'{prefix}{name}/', depth + 1)

    visit('', 0)
    return sorted(found)


def split_folder(root: str, split: str) -> 'str | None':
    """Return the path of the folder of a split, whose name may be in upper case; None if there is none.

    Beside other folders it must hold folders, or it is a class: there are datasets of vehicles with a train.
    """
    names = subfolders(root)
    found = sorted((name for name in names if name.lower() == split), key=lambda name: name != split)
    path = os.path.join(root, found[0]) if found else ''
    divided = found and (subfolders(path) or {name.lower() for name in names} <= EVERY_SPLIT)
    return path if divided else None


def split_level(paths: Iterable[str]) -> 'int | None':
    """Return where on relative paths of images the split stands: 0 for SPLIT/CLASS, 1 for CLASS/SPLIT, else None."""
    names: tuple[set[str], set[str]] = (set(), set())
    for path in paths:
        folders = path.lower().split('/')[:-1]
        for level in range(2):
            names[level].add(folders[level] if len(folders) > level else '')
    return next((level for level in range(2) if names[level] and names[level] <= EVERY_SPLIT), None)


def select_split(paths: Sequence[str], split: str) -> 'tuple[list[int], list[str]] | None':
    """Choose the images of a split by its name on their relative paths.

    Returns their indices, and their paths without the split's name; None if paths have no names of splits, or none of
    this split.
    """
    level = split_level(paths)
    if level is None:
        return None
    parts = [path.split('/') for path in paths]
    present = {part[level].lower() for part in parts}
    chosen = next((name for name in SPLITS[split] if name in present), None)
    if chosen is None:
        return None
    indices = [i for i, part in enumerate(parts) if part[level].lower() == chosen]
    return indices, ['/'.join(parts[i][:level] + parts[i][level + 1 :]) for i in indices]
