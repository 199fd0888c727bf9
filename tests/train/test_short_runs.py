"""Test that settings are scaled down to the number of images and epochs."""

import pytest
import yaml
from conftest import digits_config

from t2t_vit.train.run import train
from t2t_vit.train.short_runs import scale_to_data


def test_short_run_scales_its_settings_down(tmp_path, capsys):
    changes = {'epochs': 1, 'optimizer.warmup_epochs': 10, 'optimizer.cooldown_epochs': 10, 'optimizer.min_lr': 0.1}
    train(digits_config(output=str(tmp_path / 'run'), batch_size=2000, **changes))
    said = ' '.join(capsys.readouterr().out.split())
    for line in (
        'note batch_size 2000 reduced to 1437: there are 1,437 training images',
        'note warm-up reduced from 10 to 0 epochs and cooldown from 10 to 0: the run has 1',
        'note optimizer.min_lr reduced from 0.1 to 2e-05: lr is lower',
    ):
        assert line in said
    config = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert (config['batch_size'], config['optimizer']['warmup_epochs']) == (1437, 0)


def test_warm_up_does_not_start_above_the_learning_rate():
    tuning = {'optimizer.lr': 1e-5, 'optimizer.warmup_lr': 1e-4, 'optimizer.min_lr': 0.0}
    config, notes = scale_to_data(digits_config(**tuning), 1437)
    assert config.optimizer.warmup_lr == pytest.approx(1e-7)
    assert notes == ['note      optimizer.warmup_lr reduced from 0.0001 to 1e-07: lr is lower']


def test_too_few_images_for_all_processes():
    config = digits_config(batch_size=8, grad_accum_steps=4)
    assert scale_to_data(config, 3) == (config, [])  # which open_data refuses
    assert scale_to_data(config, 6)[0].batch_size == 4
