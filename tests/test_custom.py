"""Code is loaded only if the user names it, and never because a file does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import t2t_vit
from t2t_vit import cli, custom
from t2t_vit.classifier import Classifier
from t2t_vit.explore.command import offer
from t2t_vit.look.opened import open_model
from t2t_vit.reproduce.runs import read_arm
from t2t_vit.train.state import saved_states
from t2t_vit.trained import load_trained

CANARY = """
from pathlib import Path
Path({marker!r}).touch()
import torch
from t2t_vit import Block
from t2t_vit.models.t2t_vit import TokenPerformer

class Mine(Block):
    pass

class MyLayer(TokenPerformer):
    pass

def teacher(img_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
"""


class Trap:
    """A Python file that leaves a marker when it is executed."""

    def __init__(self, folder: Path) -> None:
        self.file, self.marker = folder / 'evil.py', folder / 'executed'
        self.file.write_text(CANARY.format(marker=str(self.marker)))
        self.block, self.teacher = f'{self.file}:Mine', f'{self.file}:teacher'
        self.layer = f'{self.file}:MyLayer'

    def sprung(self) -> bool:
        return self.marker.exists()


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


@pytest.fixture
def foreign(digits_run: Path, tmp_path: Path, trap: Trap) -> Path:
    """Make a run folder whose every file names code."""
    folder = tmp_path / 'foreign'
    shutil.copytree(digits_run, folder)
    config = json.loads((folder / 'config.json').read_text())
    del config['sha256']
    config['model_args'] = {**config.get('model_args', {}), 'block': trap.block}
    (folder / 'config.json').write_text(json.dumps(config))
    tree = yaml.safe_load((folder / 'config.yaml').read_text())
    tree['model_args'] = {**tree['model_args'], 'block': trap.block}
    (folder / 'config.yaml').write_text(yaml.safe_dump(tree))
    for file in saved_states(folder / 'checkpoints'):
        state = torch.load(file, weights_only=False)
        state['config'] = yaml.safe_dump(tree)
        torch.save(state, file)
    return folder


def state_of(folder: Path) -> Path:
    return saved_states(folder / 'checkpoints')[0]


COMMANDS: dict[str, list[str]] = {
    'predict': ['predict', 'digits', '--checkpoint', '{run}'],
    'predict local-dir': ['predict', 'digits', '--checkpoint', 'local-dir:{run}'],
    'predict state': ['predict', 'digits', '--checkpoint', '{state}'],
    'eval': ['eval', '{run}'],
    'eval weights': ['eval', '{run}/model.safetensors'],
    'embed': ['embed', 'digits', '--checkpoint', '{run}', '--output', '{tmp}/a.parquet'],
    'visualize': ['visualize', 'digits', '--models', '{run}', '--output', '{tmp}/looks'],
    'export': ['export', '--checkpoint', '{run}', '-o', '{tmp}/a.onnx'],
    'explore': ['explore', '--checkpoint', '{run}'],
    'bench': ['bench', 'local-dir:{run}'],
    'resume folder': ['train', '--resume', '{run}'],
    'resume state': ['train', '--resume', '{state}'],
    'resume dry run': ['train', '--resume', '{run}', '--dry-run'],
    'resume print config': ['train', '--resume', '{run}', '--print-config'],
    'config': ['train', '--config', '{run}/config.yaml', '--output', '{tmp}/new'],
    'config dry run': ['train', '--config', '{run}/config.yaml', '--dry-run'],
    'config print config': ['train', '--config', '{run}/config.yaml', '--print-config'],
    'base': ['train', '--config', '{based}', '--print-config'],
    'teacher in a file': ['train', '--config', '{teacher}', '--print-config'],
    'token layer in a file': ['train', '--config', '{layer}', '--print-config'],
    'teacher folder': [
        *('train', '--recipe', 'digits', '--objective.kind', 'distill', '--objective.teacher', '{run}'),
        *('--output', '{tmp}/new'),
    ],
    'finetune': ['finetune', 'digits', '--weights', '{run}', '--print-config'],
    'weights': ['train', '--recipe', 'digits', '--weights', '{run}', '--dry-run'],
    'push': ['push', '{run}', 'someone/something'],
}


@pytest.mark.parametrize('way', COMMANDS)
def test_code_named_by_a_file_is_refused(way, foreign, trap, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    (foreign / 'README.md').unlink(missing_ok=True)  # so that push has to build the model for a new card
    (tmp_path / 'based.yaml').write_text('{base: foreign/config.yaml, epochs: 1}')
    (tmp_path / 'teacher.yaml').write_text(f'{{objective: {{kind: distill, teacher: "{trap.teacher}"}}}}')
    (tmp_path / 'layer.yaml').write_text(f'{{model_args: {{token_layer: "{trap.layer}"}}}}')
    places = dict(run=foreign, state=state_of(foreign), tmp=tmp_path, based=tmp_path / 'based.yaml')
    places.update(teacher=tmp_path / 'teacher.yaml', layer=tmp_path / 'layer.yaml')
    code = cli.main([word.format(**places) for word in COMMANDS[way]])
    assert not trap.sprung()
    if way not in ('weights',):  # only the tensors of a run are read
        assert code == 2 and 'names code to execute' in capsys.readouterr().err


def test_page_refuses_code_of_a_compared_model(foreign, trap):
    """`explore --compare RUN` opens a model when it is chosen on the page."""
    openers = offer(open_model('t2t_vit_7'), [str(foreign)], open_model)
    with pytest.raises(custom.UntrustedCodeError, match='names code to execute'):
        openers['foreign']()
    assert not trap.sprung()


@pytest.mark.parametrize('argument', ['block', 'token_layer'])
def test_timm_refuses_code_from_a_folder(argument, digits_run, tmp_path, trap):
    folder = tmp_path / 'foreign'
    shutil.copytree(digits_run, folder)
    config = json.loads((folder / 'config.json').read_text())
    del config['sha256']
    config['model_args'] = {**config.get('model_args', {}), argument: trap.block if argument == 'block' else trap.layer}
    (folder / 'config.json').write_text(json.dumps(config))
    for build in (
        timm.create_model,
        lambda name, **more: load_trained(name),
        lambda name, **more: Classifier.load(name),
    ):
        with pytest.raises(custom.UntrustedCodeError, match='names code to execute'):
            build(f'local-dir:{folder}', pretrained=True)
    assert not trap.sprung()


def test_timm_refuses_code_from_the_hub(digits_run, tmp_path, trap, monkeypatch):
    config = json.loads((digits_run / 'config.json').read_text())
    del config['sha256']
    config['model_args'] = {'block': trap.block}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    monkeypatch.setattr('timm.models._hub.hf_hub_download', lambda *_, **__: str(tmp_path / 'config.json'))
    with pytest.raises(custom.UntrustedCodeError, match='someone/something'):
        timm.create_model('hf-hub:someone/something')
    assert not trap.sprung()


def test_arm_of_a_comparison_must_not_name_code(tmp_path, trap):
    (tmp_path / 'arms').mkdir()
    arm = {'model': 't2t_vit_14', 'args': {'block': trap.block}, 'parameters': 1}
    (tmp_path / 'arms' / 't2t_vit_14.yaml').write_text(yaml.safe_dump(arm))
    with pytest.raises(custom.UntrustedCodeError, match='names code to execute'):
        read_arm(tmp_path, 't2t_vit_14')


@pytest.mark.parametrize('way', ['predict', 'config print config', 'resume print config'])
def test_trust_option_accepts_code_from_a_file(way, foreign, trap, tmp_path):
    places: dict[str, Any] = dict(run=foreign, state=state_of(foreign), tmp=tmp_path)
    assert cli.main([*(word.format(**places) for word in COMMANDS[way]), '--trust']) == 0
    assert trap.sprung() == (way == 'predict') and not custom._trusted


def test_code_typed_on_the_command_line_is_used(trap, capsys):
    assert cli.main(['train', '--recipe', 'digits', '--model_args.block', trap.block, '--print-config']) == 0
    assert trap.block in capsys.readouterr().out


def test_naming_the_code_again_reopens_a_run(foreign, trap, capsys):
    assert cli.main(['train', '--resume', str(foreign), '--model_args.block', trap.block, '--print-config']) == 0
    assert trap.block in capsys.readouterr().out


def test_code_passed_in_python_is_used(foreign, trap):
    assert type(timm.create_model('t2t_vit_4_16', block=trap.block).blocks[0]).__name__ == 'Mine'
    with t2t_vit.trust():
        timm.create_model(f'local-dir:{foreign}')
    with pytest.raises(custom.UntrustedCodeError):
        timm.create_model(f'local-dir:{foreign}')


def test_a_class_in_python_replaces_the_name_in_a_folder(foreign, trap):
    net = timm.create_model(f'local-dir:{foreign}', block=t2t_vit.Block)
    assert isinstance(net.blocks[0], t2t_vit.Block) and not trap.sprung()


def test_missing_file_or_name_is_refused(tmp_path):
    (tmp_path / 'a.py').write_text('x = 1')
    with pytest.raises(ValueError, match="defines no function or class 'y'"):
        custom.load_code(f'{tmp_path}/a.py:y')
    with pytest.raises(ValueError, match='no file'):
        custom.load_code(f'{tmp_path}/b.py:y')
    assert custom.load_code(f'{tmp_path}/a.py:x') == 1
