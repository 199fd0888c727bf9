"""Run the commands of `t2t-vit`. Each is one typed function, which is imported when it is called."""

import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from t2t_vit_cli import COMMANDS, entry, main

from . import custom
from .allocator import keep_freed_memory
from .options import format_help, known_options, required, split_words
from .settings import (
    Setting,
    UsageError,
    check_values,
    nearest,
    option_types,
    raise_problems,
    read_settings,
    recipes,
    resolve,
)

__all__ = ['COMMANDS', 'entry', 'main', 'run']

TRUST = ('--trust', 'execute the Python code that the files of a model or run name; off by default')
SHORT = {'-o': 'output'}  # every other option has a long name only
FAMILIAR = {'batch': 'batch_size', 'imgsz': 'img_size', 'bs': 'batch_size', 'weights': 'checkpoint'}  # of commands
TRAIN_SPECIAL = (
    ('--recipe NAME', 'A shipped configuration to start from; t2t-vit recipes lists them.'),
    ('--config FILE', "A YAML file of the options below, such as a run folder's config.yaml; it overrides the recipe."),
    (
        '--resume RUN',
        'Continue the run in this folder, or from this state file, with its own configuration; auto: continue the run '
        'in --output if there is one.',
    ),
    ('--pretrained', 'Start from the published weights of --model; short for --weights with its name.'),
    ('--dry-run', 'Print what would be done, and stop.'),
    ('--print-config', 'Print the resolved configuration as YAML, and stop.'),
)
TRAINING = ('train', 'finetune')  # commands
PRETRAINED = 't2t_vit_14'  # of --pretrained without a model
TRAIN_TYPES = {'recipe': str, 'config': str, 'resume': str, 'pretrained': bool, 'dry_run': bool, 'print_config': bool}
TRAIN_ALIASES = {  # accepted as they are
    **SHORT,
    'data': 'data.root',
    'lr': 'optimizer.lr',
    'batch': 'batch_size',
    'imgsz': 'data.img_size',
    'workers': 'data.workers',
}
ELSEWHERE = {  # names in timm's and ultralytics' training scripts that are not the last part of one of ours
    'b': 'batch_size',
    'bs': 'batch_size',
    'j': 'data.workers',
    'opt': 'optimizer.name',
    'optimizer': 'optimizer.name',
    'lr0': 'optimizer.lr',
    'learning_rate': 'optimizer.lr',
    'freeze': 'optimizer.frozen',
    'lr_base': 'optimizer.lr',
    'lrf': 'optimizer.min_lr',
    'momentum': 'optimizer.name',
    'data_dir': 'data.root',
    'dataset': 'data.root',
    'dataset_download': 'data.download',
    'input_size': 'data.img_size',
    'img_size': 'data.img_size',
    'image_size': 'data.img_size',
    'in_chans': 'data.channels',
    'model_ema': 'ema_decay',
    'model_ema_decay': 'ema_decay',
    'ema': 'ema_decay',
    'amp': 'precision',
    'half': 'precision',
    'amp_dtype': 'precision',
    'model_dtype': 'precision',
    'drop': 'model_args.drop_rate',
    'dropout': 'model_args.drop_rate',
    'drop_path': 'model_args.drop_path_rate',
    'model_kwargs': 'model_args',
    'nbs': 'grad_accum_steps',
    'degrees': 'augment.rotate',
    'fliplr': 'augment.hflip',
    'label_smoothing': 'augment.smoothing',
    'train_interpolation': 'augment.interpolation',
    'pretrained_path': 'weights',
    'initial_checkpoint': 'weights',
    'checkpoint': 'weights',
    'experiment': 'output',
    'project': 'output',
    'name': 'output',
    'checkpoint_hist': 'keep',
    'recovery_interval': 'save_minutes',
    'save_period': 'save_minutes',
    'log_wandb': 'trackers',
    'cache': 'data.memory',
    'distill': 'objective.kind',
    'kd_model_name': 'objective.teacher',
    'train_split': 'data.root',
    'val_split': 'data.root',
}
NOT_NEEDED = {  # options elsewhere that have no counterpart, and why
    'sched': 'the learning rate always follows a cosine; see --optimizer.warmup_epochs and --optimizer.min_lr',
    'cos_lr': 'the learning rate always follows a cosine; see --optimizer.warmup_epochs and --optimizer.min_lr',
    'num_classes': 'the data names the classes',
    'class_map': 'the data names the classes',
    'gpu': 'see --device, or start one process for each GPU with torchrun',
    'local_rank': 'torchrun sets it in the environment',
}


def run(command: str, argv: Sequence[str]) -> int:
    """Run a command with its words and print mistakes as sentences.

    Returns:
        The exit code, see `main`.
    """
    words = [word for word in argv if word != '--trust']
    keep_freed_memory()
    try:
        with custom.trust(len(words) < len(argv)):
            from .reproduce import mobilenet as _registered  # noqa: F401  # so that runs of a comparison open

            if command == 'completion':
                return completion(words)
            return train(words, command) if command in TRAINING else call(command, words)
    except BrokenPipeError:  # of the reader of the output; the console script ends silently
        raise
    except (ValueError, OSError, FloatingPointError) as error:
        print('\n'.join(f't2t-vit: {line}' for line in str(error).splitlines()), file=sys.stderr)
        return getattr(error, 'code', 2)  # 1: finished, but a check failed
    except KeyboardInterrupt as stop:
        print(f't2t-vit: {stop}' if str(stop) else 't2t-vit: stopped, nothing to save', file=sys.stderr)
        return 130


def load_function(command: str) -> Callable[..., Any]:
    """Import the function of a command."""
    module, name = COMMANDS[command].function.split(':')
    return getattr(import_module(f'.{module}', __package__), name)


def aliases(function: Callable[..., Any]) -> dict[str, str]:
    """Return the other names of a command's options."""
    types = option_types(function)
    familiar = {word: name for word, name in FAMILIAR.items() if word not in types and name in types}
    return {**familiar, **{word: name for word, name in SHORT.items() if name in types}}


def call(command: str, argv: Sequence[str]) -> int:
    """Run a command whose options are the arguments of its function."""
    function, positional = load_function(command), COMMANDS[command].positional
    types = option_types(function)
    if '--help-all' in argv:
        print(f'usage: t2t-vit {command} {COMMANDS[command].usage}\n\n{format_help(function, [TRUST])}')
        return 0
    settings, problems = split_words(argv, types, positional, aliases(function))
    given = {setting.key for setting in settings}
    tree, found = check_values(function, settings)
    missing = [name if name in positional else f'--{name}' for name in required(function) if name not in given]
    raise_problems([*problems, *found, *([f'missing: {", ".join(missing)}'] if missing else [])])
    function(**tree)
    return 0


def advise(key: str, known: Sequence[str]) -> str:
    """Return the end of the message for an unknown option of train that other training scripts have."""
    if key in NOT_NEEDED:
        return f': {NOT_NEEDED[key]}'
    if (name := ELSEWHERE.get(key)) and (name in known or name.startswith('model_args')):
        return f', here it is --{name}'
    return ''


def train(argv: Sequence[str], command: str = 'train') -> int:
    """Run `t2t-vit train` or `finetune`: options override the configuration file, which overrides the recipe.

    What none of them says is chosen from the data and the machine.
    """
    from .train.choose import FINETUNING, choose_settings
    from .train.config import Config

    if '--help-all' in argv:
        usage = f'usage: t2t-vit {command} {COMMANDS[command].usage}'
        order = 'Options override --config, which overrides --recipe. A flag needs no value.'
        print(f'{usage}\n\n{order}\n\n{format_help(Config, [*TRAIN_SPECIAL, TRUST])}')
        return 0
    types = option_types(Config)
    words, problems = split_words(argv, {**types, **TRAIN_TYPES}, ['data.root'], TRAIN_ALIASES)
    special = {word.key: word.value for word in words if word.key in TRAIN_TYPES and word.value != 'false'}
    settings: list[Setting] = []
    if special.get('resume', 'auto') != 'auto':
        from .train.resume import saved_settings

        settings += saved_settings(Path(special['resume']))
    given = [word for word in words if word.key not in TRAIN_TYPES]
    recipe = special.get('recipe') or ('finetune' if command == 'finetune' else None)
    choices: list[str] = []
    if 'pretrained' in special and not {'recipe', 'config', 'resume'} & set(special):
        recipe = 'finetune'
    if 'pretrained' in special and recipe in FINETUNING:  # whose choices depend on the weights
        given.append(published_weights(given))
    if special.get('resume', 'auto') == 'auto' and 'config' not in special and recipe in (None, *FINETUNING):
        resolve(Config, given, problems, lambda key: advise(key, list(types)))  # mistakes before the data is opened
        settings, choices = choose_settings(given, recipe, resume='resume' in special)
    elif 'recipe' in special:
        if special['recipe'] not in recipes():
            raise UsageError(
                f'unknown recipe {special["recipe"]!r}{nearest(special["recipe"], recipes())}; '
                f'recipes: {", ".join(recipes())}'
            )
        settings += read_settings(recipes()[special['recipe']])
    if 'config' in special:
        from .train.upgrade import upgrade

        settings += upgrade(read_settings(Path(special['config'])), drop=False)[0]
    if 'pretrained' in special and recipe not in FINETUNING:
        settings.append(published_weights([*settings, *given]))
    settings += given
    config = resolve(Config, settings, problems, lambda key: advise(key, list(types)))
    if 'print_config' in special:
        print(config.to_yaml(), end='')
        return 0

    import psutil

    from .train.run import train as run_training
    from .train.signals import Interrupted

    try:
        began = time.monotonic() - (time.time() - psutil.Process().create_time())  # imports count too
        run_training(config, special.get('resume'), 'dry_run' in special, choices, began)
    except Interrupted as stop:
        print(stop)
        return stop.code
    return 0


def published_weights(settings: Sequence[Setting]) -> Setting:
    """Return the setting that --pretrained stands for: weights of the model that was chosen, as timm names them."""
    models = [str(setting.value) for setting in settings if setting.key == 'model']
    return Setting('--pretrained', 'weights', models[-1] if models else PRETRAINED)


def completion(argv: Sequence[str]) -> int:
    """Print a script that completes commands, options and their values in a shell."""
    import argparse

    import shtab

    from .train.config import Config

    if len(argv) != 1 or argv[0] not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f'expected one of {", ".join(shtab.SUPPORTED_SHELLS)}, got {" ".join(argv) or "nothing"}')
    parser = argparse.ArgumentParser(prog='t2t-vit')
    parser.add_argument('--version', action='store_true')
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.summary)
        one.add_argument('--help-all', action='store_true')
        options = known_options(load_function(name)) if command.function else {}
        if name == 'train':
            options = {'recipe': list(recipes()), **dict.fromkeys(['config', 'resume'], []), **known_options(Config)}
            options.update(dict.fromkeys([word for word in TRAIN_ALIASES if not word.startswith('-')], []))
            options.update(dict.fromkeys(['pretrained', 'dry-run', 'print-config'], []))
        for option, values in options.items():
            target = one.add_argument(f'--{option.replace("_", "-")}', choices=values or None)
            if not values:
                target.complete = shtab.FILE  # type: ignore[attr-defined]
        if name in ('train', *(name for name, other in COMMANDS.items() if other.positional)):
            one.add_argument('words', nargs='*').complete = shtab.FILE  # type: ignore[attr-defined]
        elif name == 'recipes':
            one.add_argument('words', nargs='*', choices=list(recipes()))
        elif name == 'completion':
            one.add_argument('words', choices=shtab.SUPPORTED_SHELLS)
    print(shtab.complete(parser, argv[0]))
    return 0


if __name__ == '__main__':
    entry()
