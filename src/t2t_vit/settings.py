"""From YAML files and --dotted.options to a typed configuration; all that is wrong with them said at once."""

import argparse
import difflib
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Tuple, Type, TypeVar

import yaml
from jsonargparse import ArgumentParser

T = TypeVar('T')
Setting = Tuple[str, str, Any]  # where it stands, its dotted key, its value


class UsageError(ValueError):
    """What a user asked for cannot be understood; a line for every problem."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """', did you mean …?' where one of the choices is near, else nothing."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f', did you mean {near[0]}?' if near else ''


def require(rules: Iterable[Tuple[bool, str]]) -> None:
    """UsageError with the sentence of every rule that does not hold."""
    if problems := [sentence for holds, sentence in rules if not holds]:
        raise UsageError('\n'.join(problems))


def recipes() -> Dict[str, Path]:
    """The shipped recipes by name."""
    return {file.stem: file for file in sorted(Path(str(resources.files(__package__) / 'recipes')).glob('*.yaml'))}


def options(argv: Sequence[str], flags: Sequence[str] = ()) -> Tuple[List[Tuple[str, Any]], List[str]]:
    """`--key value`, `--key=value` and, for `flags`, `--key` alone, in their order; and what is wrong with them."""
    found: List[Tuple[str, Any]] = []
    problems, words = [], list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word[2:].partition('=')
        if not word.startswith('--'):
            problems.append(f'what is {word!r} for? options are --name value')
        elif key in flags and not equals:
            found.append((key, True))
        elif equals:
            found.append((key, value))
        elif words and not words[0].startswith('--'):
            found.append((key, words.pop(0)))
        else:
            problems.append(f'--{key} has no value')
    return found, problems


def read_settings(file: Path) -> List[Setting]:
    """The leaves of a YAML file.

    Raises:
        UsageError: if it is not there, or no YAML mapping.
    """
    try:
        tree = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f'cannot read {file}: {" ".join(str(error).split())}') from None
    if not isinstance(tree, dict):
        raise UsageError(f'{file} holds no settings: expected lines of key: value')
    return [(f'{key} in {file}', key, value) for key, value in flatten(tree)]


def flatten(tree: Dict[str, Any], prefix: str = '') -> List[Tuple[str, Any]]:
    """{'a': {'b': 1}} -> [('a.b', 1)]."""
    leaves: List[Tuple[str, Any]] = []
    for key, value in tree.items():
        name = f'{prefix}{key}'
        leaves += flatten(value, f'{name}.') if isinstance(value, dict) and value else [(name, value)]
    return leaves


def nest(tree: Dict[str, Any], key: str, value: Any) -> Dict[str, Any]:
    """Set tree['a']['b'] for 'a.b'; gives the tree."""
    *parents, name = key.split('.')
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
    branch[name] = deepcopy(value)  # later settings may reach into it
    return tree


def resolve(kind: Type[T], settings: Sequence[Setting], problems: Sequence[str] = ()) -> T:
    """A `kind` with these settings, later ones over earlier ones, and its defaults for the rest.

    `kind` is a dataclass with a method `problems`, which names what is wrong with its values; `problems` are those
    found before.

    Raises:
        UsageError: with every unknown key, wrong type and impossible value in one message.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, 'config')
    known = [key.partition('.')[2] for key in vars(parser.get_defaults().as_flat())]
    tree: Dict[str, Any] = {}
    problems = list(problems)
    for place, key, value in settings:
        if not any(key == name or key.startswith(f'{name}.') for name in known):
            problems.append(f'unknown option {place}{nearest(key, known)}')
            continue
        try:
            parser.parse_object(nest({}, f'config.{key}', value))
        except argparse.ArgumentError as error:
            problems.append(f'{place}: {" ".join(str(error).split()[3:])}')  # without jsonargparse's own name of it
            continue
        nest(tree, f'config.{key}', value)
    config = parser.instantiate(parser.parse_object(tree)).config
    problems += config.problems()
    if problems:
        raise UsageError('\n'.join(problems))
    return config
