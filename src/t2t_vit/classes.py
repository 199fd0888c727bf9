"""Match the classes of a data set with those of a model, by name and never by guess."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.utils import natural_key

from .settings import UsageError

ORDERS = ('text', 'natural', 'by-name')  # what --classes takes beside a file
SHOWN = 4  # names in a message


class ClassError(UsageError):
    """The classes of data and model do not belong together."""


def read_classes(choice: str, count: int) -> list[str] | None:
    """Return the names in a classes file in their order; None for one of `ORDERS`.

    A text file has a name a line; a .json file has what `names_of` takes.

    Raises:
        ClassError: if the file cannot be read, repeats a name, or has another number of names than the model `count`s.
    """
    if choice in ORDERS:
        return None
    try:
        text = Path(choice).read_text('utf-8-sig')
        if choice.endswith('.json'):
            names = names_of(json.loads(text))
        else:
            names = [line for line in text.split('\n') if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ClassError(
            f'--classes {choice}: cannot be read ({error}); expected a file with a class name a line, '
            f'or one of {", ".join(ORDERS)}'
        ) from None
    names = [name.rstrip('\r') for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ClassError(f'--classes {choice}: {few(twice)} stand there more than once')
    if len(names) != count:
        raise ClassError(f'--classes {choice}: the file has {len(names)} names, the model has {count} classes')
    return names


def names_of(tree: Any) -> list[str]:
    """Return the names in a list, in {name: index}, or in Hugging Face's {index: name}, all indices from 0 on.

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(tree, list) and all(isinstance(name, str) for name in tree):
        return tree
    if isinstance(tree, dict):
        places = [*range(len(tree))]
        if all(isinstance(name, str) for name in tree.values()) and {*tree} == {*map(str, places)}:
            return [tree[str(i)] for i in places]
        if all(type(index) is int for index in tree.values()) and sorted(tree.values()) == places:
            return sorted(tree, key=lambda name: tree[name])
    raise ValueError('JSON must be a list of names, {name: index}, or {index: name}, with the indices 0, 1, 2, …')


def few(names: Sequence[str]) -> str:
    """Return the first few of many names, for a message."""
    return ', '.join(map(repr, names[:SHOWN])) + (f', … ({len(names)} in all)' if len(names) > SHOWN else '')


def match_classes(
    names: Sequence[str] | None,
    classes: Sequence[str],
    count: int,
    data: str,
    choice: str | None = None,
    natural: bool = False,
) -> tuple[list[int], str]:
    """Return the model's output of each of the data's classes, and a note for the user.

    Args:
        names: The model's class names in the order of its outputs; None if the checkpoint names none.
        classes: The data's class names in the order of its labels.
        count: Outputs of the model.
        data: The data's name, for messages.
        choice: What the user said of the order: one of `ORDERS`; None for nothing.
        natural: True for a checkpoint of timm's train.py.

    Raises:
        ClassError: if the data has a class that the model does not have, or the order cannot be known.
    """
    if names is None:
        return order_without_names(list(classes), count, data, choice, natural)
    index = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in classes if name not in index]:
        missing = [name for name in names if name not in set(classes)]
        raise ClassError(
            f'the model has {len(names)} classes, {data} has {len(classes)}: {few(unknown)} '
            f'{"is" if len(unknown) == 1 else "are"} in the data and not in the model'
            + (f'; {few(missing)} in the model and not in the data' if missing else '')
        )
    found = [index[name] for name in classes]
    if found != sorted(found) and choice != 'by-name':
        i = next(i for i, (a, b) in enumerate(zip(found, sorted(found))) if a != b)
        raise ClassError(
            f'{data} and the model have the same classes in another order: number {i + 1} is {classes[i]!r} in the '
            f'data and {names[sorted(found)[i]]!r} in the model; if the names of both are right, match them with '
            '--classes by-name'
        )
    absent = [name for name in names if name not in set(classes)]
    return found, f'{data} has no images of {len(absent)} of {count} classes: {few(absent)}' if absent else ''


def order_without_names(
    classes: list[str], count: int, data: str, choice: str | None, natural: bool
) -> tuple[list[int], str]:
    """Return `match_classes` for a checkpoint without class names, whose outputs have the order of sorted folders.

    Raises:
        ClassError: if the numbers of classes differ, or text order and natural order do and nobody said which it is;
            for `by-name`.
    """
    if choice == 'by-name':
        raise ClassError(
            'the checkpoint names no classes that --classes by-name could match: say how its class folders were sorted '
            'with --classes text or --classes natural, or give the names with --classes FILE'
        )
    if len(classes) != count:
        raise ClassError(
            f'the model has {count} classes and no names for them, {data} has {len(classes)} ({few(classes)}): '
            'give the names in the order of the outputs with --classes FILE'
        )
    by_text, by_number = sorted(classes), sorted(classes, key=natural_key)
    chosen = choice or ('natural' if natural else None)
    if chosen is None and classes == by_text != by_number:
        raise ClassError(
            f'the checkpoint names no classes, and the folders of {data} have two orders: by text ({few(by_text)}) '
            f'and natural, as timm sorts them ({few(by_number)}): say which with --classes text or --classes natural, '
            'or give the names with --classes FILE'
        )
    order = {'text': by_text, 'natural': by_number}.get(chosen or '', classes)
    how = {'text': 'sorted by text', 'natural': 'in natural order, as timm sorts them'}.get(
        chosen or '', f"in the order of {data}'s"
    )
    note = f'the checkpoint names no classes; its outputs are taken to be the classes {how}'
    return [order.index(name) for name in classes], note
