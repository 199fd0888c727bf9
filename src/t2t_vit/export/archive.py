"""What a .pt2 must not hold. torch.export.load trusts a file: it unpickles, evaluates text, and loads compiled code."""

import io
import json
import pickle
import re
import zipfile
from typing import Any, Iterator

import torch

from ..models.checkpoints import CheckpointError, PathLike

# what `t2t-vit export` writes: no compiled code, no objects but tensors
EXPECTED = re.compile(
    r'[^/]+/(archive_format|archive_version|byteorder|version|\.data/\w+|extra/\w+|models/model\.json'
    r'|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)'
    r'|data/sample_inputs/model\.pt)'
    r'|version|extra_files/\w+|serialized_\w+\.(json|pt)')  # up to torch 2.7
# the sizes of tensors, which are evaluated: sums and products of symbols
WORDS = {'Symbol', 'Integer', 'Add', 'Mul', 'Max', 'Min', 'FloorDiv', 'CleanDiv', 'Mod', 'PythonMod', 'Pow', 'Rational',
         'positive', 'nonnegative', 'integer', 'True', 'False'}
SIZE = re.compile(r"[\w\s(),=+*/'<>-]*")


def leaves(tree: Any, key: str = '') -> Iterator[Any]:
    """All that stands under a key in a tree of JSON, at any depth."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            if name == key:
                yield branch
            yield from leaves(branch, key)
    elif isinstance(tree, list):
        for branch in tree:
            yield from leaves(branch, key)


def check_archive(path: PathLike) -> None:
    """Refuse a .pt2 in which something would be executed when it is loaded.

    Raises:
        CheckpointError: if it is no such archive, or holds pickles, compiled code, or sizes that are no arithmetic.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            strange = [name for name in archive.namelist() if not EXPECTED.fullmatch(name)]
            trees = {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith('.json')}
            for name in archive.namelist():
                if name.endswith('.pt') and (content := archive.read(name)):
                    torch.load(io.BytesIO(content), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f'{path} holds pickled objects; expected tensors only. Nothing in it was executed'
                              ) from error
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f'{path} is damaged, or not written by torch.export: {error}') from error
    if strange:
        raise CheckpointError(f'{path} holds {strange[0]}, which no exported model needs; it was refused unread')
    if any(flag is not False for tree in trees.values() for flag in leaves(tree, 'use_pickle')):
        raise CheckpointError(f'{path} holds pickled objects; expected tensors only. Nothing in it was executed')
    for size in (size for tree in trees.values() for size in leaves(tree, 'expr_str')):
        words = {*re.findall(r'[A-Za-z_]\w*', str(size))} - WORDS
        if not SIZE.fullmatch(str(size)) or any(not re.fullmatch(r'[su]\d+', word) for word in words):
            raise CheckpointError(f'{path}: {str(size)[:80]!r} is no size of a tensor. Nothing in it was executed')
