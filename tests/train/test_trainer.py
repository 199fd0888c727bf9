"""Test the trainer: schedule of a resumed run, sources in memory and on disk, damaged images."""

import shutil
from pathlib import Path

import pytest
import timm
from accelerate import Accelerator
from conftest import PHOTOS, SHORT, digits_config, records

from t2t_vit.data import DataError, Digits, DiskBatches, MemoryBatches, find_images, printable
from t2t_vit.train.run import train
from t2t_vit.train.state import load_state, read_state
from t2t_vit.train.trainer import load


def test_resume_with_more_epochs_follows_their_schedule(digits_run, tmp_path):
    """Compare the learning rate of a resumed step with that of a run with all epochs from the start."""
    config = digits_config(output=str(tmp_path), epochs=3)
    rates = []
    for state in (None, read_state(digits_run / 'checkpoints' / 'step-00000010.pt')):
        run = load(config, tmp_path, state, Accelerator(cpu=True))
        run.parts.schedule.step_update(11)
        rates.append([group['lr'] for group in run.parts.optimizer.param_groups])
    assert rates[0] == rates[1] and rates[0][0] < 1e-3


@pytest.mark.parametrize('source', ['photos', 'parquet'])
@pytest.mark.parametrize('memory', [False, True], ids=['disk', 'memory'])
def test_folder_and_parquet_train_from_disk_and_memory(request, tmp_path, source, memory):
    config = digits_config(
        output=str(tmp_path),
        batch_size=8,
        **SHORT,
        **PHOTOS,
        **{'data.root': str(request.getfixturevalue(source)), 'data.memory': memory},
    )
    run = load(config, tmp_path, None, Accelerator(cpu=True))
    assert type(run.data.train) is type(run.data.val) is (MemoryBatches if memory else DiskBatches)
    train(config)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['label_names'] == [
        'flower',
        'roof',
        'sky',
    ]


def test_epoch_is_kept_if_no_validation_image_can_be_read(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / 'photos')
    for file in (root / 'val').rglob('*.*'):
        file.write_bytes(b'not an image')
    changes = {**SHORT, **PHOTOS, 'data.root': str(root), 'data.memory': False, 'data.workers': 0}
    with pytest.raises(DataError, match='validation: not one image could be read; the state is saved in .*step'):
        train(digits_config(output=str(tmp_path / 'run'), batch_size=8, **changes))


def test_damaged_images_are_counted_and_named(photos, tmp_path, capsys):
    (tmp_path / 'train').mkdir()
    for name in ('flower', 'roof', 'sky'):
        (tmp_path / 'train' / name).symlink_to(photos / 'train' / name)
        (tmp_path / 'val' / name).mkdir(parents=True)
        for file in (photos / 'val' / name).iterdir():
            (tmp_path / 'val' / name / file.name).symlink_to(file)
    odd = ['text\n1.jpg', *(f'text{i}.jpg' for i in range(4)), 'text\udce9.jpg']
    names = [str(tmp_path / 'val' / 'sky' / name) for name in odd]
    for name in names:
        Path(name).write_text('not an image')
    train(digits_config(output=str(tmp_path / 'run'), batch_size=8, **SHORT, **PHOTOS, **{'data.root': str(tmp_path)}))
    assert records(tmp_path / 'run')[0]['damaged'] == 6
    said = f'6 damaged images were left out: {", ".join(map(printable, names[:5]))}, …; all of them are named in '
    assert said + str(tmp_path / 'run' / 'damaged.txt') in capsys.readouterr().out
    listed = find_images([str(tmp_path / 'run' / 'damaged.txt')])
    assert [listed.name(i) for i in range(len(listed))] == names
    state = load_state(tmp_path / 'run' / 'checkpoints')[0]
    assert state['damaged'] == names  # a resumed run knows those of before
    run = load(
        digits_config(batch_size=8, **SHORT, **PHOTOS, **{'data.root': str(photos)}),
        tmp_path,
        state,
        Accelerator(cpu=True),
    )
    assert run.damaged() == names


def test_digits_train_in_colour(tmp_path):
    config = digits_config(**{'data.channels': 3, 'data.mean': None, 'data.std': None})
    run = load(config, tmp_path, None, Accelerator(cpu=True))
    images, labels, *_ = next(run.data.val.epoch())
    assert images.shape == (256, 3, 16, 16) and labels.tolist()[:5] == list(Digits('val').labels[:5])
