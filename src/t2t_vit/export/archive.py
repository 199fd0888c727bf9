"""Check a .pt2 before torch loads it.

torch.export.load trusts a file: it unpickles, loads compiled code, evaluates sizes and guards, imports the classes that
structures name, and puts names into Python code, which it executes.
"""

import ast
import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from ..models.safe_load import CheckpointError, PathLike, check_growth, claimed_size, unpacked_size

# the records that `t2t-vit export` writes: no compiled code, no objects but tensors
EXPECTED = re.compile(
    r'([^/]+)/(?:archive_format|archive_version|byteorder|version|\.data/\w+|extra/\w+|models/model\.json'
    r'|data/weights/(?:weight_\d+|model_weights_config\.json)|data/constants/(?:tensor_\d+|model_constants_config\.json)'
    r'|data/sample_inputs/model\.pt)'
    r'|version|extra_files/\w+|serialized_\w+\.(?:json|pt)',
    re.ASCII,
)  # up to torch 2.7
EMPTY = ('data/sample_inputs/model.pt', 'serialized_example_inputs.pt')  # torch makes guards of example inputs
RECORD = re.compile(r'(weight|tensor)_\d+', re.ASCII)

# the sizes of tensors, as Mul(Symbol('s0', positive=True, integer=True), Integer(3))
FUNCTIONS = {
    'Symbol',
    'Integer',
    'Add',
    'Mul',
    'Max',
    'Min',
    'FloorDiv',
    'CleanDiv',
    'Mod',
    'PythonMod',
    'Pow',
    'Rational',
}
SYMBOL = re.compile(r'[su]\d+', re.ASCII)
ARITHMETIC = (
    ast.Expression,
    ast.Load,
    ast.keyword,
    ast.UnaryOp,
    ast.USub,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Mod,
)
SMALL_POWER = re.compile(r'Pow\(.*, Integer\(-?[1-9]\)\)')
LONGEST, LARGEST = 2000, 2**63  # characters of a size, and a number in it

# the operators of exported T2T-ViTs and of timm's models: arithmetic on tensors; none reads a file, as aten.from_file
# does, or calls code by its name
OPERATORS = (
    r'_assert_tensor_metadata|_softmax|_to_copy|_upsample_bicubic2d_aa|abs|adaptive_avg_pool2d|add|add_|addmm|alias'
    r'|amax|arange|avg_pool2d|baddbmm|batch_norm|bmm|cat|ceil|chunk|clamp|clamp_min|clone|constant_pad_nd|contiguous'
    r'|conv2d|convolution|detach|div|dropout|eq|exp|expand|flatten|floor|full|full_like|ge|gelu|group_norm|gt'
    r'|hardsigmoid|hardswish|hardswish_|hardtanh|hardtanh_|index|layer_norm|le|leaky_relu|linear|lt|matmul|max_pool2d'
    r'|mean|mm|mul|mul_|native_batch_norm|native_layer_norm|ne|neg|ones|ones_like|pad|permute|pow|reciprocal|relu'
    r'|relu_|repeat|reshape|reshape_as|rms_norm|roll|round|rsqrt|rsub|scalar_tensor|scaled_dot_product_attention|select'
    r'|sigmoid|silu|silu_|slice|softmax|split|split_with_sizes|sqrt|square|squeeze|stack|sub|sum|sym_numel|sym_size'
    r'|sym_stride|t|to|transpose|unbind|unflatten|unsqueeze|upsample_bicubic2d|var|var_mean|view|where|zeros'
    r'|zeros_like'
)
TARGET = re.compile(
    rf'torch\.ops\.aten\.({OPERATORS})\.\w+|torch\.sym_(not|int|float|ite|max|min|sqrt)|math\.trunc'
    r'|_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|truediv|and_|or_)',
    re.ASCII,
)
ARGUMENTS = {
    f'as_{kind}'
    for kind in (
        'tensor',
        'tensors',
        'optional_tensor',
        'optional_tensors',
        'none',
        'int',
        'ints',
        'float',
        'floats',
        'bool',
        'bools',
        'sym_int',
        'sym_ints',
        'sym_float',
        'sym_bool',
        'sym_bools',
        'expr',
        'name',
        'string',
        'scalar_type',
        'memory_format',
        'layout',
        'device',
    )
}
MODES = {'none', 'tanh', 'floor', 'trunc', 'constant', 'reflect', 'replicate', 'circular', 'same', 'valid'}
NAME = re.compile(r'[\w.+]*', re.ASCII)
CONTAINERS = {None, 'builtins.tuple', 'builtins.list', 'builtins.dict'}


def leaves(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every plain value of a JSON tree and every key, with the keys above it."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield keys, key
            yield from leaves(branch, (*keys, key))
    elif isinstance(tree, list):
        for branch in tree:
            yield from leaves(branch, keys)
    else:
        yield keys, tree


def is_size(text: str) -> bool:
    """Return whether sympy may evaluate a text: arithmetic of symbols and whole numbers, with small powers."""
    try:
        nodes = [*ast.walk(ast.parse(text, mode='eval'))] if len(text) <= LONGEST else []
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    for node in nodes:
        good: object
        if isinstance(node, ast.Name):
            good = node.id in FUNCTIONS or SYMBOL.fullmatch(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            good = SYMBOL.fullmatch(node.value)
        elif isinstance(node, ast.Constant):
            good = isinstance(node.value, int) and abs(node.value) < LARGEST
        elif isinstance(node, ast.Call):
            call = ast.unparse(node)
            good = (
                isinstance(node.func, ast.Name)
                and node.func.id in FUNCTIONS
                and (node.func.id != 'Pow' or call.count('Pow') == 1 and re.fullmatch(SMALL_POWER, call))
            )
        else:
            good = isinstance(node, ARITHMETIC)
        if not good:
            return False
    return bool(nodes)


def is_plain(text: str) -> bool:
    """Return whether a structure has plain containers only: torch imports others by their names."""
    found = [*leaves(json.loads(text))]
    return all(value in CONTAINERS for keys, value in found if keys[-1:] == ('type',)) and all(
        value in (None, 'null', '[]') for keys, value in found if keys[-1:] == ('context',)
    )


def is_harmless(keys: tuple[str, ...], value: Any) -> bool:
    """Return whether a value is allowed under these keys."""
    key = keys[-1] if keys else ''
    if 'guards_code' in keys or any(name.startswith('as_') and name not in ARGUMENTS for name in keys):
        return False
    if key == 'use_pickle':
        return value is False
    if not isinstance(value, str):
        return True
    if key == 'expr_str':
        return is_size(value)
    if key in ('in_spec', 'out_spec'):
        return is_plain(value)
    if key == 'as_string':
        return value in MODES
    wanted = TARGET if key == 'target' and 'nodes' in keys else RECORD if key == 'path_name' else NAME
    return bool(wanted.fullmatch(value))


def read_archive(path: PathLike) -> io.BytesIO:
    """Copy a .pt2 to memory whose loading and calling executes no foreign code.

    Load the copy, not the file: torch's reader may find other records in a file than Python's does.

    Raises:
        CheckpointError: if it is no such archive, or holds what no exported model needs.
    """
    copy, claimed = io.BytesIO(), 0
    try:
        check_growth(path, unpacked_size(path))
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, 'w') as checked:
            check_names(path, [record.orig_filename for record in archive.infolist()])
            for name in archive.namelist():
                content = archive.read(name)
                checked.writestr(name, content)
                if name.endswith(EMPTY) and content:
                    refuse(path, f'{name} with example inputs')
                if name.endswith('.pt') and content:
                    claimed += claimed_size(torch.load(io.BytesIO(content), weights_only=True))
                if name.endswith('.json'):
                    tree = json.loads(content.decode())
                    for keys, value in leaves(tree):
                        if not is_harmless(keys, value):
                            refuse(path, f'{str(value)[:80]!r} as {keys[-1][:80] if keys else "a key"}')
                    if name.endswith('_config.json'):  # a tensor may have a shape and no bytes
                        claimed += 4 * sum(
                            abs(math.prod(size['as_int'] for size in entry['tensor_meta']['sizes']))
                            for entry in tree['config'].values()
                        )
        check_growth(path, claimed)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        refuse(path, 'pickled objects')
    except Exception as error:  # zip, JSON and torch raise many kinds for damaged bytes
        raise CheckpointError(f'{path} is damaged, or not written by torch.export: {str(error)[:300]}') from error
    copy.seek(0)
    return copy


def check_names(path: PathLike, names: Sequence[str]) -> None:
    """Raise CheckpointError for a record that no exported model has, a second folder, or two records of one name."""
    found = [(EXPECTED.fullmatch(name), name) for name in names]
    if strange := [name for match, name in found if not match]:
        refuse(path, repr(strange[0][:80]))
    if len({match[1] for match, _ in found if match and match[1]}) > 1:
        refuse(path, 'more than one folder')
    if len({name.casefold() for name in names}) < len(names):
        refuse(path, 'two records of one name')


def refuse(path: PathLike, what: str) -> NoReturn:
    """Raise CheckpointError."""
    raise CheckpointError(f'{path} holds {what}, which no exported model needs: nothing in it was executed')
