"""Every command and every code block of the README runs, at smoke size; its table is the package's.

Of the guides in docs/, the Python blocks of a page run one after the other, and the commands are read by the command
line's own parsers, not run. A block that says why in its first line, `# not run here: …`, is only compiled or passed
over; readers see it too.
"""

import argparse
import functools
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from conftest import crops

from t2t_vit import PUBLISHED, VARIANTS, cli
from t2t_vit.models.listing import count_parameters

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
GUIDES = {file.name: file.read_text() for file in sorted((ROOT / 'docs').glob('*.md'))}
NOT_RUN = '# not run here: '
LEARNS = 'backbone.md'  # whose long examples are test_backbone's
SMOKE = [
    '--epochs',
    '1',
    '--optimizer.warmup_epochs',
    '0',
    '--optimizer.cooldown_epochs',
    '0',
    '--batch_size',
    '8',
    '--model_args.depth',
    '1',
    '--data.workers',
    '0',
]
SMOKE_BENCH = ['--rounds', '1', '--seconds', '0.01', '--memory', 'false', '--batch_size', '1', '--img_sizes', '[64]']


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', page, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Its lines as words; one that ends in a backslash goes on."""
    lines = block.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], folder: Path) -> None:
    """One command line, as far as it can be run small."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith('MAKE')}
    if words[0] == 't2t-vit':
        smoke = {
            'train': [] if '--resume' in words else SMOKE,
            'bench': SMOKE_BENCH,
            'visualize': ['--img_size', '32'],
        }.get(words[1], [])
        assert cli.main(words[1:] + smoke) == 0
    elif words[0] == 'make':
        subprocess.run([*words, '--dry-run'], cwd=ROOT, env=environment, check=True, capture_output=True)
    elif words == ['pip', 'install', '.']:
        small = ['--no-deps', '--no-build-isolation', '--disable-pip-version-check', '--target', str(folder / 'site')]
        subprocess.run([sys.executable, '-m', *words, *small], cwd=ROOT, check=True, capture_output=True)
    else:
        pytest.fail(f'nothing here runs {words}')


@pytest.fixture
def workplace(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the README speaks of: photos, and of ImageNet a released file and some of the images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').symlink_to(photos)
    weights = timm.create_model('t2t_vit_14').state_dict()
    torch.save({'state_dict_ema': weights, 'args': argparse.Namespace()}, tmp_path / '81.5_T2T_ViT_14.pth.tar')
    for i in range(1000):
        (tmp_path / 'imagenet' / 'val' / f'n{i:08}').mkdir(parents=True)
    for i, (_, _, image) in zip(range(3), crops()):
        image.save(tmp_path / 'imagenet' / 'val' / f'n{i:08}' / '1.jpg')
    return tmp_path


def test_every_command(workplace):
    """In their order: later ones use what earlier ones leave."""
    for words in (words for block in blocks('sh') for words in commands(block)):
        run(words, workplace)


@pytest.mark.parametrize('block', blocks('python'), ids=lambda block: block.splitlines()[-1])
def test_every_code_block(block, workplace):
    exec(compile(block, 'README.md', 'exec'), {})


@pytest.mark.parametrize('page', [name for name, text in GUIDES.items() if blocks('python', text)])
def test_code_blocks_of_a_guide(page, workplace):
    names: dict[str, object] = {}
    for block in blocks('python', GUIDES[page]):
        code = compile(block, page, 'exec')
        if not block.startswith(NOT_RUN) and not (page == LEARNS and 'optimizer' in block):
            exec(code, names)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One command line of a guide, as far as it can be checked without running it."""
    while '=' in words[0]:  # of the environment
        words = words[1:]
    if words[0] in ('torchrun', 'python', 'sbatch', 'bash'):
        program = next(
            i
            for i, word in enumerate(words)
            if word in ('t2t_vit.cli', 't2t_vit', 't2t_vit.timm') or (ROOT / word).is_file()
        )
        if words[program] not in ('t2t_vit.cli', 't2t_vit', 'scripts/train.sbatch'):
            return
        words = ['t2t-vit', *(['train'] if words[0] == 'sbatch' else []), *words[program + 1 :]]
    if words[:2] == ['t2t-vit', 'train']:
        options = [word for word in words[2:] if word != '--dry_run']
        assert cli.train([*options, '--print_config']) == 0
    elif words[0] == 't2t-vit':
        if not cli.COMMANDS[words[1]].function:  # recipes and completion, which take a word
            return
        module, name = cli.COMMANDS[words[1]].function.split(':')
        module = import_module(f't2t_vit.{module}')
        silent = functools.wraps(getattr(module, name))(lambda **options: None)
        monkeypatch.setattr(module, name, silent)
        assert cli.call(words[1], words[2:]) == 0
    elif words[0] == 'make':
        run(words, ROOT)
    elif words[:2] == ['pip', 'install']:
        extras = re.findall(r't2t-vit\[(.+)\]|\.\[(.+)\]', words[-1])
        known = re.findall(r'^([\w-]+) = \[$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
        assert {extra for found in extras for part in found for extra in part.split(',') if extra} <= {*known}
    else:
        pytest.fail(f'nothing here checks {words}; a first line {NOT_RUN!r} and why leaves the block out')


@pytest.mark.parametrize('page', [name for name, text in GUIDES.items() if blocks('sh', text)])
def test_commands_of_a_guide(page, workplace, digits_run, monkeypatch, capsys):
    (workplace / 'runs').mkdir()
    for name in re.findall(r'--resume (runs/\w+)', GUIDES[page]):
        (workplace / name).symlink_to(digits_run)
    for name in re.findall(r'--weights (\S+)', GUIDES[page]):
        (workplace / name).write_text('')
    for block in blocks('sh', GUIDES[page]):
        for words in () if block.startswith(NOT_RUN) else commands(block):
            parse(words, monkeypatch)


def test_every_block_is_tested():
    assert {*re.findall(r'^```(\w+)', README, re.MULTILINE)} <= {'sh', 'python', 'bibtex'}
    assert blocks('sh') and blocks('python')
    for page, text in GUIDES.items():
        assert {*re.findall(r'^```(\w+)', text, re.MULTILINE)} <= {'sh', 'python', 'json', 'yaml', 'text'}, page


@pytest.mark.parametrize('page', ['README.md', *(f'docs/{name}' for name in GUIDES)])
def test_every_page_that_it_points_to(page):
    pages = re.findall(r'\]\((?!http)([^)#]+)', (ROOT / page).read_text())
    assert not [name for name in pages if not ((ROOT / page).parent / name).exists()]


def row_of(name: str) -> dict[str, str]:
    """The table's row of a model."""
    with torch.device('meta'):
        variant, model = VARIANTS[name], timm.create_model(name)
    total, learned = count_parameters(model)
    depth = variant.depth if isinstance(variant.depth, tuple) else (variant.depth,)
    width = f'{variant.embed_dim} to {model.num_features}' if variant.block == 'dense' else f'{variant.embed_dim}'
    return {
        'model': name,
        'tokens': variant.token_layer,
        'depth': ' + '.join(map(str, depth)),
        'width': width,
        'heads': f'{variant.num_heads}',
        'MLP ratio': f'{variant.mlp_ratio:g}',
        'parameters': f'{total:,}',
        'learned': f'{learned:,}',
    }


def test_the_table_of_models():
    """All of them, with exact numbers; the release puts the top-1 into the names of its files."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in README.splitlines() if line[:1] == '|']
    header = next(line for line in lines if 'MLP ratio' in line)
    rows = [dict(zip(header, line)) for line in lines if line[0] in VARIANTS and len(line) == len(header)]
    top1 = {row['model']: row.pop('top-1') for row in rows}
    assert rows == [row_of(name) for name in VARIANTS]
    for name, cell in top1.items():
        files = [p.file for key, p in PUBLISHED.items() if key.split('.')[0] == name and 'in1k' in key]
        assert re.findall(r'\d+\.\d', cell) == [file.split('_')[0] for file in files]
