"""Model folders: what they hold, and that our commands, timm and transformers read them alike."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import SMALLER
from PIL import Image
from safetensors.torch import load_file, save_file

from t2t_vit import CheckpointError
from t2t_vit.hub import save_pretrained
from t2t_vit.trained import load_trained, nonfinite_tensors

NAMES = ['a|b', 'c$d', 'é <f>']


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained model for RGB images with three classes; read-only."""
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    torch.nn.init.normal_(net.head.weight)
    net.pretrained_cfg.update(label_names=NAMES, num_classes=3, input_size=(3, 16, 16))
    return save_pretrained(net, tmp_path_factory.mktemp('models') / 'small', model_args=SMALLER)


@pytest.fixture(scope='module')
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))


def probabilities(folder: Path, image: Image.Image) -> torch.Tensor:
    net, preprocessing, *_ = load_trained(str(folder))
    with torch.inference_mode():
        return net(preprocessing.transform()(image)[None]).softmax(-1)[0]


def test_config_follows_timms_convention(folder):
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    assert config['label_names'] == NAMES and 'label_names' not in config['pretrained_cfg']
    assert 'num_classes' not in config['model_args'] and config['num_classes'] == 3
    assert config['model_args']['img_size'] == [16, 16] and config['model_args']['in_chans'] == 3


def test_files_have_the_mode_of_the_umask(folder, tmp_path):
    before = os.umask(0o027)
    try:
        net = timm.create_model(f'local-dir:{folder}', pretrained=True)
        save_pretrained(net, tmp_path / 'new', model_args=SMALLER)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / 'new').iterdir()}
    assert modes == {'README.md': 0o640, 'config.json': 0o640, 'model.safetensors': 0o640}


def test_timm_loads_a_folder(folder, image):
    net = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert net.pretrained_cfg['label_names'] == NAMES
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=5)
    assert other.num_classes == 5
    preprocessing = load_trained(str(folder))[1]
    with torch.inference_mode():
        found = net(preprocessing.transform()(image)[None]).softmax(-1)[0]
    assert torch.equal(found, probabilities(folder, image))


@pytest.mark.filterwarnings('ignore')
def test_transformers_loads_a_folder(folder, image, tmp_path):
    transformers = pytest.importorskip('transformers')
    expected = probabilities(folder, image)
    answers = transformers.pipeline('image-classification', model=str(folder), top_k=3)(image)
    assert {answer['label'] for answer in answers} == set(NAMES)
    for answer in answers:
        assert answer['score'] == pytest.approx(expected[NAMES.index(answer['label'])].item(), abs=1e-6)
    net = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert net.config.id2label == dict(enumerate(NAMES))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image)['pixel_values']
    loss = net(pixels, labels=torch.tensor([1])).loss  # as Trainer calls it
    assert loss.item() == pytest.approx(-expected[1].log().item(), abs=1e-5)
    assert transformers.AutoModel.from_pretrained(folder)(pixels).pooler_output.shape == (1, 128)
    net.save_pretrained(tmp_path)  # and back
    assert load_trained(str(tmp_path))[2] == NAMES
    assert torch.allclose(probabilities(tmp_path, image), expected)


@pytest.mark.filterwarnings('ignore')
def test_transformers_loads_a_folder_in_bfloat16(folder, image):
    transformers = pytest.importorskip('transformers')
    net = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    pixels = load_trained(str(folder))[1].transform()(image)[None]
    with torch.inference_mode():
        found = net(pixels).logits.float().softmax(-1)[0]
    assert torch.allclose(found, probabilities(folder, image), atol=0.03)


@pytest.mark.filterwarnings('ignore')
def test_transformers_trainer_trains_a_folder(folder, image, tmp_path):
    transformers = pytest.importorskip('transformers')
    net = transformers.AutoModelForImageClassification.from_pretrained(folder)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image)['pixel_values'][0]
    rows = [{'pixel_values': pixels.roll(8 * i, 2), 'labels': i} for i in range(3)]
    options = dict(learning_rate=1e-3, max_steps=12, per_device_train_batch_size=3, lr_scheduler_type='constant')
    quiet = dict(report_to=[], save_strategy='no', disable_tqdm=True, use_cpu=True, seed=0)
    trainer = transformers.Trainer(
        net, transformers.TrainingArguments(str(tmp_path), **options, **quiet), train_dataset=rows
    )
    before = trainer.evaluate(rows)['eval_loss']
    trainer.train()
    assert trainer.evaluate(rows)['eval_loss'] < before
    logits = torch.as_tensor(trainer.predict(rows).predictions)
    trainer.save_model(str(tmp_path / 'trained'))
    found = load_trained(str(tmp_path / 'trained'))
    assert found.names == NAMES
    with torch.inference_mode():
        assert torch.allclose(found.net(torch.stack([row['pixel_values'] for row in rows])), logits, atol=1e-4)


def test_weights_beside_their_config_need_no_model_name(digits_run, folder, image, tmp_path):
    expected = load_trained(str(digits_run))[0].state_dict()
    found = load_trained(str(digits_run / 'model.safetensors'))
    assert found.named and all(torch.equal(tensor, expected[name]) for name, tensor in found.net.state_dict().items())
    shutil.copy(folder / 'model.safetensors', tmp_path)
    with pytest.raises(CheckpointError, match='there is no .*config.json that describes its model: name the model'):
        load_trained(str(tmp_path / 'model.safetensors'))


def test_training_states_load_with_ema_or_raw_weights(digits_run):
    state = max((digits_run / 'checkpoints').glob('step-*.pt'))
    content = torch.load(state, weights_only=True)
    for ema, name in ((True, 'ema'), (False, 'model')):
        found = load_trained(str(state), ema=ema)
        weight = content[name]['head.weight' if ema else 'net.head.weight']
        assert torch.equal(found.net.state_dict()['head.weight'], weight) and found.names == [*'0123456789']
    assert not torch.equal(content['ema']['head.weight'], content['model']['net.head.weight'])


def test_flipped_bytes_of_weights_are_noticed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'copy')
    file = tmp_path / 'copy' / 'model.safetensors'
    whole, chance = file.read_bytes(), np.random.default_rng(0)
    for place in chance.integers(len(whole) // 2, len(whole), 20):  # of the tensors
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match='is damaged: its tensors do not have the SHA-256'):
            load_trained(str(tmp_path / 'copy'))
    tensors = load_file(folder / 'model.safetensors')
    tensors['head.bias'] += 1
    save_file(tensors, file)  # another program's file states no digest
    assert load_trained(str(tmp_path / 'copy'))[2] == NAMES


@pytest.mark.parametrize(
    'change, message',
    [
        ('{', 'is not the configuration of a model'),
        ('[]', 'is not the configuration of a model'),
        ('{"architecture": 3, "pretrained_cfg": {}}', 'is not the configuration of a model'),
        ('{"architecture": "t2t_vit_4_16", "pretrained_cfg": {}}', 'missing|shape|does not fit'),
    ],
)
def test_damaged_config_is_named(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / 'copy')
    (tmp_path / 'copy' / 'config.json').write_text(change)
    with pytest.raises(CheckpointError, match=message):
        load_trained(str(tmp_path / 'copy'))


def test_nonfinite_tensors_are_named():
    tensors = {'a': torch.tensor([1.0]), 'b': torch.tensor([float('nan')]), 'c': torch.tensor([3])}
    assert nonfinite_tensors(tensors.items()) == ['b']
