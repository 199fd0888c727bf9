"""The classes of a run: the same when it continues, by name and order."""

from collections.abc import Sequence
from typing import Any

from ..data import SPLIT_FILE
from ..settings import UsageError

SHOWN = 5  # names of each kind in a message


def check_classes(
    state: dict[str, Any] | None, classes: Sequence[str], counts: tuple[int, int], divided_anew: bool = False
) -> list[str]:
    """Check that the data of a continued run has the classes that it was trained on.

    Args:
        state: The state of the run; None for a new one. Version 0.1 wrote none of class names into it: then the number
            of classes is compared.
        classes: The class names of the data.
        counts: Its numbers of training and validation images.
        divided_anew: Training and validation images were not divided as in the run, whose division is not at hand.

    Returns:
        A note if the number of images changed.

    Raises:
        UsageError: if the names, their order or their number differ; or the number of images, if they were divided
            anew.
    """
    if state is None:
        return []
    saved = state.get('classes')
    if saved is None:
        trained = len(state['model']['net.head.bias']) if 'net.head.bias' in state['model'] else len(classes)
        if trained != len(classes):
            raise UsageError(f'the run was trained on {trained} classes, the data has {len(classes)}')
        return []
    if difference := describe_difference(saved, classes):
        raise UsageError(
            f'the data no longer has the classes that the run was trained on: {difference}. Continue with the old '
            'data, or train a new run, with --weights to start from this one'
        )
    before = state.get('counts')
    if before and tuple(before) != tuple(counts):
        change = (
            f'the data has {counts[0]:,} training and {counts[1]:,} validation images, before it had '
            f'{before[0]:,} and {before[1]:,}'
        )
        if divided_anew:
            raise UsageError(
                f'{change}: divided anew, images that were trained on would be validated on. Put {SPLIT_FILE} of the '
                'run beside the folder of its states, or continue with the old data'
            )
        return [f'note      {change}']
    return []


def describe_difference(before: Sequence[str], after: Sequence[str]) -> str:
    """Say how two lists of class names differ; an empty string if they are equal."""
    if list(before) == list(after):
        return ''
    missing = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    parts = [f'{what} {join(names)}' for what, names in (('missing', missing), ('new', new)) if names]
    if not parts:
        i = next(i for i, (one, other) in enumerate(zip(before, after)) if one != other)
        return f'another order, from class {i} on ({before[i]!r} before, {after[i]!r} now)'
    return ', '.join(parts)


def join(names: Sequence[str]) -> str:
    """Join the first few names."""
    return f'{", ".join(map(repr, names[:SHOWN]))}{f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""}'
