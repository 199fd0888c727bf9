"""Settings that any version wrote, translated to this version: renamed, changed and dropped fields."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from .. import __version__
from ..settings import Setting, UsageError, flatten
from .config import RENAMED, Config

FIRST_WITH_TOTAL_EPOCHS = (0, 2)  # before it, `epochs` did not include the cooldown


def upgrade(
    settings: Sequence[Setting], version: str | None = None, drop: bool = True
) -> tuple[list[Setting], list[str]]:
    """Translate the settings of a file that any version wrote into those of this version.

    Renamed fields get their new names. Fields that this version does not know are dropped, and named in the notes, if
    an older version wrote them; they are refused if a newer one did, since they may change the result. Fields that
    are missing take their defaults.

    Args:
        settings: The settings of one file.
        version: The version that wrote it; by default an old one if a field has an old name, else this one.
        drop: Set to false for a file that a user wrote, in which an unknown field is a mistake.

    Returns:
        The settings, and notes for the user.

    Raises:
        UsageError: naming the unknown fields of a newer version.
    """
    old_names = any(setting.key in RENAMED for setting in settings)
    written = parse_version(version or ('0.1.0' if old_names else __version__))
    values = {setting.key: setting.value for setting in settings}
    if written < FIRST_WITH_TOTAL_EPOCHS and 'epochs' in values:
        total = values['epochs'] + (values.get('optimizer.cooldown_epochs') or 0)
        settings = [setting._replace(value=total) if setting.key == 'epochs' else setting for setting in settings]
    settings = [setting._replace(key=RENAMED.get(setting.key, setting.key)) for setting in settings]
    unknown = [setting for setting in settings if drop and not is_known(setting.key)]
    if unknown and written > parse_version(__version__):
        names = ', '.join(setting.source for setting in unknown)
        raise UsageError(
            f'version {version} of t2t-vit wrote {names}, which this version, {__version__}, does not know: '
            f'install {version} or a later one'
        )
    notes = [f'note      {setting.source} is no longer known and is ignored' for setting in unknown]
    return [setting for setting in settings if setting not in unknown], notes


def parse_version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, as (0, 2, 0) for 0.2.0.dev1."""
    return tuple(int(part) for part in text.split('.')[:3] if part.isdigit())


@cache
def default_settings() -> dict[str, Any]:
    """Return all settings with their defaults, by dotted name."""
    return dict(flatten(asdict(Config())))


def is_known(key: str) -> bool:
    """Tell if this version has a setting of this name."""
    known = default_settings()
    return key in known or any(key.startswith(f'{name}.') and known[name] == {} for name in known)
