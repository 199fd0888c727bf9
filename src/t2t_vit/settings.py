"""Turn YAML files and options into typed configurations, and report all problems in one message."""

import argparse
import difflib
import inspect
import os
import sys
import types
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import is_dataclass, make_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from . import custom

T = TypeVar('T')
MAX_VALUES = 10_000  # in one file
MAX_PROBLEMS = 50  # in one message


class UsageError(ValueError):
    """Report mistakes in a user's request, one a line. The command line prints them and exits with 2."""


class Setting(NamedTuple):
    """Hold one value of a configuration and where it comes from."""

    source: str  # for messages: '--epochs', or 'epochs in config.yaml'
    key: str  # dotted
    value: Any
    from_file: bool = False  # not typed by the user, so it must not name code


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return the closest choice, or an empty string if none is close; a last component such as `lr` counts alone."""
    choices = list(choices)
    same = [choice for choice in choices if choice.rpartition('.')[2].lstrip('-') == word.rpartition('.')[2]]
    return next(iter(same or difflib.get_close_matches(word, choices, n=1)), '')


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ', did you mean …?' with the closest choice, or an empty string if none is close."""
    found = suggest(word, choices)
    return f', did you mean {found}?' if found else ''


def require(rules: Iterable[tuple[bool, str]]) -> None:
    """Check (condition, message) pairs.

    Raises:
        UsageError: with the message of every condition that is false.
    """
    if problems := [message for holds, message in rules if not holds]:
        raise UsageError('\n'.join(problems))


def at_least(least: int, **values: float) -> list[tuple[bool, str]]:
    """Return rules for `require`: each of these numbers must be at least `least`."""
    return [(value >= least, f'{name} must be at least {least}, got {value}') for name, value in values.items()]


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    files = Path(str(resources.files(__package__) / 'recipes')).glob('*.yaml')
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


# Files


def read_settings(file: Path, above: Sequence[Path] = ()) -> list[Setting]:
    """Read the settings of a YAML file, after those of the recipe that it names as its `base`.

    Args:
        file: The file, in UTF-8.
        above: The files whose `base` led here.

    Raises:
        UsageError: if the file cannot be read, is not a YAML mapping, or is its own base.
    """
    try:
        text = file.read_text(encoding='utf-8')
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, names that are not a path
        raise UsageError(f'cannot read {str(file)[:200]}: {str(error)[:200]}') from None
    tree = parse_settings(text, str(file))
    base = tree.pop('base', None)
    settings: list[Setting] = []
    if base is not None:
        beside = file.parent / str(base)
        if str(base) not in recipes() and not os.path.isfile(beside):  # Path.is_file raises if a name is too long
            raise UsageError(
                f'base in {file}: no recipe and no file {str(base)[:200]!r}{nearest(str(base), recipes())}'
            )
        source = recipes().get(str(base), beside)
        if source in (*above, file):
            raise UsageError(f'base in {file}: {base} leads back to itself')
        settings = read_settings(source, (*above, file))
    return settings + as_settings(tree, str(file))


def as_settings(tree: dict[str, Any], file: str) -> list[Setting]:
    """Return the values of a configuration that was read from a file."""
    return [Setting(f'{key} in {file}', key, value, from_file=True) for key, value in flatten(tree)]


def parse_settings(text: str, file: str) -> dict[str, Any]:
    """Parse a YAML mapping without executing anything.

    Args:
        text: The YAML text.
        file: Where it was read, for messages.

    Raises:
        UsageError: if it is not a mapping, or its aliases expand beyond `MAX_VALUES`.
    """
    try:
        tree = yaml.safe_load(text)
        count = count_values(tree, {})
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: invalid dates, very long numbers
        raise UsageError(f'cannot read {file}: {" ".join(str(error).split())}') from None
    if count > MAX_VALUES:
        raise UsageError(f'{file} expands to {count:,} values; a configuration has at most {MAX_VALUES:,}')
    if not isinstance(tree, dict):
        raise UsageError(f'{file} holds no settings: expected lines of key: value')
    return tree


def count_values(node: Any, known: dict[int, int]) -> int:
    """Count the values in nested dicts and lists; a YAML alias counts each time it appears.

    Raises:
        ValueError: if a value contains itself, or a number is longer than 64 bits.
    """
    if isinstance(node, int) and node.bit_length() > 64:
        raise ValueError(f'a number of {node.bit_length():,} bits')
    if not isinstance(node, (dict, list)):
        return 1
    if known.get(id(node)) == 0:
        raise ValueError('an alias leads back to itself')
    if id(node) not in known:
        known[id(node)] = 0
        known[id(node)] = 1 + sum(
            count_values(child, known) for child in (node.values() if isinstance(node, dict) else node)
        )
    return known[id(node)]


def flatten(tree: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
    """Return nested values with dotted keys: {'a': {'b': 1}} -> [('a.b', 1)]."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f'{prefix}{key}'
        leaves += flatten(value, f'{name}.') if isinstance(value, dict) and value else [(name, value)]
    return leaves


def nest(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set `tree['a']['b']` for the dotted key 'a.b' and return the tree."""
    *parents, name = key.split('.')
    branch = tree
    for parent in parents:
        if not isinstance(branch.get(parent), dict):  # a later setting replaces a plain value
            branch[parent] = {}
        branch = branch[parent]
    branch[name] = deepcopy(value)  # later settings may change it
    return tree


# Types


def option_types(kind: Any, prefix: str = '') -> dict[str, Any]:
    """Return the types of a dataclass's fields or a function's arguments by dotted name."""
    found: dict[str, Any] = {}
    names = inspect.signature(kind).parameters
    for name, hint in get_type_hints(kind).items():
        if name in names and is_dataclass(hint):
            found.update(option_types(hint, f'{prefix}{name}.'))
        elif name in names:
            found[f'{prefix}{name}'] = hint
    return found


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union except None, or the type itself."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [part for part in parts if part is not type(None)]


def is_flag(hint: Any) -> bool:
    """Return whether an option of this type needs no value."""
    return alternatives(hint) == [bool]


def is_list(hint: Any) -> bool:
    """Return whether an option of this type takes several words."""
    return get_origin(alternatives(hint)[0]) in (list, abc.Sequence)


def describe_type(hint: Any) -> str:
    """Return a phrase for the values that a type accepts, such as 'a whole number >0 or null'."""
    names = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text', type(None): 'null'}
    if hint in names:
        return names[hint]
    if get_origin(hint) in (Union, types.UnionType):
        return ' or '.join(map(describe_type, get_args(hint)))
    if get_origin(hint) is Literal:
        return ' or '.join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple, abc.Sequence):
        items = [describe_type(item) for item in get_args(hint) if item is not ...]
        return f'[{", ".join(items)}{", …" if get_origin(hint) is not tuple or ... in get_args(hint) else ""}]'
    base = next((base for base in (int, float) if isinstance(hint, type) and issubclass(hint, base)), None)
    if base and hint.__doc__:  # a restricted number type of jsonargparse: 'int restricted to be >0'
        return f'{names[base]} {hint.__doc__.partition("restricted to be ")[2] or hint.__doc__}'
    return 'key: value pairs' if get_origin(hint) is dict or hint is dict else 'a value'


@cache
def _parser(hint: Any) -> ArgumentParser:
    """Return a parser of a single value of this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(make_dataclass('Option', [('value', hint)]))
    return parser


def convert(hint: Any, value: Any) -> Any:
    """Return a value as the type says, parsed if it is text.

    Raises:
        ValueError: with a phrase for the expected values.
    """
    if value in (None, 'null') and (hint is Any or type(None) in get_args(hint)):
        return None
    try:
        parsed = _parser(hint).parse_object({'value': 'null' if value is None else value}).value
    except (argparse.ArgumentError, TypeError, AttributeError):
        raise ValueError(f'expected {describe_type(hint)}, got {value!r:.200}') from None
    return _plain(parsed)


def _plain(value: Any) -> Any:
    """Return plain numbers in place of those of jsonargparse's restricted types, which YAML cannot write."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    for base in (int, float):
        if isinstance(value, base) and type(value) not in (bool, base):
            return base(value)
    return value


# From settings to a configuration


def use_new_name(setting: Setting, renamed: Mapping[str, str]) -> Setting:
    """Replace the old name of a setting, with a warning on stderr."""
    if not (new := renamed.get(setting.key)):
        return setting
    text = f'{setting.source[:200]}: {setting.key} is now {new}; the old name will be removed'
    print(f't2t-vit: warning: {text}', file=sys.stderr)
    return setting._replace(key=new)


def check_values(
    kind: Any, settings: Iterable[Setting], advice: Callable[[str], str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Convert settings to the types of a dataclass or function.

    Args:
        kind: The dataclass or function.
        settings: Later ones replace earlier ones of the same key.
        advice: Returns the end of the message for an unknown key, or an empty string; by default the nearest name.

    Returns:
        A tree of values, and a sentence for every unknown key, wrong type and untrusted name of code.
    """
    known = option_types(kind)
    tree: dict[str, Any] = {}
    problems: list[str] = []
    refused: dict[str, str] = {}
    for source, key, value, from_file in settings:
        parent = next((name for name in parents(key) if name in known), key)
        hint = known.get(key, Any if parent != key and get_origin(known[parent]) is dict else None)
        refused = {name: text for name, text in refused.items() if name not in (key, *parents(key))}
        if from_file and (text := custom.refusal(key, value, source.partition(' in ')[2] or source)):
            refused[key] = text
        elif any(name.startswith(f'{key}.') for name in known):
            if value == {}:
                continue
            problems.append(f'{source} is a group of options, such as {group_example(key, known)}; got {value!r:.200}')
        elif hint is None:
            names = [f'--{name}' for name in known] if source.startswith('--') else known
            below = f': {parent} is a single value' if parent != key else advice(key) if advice else ''
            problems.append(f'unknown option {source[:200]}{below or nearest(key, names)}')
        else:
            try:
                nest(tree, key, convert(hint, value))
            except ValueError as error:
                problems.append(f'{source}: {error}')
    return tree, [*problems, *refused.values()]


def parents(key: str) -> Iterator[str]:
    """Yield the dotted keys above a key, the nearest first."""
    while '.' in key:
        key = key.rpartition('.')[0]
        yield key


def group_example(key: str, known: Iterable[str]) -> str:
    """Return the first option of a group."""
    return next(name for name in known if name.startswith(f'{key}.'))


def resolve(
    kind: type[T], settings: Sequence[Any], problems: Sequence[str] = (), advice: Callable[[str], str] | None = None
) -> T:
    """Build a dataclass from settings; later ones replace earlier ones, and its defaults fill the rest.

    Args:
        kind: A dataclass with a method `problems`, which returns a sentence for every impossible value, and optionally
            a class variable `RENAMED`, old dotted names of fields and the present ones.
        settings: `Setting`s, or tuples (source, key, value).
        problems: Problems that were found before.
        advice: See `check_values`.

    Raises:
        UsageError: with every unknown key, wrong type and impossible value in one message.
    """
    renamed = getattr(kind, 'RENAMED', {})
    tree, found = check_values(kind, [use_new_name(Setting(*setting), renamed) for setting in settings], advice)
    config = build(kind, tree)
    raise_problems([*problems, *found, *config.problems()])  # type: ignore[attr-defined]
    return config


def raise_problems(problems: Sequence[str]) -> None:
    """Raise a `UsageError` that lists the problems, if there are any."""
    if problems:
        more = [f'… and {len(problems) - MAX_PROBLEMS} more'] if len(problems) > MAX_PROBLEMS else []
        raise UsageError('\n'.join([*problems[:MAX_PROBLEMS], *more]))


def build(kind: type[T], tree: Mapping[str, Any]) -> T:
    """Build a dataclass, and those nested in it, from a tree of values."""
    hints = get_type_hints(kind)
    nested = {name: build(hints[name], value) for name, value in tree.items() if is_dataclass(hints[name])}
    return kind(**{**tree, **nested})
