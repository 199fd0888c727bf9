"""Run a script of timm's with the models of this package registered: `python -m t2t_vit.timm validate.py …`."""

import runpy
import sys
from pathlib import Path

import t2t_vit  # noqa: F401  # registers the models


def main() -> None:
    """Run the script that the first word names with the words after it, as `python SCRIPT …` would."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = f'no script {sys.argv[1]}' if len(sys.argv) > 1 else 'no script given'
        sys.exit(f'{given}; usage: python -m t2t_vit.timm SCRIPT.py …, with a script of a checkout of timm')
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
