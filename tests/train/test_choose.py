"""One command on a folder of photos: choices from the data and the machine; and fine-tuning from weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import CLASSES, PHOTOS, SHORT, digits_config
from PIL import Image
from safetensors.torch import load_file

from t2t_vit.cli import main
from t2t_vit.data import Augment
from t2t_vit.train.choose import Facts, choices, look_at
from t2t_vit.train.run import train
from t2t_vit.train.start_weights import load_start_weights
from t2t_vit.train.state import load_state
from t2t_vit.train.tasks import Classify, balanced_weights

SMALL = ['--model', 't2t_vit_4_16', '--model_args.depth', '1', '--imgsz', '16', '--epochs', '1']


@pytest.fixture(scope='module')
def flat(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of class folders that is not divided."""
    root = tmp_path_factory.mktemp('flat') / 'photos'
    for name in CLASSES:
        for split in ('train', 'val'):
            shutil.copytree(photos / split / name, root / name, dirs_exist_ok=True)
    return root


@pytest.fixture(scope='module')
def colour_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('colour') / 'run'
    config = digits_config(output=str(folder), batch_size=8, **{**SHORT, **PHOTOS, 'data.root': str(photos)})
    train(config)
    return folder


def test_train_on_a_plain_folder_divides_it_and_keeps_the_division(flat, tmp_path, capsys):
    assert main(['train', str(flat), *SMALL, '--output', str(tmp_path / 'run')]) == 0
    said = capsys.readouterr().out
    assert 'chosen    data.val_fraction 0.2' in said and 'flower 9+3' in ' '.join(said.split())
    split = json.loads((tmp_path / 'run' / 'split.json').read_text())
    assert len(split['train']) == 28 and len(split['val']) == 8 and not {*split['train']} & {*split['val']}
    config = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert (config['model'], config['batch_size'], config['epochs']) == ('t2t_vit_4_16', 8, 1)
    assert main(['train', str(flat), *SMALL, '--output', str(tmp_path / 'run'), '--resume', 'auto']) == 0
    assert 'is finished: 1 epochs' in capsys.readouterr().out


def test_plan_names_every_choice_and_options_override_it(flat, tmp_path, capsys):
    assert main(['train', str(flat), '--dry-run', '--batch', '4', '--output', str(tmp_path / 'run')]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    for text in ('model t2t_vit_r_4_64', 'data.img_size 64', 'epochs 100:', 'data.workers', '4 images = 1 processes x'):
        assert text in said
    assert 'batch_size' not in said and not (tmp_path / 'run').exists()
    assert 'time about' in said and 'memory about' in said


def test_mistyped_options_are_reported_before_the_data_is_opened(capsys):
    assert main(['train', '/nowhere', '--epochs', 'x', '--lr', '-1']) == 2
    said = capsys.readouterr().err
    assert '--epochs' in said and '--lr' in said or 'optimizer.lr' in said


def chosen(**facts: Any) -> dict[str, Any]:
    base = dict(images=1000, val_images=100, classes=5, imbalance=1.0, pixels=500, divided=True, device='cpu')
    return {key: value for key, value, _ in choices(Facts(**{**base, **facts}), {})}


def test_choices_follow_data_and_machine():
    assert chosen()['model'] == 't2t_vit_r_4_64' and chosen(device='cuda')['data.img_size'] == 224
    assert chosen(pixels=40)['model'] == 't2t_vit_r_4_32' and chosen(pixels=5)['model'] == 't2t_vit_4_16'
    assert chosen(images=20)['batch_size'] == 8 and chosen(images=100_000)['batch_size'] == 32
    assert chosen(images=100_000)['epochs'] == 13 and chosen(images=100)['epochs'] == 100
    assert 'objective.class_weights' not in chosen() and chosen(imbalance=20.0)['objective.class_weights'] == 'balanced'
    assert 'data.val_fraction' not in chosen() and chosen(divided=False)['data.val_fraction'] == 0.2


def test_convolutional_networks_have_their_own_learning_rate():
    def settings(model: str) -> dict[str, Any]:
        return {
            key: value for key, value, _ in choices(Facts(9_000, 1_000, 5, 1.0, 500, True, 'cpu'), {'model': model})
        }

    assert settings('resnet18')['optimizer.lr'] == settings('mobilenetv2_100')['optimizer.lr'] == 0.02
    for model in ('vit_tiny_patch16_224', 't2t_vit_r_4_64', 'not_a_model'):
        assert 'optimizer.lr' not in settings(model)


def test_runs_start_on_smaller_images_where_that_was_measured():
    def choices_of(values: dict[str, Any], device: str = 'cpu') -> dict[str, Any]:
        return {key: value for key, value, _ in choices(Facts(9_000, 1_000, 5, 1.0, 500, True, device), values)}

    def start_scale(device: str = 'cpu', **values: Any) -> Any:
        return choices_of(values, device).get('data.start_scale')

    assert start_scale() == start_scale(model='t2t_vit_14') == 0.75
    assert start_scale(model='vit_tiny_patch16_224') is start_scale(model='resnet18') is None
    assert choices_of({'data.start_scale': 1.0})['epochs'] < choices_of({})['epochs']  # the time is the same
    assert start_scale(minutes=10) == start_scale(epochs=10) == 0.75
    assert start_scale(minutes=60) is start_scale(epochs=60) is None  # they gain nothing in long runs
    assert start_scale(device='cuda') is None and start_scale(**{'data.img_size': 32}) is None
    assert start_scale(**{'objective.kind': 'token_labels'}) is None
    assert 'data.start_scale' not in chosen(pixels=40)


def test_augmentation_is_light_for_few_passes():
    few, some, many = (chosen(images=images) for images in (100_000, 9_000, 500))
    assert few['epochs'] == 13 and few['augment.scale'] == [1.0, 1.0] and few['augment.pad'] == 4
    assert 15 < some['epochs'] < 60 and some['augment.scale'] == [0.5, 1.0] and some['augment.mixup'] == 0
    assert many['epochs'] == 100 and 'augment.scale' not in many
    budget = {key: value for key, value, _ in choices(Facts(9_000, 1_000, 5, 1.0, 500, True, 'cpu'), {'minutes': 5})}
    assert budget['ema_decay'] == 0.9959  # a tenth of the steps that fit into five minutes, and not of 1000 epochs
    assert budget['augment.pad'] == 4 and budget['data.memory'] is True
    assert 'data.memory' not in chosen(device='cuda')


@pytest.mark.parametrize(
    'given',
    [
        {'augment.recount': 2},
        {'augment.aa': 'augmix-m5'},
        {'data.channels': 12},
        {'data.img_size': 128},
        {'data.img_size': (448, 512)},
    ],
    ids=str,
)
def test_images_stay_on_disk_where_memory_does_not_fit_them(given):
    facts = Facts(9_000, 1_000, 5, 1.0, 500, True, 'cpu')
    assert 'data.memory' in {key for key, _, _ in choices(facts, {'augment.aa': None})}
    assert 'data.memory' not in {key for key, _, _ in choices(facts, given)}
    assert 'data.memory' not in chosen(pixels=3_000)  # photos that take long to decode


def test_minutes_given_as_null_are_no_budget():
    assert {
        key: value for key, value, _ in choices(Facts(9_000, 1_000, 5, 1.0, 500, True, 'cpu'), {'minutes': None})
    } == (chosen(images=9_000))


def test_other_optimizers_do_not_get_the_learning_rate_of_muon():
    for model in ('resnet18', 't2t_vit_r_4_64'):
        found = chosen_with(**{'model': model, 'optimizer.name': 'adamw'})
        assert (found['optimizer.lr'], found['optimizer.weight_decay']) == (1e-3, 0.05)
    assert chosen_with(**{'model': 'resnet18', 'optimizer.name': 'muon'})['optimizer.lr'] == 0.02


def test_token_labels_get_no_class_weights():
    assert 'objective.class_weights' not in chosen_with(imbalance=20.0, **{'objective.kind': 'token_labels'})


def test_sizes_of_two_sides_choose_as_the_shorter_one():
    assert chosen_with(**{'data.img_size': (448, 512)})['model'] == 't2t_vit_7'
    assert chosen_with(**{'data.img_size': (32, 48)})['model'] == 't2t_vit_r_4_32'


def chosen_with(imbalance: float = 1.0, **values: Any) -> dict[str, Any]:
    facts = Facts(9_000, 1_000, 5, imbalance, 500, True, 'cpu')
    return {key: value for key, value, _ in choices(facts, values)}


def test_images_are_counted_as_they_are_trained_on(flat):
    def counts(**values: Any) -> tuple[int, int]:
        return look_at(str(flat), {f'data.{key}': value for key, value in values.items()})[:2]

    assert counts() == (29, 7) and counts(fold=1, folds=4) == (27, 9)
    assert counts(train_images=10, val_images=3) == (10, 3) and counts(train_images=10**6, val_images=10**6) == (29, 7)
    (flat.parent / 'lopsided').mkdir()
    shutil.copytree(flat / 'sky', flat.parent / 'lopsided' / 'sky')
    (flat.parent / 'lopsided' / 'roof').mkdir()
    for file in sorted((flat / 'roof').iterdir())[:3]:
        shutil.copy(file, flat.parent / 'lopsided' / 'roof')
    balanced = {'data.val_fraction': 0.2, 'data.sampler': 'balanced'}
    assert look_at(str(flat.parent / 'lopsided'), balanced).images == 19  # 12 of 15, times 24 / 15


@pytest.mark.parametrize('key', ['val_images', 'train_images', 'channels', 'fold'])
def test_options_given_as_null_are_as_if_not_given(flat, tmp_path, key):
    assert main(['train', str(flat), *SMALL, f'--data.{key}', 'null', '--dry-run', '--output', str(tmp_path)]) == 0


def test_validation_takes_a_limited_part_of_the_time():
    assert 'val_interval' not in chosen(images=800, val_images=200)
    assert 'val_interval' not in chosen(images=9_469, val_images=3_925)  # Imagenette
    assert chosen(images=500, val_images=1_000)['val_interval'] == 5  # 0.7 x 1,000 / (0.3 x 500), rounded up
    assert chosen(images=500, val_images=100_000)['val_interval'] == 10  # ten validations in 100 epochs


def test_class_weights_balance_the_loss():
    weights = balanced_weights([0, 0, 0, 1], 2)
    assert torch.allclose(weights, torch.tensor([2 / 3, 2.0]))
    assert sum(weights[label] for label in (0, 0, 0, 1)) == pytest.approx(4)
    loss = Classify(torch.nn.Identity(), Augment(mixup=0, cutmix=0, smoothing=0), weights).loss
    logits, labels = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    each = -logits.log_softmax(1)[range(4), labels] * weights[labels]
    assert loss(logits, labels) == pytest.approx((each.sum() / weights[labels].sum()).item())


def test_class_weights_train(photos, tmp_path):
    changes = {**SHORT, **PHOTOS, 'data.root': str(photos), 'objective.class_weights': 'balanced', 'augment.mixup': 0.5}
    assert train(digits_config(output=str(tmp_path), batch_size=8, **changes))['train_loss'] < 5


# fine-tuning


@pytest.mark.parametrize('recipe', ['finetune', 'finetune-head'])
def test_finetune_on_other_classes_has_a_new_head(flat, colour_run, tmp_path, capsys, recipe):
    root = shutil.copytree(flat, tmp_path / 'photos')
    (root / 'sky').rename(root / 'cloud')
    words = ['finetune', str(root), '--weights', str(colour_run), '--recipe', recipe, '--epochs', '1']
    assert main([*words, '--output', str(tmp_path / 'run')]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert 'tensors loaded, 2 new (head.weight, head.bias)' in said and 'model t2t_vit_4_16' in said
    before, after = (load_file(folder / 'model.safetensors') for folder in (colour_run, tmp_path / 'run'))
    same = [name for name in before if torch.equal(before[name], after[name])]
    trained = {'head.weight', 'head.bias'} if recipe == 'finetune-head' else {*before} - {'pos_embed'}
    assert {*before} - {*same} >= trained - {'tokens_to_token.attention1.w', 'tokens_to_token.attention2.w'}
    assert recipe == 'finetune' or {*before} - {*same} == trained
    config = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert config['model_args']['depth'] == 1 and config['data']['val_fraction'] == 0.2
    assert load_state(tmp_path / 'run' / 'checkpoints')[0]['origin']['weights'] == colour_run.name


def test_training_from_weights_fine_tunes(flat, colour_run, tmp_path, capsys):
    words = ['train', str(flat), '--weights', str(colour_run), '--epochs', '1', '--dry-run']
    assert main([*words, '--output', str(tmp_path / 'run')]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert 'chosen recipe finetune: training starts from weights' in said and 'tensors loaded' in said


def test_finetune_on_the_same_classes_keeps_the_head_also_of_a_state(flat, colour_run):
    for weights in (colour_run, next((colour_run / 'checkpoints').glob('*.pt'))):
        net = timm.create_model(f'local-dir:{colour_run}', pretrained=False)
        report = load_start_weights(net, str(weights), CLASSES)
        assert not report.new and not report.resized and len(report.loaded) == len(net.state_dict())
        assert load_start_weights(net, str(weights), CLASSES[::-1]).new == ['head.weight', 'head.bias']


def test_finetune_at_another_size_resizes_the_positions(colour_run):
    net = timm.create_model('t2t_vit_4_16', img_size=32, num_classes=3, depth=1, token_dim=16)
    report = load_start_weights(net, str(colour_run), CLASSES)
    assert report.resized == ['pos_embed'] and '1 resized (pos_embed)' in str(report)


@pytest.mark.parametrize(
    'words, message',
    [
        ([], 'fine-tuning starts from trained weights'),
        (['--weights', '/nowhere'], 'no weights at /nowhere'),
        (['--weights', 't2t_vit_14.in1kk'], 'no weights at t2t_vit_14.in1kk'),
        (['--weights', 't2t_vit_r_4_64.imagenet'], 'such as t2t_vit_r_4_64.imagenette'),
        (['--weights', 'FILE'], 'does not say what model it is for: name it with --model'),
    ],
)
def test_finetune_without_usable_weights_is_refused(flat, colour_run, tmp_path, capsys, words, message):
    file = tmp_path / 'weights.safetensors'
    shutil.copy(colour_run / 'model.safetensors', file)
    words = [str(file) if word == 'FILE' else word for word in words]
    assert main(['finetune', str(flat), *words, '--output', str(tmp_path / 'run')]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_sizes_of_jpeg_photos_are_seen(tmp_path):
    for name in ('cat/1.jpg', 'cat/2.jpg', 'dog/3.jpg', 'dog/4.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (90, 70)).save(tmp_path / name)
    assert look_at(str(tmp_path), {}).pixels == 70
