"""Run the commands and code of README.md and the tutorial, in order and at smoke size; check those of other guides.

In the other pages of docs/ the Python blocks of a page run one after the other, and the commands are parsed, not run.
A block whose first line is `# not run here: REASON` is skipped.
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
EXECUTED = {'README.md': ROOT / 'README.md', 'first-model.md': ROOT / 'docs' / 'first-model.md'}
GUIDES = {
    file.name: file.read_text(encoding='utf-8')
    for file in sorted((ROOT / 'docs').glob('*.md'))
    if file.name not in EXECUTED
}
NOT_RUN = '# not run here: '
LONG_PAGE = 'backbone.md'  # test_backbone runs its long examples
SMOKE = {
    'train': ['--epochs', '1', '--batch_size', '8', '--model_args.depth', '1', '--data.workers', '0'],
    'finetune': ['--epochs', '1', '--batch_size', '8', '--data.workers', '0'],
    'eval': ['--workers', '0'],
    'predict': ['--workers', '0'],
}


def blocks(languages: str, page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each code block in one of the languages, `sh|python` for instance."""
    return re.findall(rf'^```({languages})\n(.*?)^```', page, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Split a block into command lines, and each into words; a backslash at the end continues a line."""
    lines = block.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str], folder: Path) -> None:
    """Run a command line at smoke size."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith('MAKE')}
    if words[0] == 't2t-vit':
        smoke = [] if '--resume' in words else SMOKE.get(words[1], [])
        assert cli.main(words[1:] + smoke) == 0
    elif words[0] == 'make':
        subprocess.run([*words, '--dry-run'], cwd=ROOT, env=environment, check=True, capture_output=True)
    elif words == ['pip', 'install', '.']:
        small = ['--no-deps', '--no-build-isolation', '--disable-pip-version-check', '--target', str(folder / 'site')]
        subprocess.run([sys.executable, '-m', *words, *small], cwd=ROOT, check=True, capture_output=True)
    else:
        pytest.fail(f'this test cannot run {words}')


@pytest.fixture(scope='module')
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of T2T-ViT-14 as the official training saves it; read-only."""
    weights = timm.create_model('t2t_vit_14').state_dict()
    file = tmp_path_factory.mktemp('release') / '81.5_T2T_ViT_14.pth.tar'
    torch.save({'state_dict_ema': weights, 'args': argparse.Namespace()}, file)
    return file


@pytest.fixture
def workplace(tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder with a released file, some images of ImageNet, and photos in class folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / release.name).symlink_to(release)
    for i in range(1000):
        (tmp_path / 'imagenet' / 'val' / f'n{i:08}').mkdir(parents=True)
    for i, (_, name, image) in enumerate(crops()):  # twelve of each class
        if i < 3:
            image.save(tmp_path / 'imagenet' / 'val' / f'n{i:08}' / '1.jpg')
        (tmp_path / 'photos' / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'photos' / name / f'{i % 12 + 1}.jpg')
    return tmp_path


@pytest.mark.timeout(900)
@pytest.mark.parametrize('page', EXECUTED)
def test_page_runs_in_order(page, workplace):
    names: dict[str, object] = {}
    found = blocks('sh|python', EXECUTED[page].read_text(encoding='utf-8'))
    assert {language for language, _ in found} == {'sh', 'python'}
    for language, block in found:
        if language == 'python':
            exec(compile(block, page, 'exec'), names)
        else:
            for words in commands(block):
                run(words, workplace)


@pytest.fixture
def guide(workplace: Path, photos: Path) -> Path:
    """Enter the same folder, with photos in train/ and val/."""
    (workplace / 'photos').rename(workplace / 'class-folders')
    (workplace / 'photos').symlink_to(photos)
    return workplace


@pytest.mark.parametrize('page', [name for name, text in GUIDES.items() if blocks('python', text)])
def test_code_of_guide_runs(page, guide):
    names: dict[str, object] = {}
    for _, block in blocks('python', GUIDES[page]):
        code = compile(block, page, 'exec')
        if not block.startswith(NOT_RUN) and not (page == LONG_PAGE and 'optimizer' in block):
            exec(code, names)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line of a guide without running it."""
    while '=' in words[0]:  # an environment variable
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
    if words[0] == 't2t-vit' and words[1] in cli.TRAINING:
        monkeypatch.setattr('t2t_vit.train.choose.choose_settings', lambda *_, **__: ([], []))  # opens the data
        options = [word for word in words[2:] if word not in ('--dry_run', '--dry-run')]
        assert cli.train([*options, '--print_config'], words[1]) == 0
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
        pytest.fail(f'this test cannot check {words}; a first line {NOT_RUN!r} with a reason skips the block')


@pytest.mark.parametrize('page', [name for name, text in GUIDES.items() if blocks('sh', text)])
def test_commands_of_guide_parse(page, guide, digits_run, monkeypatch, capsys):
    (guide / 'runs').mkdir()
    for name in re.findall(r'--resume (runs/\w+)', GUIDES[page]):
        (guide / name).symlink_to(digits_run)
    for name in re.findall(r'--weights (?!hf-hub:)(\S+)', GUIDES[page]):
        (guide / name).parent.mkdir(parents=True, exist_ok=True)
        (guide / name).touch()
    for _, block in blocks('sh', GUIDES[page]):
        for words in () if block.startswith(NOT_RUN) else commands(block):
            parse(words, monkeypatch)


@pytest.mark.parametrize('page', [*EXECUTED, *GUIDES])
def test_every_block_has_a_known_language(page):
    text = EXECUTED[page].read_text(encoding='utf-8') if page in EXECUTED else GUIDES[page]
    languages = {*re.findall(r'^```(\w+)', text, re.MULTILINE)}
    assert languages <= {'sh', 'python', 'json', 'yaml', 'text', 'bibtex'}


PAGES = sorted(ROOT.glob('*.md')) + sorted((ROOT / 'docs').glob('*.md'))


@pytest.mark.parametrize('page', PAGES, ids=lambda file: file.name)
def test_links_to_files_exist(page):
    links = re.findall(r'\]\((?!http)([^)#]+)', page.read_text(encoding='utf-8'))
    assert not [name for name in links if not (page.parent / name).exists()]


def row_of(name: str) -> dict[str, str]:
    """Return the row of a model in docs/models.md."""
    with torch.device('meta'):
        variant, model = VARIANTS[name], timm.create_model(name, num_classes=1000)
    total, trained = count_parameters(model)
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
        'trained': f'{trained:,}',
    }


def test_table_of_models_is_exact():
    """The release puts the top-1 into the names of its files."""
    page = (ROOT / 'docs' / 'models.md').read_text(encoding='utf-8')
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in page.splitlines() if line[:1] == '|']
    header = next(line for line in lines if 'MLP ratio' in line)
    rows = [dict(zip(header, line)) for line in lines if line[0] in VARIANTS and len(line) == len(header)]
    top1 = {row['model']: row.pop('top-1') for row in rows}
    assert rows == [row_of(name) for name in VARIANTS]
    for name, cell in top1.items():
        files = [p.file for key, p in PUBLISHED.items() if key.split('.')[0] == name and 'in1k' in key]
        assert re.findall(r'\d+\.\d', cell) == [file.split('_')[0] for file in files]
