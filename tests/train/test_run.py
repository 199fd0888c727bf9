"""Test runs: the files that they write, that they repeat bit for bit, their options, and errors."""

import os
import re
import subprocess
import sys

import matplotlib.image
import pytest
import timm
import torch
import yaml
from conftest import PHOTOS, SHORT, SMALLER, digits_config, read_records, records, same_run
from safetensors.torch import load_file

from t2t_vit.data import DataError
from t2t_vit.settings import UsageError
from t2t_vit.train import run as running
from t2t_vit.train.run import train

GREY_PHOTOS = {'data.channels': 1, 'augment.rotate': 0}


# files of a run


def test_run_folder_has_all_files(digits_run):
    assert {str(p.relative_to(digits_run)) for p in digits_run.rglob('*') if p.is_file()} >= {
        'config.yaml',
        'config.json',
        'model.safetensors',
        'README.md',
        'metrics.jsonl',
        'curves.png',
        'checkpoints/step-00000005.pt',
        'checkpoints/step-00000010.pt',
    }
    assert matplotlib.image.imread(digits_run / 'curves.png').std() > 0


@pytest.mark.parametrize('seconds, drawings', [(0, [1, 2, 3]), (3600, [1, 3])], ids=['every epoch', 'first and last'])
def test_curves_are_drawn_at_intervals_and_at_the_end(tmp_path, monkeypatch, seconds, drawings):
    made: list[int] = []
    monkeypatch.setattr(running, 'DRAW_SECONDS', seconds)
    monkeypatch.setattr(running, 'plot_curves', lambda records, path: made.append(len(records)))
    train(digits_config(output=str(tmp_path), epochs=3, **{'optimizer.warmup_epochs': 0}))
    assert made == drawings


def test_denormal_numbers_are_zero_while_a_run_trains(tmp_path, monkeypatch):
    """They slow a processor down tenfold, and dead channels leave them in the optimizer's averages."""

    def denormal() -> bool:
        return (torch.full((1,), 1e-39) * 1).item() > 0

    assert denormal()
    seen: list[bool] = []
    monkeypatch.setattr(running, 'plot_curves', lambda records, path: seen.append(denormal()))
    train(digits_config(output=str(tmp_path), epochs=1, **{'optimizer.warmup_epochs': 0}))
    assert seen == [False] and denormal()


def test_records_of_every_epoch(digits_run):
    found = read_records(digits_run / 'metrics.jsonl')
    assert [record['epoch'] for record in found] == [0, 1]
    assert found[1]['train_loss'] < found[0]['train_loss'] < 3
    assert all(0 <= record['val_top1'] <= record['val_top5'] <= 1 for record in found)


def test_config_yaml_repeats_the_run(digits_run, tmp_path):
    config = yaml.safe_load((digits_run / 'config.yaml').read_text())
    assert config.pop('output') == str(digits_run)
    assert config == {key: value for key, value in yaml.safe_load(digits_config().to_yaml()).items() if key != 'output'}


def test_run_folder_loads_in_timm(digits_run):
    model = timm.create_model(f'local-dir:{digits_run}', pretrained=True).eval()
    expected = timm.create_model('t2t_vit_4_16', in_chans=1, num_classes=10, **SMALLER).eval()
    expected.load_state_dict(load_file(digits_run / 'model.safetensors'))
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(model(images), expected(images))
    cfg = model.pretrained_cfg
    assert cfg['label_names'] == [str(i) for i in range(10)]
    assert (*cfg['input_size'], *cfg['mean'], *cfg['std']) == (1, 16, 16, 0.305, 0.376)


def test_run_folder_keeps_model_args(tmp_path):
    args = {'model_args.depth': 2, 'model_args.token_layer': 'convolution', 'data.img_size': [16, 24]}
    train(digits_config(output=str(tmp_path), **SHORT, **args))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (len(model.blocks), model.img_size) == (2, (16, 24))
    assert 'conv' in dict(model.tokens_to_token.attention1.named_children())


# repetition


def test_run_repeats_bit_for_bit(digits_run, tmp_path):
    train(digits_config(output=str(tmp_path)))
    assert same_run(tmp_path, digits_run)


def test_other_seed_gives_another_run(digits_run, tmp_path):
    train(digits_config(output=str(tmp_path), seed=1, **SHORT))
    assert records(tmp_path)[0]['train_loss'] != records(digits_run)[0]['train_loss']


# options


@pytest.mark.parametrize(
    'changes',
    [
        {'augment.mixup': 0.8, 'augment.cutmix': 1.0},
        {'precision': 'bf16'},
        {'ema_decay': 0},
        {'optimizer.layer_decay': 0.7, 'optimizer.clip_grad': 1.0},
        {'optimizer.name': 'sgd', 'epochs': 2, 'optimizer.cooldown_epochs': 1, 'optimizer.lr': 0.1},
        {'model': 'vit_tiny_patch16_224', 'model_args': {'depth': 1}, 'data.img_size': 16},
        {'model': 'test_convnext', 'model_args': {}, 'data.img_size': 32},
    ],
    ids=' '.join,
)
def test_options_train(tmp_path, changes):
    record = train(digits_config(output=str(tmp_path), **{**SHORT, **changes}))
    assert 0 < record['train_loss'] < 10
    assert ('val_top1_ema' in record) == ('ema_decay' not in changes)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 10


@pytest.mark.parametrize('gain, precision', [(0.0, 'no'), (6.0, 'bf16')])
def test_precision_auto_is_resolved_and_recorded(gain, precision, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('t2t_vit.models.precision.cpu_gain', lambda kind: gain)
    record = train(digits_config(output=str(tmp_path), **SHORT, precision='auto'))
    assert 0 < record['train_loss'] < 10
    assert yaml.safe_load((tmp_path / 'config.yaml').read_text()).get('precision', 'no') == precision
    assert f'precision {precision.replace("no", "float32")}: this processor' in ' '.join(
        capsys.readouterr().out.split()
    )


# errors


def test_single_class_is_refused(photos, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        (tmp_path / split / 'sky').symlink_to(photos / split / 'sky')
    with pytest.raises(DataError, match='of one class, sky'):
        train(digits_config(**PHOTOS, **{'data.root': str(tmp_path)}), dry_run=True)


def test_validation_with_unknown_classes_is_refused(photos, tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'data' / 'train' / name / '1.jpg').write_bytes(b'')
    (tmp_path / 'data' / 'val').symlink_to(photos / 'val')
    with pytest.raises(DataError, match='flower'):
        train(digits_config(output=str(tmp_path / 'run'), **{'data.root': str(tmp_path / 'data')}))
    assert not (tmp_path / 'run').exists()


def test_mean_and_std_for_other_channels_are_refused():
    with pytest.raises(UsageError, match='a value for each of 1 channels'):
        train(digits_config(**{'data.mean': [0.1, 0.2], 'data.std': [1, 1]}))


@pytest.mark.skipif(not hasattr(os, 'wait4'), reason='the system does not tell the peak memory of a process')
@pytest.mark.parametrize('batch, pixels', [(32, 16), (256, 32)])
def test_planned_memory_is_the_peak_of_the_whole_process(tmp_path, batch, pixels):
    words = ['train', 'digits', '--epochs', '1', '--batch', str(batch), '--imgsz', str(pixels), '--threads', '1']
    words += ['--data.train_images', '512', '--optimizer.warmup_epochs', '0', '--device', 'cpu']
    words += ['--output', str(tmp_path / 'run')]
    with (
        (tmp_path / 'log').open('w') as log,
        subprocess.Popen([sys.executable, '-m', 't2t_vit', *words], stdout=log, stderr=log) as run,
    ):
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    text = (tmp_path / 'log').read_text()
    assert run.returncode == 0, text
    said = re.search(r'memory +about ([\d,]+) MB for each process', text)
    unit = 2**20 if sys.platform == 'darwin' else 2**10  # of ru_maxrss, for MB
    assert int(said[1].replace(',', '')) == pytest.approx(usage.ru_maxrss / unit, rel=0.2)
