"""Split the words of a command line into settings, and describe the options of a command."""

import inspect
import os
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

from .settings import Setting, alternatives, is_flag, is_list, option_types, parents

SWITCHES = ('true', 'false', 'null')  # the values of a flag


def split_words(
    argv: Sequence[str],
    types: Mapping[str, Any],
    positional: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> tuple[list[Setting], list[str]]:
    """Split `--key value`, `--key=value`, flags and positional words into settings.

    Hyphens and underscores in names are the same. A flag may stand alone. An option of a list takes all words up to the
    next option. After `--` every word is positional.

    Args:
        argv: The words after the command.
        types: The types of the known options, by name.
        positional: The options that need no name, in their order; the last one may be a list.
        aliases: Other names of options, such as {'-o': 'output', 'lr': 'optimizer.lr'}.

    Returns:
        The settings in their order, and a sentence for every word that is out of place.
    """
    aliases = aliases or {}
    found: list[Setting] = []
    problems: list[str] = []
    loose: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == '--':
            loose += words
            break
        name, equals, value = word.partition('=')
        if not is_option(word, aliases):
            if equals and aliases.get(name, name) in types and not os.path.exists(word):  # as ultralytics has it
                problems.append(f'unexpected argument {word!r}, did you mean --{name} {value}?')
            else:
                loose.append(word)
            continue
        key = name.removeprefix('--').replace('-', '_') if name.startswith('--') else name
        key = aliases.get(key, key)
        hint = types.get(key, str)
        following = next((i for i, word in enumerate(words) if is_option(word, aliases) or word == '--'), len(words))
        if equals:
            found.append(Setting(name, key, value))
        elif is_flag(hint):
            stated = words and words[0].lower() in SWITCHES
            found.append(Setting(name, key, words.pop(0).lower() if stated else 'true'))
        elif key not in types and not any(parent in types for parent in parents(key)):
            found.append(Setting(name, key, ' '.join(words[:following])))  # unknown, as whoever reads it will say
            words = words[following:]
        elif not following:
            problems.append(f'{name} has no value')
        elif is_list(hint):
            values, words = words[:following], words[following:]
            whole = len(values) == 1 and values[0].startswith('[') and values[0].endswith(']')  # as in a file
            found.append(Setting(name, key, values[0] if whole else values))
        else:
            found.append(Setting(name, key, words.pop(0)))
    for i, key in enumerate(positional):
        several = is_list(types[key])
        if loose[i:]:
            found.append(Setting(key, key, loose[i:] if several else loose[i]))
        if several:
            return found, problems
    extra = loose[len(positional) :]
    return found, [*problems, *(f'unexpected argument {word!r}, options are --name value' for word in extra)]


def is_option(word: str, aliases: Collection[str] = ()) -> bool:
    """Return whether a word is the name of an option, and not a value such as -2."""
    return len(word) > 2 and word.startswith('--') or word in aliases


def required(kind: Any) -> list[str]:
    """Return the arguments of a function that have no default."""
    return [name for name in inspect.signature(kind).parameters if name not in defaults(kind)]


# Help


def describe_options(kind: Any) -> list[tuple[str, Any, Any, str]]:
    """Return (dotted name, type, default, description) of every option of a dataclass or function."""
    described = []
    documented = docstring_parser.parse(kind.__doc__).params
    texts = {item.arg_name: ' '.join((item.description or '').split()) for item in documented}
    hints, default = get_type_hints(kind), defaults(kind)
    for name in inspect.signature(kind).parameters:
        if is_dataclass(hints[name]):
            described += [(f'{name}.{key}', *rest) for key, *rest in describe_options(hints[name])]
        else:
            described.append((name, hints[name], default.get(name, MISSING), texts.get(name, '')))
    return described


def defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields or a function's arguments that have one."""
    if is_dataclass(kind):
        made = {field.name: field.default_factory() for field in fields(kind) if field.default_factory is not MISSING}
        return {**{field.name: field.default for field in fields(kind) if field.default is not MISSING}, **made}
    parameters = inspect.signature(kind).parameters.items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


def metavar(hint: Any) -> str:
    """Return a placeholder for the values of a type, such as N or a|b."""
    parts = alternatives(hint)
    if is_list(hint):
        item = metavar(get_args(parts[0])[0])
        return f'{item} [{item} …]'
    if get_origin(parts[0]) is Literal:
        return '|'.join(map(str, get_args(parts[0])))
    names = {bool: '', str: 'TEXT', int: 'N', float: 'X'}
    simple = next((names[base] for base in names if isinstance(parts[0], type) and issubclass(parts[0], base)), 'VALUE')
    return f'{simple}|[{simple}, …]' if len(parts) > 1 and get_origin(parts[1]) is tuple else simple


def format_help(kind: Any, special: Sequence[tuple[str, str]] = ()) -> str:
    """Return a description of all options, `special` ones first, as wide as the terminal and at most 100 columns."""
    width = min(shutil.get_terminal_size().columns, 100)
    lines = []
    for name, text in special:
        lines += [f'  {name}', *wrap(text, width)]
    for name, hint, default, text in describe_options(kind):
        lines.append(f'  --{name.replace("_", "-")} {metavar(hint)}'.rstrip())
        shown = '' if default in (None, '', (), [], {}) else f' Default: {spell(default)}.'
        lines += wrap(f'{text}{" Required." if default is MISSING else shown}', width)
    return '\n'.join(lines)


def wrap(text: str, width: int) -> list[str]:
    """Return a description as indented lines."""
    return textwrap.wrap(text, width, initial_indent=' ' * 8, subsequent_indent=' ' * 8, break_on_hyphens=False)


def spell(value: Any) -> str:
    """Return a default as a user would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'[{", ".join(map(spell, value))}]' if isinstance(value, (list, tuple)) else f'{value}'


# Completion


def known_options(kind: Any) -> dict[str, list[str]]:
    """Return the options of a command with the values to choose from, if these are few."""
    found = {}
    for name, hint in option_types(kind).items():
        part = alternatives(hint)[0]
        part = get_args(part)[0] if is_list(part) else part
        found[name] = [str(value) for value in get_args(part)] if get_origin(part) is Literal else []
    return found
