"""The commands as a user gives them: what they print, what they leave, what they answer to mistakes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import read_records
from safetensors.torch import load_file

from t2t_vit import VARIANTS, __version__, cli
from t2t_vit.models.listing import count_parameters

Lines = tuple[int, list[str], list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line; gives its exit code and the lines it printed and complained with."""
    monkeypatch.setenv('COLUMNS', '200')

    def run(*argv: object) -> Lines:
        code = cli.main([str(word) for word in argv])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err.splitlines()

    return run


@pytest.fixture(scope='session')
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the official training saves it; the raw weights are zeros."""
    torch.manual_seed(0)
    weights = timm.create_model('t2t_vit_4_16', num_classes=3).state_dict()
    file = tmp_path_factory.mktemp('release') / '99.9_small.pth.tar'
    torch.save(
        {
            'state_dict': {name: torch.zeros_like(tensor) for name, tensor in weights.items()},
            'state_dict_ema': weights,
            'args': argparse.Namespace(lr=5e-4),
            'epoch': 309,
        },
        file,
    )
    return file


def test_help_lists_the_commands(run):
    for argv in ([], ['--help']):
        code, lines, _ = run(*argv)
        assert code == 0 and all(f'  {name}' in '\n'.join(lines) for name in cli.COMMANDS)


@pytest.mark.parametrize('command', [name for name in cli.COMMANDS if name != 'train'])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit, match='0'):
        cli.main([command, '--help'])
    assert f'usage: t2t-vit {command}' in capsys.readouterr().out


def test_help_of_train_has_every_option(run):
    code, lines, _ = run('train', '--help')
    text = ' '.join(lines)
    assert code == 0
    assert all(word in text for word in ('--recipe', '--resume', '--print_config', '--optimizer.lr', 'Peak learning'))


def test_version(run):
    assert run('--version') == (0, [__version__], [])


def test_unknown_command(run):
    code, _, errors = run('trian')
    assert code == 2 and errors == [
        f"t2t-vit: unknown command 'trian', did you mean train?; commands: {', '.join(cli.COMMANDS)}"
    ]


def test_as_a_program_it_gives_its_exit_code():
    done = subprocess.run([sys.executable, '-m', 't2t_vit.cli', 'trian'], capture_output=True, text=True)
    assert done.returncode == 2 and 'did you mean train?' in done.stderr and 'Traceback' not in done.stderr


def test_interrupted_before_there_is_anything_to_save(run, monkeypatch):
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, 'train', interrupted)
    assert run('train') == (130, [], ['t2t-vit: stopped, nothing to save'])


# train


def test_recipe_below_file_below_option(run, tmp_path):
    (tmp_path / 'a.yaml').write_text('{epochs: 7, seed: 1, optimizer: {warmup_epochs: 2}}')
    code, lines, _ = run('train', '--seed', 2, '--config', tmp_path / 'a.yaml', '--recipe', 'digits', '--print_config')
    assert code == 0
    assert {'model: t2t_vit_4_16', 'epochs: 7', 'seed: 2', '  warmup_epochs: 2', '  lr: 0.002'} <= set(lines)


def test_a_printed_config_gives_itself(run, tmp_path):
    _, lines, _ = run('train', '--recipe', 'small-images', '--data.img_size', '[48, 64]', '--print_config')
    (tmp_path / 'a.yaml').write_text('\n'.join(lines))
    assert run('train', '--config', tmp_path / 'a.yaml', '--print_config') == (0, lines, [])


def test_options_as_people_spell_them(run, tmp_path):
    code, lines, _ = run(
        'train',
        '--recipe',
        'digits',
        '--data',
        'digits',
        '--batch-size',
        128,
        '--dry-run',
        '--data.memory',
        '--output',
        tmp_path / 'run',
    )
    assert code == 0 and lines[1].startswith('data      digits: 1,437') and not (tmp_path / 'run').exists()
    code, lines, _ = run('train', '--data', 'elsewhere', '--data.download', '--print-config')
    assert code == 0 and {'  root: elsewhere', '  download: true'} <= set(lines)


def test_mistakes_are_reported_together(run):
    code, _, errors = run('train', 'word', '--recipe', 'digits', '--epohcs', 3, '--optimizer.lr=-1', '--seed')
    assert code == 2 and errors == [
        "t2t-vit: what is 'word' for? options are --name value",
        't2t-vit: --seed has no value',
        't2t-vit: unknown option --epohcs, did you mean epochs?',
        't2t-vit: optimizer.lr is above 0, got -1.0',
        't2t-vit: optimizer.min_lr 1e-05 is above the learning rate -1',
    ]


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--recipe', 'digit'], "unknown recipe 'digit', did you mean digits?; recipes: cifar10, cifar10-transfer"),
        (['--config', 'nowhere.yaml'], 'cannot read nowhere.yaml'),
        (['--resume', 'nowhere'], 'cannot read nowhere/config.yaml'),
        (['--data.root', 'nowhere'], 'no data at nowhere'),
        (['--recipe', 'digits', '--weights', sys.executable], 'is of an unknown kind'),
    ],
)
def test_what_cannot_be_trained(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run('train', *argv)
    assert code == 2 and message in errors[0] and not list(tmp_path.iterdir())


def test_an_output_that_is_a_file(run, tmp_path):
    (tmp_path / 'a').touch()
    code, _, errors = run('train', '--recipe', 'digits', '--output', tmp_path / 'a')
    assert code == 2 and str(tmp_path / 'a') in errors[0]


def test_a_loss_that_is_not_finite(run, tmp_path):
    argv = [
        '--epochs',
        1,
        '--optimizer.warmup_epochs',
        0,
        '--optimizer.lr',
        1e30,
        '--model_args.depth',
        1,
        '--max_skipped_steps',
        3,
    ]
    code, _, errors = run('train', '--recipe', 'digits', '--output', tmp_path, *argv)
    assert code == 2 and errors[0].startswith('t2t-vit: loss or gradient were not finite in 3 steps in a row')


def test_resume(run, digits_run, tmp_path):
    for file in digits_run.rglob('*'):
        if file.is_file():
            (tmp_path / file.relative_to(digits_run)).parent.mkdir(exist_ok=True)
            (tmp_path / file.relative_to(digits_run)).write_bytes(file.read_bytes())
    code, lines, _ = run('train', '--resume', tmp_path, '--epochs', 3)
    assert code == 0 and 'from epoch 3, step 1' in lines[2] and lines[-1].endswith(f'are in {tmp_path}')


# eval


def test_eval_of_a_run(run, digits_run, tmp_path):
    code, lines, _ = run('eval', '--checkpoint', digits_run, '--output', tmp_path)
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert code == 0 and any(line.split()[:2] == ['top-1', f'{100 * scores["top1"]:.2f}'] for line in lines)
    assert list(scores['per_class']) == [str(i) for i in range(10)] and scores['images'] == 360
    assert (tmp_path / 'confusion.png').read_bytes()[1:4] == b'PNG'
    best = max(max(r['val_top1'], r['val_top1_ema']) for r in read_records(digits_run / 'metrics.jsonl'))
    assert scores['top1'] == pytest.approx(best)


def test_eval_of_a_file_on_a_validation_folder_alone(run, release, photos, tmp_path):
    argv = ['--checkpoint', release, '--model', 't2t_vit_4_16', '--output', tmp_path / 'new' / 'folder']
    code, lines, _ = run('eval', *argv, '--data', photos / 'val')
    scores = json.loads((tmp_path / 'new' / 'folder' / 'scores.json').read_text())
    assert code == 0 and (scores['images'], scores['damaged']) == (12, [])
    assert any('flower' in line for line in lines)


def test_eval_of_parquet_scores_as_the_folder(run, release, photos, parquet, tmp_path):
    for root in (photos, parquet):
        assert (
            run(
                'eval',
                '--checkpoint',
                release,
                '--model',
                't2t_vit_4_16',
                '--data',
                root,
                '--output',
                tmp_path / root.name,
                '--split',
                'train',
            )[0]
            == 0
        )
    one, other = (json.loads((tmp_path / root.name / 'scores.json').read_text()) for root in (photos, parquet))
    assert one['images'] == other['images'] == 24 and one['loss'] == pytest.approx(other['loss'], rel=0.1)  # jpeg, png


def test_eval_names_damaged_images(run, release, photos, tmp_path):
    for name in ('flower', 'roof', 'sky'):
        (tmp_path / name).symlink_to(photos / 'val' / name) if name != 'sky' else (tmp_path / name).mkdir()
    (tmp_path / 'sky' / '1.png').write_text('not an image')
    code, lines, _ = run('eval', '--checkpoint', release, '--model', 't2t_vit_4_16', '--data', tmp_path)
    assert code == 0 and f'1 damaged images are left out: {tmp_path}/sky/1.png' in lines[-1]


def test_other_classes_are_not_scored(run, digits_run, photos):
    code, _, errors = run('eval', '--checkpoint', digits_run, '--data', photos)
    assert code == 2 and f"the model has 10 classes, {photos} has 3: 'flower', 'roof', 'sky' are in" in errors[0]


def test_all_wrong_values_in_one_message(run):
    code, _, errors = run('eval', '--checkpoint', 'x', '--split', 'tset', '--workers', '2', '--batch-size', 'many')
    assert code == 2 and ['"split"' in errors[0], '"batch_size"' in errors[1], len(errors)] == [True, True, 2]


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], 'arguments are required: checkpoint'),
        (['--checkpoint', 'nowhere'], 'no checkpoint at nowhere'),
        (['--checkpoint', 'RELEASE'], 'name the model with --model NAME'),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit14'], "unknown model 't2t_vit14', did you mean t2t_vit_14?"),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit_14.foo'], "t2t_vit_14 has no tag 'foo'; tags: in1k, in1k_384"),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit_7'], 'of another shape'),
        (['--checkpoint', 'RELEASE', '--batch-size', '0', '--workers', '-1'], 'batch_size must be at least 1, got 0'),
        (['--checkpoint', 'RELEASE', '--split', 'tset'], '"split"'),
        (['--checkpoint', 'RELEASE', '--device', 'abacus'], "no device 'abacus' here"),
        (['--checkpoint', 'RELEASE', '--download', '--data', 'nowhere'], 'no data at nowhere'),
        (['--chekpoint', 'RELEASE'], 'unknown option --chekpoint, did you mean checkpoint?'),
        (['--checkpoint', '.'], 'it has no model.safetensors and no config.json'),
    ],
)
def test_what_cannot_be_scored(run, release, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run('eval', *(release if word == 'RELEASE' else word for word in argv))
    assert code == 2 and message in ' '.join(errors)


# predict


def test_predict_files_and_folders(run, digits_run, photos):
    folder, file = photos / 'val' / 'sky', photos / 'val' / 'roof' / '20.jpg'
    code, lines, _ = run('predict', folder, file, '--checkpoint', digits_run)
    named = [line.split('   ')[0] for line in lines if '%' in line]
    assert code == 0 and [Path(name).parent.name for name in named] == ['sky'] * 4 + ['roof']
    assert all(line.count('%') == 5 for line in lines if '%' in line)


def test_predict_digits_with_a_picture(run, digits_run, tmp_path):
    picture = tmp_path / 'new' / 'a.png'
    code, lines, _ = run('predict', 'digits', '--checkpoint', digits_run, '--top_k', 3, '--picture', picture)
    assert code == 0 and picture.read_bytes()[1:4] == b'PNG'
    assert len([line for line in lines if line.count('%') == 3]) == 12


def test_predict_from_a_file(run, release, photos):
    argv = ['--checkpoint', release, '--model', 't2t_vit_4_16', '--batch_size', 5]
    code, lines, _ = run('predict', photos / 'val', *argv)
    assert code == 0 and len([line for line in lines if line.count('%') == 3]) == 12  # of three classes


def test_predict_says_what_is_damaged(run, digits_run, photos, tmp_path):
    (tmp_path / 'a.png').write_text('not an image')
    code, lines, _ = run('predict', tmp_path, photos / 'val' / 'sky', '--checkpoint', digits_run)
    said = f'1 of 5 images have no prediction: {tmp_path / "a.png"} (ImageError'
    assert code == 0 and lines[-1].startswith(said) and len([line for line in lines if line.count('%') == 5]) == 4
    code, _, errors = run('predict', tmp_path, '--checkpoint', digits_run)
    assert code == 2
    assert errors[0].startswith(f't2t-vit: not one image can be read: {tmp_path / "a.png"} (ImageError')


@pytest.mark.parametrize(
    'argv, message',
    [
        (['here', 'nowhere', 'else'], 'not found: nowhere, else'),
        (['here'], 'no images in here'),
        (['here', '--top_k', '0', '--batch_size', '0'], 'top_k must be at least 1, got 0'),
        ([], 'arguments are required: inputs'),
    ],
)
def test_what_cannot_be_predicted(run, digits_run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    code, _, errors = run('predict', *argv, '--checkpoint', digits_run)
    assert code == 2 and message in errors[0]


# models, convert


def test_models_lists_all_with_their_sizes(run):
    code, lines, _ = run('models')
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in lines if '│ t2t' in line or '│ vit' in line]
    assert code == 0 and [row[0] for row in rows] == list(VARIANTS)
    counts = count_parameters(timm.create_model('t2t_vit_7'))
    assert rows[0] == ['t2t_vit_7', '224', *(f'{n:,}' for n in counts), 'in1k']


def test_models_by_pattern(run):
    code, lines, _ = run('models', 't2t_vit_t_*')
    assert code == 0 and len([line for line in lines if 't2t_vit_t_' in line]) == 3
    assert run('models', 'resnet')[::2] == (2, ["t2t-vit: no model matches 'resnet'; `t2t-vit models` lists all"])


def test_convert_takes_the_averaged_weights(run, release, tmp_path):
    output = tmp_path / 'a.safetensors'
    code, lines, _ = run('convert', release, '--model', 't2t_vit_4_16', '-o', output)
    assert code == 0 and lines[0].startswith(f'{output}: t2t_vit_4_16, ')
    expected = torch.load(release, weights_only=False)['state_dict_ema']
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(output).items())


def test_convert_for_other_classes_says_what_is_new(run, release, tmp_path):
    code, lines, _ = run('convert', release, '--model', 't2t_vit_4_16', '-o', tmp_path / 'a', '--num_classes', 5)
    assert code == 0 and lines[0].endswith('; new: head.weight, head.bias')


@pytest.mark.parametrize(
    'model, message',
    [('t2t_vit_4_61', "unknown model 't2t_vit_4_61', did you mean t2t_vit_4_16?"), ('t2t_vit_7', 'of another shape')],
)
def test_what_cannot_be_converted(run, release, tmp_path, model, message):
    code, _, errors = run('convert', release, '--model', model, '-o', tmp_path / 'a')
    assert code == 2 and message in errors[0] and not (tmp_path / 'a').exists()
