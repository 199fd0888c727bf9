"""Damage bytes and nested trees."""

import copy
import math
import random
import struct
from collections.abc import Sequence
from typing import Any

NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1e308,
    -0.0,
    math.nan,
    math.inf,
    '',
    ' ',
    'x' * 500,
    '\x1b[2J\x07',
    '../../etc/passwd',
    '\0',
    'ünïcödé \U0001f600',
    [],
    {},
    [[]],
    [None],
    {'': {}},
    [0] * 1000,
    ['a'],
    {'a': {'b': {'c': [1, {'d': None}]}}},
    'nan',
    '1e9',
    '-1',
    '100000000',
    100_000_000,
]


# bytes


def mangle(rng: random.Random, content: bytes, others: Sequence[bytes] = (b'\0' * 64,)) -> tuple[bytes, str]:
    """Damage bytes in one to four places, half of them near the ends, where headers and directories are."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = len(content)
        position = rng.randrange(size + 1)
        if rng.random() < 0.5:
            position = (
                rng.randrange(min(size, 600) + 1) if rng.random() < 0.6 else size - rng.randrange(min(size, 600) + 1)
            )
        span = rng.choice((1, 4, 16, 200, max(1, size // 3)))
        kind = rng.choice(('flip', 'flip', 'cut', 'drop', 'double', 'insert', 'fill', 'number', 'swap', 'graft'))
        if kind == 'flip' and size:
            changed = bytearray(content)
            for at in [position % size, *(rng.randrange(size) for _ in range(rng.choice((0, 0, 1, 8))))]:
                changed[at] ^= 1 << rng.randrange(8)
            content = bytes(changed)
        elif kind == 'cut':
            content = content[:position]
        elif kind == 'drop':
            content = content[:position] + content[position + span :]
        elif kind == 'double':
            content = content[: position + span] + content[position:]
        elif kind == 'insert':
            content = content[:position] + rng.randbytes(span) + content[position:]
        elif kind == 'fill':
            content = content[:position] + rng.choice((b'\0', b'\xff', b'A')) * span + content[position + span :]
        elif kind == 'number':
            value = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 20))
            packed = struct.pack(rng.choice('<>') + rng.choice('IQ'), value)
            content = content[:position] + packed + content[position + len(packed) :]
        elif kind == 'swap':
            other = rng.randrange(size + 1)
            content = content[:position] + content[other : other + span] + content[position + span :]
        else:
            donor = rng.choice(others)
            content = content[:position] + donor[rng.randrange(len(donor)) :]
        done.append(f'{kind} at {position}')
    return content, ', '.join(done)


def flip(rng: random.Random, content: bytes) -> bytes:
    """Flip one to three bits."""
    changed = bytearray(content)
    for at in rng.sample(range(len(content)), rng.choice((1, 1, 2, 3))):
        changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mangle_tree(rng: random.Random, tree: Any) -> tuple[Any, str]:
    """Drop, rename, nest or replace one to three nodes of nested dicts and lists."""
    tree, done = copy.deepcopy(tree), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, key = tree, None
        while isinstance(node, (dict, list)) and node and (key is None or rng.random() < 0.6):
            parent, key = node, rng.choice([*node] if isinstance(node, dict) else [*range(len(node))])
            node = node[key]
        if key is None:
            return copy.deepcopy(rng.choice(NASTY)), 'replaced whole'
        kind = rng.choice(('drop', 'name', 'value', 'value', 'value', 'nest'))
        if kind == 'drop':
            del parent[key]
        elif kind == 'name' and isinstance(parent, dict):
            parent[rng.choice((f'{key}x', str(key).upper(), '', 'a.b', 'x' * 3000, '\x1b[2J', 7, None))] = parent.pop(
                key
            )
        elif kind == 'nest':
            for _ in range(rng.choice((1, 50))):
                parent[key] = rng.choice(({str(key): parent[key]}, [parent[key]]))
        else:
            kind = 'value'
            parent[key] = copy.deepcopy(rng.choice(NASTY))  # the next turn may change it
        done.append(f'{kind} of {str(key)[:40]!r}')
    return tree, ', '.join(done)
