"""Write text files so that damage shows: complete or absent, and with a digest of their content."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEY = 'sha256'
BLANK = 't2t-vit-sha256:' + '0' * 64  # in a file that `stamp` completes
STAMP = re.compile(rb't2t-vit-sha256:([0-9a-f]{64})')
HEX = re.compile(r'[0-9a-f]{64}')
LAST_LINE = re.compile(r'# sha256 of the lines above: ([0-9a-f]{64})\n\Z')


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is complete or absent, in UTF-8; bytes of names that are not UTF-8 stay as they are."""
    draft = path.with_name(f'.draft-{path.name}')
    draft.write_text(text, encoding='utf-8', errors='surrogateescape')
    os.replace(draft, path)


def digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()


def seal(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of its other members, however they are laid out in a file."""
    rest = {key: value for key, value in tree.items() if key != KEY}
    return {**rest, KEY: digest(json.dumps(rest, sort_keys=True))}


def check_seal(tree: Any) -> None:
    """Raise ValueError if a JSON object has another digest than it states; without one it is accepted.

    What is no object is left to the caller.
    """
    if isinstance(tree, dict) and has_digest(tree) and tree != seal(tree):
        raise ValueError(
            'its content does not have the SHA-256 that it states: it is damaged. If you changed it on purpose, '
            f'remove "{KEY}" from it'
        )


def has_digest(tree: Mapping[str, Any]) -> bool:
    """Return whether an object states a digest, also under a name that is damaged."""
    return KEY in tree or any(isinstance(value, str) and HEX.fullmatch(value) for value in tree.values())


def sign(text: str) -> str:
    """Return a YAML text with its digest in a comment on the last line."""
    return f'{text}# sha256 of the lines above: {digest(text)}\n'


def check_signed(text: str) -> str:
    """Return a text of `sign`, or one without a digest.

    Raises:
        ValueError: if it has another digest than it states.
    """
    found = LAST_LINE.search(text)
    damaged = digest(text[: found.start()]) != found[1] if found else bool(HEX.search(text[text.rfind('#') :]))
    if damaged:
        raise ValueError(
            'its lines do not have the SHA-256 that the last one states: it is damaged. If you changed it on purpose, '
            'remove the last line'
        )
    return text


def stamp(files: Sequence[Path]) -> None:
    """Put the digest of some files, as they are, in the place of `BLANK` in the first one."""
    content = files[0].read_bytes()
    if content.count(BLANK.encode()) != 1:
        raise ValueError(f'{files[0]} must have one place for a digest, found {content.count(BLANK.encode())}')
    files[0].write_bytes(content.replace(BLANK.encode(), f't2t-vit-sha256:{hash_files(files)}'.encode()))


def check_stamp(files: Sequence[Path]) -> None:
    """Check files against the digest of `stamp`; without one they are accepted.

    Raises:
        ValueError: if they have another digest.
    """
    found = STAMP.search(files[0].read_bytes())
    if found and hash_files(files) != found[1].decode():
        raise ValueError('the content does not have the SHA-256 that it states')


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, 'rb') as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def hash_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 of the content of files, with `BLANK` in the place of the digest in the first one."""
    first, *others = (file.read_bytes() for file in files)
    sha = hashlib.sha256(STAMP.sub(BLANK.encode(), first, count=1))
    for content in others:
        sha.update(content)
    return sha.hexdigest()
