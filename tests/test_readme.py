"""Every command and every code block of the README runs, at smoke size; its table is the package's."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import pytest
import timm
import torch
from conftest import crops

from t2t_vit import PUBLISHED, VARIANTS, cli
from t2t_vit.models.listing import count_parameters

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
SMOKE = ['--epochs', '1', '--optimizer.warmup_epochs', '0', '--optimizer.cooldown_epochs', '0', '--batch_size', '8',
         '--model_args.depth', '1', '--data.workers', '0']
SMOKE_BENCH = ['--rounds', '1', '--seconds', '0.01', '--memory', 'false', '--batch_size', '1', '--img_sizes', '[64]']


def blocks(language: str) -> List[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


def commands(block: str) -> List[List[str]]:
    """Its lines as words; one that ends in a backslash goes on."""
    lines = block.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: List[str], folder: Path) -> None:
    """One command line, as far as it can be run small."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith('MAKE')}
    if words[0] == 't2t-vit':
        smoke = {'train': [] if '--resume' in words else SMOKE, 'bench': SMOKE_BENCH}.get(words[1], [])
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


def test_every_block_is_tested():
    assert {*re.findall(r'^```(\w+)', README, re.MULTILINE)} <= {'sh', 'python', 'bibtex'}
    assert blocks('sh') and blocks('python')


def test_every_page_that_it_points_to():
    pages = re.findall(r'\]\((?!http)([^)#]+)', README)
    assert pages and not [page for page in pages if not (ROOT / page).exists()]


def row_of(name: str) -> Dict[str, str]:
    """The table's row of a model."""
    with torch.device('meta'):
        variant, model = VARIANTS[name], timm.create_model(name)
    total, learned = count_parameters(model)
    depth = variant.depth if isinstance(variant.depth, tuple) else (variant.depth,)
    width = f'{variant.embed_dim} to {model.num_features}' if variant.block == 'dense' else f'{variant.embed_dim}'
    return {
        'model': name, 'tokens': variant.token_layer, 'depth': ' + '.join(map(str, depth)), 'width': width,
        'heads': f'{variant.num_heads}', 'MLP ratio': f'{variant.mlp_ratio:g}', 'parameters': f'{total:,}',
        'learned': f'{learned:,}'}


def test_the_table_of_models():
    """All of them, with exact numbers; the release puts the top-1 into the names of its files."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in README.splitlines() if line[:1] == '|']
    header = next(line for line in lines if 'MLP ratio' in line)
    rows = [dict(zip(header, line)) for line in lines if line[0] in VARIANTS]
    top1 = {row['model']: row.pop('top-1') for row in rows}
    assert rows == [row_of(name) for name in VARIANTS]
    for name, cell in top1.items():
        files = [p.file for key, p in PUBLISHED.items() if key.split('.')[0] == name and 'in1k' in key]
        assert re.findall(r'\d+\.\d', cell) == [file.split('_')[0] for file in files]
