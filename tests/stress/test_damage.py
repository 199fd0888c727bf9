"""Check that flipped bits in any file of a run or an export are noticed, or change nothing."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import digits_config
from fuzz_damage import flip
from fuzz_twins import digest
from test_export import small, written

from t2t_vit.data import SPLIT_FILE, DataError
from t2t_vit.export import load_exported
from t2t_vit.inputs import open_own
from t2t_vit.models.safe_load import CheckpointError
from t2t_vit.settings import UsageError
from t2t_vit.train.resume import saved_settings
from t2t_vit.train.run import train
from t2t_vit.train.state import load_state
from t2t_vit.trained import hash_weights, load_trained

REFUSED = (CheckpointError, DataError, UsageError)
FILES = ['config.json', 'config.yaml', SPLIT_FILE, 'model.safetensors', 'checkpoints/step-00000004.pt']
GREY = {'data.channels': 1, 'augment.rotate': 0}


@pytest.fixture(scope='module')
def run(photos, tmp_path_factory) -> Path:
    """Return the folder of a run on photos that were divided."""
    folder = tmp_path_factory.mktemp('runs') / 'divided'
    data = {'data.root': str(photos / 'train'), 'data.val_fraction': 0.25, **GREY}
    short = {'batch_size': 8, 'epochs': 2, 'optimizer.warmup_epochs': 0}
    train(digits_config(output=str(folder), **short, **data))
    return folder


def predicts(folder: Path) -> object:
    trained = load_trained(str(folder))
    return hash_weights(trained.net), trained.names, trained.preprocessing


def evaluates(folder: Path) -> object:
    source, name = open_own(str(folder), 'val', None, 1)
    return name, source.classes, [source.name(i) for i in range(len(source.labels))]


def resumes(folder: Path) -> object:
    state, _ = load_state(folder / 'checkpoints')
    return state['position'], digest(state['model']), digest(state['ema']), saved_settings(folder)


@pytest.mark.parametrize('use', [predicts, evaluates, resumes], ids=lambda use: use.__name__)
@pytest.mark.parametrize('name', FILES)
def test_flipped_bits_in_a_run_folder_are_noticed_or_change_nothing(run, tmp_path, name, use):
    clean, whole = use(run), (run / name).read_bytes()
    shutil.copytree(run, tmp_path / 'run')
    refused = 0
    for seed in range(25):
        (tmp_path / 'run' / name).write_bytes(flip(random.Random(seed), whole))
        try:
            found = use(tmp_path / 'run')
        except REFUSED:
            refused += 1
        else:
            expected = str(clean).replace(str(run), str(tmp_path / 'run'))
            assert str(found) == expected or use is resumes and found[0]['step'] == 0  # an older state
    read = {predicts: FILES[:1] + FILES[3:4], evaluates: FILES[1:3], resumes: []}[use]
    assert refused >= 20 if name in read else not refused


@pytest.mark.parametrize('suffix', ['.onnx', '.pt2', '.xml', '.bin'])
def test_flipped_bits_in_exported_files_are_noticed_or_change_nothing(tmp_path, suffix):
    path = written(small('vit_s_16', embed_dim=16, num_heads=2), tmp_path / f'model{suffix.replace("bin", "xml")}')
    image = torch.zeros(1, 3, *load_exported(path).preprocessing.size)
    clean, file = digest(load_exported(path)(image)), path.with_suffix(suffix)
    whole, refused = file.read_bytes(), 0
    for seed in range(25):
        file.write_bytes(flip(random.Random(seed), whole))
        try:
            assert digest(load_exported(path)(image)) == clean
        except CheckpointError:
            refused += 1
    assert refused >= 20


def test_edited_file_says_how_to_accept_the_edit(run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    file = tmp_path / 'run' / 'config.json'
    config = json.loads(file.read_text())
    config['label_names'][0] = 'blossom'
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='does not have the SHA-256 .* remove "sha256" from it'):
        load_trained(str(tmp_path / 'run'))
    del config['sha256']
    file.write_text(json.dumps(config, indent=1))
    assert load_trained(str(tmp_path / 'run')).names[0] == 'blossom'
