"""A balanced training set: which images are repeated, and that steps, processes and runs stay exact."""

import shutil
from collections import Counter

import pytest
import torch
from conftest import CLASSES, digits_config, read_records
from safetensors.torch import load_file

from t2t_vit.data import Augment, Balanced, Preprocessing, open_batches, open_source
from t2t_vit.train.run import train
from t2t_vit.train.signals import Interrupted
from t2t_vit.train.trainer import Trainer


@pytest.fixture(scope='module')
def lopsided(photos, tmp_path_factory):
    """Copy the photos and leave eight, three and one training images of the classes."""
    root = shutil.copytree(photos, tmp_path_factory.mktemp('lopsided') / 'photos')
    for name, kept in zip(CLASSES, (8, 3, 1)):
        for file in sorted((root / 'train' / name).glob('*'))[kept:]:
            file.unlink()
    return root


def test_small_classes_are_repeated_evenly_after_the_images_themselves(lopsided):
    source = open_source(str(lopsided), 'train')
    found = Balanced(source)
    assert Counter(found.labels) == {0: 8, 1: 8, 2: 8} and found.indices[:12] == list(range(12))
    times = Counter(found.indices)
    assert {times[i] for i in range(8)} == {1} and {times[i] for i in range(8, 11)} == {2, 3} and times[11] == 8
    assert Balanced(found).indices == list(range(24))  # nothing left to balance
    assert found.name(23) == source.name(11)


@pytest.mark.parametrize('memory', [True, False])
def test_repetitions_are_augmented_differently_and_shared_by_processes(lopsided, memory):
    source = Balanced(open_source(str(lopsided), 'train'))
    augment = Augment(mixup=0, cutmix=0, aa=None, scale=(0.2, 0.9))
    size = Preprocessing((16, 16), 3, (0.5,) * 3, (0.5,) * 3)

    def epoch(batch, rank=0, world=1):
        return list(open_batches(source, size, batch, augment, memory, 0, 1, rank=rank, world=world).epoch(2))

    whole = epoch(8)
    of_one = [image for batch in whole for image, label in zip(batch.images, batch.labels) if label == 2]
    assert len(of_one) == 8 and len({image.sum().item() for image in of_one}) == 8
    halves = epoch(4, 0, 2), epoch(4, 1, 2)
    for step, (first, second) in zip(whole, zip(*halves)):
        assert torch.equal(step.images, torch.cat([first.images, second.images]))


def test_balanced_run_counts_images_once_and_resumes_exactly(lopsided, tmp_path, monkeypatch, capsys):
    changes = {'data.root': str(lopsided), 'data.sampler': 'balanced', 'data.mean': None, 'data.std': None}
    changes |= {'augment.rotate': 0, 'optimizer.warmup_epochs': 0}

    def config(folder):
        return digits_config(output=str(folder), batch_size=8, **changes)

    train(config(tmp_path / 'whole'))
    said = ' '.join(capsys.readouterr().out.split())
    assert '12 training and 12 validation images' in said and '2 epochs of 3 steps' in said
    assert 'balanced: 12 of the training images of an epoch are repetitions' in said and 'duplicate' not in said
    assert '12 training and 12 validation images' in (tmp_path / 'whole' / 'README.md').read_text()
    step, done = Trainer.step, []

    def stopping(run, batch):
        done.append(batch)
        if len(done) == 4:
            run.signals.append(2)
        return step(run, batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, 'step', stopping)
        train(config(tmp_path / 'cut'))
    train(config(tmp_path / 'cut'), resume=str(tmp_path / 'cut'))
    one, other = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'cut'))
    assert all(torch.equal(one[key], other[key]) for key in one)
    records = [read_records(tmp_path / name / 'metrics.jsonl') for name in ('whole', 'cut')]
    assert [record['train_loss'] for record in records[0]] == [record['train_loss'] for record in records[1]]
