"""Words of a command line become settings, and options get a readable description."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from t2t_vit.options import describe_options, format_help, split_words

TYPES: dict[str, Any] = {
    'inputs': Sequence[str],
    'data.memory': bool | None,
    'batch_size': int,
    'output': str,
    'models': list[str],
    'args': dict[str, Any],
}


def split(*argv: str, positional: Sequence[str] = ('inputs',)) -> tuple[dict[str, Any], list[str]]:
    found, problems = split_words(argv, TYPES, positional, {'-o': 'output', 'batch': 'batch_size'})
    return {setting.key: setting.value for setting in found}, problems


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['--batch-size', '2'], {'batch_size': '2'}),
        (['--batch_size=2'], {'batch_size': '2'}),
        (['--batch', '-2'], {'batch_size': '-2'}),
        (['-o', 'a=b'], {'output': 'a=b'}),
        (['--output=a=b'], {'output': 'a=b'}),
        (['--data.memory', 'a.jpg'], {'data.memory': 'true', 'inputs': ['a.jpg']}),
        (['--data.memory', 'False', 'a.jpg'], {'data.memory': 'false', 'inputs': ['a.jpg']}),
        (['--data.memory=false'], {'data.memory': 'false'}),
        (['--models', 'a', 'b', '-o', 'c', 'd'], {'models': ['a', 'b'], 'output': 'c', 'inputs': ['d']}),
        (['--models', '[a, b]'], {'models': '[a, b]'}),
        (['a', '-o', 'b', 'c', '--', '--d', '-o'], {'output': 'b', 'inputs': ['a', 'c', '--d', '-o']}),
        (['-', '-a'], {'inputs': ['-', '-a']}),
        (['--args.depth', '3'], {'args.depth': '3'}),
    ],
)
def test_words_become_settings(argv, expected):
    assert split(*argv) == (expected, [])


def test_positional_words_fill_options_in_order():
    assert split('a', 'b', positional=('output', 'batch_size')) == ({'output': 'a', 'batch_size': 'b'}, [])


def test_misplaced_words_are_all_reported():
    assert split('a', 'b', 'batch=3', 'c=3', '--output', '--args.depth', positional=('batch_size',))[1] == [
        "unexpected argument 'batch=3', did you mean --batch 3?",
        '--output has no value',
        '--args.depth has no value',
        "unexpected argument 'b', options are --name value",
        "unexpected argument 'c=3', options are --name value",
    ]


def test_unknown_option_takes_its_words_along():
    assert split('--input-size', '3', '224', '--amp') == ({'input_size': '3 224', 'amp': ''}, [])


@dataclass
class Inner:
    """Describe something.

    Args:
        lr: Peak learning rate.
    """

    lr: float = 5e-4


@dataclass
class Outer:
    """Describe everything.

    Args:
        size: Pixels, one number or
            [height, width].
        mode: How.
        names: Whom.
        flag: If so.
    """

    size: int | tuple[int, int] | None = None
    mode: Literal['a', 'b'] = 'a'
    names: list[str] = field(default_factory=list)
    flag: bool = True
    inner: Inner = field(default_factory=Inner)


def test_describe_options_follows_nested_dataclasses():
    assert [(name, default, text) for name, _, default, text in describe_options(Outer)] == [
        ('size', None, 'Pixels, one number or [height, width].'),
        ('mode', 'a', 'How.'),
        ('names', [], 'Whom.'),
        ('flag', True, 'If so.'),
        ('inner.lr', 5e-4, 'Peak learning rate.'),
    ]


def test_help_shows_placeholders_and_defaults():
    assert format_help(Outer, [('--trust', 'Execute.')]).split('\n') == [
        '  --trust',
        '        Execute.',
        '  --size N|[N, …]',
        '        Pixels, one number or [height, width].',
        '  --mode a|b',
        '        How. Default: a.',
        '  --names TEXT [TEXT …]',
        '        Whom.',
        '  --flag',
        '        If so. Default: true.',
        '  --inner.lr X',
        '        Peak learning rate. Default: 0.0005.',
    ]
