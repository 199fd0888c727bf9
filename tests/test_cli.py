"""The commands as a user types them: their output, the files that they write, their answers to mistakes."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import timm
import torch
from conftest import read_records
from safetensors.torch import load_file

from t2t_vit import VARIANTS, __version__, cli
from t2t_vit.models.listing import KEYS, count_parameters
from t2t_vit.options import split_words
from t2t_vit.settings import option_types

Lines = tuple[int, list[str], list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line; returns its exit code, the lines of its output, and those of its errors."""
    monkeypatch.setenv('COLUMNS', '200')

    def run(*argv: object) -> Lines:
        code = cli.main([str(word) for word in argv])
        output = capsys.readouterr()
        return code, output.out.splitlines(), output.err.splitlines()

    return run


@pytest.fixture(scope='session')
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint as the official training saves it; the raw weights are zeros."""
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


# Help and start-up


def fast(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that fails if it imports torch or timm."""
    code = (
        'import sys, t2t_vit_cli; code = t2t_vit_cli.main(sys.argv[1:]); '
        'assert not {"torch", "timm", "t2t_vit"} & set(sys.modules), "heavy import"; sys.exit(code)'
    )
    return subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, encoding='utf-8')


def test_help_lists_the_commands_without_heavy_imports():
    for argv in ([], ['--help']):
        done = fast(*argv)
        assert done.returncode == 0 and all(f'  {name}' in done.stdout for name in cli.COMMANDS)


def test_version_without_heavy_imports():
    done = fast('--version')
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_unknown_command_gets_a_suggestion_without_heavy_imports():
    done = fast('trian')
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [f"t2t-vit: unknown command 'trian', did you mean train?; commands: {', '.join(cli.COMMANDS)}"],
    )


def test_recipes_are_listed_with_their_headers_without_heavy_imports():
    done = fast('recipes')
    assert done.returncode == 0 and 't2t-vit train --recipe digits' in done.stdout
    sentences = [line for line in done.stdout.splitlines() if not line.startswith(' ' * 6)]  # commands stay whole
    assert max(map(len, sentences)) <= 100
    assert (
        fast('recipes', 'digits').stdout.startswith('# ') and 'model: t2t_vit_4_16' in fast('recipes', 'digits').stdout
    )
    assert (lambda done: (done.returncode, 'did you mean digits?' in done.stderr))(fast('recipes', 'digit')) == (
        2,
        True,
    )


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_short_help_fits_a_screen(command, run):
    code, lines, _ = run(command, '--help')
    assert code == 0 and lines[0].startswith(f'usage: t2t-vit {command}')
    assert max(map(len, lines)) <= 80 and len(lines) <= 30
    examples = [line for line in lines if line.startswith(f'  t2t-vit {command}')]
    assert len(examples) == 3


PYTHON = ('typing.', 'Literal[', 'Sequence[', 'list[', '<class', 'None', 'collections.abc', 'Union')


@pytest.mark.parametrize(
    'command', [name for name, command in cli.COMMANDS.items() if command.function or name == 'train']
)
def test_help_all_names_every_option_in_plain_words(command, run):
    code, lines, _ = run(command, '--help-all')
    text = '\n'.join(lines)
    kind = t2t_vit_config() if command == 'train' else cli.load_function(command)
    assert code == 0 and all(f'--{name.replace("_", "-")}' in text for name in option_types(kind))
    assert not [word for word in PYTHON if word in text]


def t2t_vit_config():
    from t2t_vit.train.config import Config

    return Config


@pytest.mark.parametrize(
    'command', [name for name, command in cli.COMMANDS.items() if command.function or name == 'train']
)
def test_short_help_and_examples_name_existing_options(command):
    """The text is written by hand, so that it needs no import: this holds it to the options that there are."""
    described = cli.COMMANDS[command]
    kind = t2t_vit_config() if command == 'train' else cli.load_function(command)
    aliases = cli.TRAIN_ALIASES if command == 'train' else cli.aliases(kind)
    extra = cli.TRAIN_TYPES if command == 'train' else {}
    types = {**option_types(kind), **extra}
    named = re.findall(r'--([a-z][\w.-]*)', described.usage + described.options)
    assert not {name for name in named if name.replace('-', '_') not in {*types, *aliases}}
    positional = ['data.root'] if command == 'train' else described.positional
    for example in described.examples:
        settings, problems = split_words(shlex.split(example.partition(' > ')[0]), types, positional, aliases)
        assert not problems and {setting.key for setting in settings} <= {*types}


def test_python_m_runs_the_command_and_returns_its_exit_code():
    for module in ('t2t_vit', 't2t_vit.cli', 't2t_vit_cli'):
        done = subprocess.run([sys.executable, '-m', module, 'trian'], capture_output=True, text=True)
        assert done.returncode == 2 and 'did you mean train?' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.skipif(sys.platform == 'win32', reason='needs pipes of POSIX')
def test_closed_pipe_ends_the_command_silently():
    program = subprocess.Popen(
        [sys.executable, '-m', 't2t_vit_cli', 'recipes'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout and program.stderr
    program.stdout.close()
    assert program.stderr.read() == '' and program.wait() == 141
    program.stderr.close()


def test_import_is_silent_and_registers_the_models_without_experiments():
    code = (
        'import sys, t2t_vit, timm; assert timm.is_model("t2t_vit_14"); '
        'assert not [name for name in sys.modules if name.startswith("t2t_vit.reproduce")]'
    )
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_predict_imports_no_library_of_other_commands():
    code = (
        'import sys, t2t_vit.cli, t2t_vit.predict; '
        'assert not {"torchmetrics", "scipy", "matplotlib", "accelerate", "gradio", "sklearn"} & set(sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_completion_script_knows_commands_and_options(run, shell):
    code, lines, _ = run('completion', shell)
    text = '\n'.join(lines)
    assert code == 0 and all(word in text for word in ('predict', '--top-k', '--optimizer.lr', 'small-images'))


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_completion_script_completes_in_bash(run, tmp_path):
    (tmp_path / 'completion').write_text('\n'.join(run('completion', 'bash')[1]))
    script = (
        'source "$1"; COMP_WORDS=(t2t-vit predict --top); COMP_CWORD=2; COMP_LINE="t2t-vit predict --top"; '
        '_shtab_t2t_vit; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(['bash', '-c', script, 'bash', tmp_path / 'completion'], capture_output=True, text=True)
    assert '--top-k' in done.stdout.split()


def test_completion_refuses_other_shells(run):
    code, _, errors = run('completion', 'ksh')
    assert code == 2 and errors[0].startswith('t2t-vit: expected one of bash, ') and errors[0].endswith('got ksh')


def test_interrupt_before_anything_is_saved(run, monkeypatch):
    def interrupted(argv: list[str], command: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, 'train', interrupted)
    assert run('train') == (130, [], ['t2t-vit: stopped, nothing to save'])


# train


def test_options_override_the_file_and_the_file_overrides_the_recipe(run, tmp_path):
    (tmp_path / 'a.yaml').write_text('{epochs: 7, seed: 1, optimizer: {warmup_epochs: 2}}')
    code, lines, _ = run('train', '--seed', 2, '--config', tmp_path / 'a.yaml', '--recipe', 'digits', '--print_config')
    assert code == 0
    assert {'model: t2t_vit_4_16', 'epochs: 7', 'seed: 2', '  warmup_epochs: 2', '  lr: 0.002'} <= set(lines)


def test_printed_config_reproduces_itself(run, tmp_path):
    _, lines, _ = run('train', '--recipe', 'small-images', '--data.img_size', '[48, 64]', '--print_config')
    (tmp_path / 'a.yaml').write_text('\n'.join(lines))
    assert run('train', '--config', tmp_path / 'a.yaml', '--print_config') == (0, lines, [])


def test_familiar_spellings_of_train_options(run, tmp_path):
    argv = ['--recipe', 'digits', '--data', 'digits', '--batch', 128, '--dry-run', '--data.memory', '--lr', 1e-3]
    code, lines, _ = run('train', *argv, '--output', tmp_path / 'run')
    assert code == 0 and lines[2].startswith('data      digits: 1,437') and not (tmp_path / 'run').exists()
    code, lines, _ = run(
        'train',
        'elsewhere',
        '--recipe',
        'small-images',
        '--data.download',
        '--print-config',
        '--imgsz',
        48,
        '--workers',
        1,
    )
    assert code == 0 and {'  root: elsewhere', '  download: true', '  img_size: 48', '  workers: 1'} <= set(lines)
    code, lines, _ = run('train', '--print-config', '--lr', '0.01', '--batch', '64')
    assert code == 0 and {'  lr: 0.01', 'batch_size: 64'} <= set(lines)


@pytest.mark.parametrize(
    'argv, weights',
    [
        (['train', 'digits', '--pretrained', '--model', 't2t_vit_7'], 't2t_vit_7'),
        (['finetune', 'digits', '--pretrained'], 't2t_vit_14'),
        (['finetune', 'digits', '--pretrained', '--model', 't2t_vit_24.token_labeling_in1k'], '*'),
        (['train', '--recipe', 'imagenet-14-384', '--pretrained'], 't2t_vit_14'),
    ],
)
def test_pretrained_is_the_published_weights_of_the_model(run, argv, weights):
    code, lines, errors = run(*argv, '--print-config')
    weights = argv[-1] if weights == '*' else weights
    assert code == 0 and f'weights: {weights}' in lines, errors


def test_train_mistakes_are_reported_together(run):
    code, _, errors = run('train', 'photos', 'word', '--epohcs', 3, '--optimizer.lr=-1', '--seed')
    assert code == 2
    assert errors[:3] == [
        't2t-vit: --seed has no value',
        "t2t-vit: unexpected argument 'word', options are --name value",
        't2t-vit: unknown option --epohcs, did you mean --epochs?',
    ]
    assert any('optimizer.lr' in line for line in errors[3:])


@pytest.mark.parametrize(
    'word, answer',
    [
        ('bs', '--batch_size'),
        ('b', '--batch_size'),
        ('opt', '--optimizer.name'),
        ('mixup', '--augment.mixup'),
        ('cutmix', '--augment.cutmix'),
        ('smoothing', '--augment.smoothing'),
        ('weight-decay', '--optimizer.weight_decay'),
        ('warmup-epochs', '--optimizer.warmup_epochs'),
        ('min-lr', '--optimizer.min_lr'),
        ('layer-decay', '--optimizer.layer_decay'),
        ('clip-grad', '--optimizer.clip_grad'),
        ('img-size', '--data.img_size'),
        ('input-size', '--data.img_size'),
        ('model-ema', '--ema_decay'),
        ('drop-path', '--model_args.drop_path_rate'),
        ('sched', 'cosine'),
        ('num-classes', 'the data names the classes'),
        ('initial-checkpoint', '--weights'),
        ('batch-sze', '--batch_size'),
    ],
)
def test_option_of_another_training_script_gets_an_answer(run, word, answer):
    code, _, errors = run('train', f'--{word}', '1', '--print-config')
    assert code == 2 and errors[0].startswith(f't2t-vit: unknown option --{word}') and answer in errors[0]


def test_every_suggested_option_exists():
    from t2t_vit.models.t2t_vit import T2TViT

    known = {*option_types(t2t_vit_config()), *(f'model_args.{name}' for name in signature(T2TViT).parameters)}
    assert {*cli.ELSEWHERE.values(), *cli.TRAIN_ALIASES.values()} <= known


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
def test_train_refuses_bad_input_and_writes_nothing(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run('train', *argv)
    assert code == 2 and message in errors[0] and not list(tmp_path.iterdir())


def test_train_refuses_a_file_as_output(run, tmp_path):
    (tmp_path / 'a').touch()
    code, _, errors = run('train', '--recipe', 'digits', '--output', tmp_path / 'a')
    assert code == 2 and str(tmp_path / 'a') in errors[0]


def test_train_stops_when_the_loss_is_not_finite(run, tmp_path):
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


def test_resume_continues_a_run(run, digits_run, tmp_path):
    for file in digits_run.rglob('*'):
        if file.is_file():
            (tmp_path / file.relative_to(digits_run)).parent.mkdir(exist_ok=True)
            (tmp_path / file.relative_to(digits_run)).write_bytes(file.read_bytes())
    code, lines, _ = run('train', '--resume', tmp_path, '--epochs', 3)
    assert code == 0 and 'from epoch 3, step 1' in lines[1] and lines[-1].endswith(f'is in {tmp_path}')


# eval


def test_eval_scores_a_run(run, digits_run, tmp_path):
    code, lines, _ = run('eval', '--checkpoint', digits_run, '--output', tmp_path)
    scores = json.loads((tmp_path / 'scores.json').read_text())
    assert code == 0 and any(line.split()[:2] == ['top-1', f'{100 * scores["top1"]:.2f}'] for line in lines)
    assert list(scores['per_class']) == [str(i) for i in range(10)] and scores['images'] == 360
    assert (tmp_path / 'confusion.png').read_bytes()[1:4] == b'PNG'
    best = max(max(r['val_top1'], r['val_top1_ema']) for r in read_records(digits_run / 'metrics.jsonl'))
    assert scores['top1'] == pytest.approx(best)


def test_eval_scores_a_checkpoint_on_a_validation_folder(run, release, photos, tmp_path):
    argv = ['--checkpoint', release, '--model', 't2t_vit_4_16', '--output', tmp_path / 'new' / 'folder']
    code, lines, _ = run('eval', *argv, '--data', photos / 'val')
    scores = json.loads((tmp_path / 'new' / 'folder' / 'scores.json').read_text())
    assert code == 0 and (scores['images'], scores['damaged']) == (12, [])
    assert any('flower' in line for line in lines)


def test_eval_scores_parquet_like_the_folder(run, release, photos, parquet, tmp_path):
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


def test_eval_refuses_other_classes(run, digits_run, photos):
    code, _, errors = run('eval', '--checkpoint', digits_run, '--data', photos)
    assert code == 2 and f"the model has 10 classes, {photos} has 3: 'flower', 'roof', 'sky' are in" in errors[0]


def test_eval_reports_all_wrong_values(run):
    code, _, errors = run('eval', '--checkpoint', 'x', '--split', 'tset', '--workers', '2', '--batch-size', 'many')
    assert code == 2 and errors == [
        "t2t-vit: --split: expected train or val, got 'tset'",
        "t2t-vit: --batch-size: expected a whole number, got 'many'",
    ]


@pytest.mark.parametrize(
    'argv, message',
    [
        ([], 'missing: checkpoint'),
        (['--checkpoint', 'nowhere'], 'no checkpoint at nowhere'),
        (['--checkpoint', 'RELEASE'], 'name the model with --model NAME'),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit14'], "unknown model 't2t_vit14', did you mean t2t_vit_14?"),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit_14.foo'], "t2t_vit_14 has no tag 'foo'; tags: in1k, in1k_384"),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit_7'], 'found a T2T-ViT of depth 4'),
        (['--checkpoint', 'RELEASE', '--batch-size', '0', '--workers', '-1'], 'batch_size must be at least 1, got 0'),
        (['--checkpoint', 'RELEASE', '--split', 'tset'], "expected train or val, got 'tset'"),
        (['--checkpoint', 'RELEASE', '--device', 'abacus'], "no device 'abacus' here"),
        (['--checkpoint', 'RELEASE', '--model', 't2t_vit_4_16', '--data', 'nowhere'], 'no data at nowhere'),
        (['--chekpoint', 'RELEASE'], 'unknown option --chekpoint, did you mean --checkpoint?'),
        (['--checkpoint', '.'], 'it has no model.safetensors and no config.json'),
    ],
)
def test_eval_refuses_bad_input(run, release, tmp_path, monkeypatch, argv, message):
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


def test_predict_draws_a_picture(run, digits_run, tmp_path):
    picture = tmp_path / 'new' / 'a.png'
    code, lines, _ = run('predict', 'digits', '--checkpoint', digits_run, '--top_k', 3, '--picture', picture)
    assert code == 0 and picture.read_bytes()[1:4] == b'PNG'
    assert len([line for line in lines if line.count('%') == 3]) == 12


def test_predict_with_a_checkpoint_file(run, release, photos):
    argv = ['--checkpoint', release, '--model', 't2t_vit_4_16', '--batch_size', 5]
    code, lines, _ = run('predict', photos / 'val', *argv)
    assert code == 0 and len([line for line in lines if line.count('%') == 3]) == 12  # of three classes


def test_predict_names_damaged_images(run, digits_run, photos, tmp_path):
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
        ([], 'missing: inputs'),
    ],
)
def test_predict_refuses_bad_input(run, digits_run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'here').mkdir()
    code, _, errors = run('predict', *argv, '--checkpoint', digits_run)
    assert code == 2 and message in errors[0]


# models, convert


def test_models_lists_sizes(run):
    code, lines, _ = run('models')
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in lines if '│ t2t' in line or '│ vit' in line]
    assert code == 0 and [row[0] for row in rows] == list(VARIANTS)
    counts = count_parameters(timm.create_model('t2t_vit_7'))
    assert rows[0] == ['t2t_vit_7', '224', *(f'{n:,}' for n in counts), 'in1k']


def test_models_as_json(run):
    code, lines, _ = run('models', 't2t_vit_7', '--json')
    assert code == 0 and json.loads('\n'.join(lines)) == [
        dict(zip(KEYS, ('t2t_vit_7', 224, *count_parameters(timm.create_model('t2t_vit_7')), ['in1k'])))
    ]


def test_models_filters_by_pattern(run):
    code, lines, _ = run('models', 't2t_vit_t_*')
    assert code == 0 and len([line for line in lines if 't2t_vit_t_' in line]) == 3
    assert run('models', 'resnet')[::2] == (2, ["t2t-vit: no model matches 'resnet'; `t2t-vit models` lists all"])


def test_convert_uses_ema_weights(run, release, tmp_path):
    output = tmp_path / 'a.safetensors'
    code, lines, _ = run('convert', release, '--model', 't2t_vit_4_16', '-o', output)
    assert code == 0 and lines[0].startswith(f'{output}: t2t_vit_4_16, ')
    expected = torch.load(release, weights_only=False)['state_dict_ema']
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(output).items())


def test_convert_names_new_parameters(run, release, tmp_path):
    code, lines, _ = run('convert', release, '--model', 't2t_vit_4_16', '-o', tmp_path / 'a', '--num_classes', 5)
    assert code == 0 and lines[0].endswith('; new: head.weight, head.bias')


@pytest.mark.parametrize(
    'model, message',
    [
        ('t2t_vit_4_61', "unknown model 't2t_vit_4_61', did you mean t2t_vit_4_16?"),
        ('t2t_vit_7', 'found a T2T-ViT of depth 4'),
    ],
)
def test_convert_refuses_another_model(run, release, tmp_path, model, message):
    code, _, errors = run('convert', release, '--model', model, '-o', tmp_path / 'a')
    assert code == 2 and message in errors[0] and not (tmp_path / 'a').exists()
