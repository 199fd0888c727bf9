"""What goes over what, and every problem in one message."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from t2t_vit.benchmark import bench
from t2t_vit.settings import (
    UsageError,
    booleans,
    flatten,
    nearest,
    options,
    read_settings,
    recipes,
    require,
    resolve,
    spell_out,
)
from t2t_vit.train.config import Config


def settings(**values: Any) -> list[Any]:
    return [(f'--{key}', key, value) for key, value in values.items()]


def problems(*found: Any) -> list[str]:
    with pytest.raises(UsageError) as error:
        resolve(Config, [(f'--{key}', key, value) for key, value in found])
    return str(error.value).splitlines()


def test_nothing_said_gives_the_defaults():
    assert resolve(Config, []) == Config()


def test_later_settings_win():
    config = resolve(Config, settings(epochs=20) + settings(epochs=30, seed=1) + settings(seed=2))
    assert (config.epochs, config.seed) == (30, 2)


@pytest.mark.parametrize(
    'key, text, value',
    [
        ('epochs', '20', 20),
        ('optimizer.lr', '5e-4', 5e-4),
        ('optimizer.clip_grad', 'null', None),
        ('augment.aa', 'null', None),
        ('augment.scale', '[0.5, 1]', (0.5, 1.0)),
        ('data.img_size', '32', 32),
        ('data.img_size', '[32, 48]', (32, 48)),
        ('data.memory', 'true', True),
        ('trackers', '[]', []),
        ('model_args.drop_path_rate', '0.1', 0.1),
        ('model_args.token_layer', 'convolution', 'convolution'),
    ],
)
def test_words_of_the_command_line_become_values(key, text, value):
    found: Any = resolve(Config, [(f'--{key}', key, text)])
    for name in key.split('.'):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value and type(found) is type(value)


def test_every_problem_in_one_message():
    assert problems(
        ('epohcs', 5),
        ('batch_size', 'x'),
        ('optimizer.lr', -1),
        ('optimizer.name', 'adamv'),
        ('model', 't2t_vit14'),
        ('augment.aa', 'foo'),
        ('augment.scale', [0.5, 2]),
    ) == [
        'unknown option --epohcs, did you mean epochs?',
        "--batch_size: Expected a <class 'int'>. Got value: x",
        "unknown model 't2t_vit14', did you mean t2t_vit_14?; `t2t-vit models` lists ours, "
        'any other of timm will also do',
        "unknown optimizer.name 'adamv', did you mean adam?",
        'optimizer.lr is above 0, got -1.0',
        'augment.scale rises within (0, 1], got (0.5, 2.0)',
        'augment.aa: Unknown AA policy foo',
    ]


@pytest.mark.parametrize(
    'key, value',
    [
        ('epochs', 0),
        ('batch_size', 0),
        ('batch_size', 63),
        ('seed', -1),
        ('ema_decay', 1),
        ('data.workers', -1),
        ('data.img_size', 0),
        ('data.img_size', [32, 0]),
        ('data.crop_pct', 1.1),
        ('data.std', [0.0]),
        ('optimizer.min_lr', -1),
        ('optimizer.weight_decay', -1),
        ('optimizer.warmup_epochs', -1),
        ('optimizer.cooldown_epochs', -1),
        ('optimizer.layer_decay', 0),
        ('optimizer.clip_grad', 0),
        ('augment.scale', [0, 1]),
        ('augment.ratio', [2, 1]),
        ('augment.hflip', 2),
        ('augment.reprob', -1),
        ('augment.remode', 'x'),
        ('augment.interpolation', 'x'),
        ('augment.mixup_switch_prob', 2),
        ('augment.rotate', -1),
        ('augment.color_jitter', -1),
        ('augment.smoothing', 1),
        ('augment.mixup', -1),
        ('augment.cutmix', -1),
        ('weights', '/nowhere'),
    ],
)
def test_impossible_values(key, value):
    assert key.split('.')[-1] in ' '.join(problems((key, value)))


def test_unknown_arguments_of_the_model():
    assert problems(('model_args.depht', 2), ('model_args.in_chans', 1)) == [
        'unknown option model_args.depht, did you mean depth?',
        'unknown option model_args.in_chans',
    ]


def test_weights_are_for_our_models(tmp_path):
    assert problems(('model', 'resnet18'), ('weights', str(tmp_path))) == [
        "weights are for models of `t2t-vit models`, not 'resnet18'"
    ]


def test_a_key_below_a_value():
    assert problems(('epochs.x', 1)) == ["--epochs.x: Expected a <class 'int'>. Got value: {'x': 1}"]


def test_options_and_what_is_wrong_with_them():
    found, wrong = options(['--a', '1', '--b=x=y', '--c', '-2', 'word', '--d'])
    assert found == [('a', '1'), ('b', 'x=y'), ('c', '-2')]
    assert wrong == ["what is 'word' for? options are --name value", '--d has no value']


def test_hyphens_and_flags_without_a_value():
    flags = booleans(Config)
    assert set(flags) >= {'data.memory', 'data.download', 'objective.hard', 'optimizer.decay_all'}
    assert 'data.root' not in flags and 'ema_decay' not in flags
    assert booleans(bench) == ['memory']  # a list of them, as `compiled`, is no flag
    assert spell_out(
        [
            '--data.train-images',
            '5',
            '--data.memory',
            '--batch-size=2',
            '--data.download',
            'false',
            'a-b',
            '--objective.hard',
            'word',
            '-o',
        ],
        flags,
    ) == [
        '--data.train_images',
        '5',
        '--data.memory=true',
        '--batch_size=2',
        '--data.download',
        'false',
        'a-b',
        '--objective.hard=true',
        'word',
        '-o',
    ]


def test_weights_that_a_recipe_asks_for():
    recipe = read_settings(recipes()['imagenet-14-384'])
    with pytest.raises(UsageError, match='starts from trained weights: give them with --weights FILE, or --weights n'):
        resolve(Config, recipe)
    assert resolve(Config, [*recipe, ('', 'weights', 'null')]).weights is None


def test_values_stay_as_they_were():
    args = {'depth': 1}
    config = resolve(Config, [('a', 'model_args', args), ('b', 'model_args.num_heads', 2)])
    assert args == {'depth': 1} and config.model_args == {'depth': 1, 'num_heads': 2}


def test_flatten():
    assert flatten({'a': {'b': 1, 'c': {}}, 'd': [2]}) == [('a.b', 1), ('a.c', {}), ('d', [2])]


def test_nearest():
    assert nearest('epohcs', ['epochs', 'seed']) == ', did you mean epochs?' and nearest('x', ['epochs']) == ''


def test_require_names_all_that_does_not_hold():
    require([(True, 'a')])
    with pytest.raises(UsageError, match='^b\nc$'):
        require([(True, 'a'), (False, 'b'), (False, 'c')])


@pytest.mark.parametrize(
    'text, message',
    [
        ('epochs: [', 'cannot read .*while parsing'),
        ('just words', 'holds no settings'),
        ('', 'holds no settings'),
        (b'\xff\xfe\xff', 'cannot read'),
    ],
)
def test_files_that_are_no_settings(tmp_path, text, message):
    (tmp_path / 'a.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_settings(tmp_path / 'a.yaml')


def test_a_file_that_is_not_there():
    with pytest.raises(UsageError, match='cannot read nowhere.yaml'):
        read_settings(Path('nowhere.yaml'))


def test_a_problem_in_a_file_names_the_file(tmp_path):
    (tmp_path / 'a.yaml').write_text('optimizer: {lrr: 1}')
    with pytest.raises(UsageError, match=r'unknown option optimizer.lrr in .*a.yaml, did you mean optimizer.lr\?'):
        resolve(Config, read_settings(tmp_path / 'a.yaml'))


@pytest.mark.parametrize('name', recipes())
def test_a_resolved_recipe_is_its_own_file(name, tmp_path):
    more = [('', 'objective.teacher', 'resnet18')] if name.startswith(('distill', 'token')) else []
    more += [('', 'weights', None)]
    config = resolve(Config, read_settings(recipes()[name]) + more)
    (tmp_path / 'a.yaml').write_text(config.to_yaml())
    assert resolve(Config, read_settings(tmp_path / 'a.yaml')) == config
    assert yaml.safe_load(config.to_yaml())['model'] == config.model


def test_old_option_names_still_work_with_a_warning(capsys):
    config = resolve(Config, [('--augment.erase', 'augment.erase', 0.5), ('--accumulate', 'accumulate', 2)])
    assert (config.augment.reprob, config.grad_accum_steps) == (0.5, 2)
    assert 'warning: --augment.erase: augment.erase is now augment.reprob' in capsys.readouterr().err
