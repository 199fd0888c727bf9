"""Typed configurations from files and options, and the messages for mistakes in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from jsonargparse.typing import PositiveInt, restricted_number_type

from t2t_vit.settings import (
    UsageError,
    convert,
    describe_type,
    flatten,
    nearest,
    option_types,
    read_settings,
    recipes,
    require,
    resolve,
)
from t2t_vit.train.config import Config

Decay = restricted_number_type('Decay', float, [('>=', 0), ('<', 1)], docstring='at least 0 and below 1')


def settings(**values: Any) -> list[Any]:
    return [(f'--{key}', key, value) for key, value in values.items()]


def problems(*found: Any, kind: Any = Config) -> list[str]:
    with pytest.raises(UsageError) as error:
        resolve(kind, [(f'--{key}', key, value) for key, value in found])
    return str(error.value).splitlines()


def test_resolve_fills_in_defaults():
    assert resolve(Config, []) == Config()


def test_later_settings_replace_earlier_ones():
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
        ('model_args.qk_scale', 'null', None),
    ],
)
def test_text_of_the_command_line_becomes_typed_values(key, text, value):
    found: Any = resolve_values(key, text)
    assert found == value and type(found) is type(value)


def resolve_values(key: str, text: str) -> Any:
    @dataclass
    class Quiet(Config):
        def problems(self) -> list[str]:
            return []

    found: Any = resolve(Quiet, [(f'--{key}', key, text)])
    for name in key.split('.'):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


def test_all_problems_in_one_message():
    assert problems(
        ('epohcs', 5), ('batch_size', 'x'), ('optimizer.lr', -1), ('optimizer.name', 'adamv'), ('model', 't2t_vit14')
    )[:2] == ['unknown option --epohcs, did you mean --epochs?', "--batch_size: expected a whole number, got 'x'"]
    text = '\n'.join(problems(('epohcs', 5), ('optimizer.lr', -1), ('optimizer.name', 'adamv'), ('model', 't2t_vit14')))
    assert all(word in text for word in ('--epohcs', 'optimizer.lr', 'did you mean adam?', 'did you mean t2t_vit_14?'))


@pytest.mark.parametrize(
    'key, value',
    [
        ('epochs', 0),
        ('batch_size', 0),
        ('seed', -1),
        ('ema_decay', 1),
        ('data.workers', -1),
        ('data.img_size', 0),
        ('data.img_size', [32, 0]),
        ('data.crop_pct', 1.1),
        ('data.std', [0.0]),
        ('optimizer.min_lr', -1),
        ('optimizer.weight_decay', -1),
        ('optimizer.layer_decay', 0),
        ('optimizer.clip_grad', 0),
        ('augment.scale', [0, 1]),
        ('augment.ratio', [2, 1]),
        ('augment.hflip', 2),
        ('augment.reprob', -1),
        ('augment.remode', 'x'),
        ('augment.mixup_switch_prob', 2),
        ('augment.interpolation', 'x'),
        ('augment.smoothing', 1),
        ('augment.mixup', -1),
        ('weights', '/nowhere'),
    ],
)
def test_impossible_values_are_named(key, value):
    assert key.split('.')[-1] in ' '.join(problems((key, value)))


def test_unknown_model_arguments_get_a_suggestion():
    assert problems(('model_args.depht', 2))[0] == 'unknown option model_args.depht, did you mean depth?'


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('epochs.x', 1, 'unknown option --epochs.x: epochs is a single value'),
        ('data', 3, '--data is a group of options, such as data.root; got 3'),
        ('mixup', 0, 'unknown option --mixup, did you mean --augment.mixup?'),
        ('lr', 0, 'unknown option --lr, did you mean --optimizer.lr?'),
    ],
)
def test_misplaced_keys_say_where_they_belong(key, value, message):
    assert problems((key, value)) == [message]


def test_empty_group_in_a_file_is_accepted():
    assert resolve(Config, [('data in a.yaml', 'data', {})]) == Config()


def test_recipe_for_fine_tuning_asks_for_weights():
    recipe = read_settings(recipes()['imagenet-14-384'])
    with pytest.raises(UsageError, match='--weights FILE'):
        resolve(Config, recipe)
    assert resolve(Config, [*recipe, ('', 'weights', 'null')]).weights is None


def test_resolve_leaves_its_input_unchanged():
    args = {'depth': 1}
    config = resolve(Config, [('a', 'model_args', args), ('b', 'model_args.num_heads', 2)])
    assert args == {'depth': 1} and config.model_args == {'depth': 1, 'num_heads': 2}


def test_flatten():
    assert flatten({'a': {'b': 1, 'c': {}}, 'd': [2]}) == [('a.b', 1), ('a.c', {}), ('d', [2])]


def test_nearest_knows_typing_mistakes_and_last_components():
    assert nearest('epohcs', ['epochs', 'seed']) == ', did you mean epochs?' and nearest('x', ['epochs']) == ''
    assert nearest('mixup', ['mixer', 'augment.mixup']) == ', did you mean augment.mixup?'


def test_require_raises_every_false_condition():
    require([(True, 'a')])
    with pytest.raises(UsageError, match='^b\nc$'):
        require([(True, 'a'), (False, 'b'), (False, 'c')])


# Types


@pytest.mark.parametrize(
    'hint, value, expected',
    [
        (PositiveInt, '5', 5),
        (Decay, '0.5', 0.5),
        (PositiveInt | tuple[PositiveInt, PositiveInt] | None, '[32, 48]', (32, 48)),
        (list[int], ['1', '2'], [1, 2]),
        (Sequence[str], ['1', 'a'], ['1', 'a']),
        (Literal[1, 3] | None, '3', 3),
        (str | None, '123', '123'),
        (str | None, None, None),
        (Any, 'null', None),
        (Any, '1e-3', 1e-3),
    ],
)
def test_convert_returns_plain_python_values(hint, value, expected):
    found = convert(hint, value)
    assert found == expected and type(found) is type(expected)
    assert yaml.safe_load(yaml.safe_dump(found)) == (list(found) if isinstance(found, tuple) else found)


@pytest.mark.parametrize(
    'hint, value, message',
    [
        (int, '2.5', "expected a whole number, got '2.5'"),
        (PositiveInt, 0, 'expected a whole number >0, got 0'),
        (Decay, '1', "expected a number at least 0 and below 1, got '1'"),
        (bool | None, 'maybe', "expected true or false or null, got 'maybe'"),
        (Literal['no', 'bf16'], 'fp8', "expected no or bf16, got 'fp8'"),
        (tuple[float, float], 'x', "expected [a number, a number], got 'x'"),
        (Sequence[int], ['a'], "expected [a whole number, …], got ['a']"),
    ],
)
def test_convert_says_what_it_expects(hint, value, message):
    with pytest.raises(ValueError) as error:
        convert(hint, value)
    assert str(error.value) == message


def test_every_type_of_train_has_a_plain_description():
    phrases = {name: describe_type(hint) for name, hint in option_types(Config).items()}
    assert not [name for name, phrase in phrases.items() if any(sign in phrase for sign in ('<', 'typing', 'Literal'))]


# Files


@pytest.mark.parametrize(
    'text, message',
    [
        ('epochs: [', 'cannot read .*while parsing'),
        ('just words', 'holds no settings'),
        ('', 'holds no settings'),
        (b'\xff\xfe\xff', 'cannot read'),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    (tmp_path / 'a.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_settings(tmp_path / 'a.yaml')


def test_missing_file_is_named():
    with pytest.raises(UsageError, match='cannot read nowhere.yaml'):
        read_settings(Path('nowhere.yaml'))


def test_problem_in_a_file_names_the_file(tmp_path):
    (tmp_path / 'a.yaml').write_text('optimizer: {lrr: 1}')
    with pytest.raises(UsageError, match=r'unknown option optimizer.lrr in .*a.yaml, did you mean optimizer.lr\?'):
        resolve(Config, read_settings(tmp_path / 'a.yaml'))


@pytest.mark.parametrize('name', recipes())
def test_resolved_recipe_round_trips_through_yaml(name, tmp_path):
    more = [('', 'objective.teacher', 'resnet18')] if name.startswith(('distill', 'token')) else []
    more += [('', 'weights', None)]
    config = resolve(Config, read_settings(recipes()[name]) + more)
    (tmp_path / 'a.yaml').write_text(config.to_yaml(), encoding='utf-8')
    assert resolve(Config, read_settings(tmp_path / 'a.yaml')) == config
    assert yaml.safe_load(config.to_yaml())['model'] == config.model


def test_old_option_names_still_work_with_a_warning(capsys):
    config = resolve(Config, [('--augment.erase', 'augment.erase', 0.5), ('--accumulate', 'accumulate', 2)])
    assert (config.augment.reprob, config.grad_accum_steps) == (0.5, 2)
    assert 'warning: --augment.erase: augment.erase is now augment.reprob' in capsys.readouterr().err
