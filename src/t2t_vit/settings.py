"""From YAML files and --dotted.options to a typed configuration; all that is wrong with them said at once."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser

T = TypeVar('T')
MOST_VALUES = 10_000  # of a file
Setting = tuple[str, str, Any]  # where it stands, its dotted key, its value


class UsageError(ValueError):
    """What a user asked for cannot be understood; a line for every problem."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """', did you mean …?' where one of the choices is near, else nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f', did you mean {near[0]}?' if near else ''


def require(rules: Iterable[tuple[bool, str]]) -> None:
    """UsageError with the sentence of every rule that does not hold."""
    if problems := [sentence for holds, sentence in rules if not holds]:
        raise UsageError('\n'.join(problems))


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    files = Path(str(resources.files(__package__) / 'recipes')).glob('*.yaml')
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def booleans(kind: Any, prefix: str = '') -> list[str]:
    """The dotted names of a dataclass's fields, or a function's arguments, that are true or false."""
    names: list[str] = []
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            names += booleans(hint, f'{prefix}{name}.')
        elif hint in (bool, bool | None):
            names.append(f'{prefix}{name}')
    return names


def spell_out(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words of a command with `_` for `-` in the options' names, and `true` for flags that stand alone."""
    spelled: list[str] = []
    for word, following in zip(argv, [*argv[1:], '']):
        key, equals, value = word.partition('=')
        if word.startswith('--'):
            key = f'--{key[2:].replace("-", "_")}'
            if key[2:] in flags and not equals and following.lower() not in ('true', 'false', 'null'):
                equals, value = '=', 'true'
        spelled.append(f'{key}{equals}{value}')
    return spelled


def options(argv: Sequence[str]) -> tuple[list[tuple[str, Any]], list[str]]:
    """`--key value` and `--key=value` in their order; and what is wrong with them."""
    found: list[tuple[str, Any]] = []
    problems, words = [], list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word[2:].partition('=')
        if not word.startswith('--'):
            problems.append(f'what is {word!r} for? options are --name value')
        elif equals:
            found.append((key, value))
        elif words and not words[0].startswith('--'):
            found.append((key, words.pop(0)))
        else:
            problems.append(f'--{key} has no value')
    return found, problems


def read_settings(file: Path, above: Sequence[Path] = ()) -> list[Setting]:
    """The leaves of a YAML file, behind those of the recipe that it names as its `base`.

    `base` is a shipped recipe's name, or a file beside this one. `above` are the files on the way here.

    Raises:
        UsageError: if it is not there, no YAML mapping, or its own base.
    """
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, names that are no path
        raise UsageError(f'cannot read {str(file)[:200]}: {str(error)[:200]}') from None
    tree = parse_settings(text, str(file))
    base = tree.pop('base', None)
    settings: list[Setting] = []
    if base is not None:
        beside = file.parent / str(base)
        if str(base) not in recipes() and not os.path.isfile(beside):  # Path.is_file raises where a name is too long
            raise UsageError(
                f'base in {file}: no recipe and no file {str(base)[:200]!r}{nearest(str(base), recipes())}'
            )
        source = recipes().get(str(base), beside)
        if source in (*above, file):
            raise UsageError(f'base in {file}: {base} leads back to itself')
        settings = read_settings(source, (*above, file))
    return settings + [(f'{key} in {file}', key, value) for key, value in flatten(tree)]


def parse_settings(text: str, place: str) -> dict[str, Any]:
    """A YAML mapping, with nothing executed; `place` is where it stands, for messages.

    Raises:
        UsageError: if it is none, or one that unfolds without measure.
    """
    try:
        tree = yaml.safe_load(text)
        count = count_values(tree, {})
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of dates and long numbers
        raise UsageError(f'cannot read {place}: {" ".join(str(error).split())}') from None
    if count > MOST_VALUES:
        raise UsageError(f'{place} unfolds to {count:,} values; a configuration has at most {MOST_VALUES:,}')
    if not isinstance(tree, dict):
        raise UsageError(f'{place} holds no settings: expected lines of key: value')
    return tree


def count_values(node: Any, known: dict[int, int]) -> int:
    """Values of nested dicts and lists, those behind YAML's aliases counted as often as they appear.

    Raises:
        ValueError: if something holds itself, or a number is longer than Python will print.
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


def flatten(tree: dict[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
    """{'a': {'b': 1}} -> [('a.b', 1)]."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f'{prefix}{key}'
        leaves += flatten(value, f'{name}.') if isinstance(value, dict) and value else [(name, value)]
    return leaves


def nest(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set `tree['a']['b']` for 'a.b'; gives the tree."""
    *parents, name = key.split('.')
    branch = tree
    for parent in parents:
        if not isinstance(branch.get(parent), dict):  # a later setting goes over a plain value
            branch[parent] = {}
        branch = branch[parent]
    branch[name] = deepcopy(value)  # later settings may reach into it
    return tree


def use_new_name(setting: Setting, renamed: dict[str, str]) -> Setting:
    """Replace the old name of a setting, with a warning on stderr."""
    place, key, value = setting
    if key not in renamed:
        return setting
    text = f'{place[:200]}: {key} is now {renamed[key]}; the old name will be removed'
    print(f't2t-vit: warning: {text}', file=sys.stderr)
    return place, renamed[key], value


def resolve(kind: type[T], settings: Sequence[Setting], problems: Sequence[str] = ()) -> T:
    """A `kind` with these settings, later ones over earlier ones, and its defaults for the rest.

    `kind` is a dataclass with a method `problems`, which names what is wrong with its values; `problems` are those
    found before.

    Raises:
        UsageError: with every unknown key, wrong type and impossible value in one message.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, 'config')
    known = [key.partition('.')[2] for key in vars(parser.get_defaults().as_flat())]

    def parse(some: Sequence[Setting], defaults: bool = True) -> Any:
        tree: dict[str, Any] = {}
        for _, key, value in some:
            nest(tree, f'config.{key}', value)
        return parser.parse_object(tree, defaults=defaults)

    def problem(setting: Setting) -> str:
        place, key, _ = setting
        if not any(key == name or key.startswith(f'{name}.') for name in known):
            return f'unknown option {place[:200]}{nearest(key, known)}'
        try:
            parse([setting], defaults=False)
        except argparse.ArgumentError as error:
            return f'{place}: {" ".join(str(error).split()[3:])}'  # without jsonargparse's own name of it
        return ''

    problems = list(problems)
    settings = [use_new_name(setting, getattr(kind, 'RENAMED', {})) for setting in settings]
    settings = [(place, key, 'null' if value is None else value) for place, key, value in settings]  # type-checked so
    try:
        if any(name.startswith(f'{key}.') for _, key, _ in settings for name in known):
            raise AttributeError('a plain value for a group of settings')
        parsed = parse(settings)
    except (argparse.ArgumentError, AttributeError):  # a wrong type, or options of what is no group of options
        # one by one takes many times as long, and finds all that is wrong
        found = [(problem(setting), setting) for setting in settings]
        problems += [text for text, _ in found if text]
        parsed = parse([setting for text, setting in found if not text])
    config = parser.instantiate(parsed).config
    problems += config.problems()
    if problems:
        more = [f'… and {len(problems) - 50} more'] if len(problems) > 50 else []
        raise UsageError('\n'.join([*problems[:50], *more]))
    return config
