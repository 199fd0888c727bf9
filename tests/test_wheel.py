"""Check that the wheel alone, in an environment without the sources, runs the quick start."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    'config.yaml',
    'model.safetensors',
    'config.json',
    'README.md',
    'metrics.jsonl',
    'curves.png',
    'predictions.png',
    'scores.json',
    'confusion.png',
    'checkpoints/step-00000396.pt',
}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel; without isolation if the build backend is installed, so that no network is needed."""
    folder = tmp_path_factory.mktemp('dist')
    offline = ['--no-isolation'] if importlib.util.find_spec('hatchling') else []
    subprocess.run(
        [sys.executable, '-m', 'build', '--wheel', *offline, '--outdir', folder, ROOT], check=True, capture_output=True
    )
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with the wheel and the dependencies of this one.

    A .pth file adds their path. Python does not read .pth files there, such as that of an editable installation.
    """
    folder = tmp_path_factory.mktemp('clean')
    venv.create(folder, with_pip=False)
    site = folder / 'lib' / f'python{sys.version_info.major}.{sys.version_info.minor}' / 'site-packages'
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
    subprocess.run(
        [
            folder / 'bin' / 'python',
            '-m',
            'pip',
            'install',
            '--no-deps',
            '--no-index',
            '--quiet',
            '--force-reinstall',
            '--prefix',
            folder,
            wheel,
        ],
        check=True,
        capture_output=True,
    )
    return folder


def test_wheel_contains_recipes_and_types_but_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {f't2t_vit/recipes/{file.name}' for file in (ROOT / 'src' / 't2t_vit' / 'recipes').glob('*.yaml')}
    assert recipes | {'t2t_vit/py.typed', 't2t_vit_cli.py', 't2t_vit_serve.py'} <= {*names}
    assert {name.split('/')[0].split('-')[0] for name in names} == {'t2t_vit', 't2t_vit_cli.py', 't2t_vit_serve.py'}
    assert not [name for name in names if 'test' in name]


def test_package_is_imported_from_the_wheel(clean, tmp_path):
    where = subprocess.run(
        [clean / 'bin' / 'python', '-c', 'import t2t_vit; print(t2t_vit.__file__)'],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != 'PYTHONPATH'},
    ).stdout
    assert Path(where.strip()).is_relative_to(clean)


@pytest.mark.timeout(900)
def test_quickstart(clean, tmp_path):
    """Run the commands of the Makefile in an empty folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(('MAKE', 'PYTHONPATH'))}
    plan = subprocess.run(
        ['make', '--dry-run', 'quickstart', f'BIN={clean / "bin"}', 'RUN=run'],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    commands = [words for words in map(shlex.split, plan.splitlines()) if words[0].endswith('/t2t-vit')]
    assert [words[1] for words in commands] == ['train', 'eval', 'predict']
    for words in commands:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, ''), done.stderr
    assert {str(p.relative_to(tmp_path / 'run')) for p in (tmp_path / 'run').rglob('*')} >= FILES
    assert json.loads((tmp_path / 'run' / 'scores.json').read_text())['top1'] >= 0.98
