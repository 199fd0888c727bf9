"""Read and write checkpoint files safely: nothing in a file is executed, and damage is an error."""

import argparse
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Mapping
from typing import Any, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..integrity import hash_file

PathLike = Union[str, 'os.PathLike[str]']

# in the release's files beside tensors, numbers, strings and containers: the arguments of its script
SAFE_TYPES: list[Any] = [argparse.Namespace]

GROWTH, SMALL_FILE = 10, 100 << 20  # limit of memory for a file: this many times its size, or this many bytes


class CheckpointError(ValueError):
    """A file or state dict that cannot be used; the message says what was found and what was expected."""


def read_checkpoint(path: PathLike) -> Mapping[str, Any]:
    """Read a checkpoint file to the CPU; its content decides its kind, not its name.

    Nothing in the file is executed: a pickle may ask for tensors, plain containers and `SAFE_TYPES` only.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for anything but a whole safetensors or `torch.save` file with a mapping in it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no checkpoint file {path}')
    with open(path, 'rb') as file:
        start = file.read(512)
    if start[8:9] == b'{':  # after the eight bytes of the header's length
        return read_safetensors(path)
    if start.startswith((b'PK\x03\x04', b'\x80')):  # torch's zip archive, and the plain pickle of old versions
        return read_pickle(path)
    raise CheckpointError(
        f'{path} is {kind_of_file(start)}; expected a checkpoint, written by torch.save or as safetensors'
    )


def kind_of_file(start: bytes) -> str:
    """Describe a file that is no checkpoint by its first bytes."""
    if not start:
        return 'empty'
    if start.lstrip(b'\xef\xbb\xbf \t\r\n').startswith(b'<'):
        return 'a web page: the download was answered with HTML'
    if start[257:262] == b'ustar':
        return 'a tar archive (published .pth.tar files are none, they only have the name)'
    return f'of an unknown kind, starting with {start[:16]!r}'


def read_safetensors(path: PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f'{path} is a damaged or truncated safetensors file of {os.path.getsize(path)} bytes: {error}'
        ) from error


def read_pickle(path: PathLike) -> Mapping[str, Any]:
    """Read a file of torch.save that holds `SAFE_TYPES` only."""
    try:
        check_growth(path, unpacked_size(path))
        check_checksums(path)
        with torch.serialization.safe_globals(SAFE_TYPES):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        check_growth(path, claimed_size(checkpoint))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        wanted = re.findall(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else []
        raise CheckpointError(
            f'{path} asks for {wanted[0]} when it is read; expected tensors, plain containers and '
            f'argparse.Namespace. It was refused, and nothing in it was executed'
            if wanted
            else f'{path} is damaged or truncated: its {os.path.getsize(path)} bytes are not a whole torch.save file'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f'{path} holds a {type(checkpoint).__name__}; expected a dict of tensors by name')
    return checkpoint


def check_checksums(path: PathLike) -> None:
    """Raise CheckpointError if a record of a zip archive does not match its checksum, which torch.load ignores."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(
                    f'{path} is damaged: {damaged} in it does not match its checksum; copy or download the file again '
                    '(or save it again, if torch.serialization.set_crc32_options(False) was used)'
                )


def unpacked_size(path: PathLike) -> int:
    """Return the unpacked bytes that a zip archive's directory claims; 0 for other files."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist())


def claimed_size(checkpoint: Any) -> int:
    """Return the bytes of all tensors in nested dicts, by their shapes: strides of 0 turn few values into many."""
    if isinstance(checkpoint, torch.Tensor):
        return checkpoint.numel() * checkpoint.element_size()
    return sum(map(claimed_size, checkpoint.values())) if isinstance(checkpoint, dict) else 0


def check_growth(path: PathLike, size: int) -> None:
    """Raise CheckpointError if a file would take memory out of proportion to its size."""
    here = os.path.getsize(path)
    if size > max(GROWTH * here, SMALL_FILE):
        raise CheckpointError(f'{path} has {here:,} bytes and would take {size:,} in memory; such a file is refused')


def verify_file(path: PathLike, size: int | None = None, sha256: str | None = None) -> None:
    """Check a downloaded file against its recorded size in bytes and SHA-256, if these are known.

    Raises:
        CheckpointError: if it is another file.
    """
    found_size = os.path.getsize(path)
    if size is not None and found_size != size:
        raise CheckpointError(f'{path} has {found_size} bytes; expected {size}')
    if sha256 is None:
        return
    if (found := hash_file(path)) != sha256.lower():
        raise CheckpointError(f'{path} has SHA-256 {found}; expected {sha256}')


def save_weights(
    state_dict: Mapping[str, torch.Tensor], path: PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file beside its path, then rename it, so that it appears complete or not at all."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
    beside = f'{os.fspath(path)}.{os.getpid()}.part'
    try:
        with open(beside, 'wb') as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # as the umask says; safetensors' own is 0600
        save_file(tensors, beside, {'format': 'pt', **(metadata or {})})
        os.chmod(beside, mode)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f'cannot write {os.fspath(path)}: {error}') from error
    finally:
        if os.path.exists(beside):
            os.remove(beside)
