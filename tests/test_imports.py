"""Check the direction of imports, that every module imports on its own without warnings, and that none is too long."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import t2t_vit

ROOT = Path(t2t_vit.__file__).parent
LAYERS = [  # a module imports from its own layer and the layers above it; modules not listed here are tools
    {'settings', 'options', 'custom', 'console', 'integrity', 'plots', 'timing', 'allocator'},
    {'models', 'fast', 'data'},
    {
        'train',
        'look',
        'inputs',
        'answers',
        'evaluate',
        'scoring',
        'metrics',
        'classes',
        'classifier',
        'vectors',
        'export',
        'trained',
        'results',
        'hub',
    },
    {'tools'},
    {'cli', '__main__'},
]
MAX_LINES = 620
FILES = {
    '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): file
    for file in sorted(ROOT.rglob('*.py'))
}
del FILES['__init__']  # the package itself, which every module may import for its version


def imports(module: str) -> Iterator[str]:
    """Yield the absolute names that a module imports, inside functions too; without the prefix `t2t_vit.`."""
    parts = ['t2t_vit', *module.split('.')]
    package = parts if FILES[module].name == '__init__.py' else parts[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = (alias.name for alias in node.names if alias.name != 'timm')  # timm itself, not the runner
            yield from (name.removeprefix('t2t_vit.') for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module != 'timm'):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = '.'.join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f'{base}.{alias.name}'.removeprefix('t2t_vit.')
                yield name if name in FILES else base.removeprefix('t2t_vit.')


def layer(module: str) -> int:
    """Return the index of a module's layer."""
    top = module.split('.')[0]
    return next((i for i, names in enumerate(LAYERS) if top in names), 3)


GRAPH = {module: {name for name in imports(module) if name in FILES and name != module} for module in FILES}


@pytest.mark.parametrize('module', FILES)
def test_module_imports_only_its_own_layer_and_those_above(module):
    assert not {name for name in GRAPH[module] if layer(name) > layer(module)}


def test_imports_have_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError with the modules of the cycle


def test_package_does_not_import_tests_and_has_no_utils():
    assert not {name.split('.')[0] for module in FILES for name in imports(module)} & {'tests', 'conftest', 'reference'}
    assert not [module for module in FILES if 'util' in module]


def test_command_line_imports_commands_only_when_called():
    top_level = ast.parse(FILES['cli'].read_text(encoding='utf-8')).body
    modules = {node.module.split('.')[0] for node in top_level if isinstance(node, ast.ImportFrom) and node.module}
    assert not modules & {'predict', 'hub', 'benchmark', 'explore', 'reproduce', 'export', 'look'}


@pytest.mark.parametrize('module', FILES)
def test_no_file_is_long(module):
    assert len(FILES[module].read_text(encoding='utf-8').splitlines()) <= MAX_LINES


def test_every_module_imports_first_and_without_warnings():
    """Import each module with none of the package loaded; a fresh interpreter for each would take minutes."""
    check = '\n'.join(
        (
            'import importlib, sys, warnings',
            'import accelerate, gradio, jsonargparse, matplotlib.figure, pyarrow, timm, torchmetrics  # their warnings',
            'warnings.simplefilter("error")',
            'warnings.simplefilter("ignore", ResourceWarning)  # torch 2.6 leaves a folder open at exit',
            'for name in sys.argv[1:]:',
            '    for loaded in [key for key in sys.modules if key.startswith("t2t_vit")]:',
            '        del sys.modules[loaded]',
            '    importlib.import_module(f"t2t_vit.{name}")',
        )
    )
    arguments = [sys.executable, '-c', check, *(name for name in FILES if name != '__main__')]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, '')
