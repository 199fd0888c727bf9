"""Find files in folders: links are followed, hidden and system files are left out and counted."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import DataError

# What desktops, network drives and notebooks leave in folders of images.
SYSTEM_FOLDERS = {'__macosx', '@eadir', '#recycle', '$recycle.bin', 'system volume information', 'lost+found'}
SYSTEM_FILES = {'thumbs.db', 'ehthumbs.db', 'desktop.ini', 'icon\r'}
MAX_SIZES = 200_000  # files whose sizes are looked up


def is_hidden(name: str) -> bool:
    """Return true if a file or folder of this name is hidden or made by a system, not by a person."""
    return name.startswith('.') or name.lower() in SYSTEM_FILES or name.lower() in SYSTEM_FOLDERS


def suffix_of(name: str) -> str:
    """Return what a file's name ends in, from its last dot on, in lower case; '' if it has none."""
    stem, dot, suffix = name.rpartition('.')
    return f'{dot}{suffix}'.lower() if stem else ''


def scan(
    folder: str, suffixes: tuple[str, ...], skipped: Counter[str], folders: 'list[str] | None' = None
) -> Iterator[str]:
    """Yield the paths of the files with these suffixes in a folder and all below it, relative to it, sorted by folder.

    Linked files and folders are followed, each linked folder once. What is left out is counted in `skipped` by reason.

    Args:
        folder: Where to begin.
        suffixes: In lower case; files that end in upper case count too.
        skipped: Counts by reason, added to.
        folders: Receives the relative paths of all folders that were read.

    Raises:
        DataError: if a folder cannot be read.
    """
    linked: set[tuple[int, int]] = set()

    def visit(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        try:
            with os.scandir(path or '.') as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f'cannot read the folder {path}: {error.strerror or error}') from error
        below = []
        for entry in found:
            if entry.is_symlink() and not os.path.exists(entry.path):
                skipped['broken links'] += 1
            elif is_hidden(entry.name):
                skipped['hidden or system folders' if entry.is_dir() else reason_to_skip(entry.name)] += 1
            elif entry.is_dir():
                below.append(entry)
            elif entry.name.lower().endswith(suffixes):
                yield prefix + entry.name
            else:
                skipped[reason_to_skip(entry.name)] += 1
        for entry in below:
            key = identity(entry.path)
            if key in above or (entry.is_symlink() and key in linked):
                skipped['links to folders already read'] += 1
                continue
            if entry.is_symlink():
                linked.add(key)
            if folders is not None:
                folders.append(prefix + entry.name)
            yield from visit(entry.path, f'{prefix}{entry.name}/', above | {key})

    return visit(folder, '', frozenset({identity(folder)}))


def identity(path: str) -> tuple[int, int]:
    """Return what is the same for two paths only if they lead to the same folder."""
    found = os.stat(path or '.')
    return found.st_dev, found.st_ino


def file_sizes(paths: Sequence[str]) -> list[int]:
    """Return the sizes of files in bytes.

    Raises:
        DataError: if there are more than MAX_SIZES.
        OSError: if a file is not there.
    """
    if len(paths) > MAX_SIZES:
        raise DataError(f'there are more than {MAX_SIZES:,} files')
    return [os.stat(path).st_size for path in paths]


def counted(skipped: Mapping[str, int]) -> str:
    """Return counts of files that were left out, by reason, as a text; empty if there are none."""
    return ', '.join(f'{count:,} {reason}' for reason, count in sorted(skipped.items()))


def left_out(source: Any, data: str) -> list[str]:
    """Return notes on what is not read of a source of images; `data` is its name."""
    skipped, uncounted = counted(getattr(source, 'skipped', {})), getattr(source, 'uncounted', '')
    return [*([f'left out of {data}: {skipped}'] if skipped else []), *([uncounted] if uncounted else [])]


def reason_to_skip(name: str) -> str:
    """Return why a file that is not an image is left out, for `counted`."""
    if is_hidden(name):
        return 'hidden or system files'
    return f'files ending in {suffix_of(name)}' if suffix_of(name) else 'other files'


def subfolders(folder: str) -> list[str]:
    """Return the names of the visible folders in a folder, linked ones too, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def to_text(path: str) -> str:
    """Return a path of the file system as text from UTF-8, whatever the locale; bytes that are not UTF-8 are escaped.

    The escapes are Python's surrogates, which `open(…, errors='surrogateescape')` writes as the bytes they stand for.
    """
    if sys.getfilesystemencoding() == 'utf-8':
        return path
    return os.fsencode(path).decode('utf-8', 'surrogateescape')


def printable(name: str) -> str:
    r"""Return a name for a terminal or a message: bytes that are not UTF-8, and control characters, as \xe9 and \n."""
    text = name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode() for char in text)
