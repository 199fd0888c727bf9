"""The package's order: who may import whom, that each module stands alone, and that none grows long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import t2t_vit

ROOT = Path(t2t_vit.__file__).parent
LAYERS = [  # a module imports from those above it only
    [
        'settings',
        'console',
        'plots',
        'models.recompute',
        'models.positions',
        'models.own',
        'models.pyramid',
        'reproduce.mobilenet',
        'models.kernels',
    ],
    ['models.soft_split'],
    ['models.fused'],
    ['data.errors', 'data.augment', 'models.tokens'],
    ['data.decode'],
    ['data.sources', 'data.preprocessing'],
    ['data.batches'],
    ['data.images'],
    ['data'],
    ['models.blocks', 'models.checkpoints'],
    ['models.t2t_vit'],
    ['models.listing'],
    ['trained', 'results', 'look.attention'],
    ['benchmark', 'evaluate', 'hub', 'look.trace', 'look.opened'],
    ['look.features', 'look.gradients', 'export.metadata', 'export.archive', 'export.images', 'export.graph'],
    ['look.draw', 'look.report', 'export.runtime'],
    ['export', 'export.formats', 'export.int8', 'export.check'],
    ['export.command', 'predict'],
    ['look.visualize'],
    ['train.config', 'train.state', 'train.token_labels'],
    ['train.teacher', 'train.log'],
    ['train.tasks'],
    ['train.build', 'train.plan'],
    ['train.loop', 'reproduce.structures'],
    ['reproduce.arms'],
    ['reproduce.runs', 'reproduce.verdicts'],
    ['reproduce.report'],
    ['reproduce.command', 'explore.seen'],
    ['explore.views', 'explore.uploads'],
    ['explore.page'],
    ['explore.command'],
    ['cli'],
]
ABOVE_ALL = 't2t_vit'  # for __version__, which the package sets before it imports anything
LONGEST = 600  # lines
PACKAGES = ['data', 'export']  # whose __init__ imports
MODULES = sorted(
    [
        *PACKAGES,
        *(
            str(file.relative_to(ROOT).with_suffix('')).replace('/', '.')
            for file in ROOT.rglob('*.py')
            if file.name != '__init__.py'
        ),
    ]
)


def imported(module: str) -> Iterator[str]:
    """What a module imports, inside functions too; from its own package without the package's name."""
    file = ROOT / module.replace('.', '/')
    package = ['t2t_vit', *module.split('.')[: None if module in PACKAGES else -1]]
    file = file / '__init__.py' if module in PACKAGES else file.with_suffix('.py')
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = '.'.join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f'{base}.{alias.name}'.removeprefix('t2t_vit.')
                yield whole if whole in MODULES else base.removeprefix('t2t_vit.')


def test_every_module_has_its_layer():
    assert sorted(module for layer in LAYERS for module in layer) == MODULES


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_one_way(module):
    place = next(i for i, layer in enumerate(LAYERS) if module in layer)
    allowed = {name for layer in LAYERS[:place] for name in layer}
    own = {name for name in imported(module) if name in MODULES or name.startswith('t2t_vit')}
    assert own - {ABOVE_ALL} <= allowed


def test_nothing_imports_tests_and_nothing_is_called_utils():
    names = {name.split('.')[0] for module in MODULES for name in imported(module)}
    assert not names & {'tests', 'conftest', 'reference'}
    assert not [module for module in MODULES if 'util' in module]


def test_the_command_line_alone_imports_little():
    """Each command is imported when it is called."""
    assert {name for name in imported('cli') if name in MODULES} == {
        'settings',
        'train.config',
        'train.loop',
        'train.state',
    }


@pytest.mark.parametrize('file', sorted(ROOT.rglob('*.py')), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_long(file):
    assert len(file.read_text().splitlines()) <= LONGEST


def test_every_module_imports_first_and_without_warnings():
    """Each in a fresh interpreter would take minutes: a cycle shows where none of the others is there yet."""
    check = '\n'.join(
        (
            'import importlib, sys, warnings',
            'import accelerate, gradio, jsonargparse, matplotlib.figure, pyarrow, timm, torchmetrics  # their warnings',
            'warnings.simplefilter("error")',
            'warnings.simplefilter("ignore", ResourceWarning)  # torch 2.6 leaves a folder behind at exit',
            'for name in sys.argv[1:]:',
            '    for loaded in [key for key in sys.modules if key.startswith("t2t_vit")]:',
            '        del sys.modules[loaded]',
            '    importlib.import_module(f"t2t_vit.{name}")',
        )
    )
    arguments: list[str] = [sys.executable, '-c', check, *MODULES]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, '')
