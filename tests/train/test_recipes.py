"""Every shipped recipe says what it is, resolves, and trains."""

import re

import pytest
import timm
import torch
from conftest import CLASSES

from t2t_vit.settings import UsageError, read_settings, recipes, resolve
from t2t_vit.train.config import Config
from t2t_vit.train.run import train

# so small that a step of each takes a second; what a recipe is about stays as it is
SMOKE = {
    'epochs': 1,
    'optimizer.warmup_epochs': 0,
    'optimizer.cooldown_epochs': 0,
    'batch_size': 8,
    'precision': 'no',
    'data.workers': 0,
    'data.download': False,
    'optimizer.min_lr': 0.0,
    'optimizer.lr_base_size': None,
}
DENSE_GROUPS = {'t2t_vit_dense': [1, 1], 'vit_s_16_dense': [1, 1]}


def config(name, **changes):
    return resolve(Config, read_settings(recipes()[name]) + [(key, key, value) for key, value in changes.items()])


@pytest.mark.parametrize('name', recipes())
def test_recipe_header_has_command_time_and_score(name):
    head = [line for line in recipes()[name].read_text().splitlines() if line.startswith('#')]
    text = '\n'.join(head)
    assert f'--recipe {name}' in text and re.search(r'\bscore\b', text, re.IGNORECASE)  # its command; its score
    assert re.search(r'\b(GPUs?|cores?)\b', text) and re.search(r'\b(hours|minutes)\b', text)  # on what, how long


@pytest.fixture(scope='module')
def teacher(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp('teacher') / 'run'
    train(
        config(
            'small-images',
            output=str(folder),
            model='t2t_vit_4_16',
            **SMOKE,
            **{'data.root': str(photos), 'data.img_size': 32},
        )
    )
    return folder


def models_of(name):
    """Return the models that the header of a recipe lists, or None for the recipe's own."""
    return re.findall(r'^#   --model (\S+)', recipes()[name].read_text(), re.MULTILINE) or [None]


TRAINED = [(name, model) for name in recipes() if name != 'digits' for model in models_of(name)]


@pytest.mark.parametrize('name, model', TRAINED)
def test_recipe_trains(name, model, photos, tmp_path, teacher):
    chosen = {'model': model} if model else {}
    resnet = {'objective.teacher': 'resnet18'} if name.startswith(('distill', 'token')) else {}
    whole = config(name, weights=None, **chosen, **resnet)
    small = {'data.root': str(photos), 'data.img_size': 32, 'model_args.depth': DENSE_GROUPS.get(whole.model, 1)}
    small.update(chosen)
    if whole.objective.kind != 'labels':
        small['objective.teacher'] = str(teacher)
    if weights := [value for _, key, value, _ in read_settings(recipes()[name]) if key == 'weights']:
        assert weights == ['required']
        small['weights'] = None
    record = train(config(name, output=str(tmp_path), **SMOKE, **small))
    assert record['train_loss'] < 10 and (tmp_path / 'model.safetensors').exists()
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['label_names'] == CLASSES


def test_token_labeling_with_label_files(photos, tmp_path):
    """As it is shipped: the public layout, a file an image."""
    for file in (photos / 'train').rglob('*.*'):
        label = tmp_path / 'labels' / file.parent.name / f'{file.stem}.pt'
        label.parent.mkdir(parents=True, exist_ok=True)
        classes = torch.arange(2).view(2, 1, 1).expand(2, 18, 18)
        torch.save(torch.stack([9.0 - 5 * classes, classes.float()]).half(), label)
    record = train(
        config(
            'token-labeling-24',
            output=str(tmp_path / 'run'),
            **SMOKE,
            **{
                'data.root': str(photos),
                'data.img_size': 32,
                'model_args.depth': 1,
                'objective.labels': str(tmp_path / 'labels'),
            },
        )
    )
    assert 0 < record['train_loss'] < 10


def test_recipes_have_the_papers_learning_rates():
    """Learning rate / weight decay at batch 512, of the release's commands."""
    rates = {'imagenet-7': (1e-3, 0.03), 'imagenet-14': (5e-4, 0.05), 'imagenet-19': (5e-4, 0.065)}
    for name, (lr, decay) in rates.items():
        found = config(name)
        assert (found.model, found.lr, found.optimizer.weight_decay) == (f't2t_vit_{name[9:]}', lr, decay)
        assert (found.epochs, found.batch_size, found.ema_decay) == (310, 512, 0.99996)
    assert config('imagenet-14', batch_size=1024).lr == 1e-3


def test_custom_file_derives_from_a_recipe_or_a_file(tmp_path):
    (tmp_path / 'mine.yaml').write_text('base: imagenet-14\nbatch_size: 64\n')
    (tmp_path / 'other.yaml').write_text('base: mine.yaml\nepochs: 20\n')
    found = resolve(Config, read_settings(tmp_path / 'other.yaml'))
    assert (found.epochs, found.batch_size, found.augment.mixup) == (20, 64, 0.8)


@pytest.mark.parametrize(
    'base, text',
    [('imagenet-41', 'no recipe and no file .*did you mean imagenet-'), ('mine.yaml', 'leads back to itself')],
)
def test_unknown_or_circular_base_is_refused(tmp_path, base, text):
    (tmp_path / 'mine.yaml').write_text(f'base: {base}\n')
    with pytest.raises(UsageError, match=text):
        read_settings(tmp_path / 'mine.yaml')
