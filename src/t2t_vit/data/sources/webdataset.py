"""WebDataset's layout: KEY.jpg with its label beside it, as text or number in KEY.cls or as "label" in KEY.json."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import DataError

LABEL_KINDS = ('cls', 'json')


def sample_key(name: str) -> str:
    """Return WebDataset's key of a sample: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition('/')
    return f'{folder}{slash}{file.partition(".")[0]}'


def read_label(content: bytes, kind: str, name: str) -> 'int | str | None':
    """Read the label in a .cls or .json file, a number or text, which may be of a number; None for JSON without one.

    Raises:
        DataError: if it is neither a whole number nor text.
    """
    try:
        text = content.decode('utf-8').strip()
        value = json.loads(text).get('label') if kind == 'json' else text
        if isinstance(value, str) and value.isdecimal():
            int(value)  # which has a limit of digits
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f'{name} holds no label: {error}') from error
    if value is not None and (value == '' or isinstance(value, bool) or not isinstance(value, (int, str))):
        raise DataError(f'{name} holds no label: expected a whole number or text, got {value!r}')
    return value


def label_samples(images: Sequence[str], labels: dict[str, Any], origin: str) -> list[Any]:
    """Return the label of each image of a tar, by the keys of samples.

    Raises:
        DataError: for images without a label, or several with one key.
    """
    keys = [sample_key(image) for image in images]
    if bare := [image for image, key in zip(images, keys) if key not in labels]:
        raise DataError(
            f'{origin} has labels in .cls or .json files, but none for {len(bare)} of {len(images)} images, '
            f'as {bare[0]}'
        )
    if len({*keys}) < len(keys):
        double = Counter(keys).most_common(1)[0][0]
        raise DataError(f'{origin} has several images of the name {double}; a label belongs to one')
    return [labels[key] for key in keys]
