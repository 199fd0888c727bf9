"""The command line: `t2t-vit COMMAND …`. Each command is one typed function, imported when it is called."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import List, Optional

from . import __version__

COMMANDS = {  # what it is for, where its function stands
    'train': ('train a model, from scratch or from weights', 'train.loop:train'),
    'eval': ('score a trained model on labelled images', 'evaluate:evaluate'),
    'predict': ('name what is in images', 'predict:predict'),
    'models': ('list the models with their sizes', 'models.listing:models'),
    'convert': ('turn a published checkpoint into safetensors', 'models.listing:convert'),
    'bench': ('compare models in speed, memory and size', 'benchmark:bench'),
}
POSITIONAL = {  # arguments that need no --name
    'predict': {'inputs': dict(nargs='+', help='image files, folders of them, or digits')},
    'bench': {'models': dict(nargs='*', help='names that timm knows, or FILE.py:FUNCTION; by default a choice')},
    'models': {'pattern': dict(nargs='?', default='*', help='only names that match, as t2t_vit_t_*')},
    'convert': {'file': dict(help='a checkpoint in any published layout')},
}
SHORT = {'convert': {'output': '-o'}}


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command; gives 0, 2 for a user's mistake, 130 where a run was stopped and saved."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: t2t-vit COMMAND [--help] …\n')
        print('\n'.join(f'  {name:10}{purpose}' for name, (purpose, _) in COMMANDS.items()))
        return 0
    if argv[0] == '--version':
        print(__version__)
        return 0
    from .settings import UsageError, nearest
    try:
        if argv[0] not in COMMANDS:
            raise UsageError(f'unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; '
                             f'commands: {", ".join(COMMANDS)}')
        return train(argv[1:]) if argv[0] == 'train' else call(argv[0], argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print('\n'.join(f't2t-vit: {line}' for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('t2t-vit: stopped, nothing to save', file=sys.stderr)
        return 130


def call(command: str, argv: List[str]) -> int:
    """Run a command whose options are the arguments of its function."""
    from jsonargparse import ArgumentParser

    from .settings import UsageError, nearest

    module, name = COMMANDS[command][1].split(':')
    function = getattr(import_module(f'.{module}', __package__), name)
    parser = ArgumentParser(prog=f't2t-vit {command}', exit_on_error=False)
    for argument, how in POSITIONAL.get(command, {}).items():
        parser.add_argument(argument, type=str, **how)
    for argument, short in SHORT.get(command, {}).items():
        parser.add_argument(short, f'--{argument}', type=str, required=True)
    parser.add_function_arguments(
        function, skip={*POSITIONAL.get(command, {}), *SHORT.get(command, {})}, as_positional=False)
    known = [*vars(parser.get_defaults()), 'help']
    unknown = [word[2:].partition('=')[0] for word in argv if word.startswith('--')]
    problems = [f'unknown option --{key}{nearest(key, known)}' for key in unknown if key not in known]
    if problems:
        raise UsageError('\n'.join(problems))
    try:
        function(**vars(parser.parse_args(argv)))
    except argparse.ArgumentError as error:
        raise UsageError(' '.join(str(error).split())) from None
    return 0


def train(argv: List[str]) -> int:
    """`t2t-vit train`: a recipe, then a configuration file, then options, each over the ones before."""
    from jsonargparse import ArgumentParser

    from .settings import UsageError, nearest, options, read_settings, recipes, resolve
    from .train.config import Config

    if {'-h', '--help'} & set(argv):
        parser = ArgumentParser(prog='t2t-vit train', description='Options go over the file, the file over the recipe.')
        parser.add_argument('--recipe', help=f'a shipped configuration to begin with: {", ".join(recipes())}')
        parser.add_argument('--config', help='a YAML file of the options below, as every run folder has one')
        parser.add_argument('--resume', help='the folder of a run to go on with, with its own configuration')
        parser.add_argument('--print_config', action='store_true', help='print the resolved configuration, and stop')
        parser.add_class_arguments(Config)
        parser.print_help()
        return 0
    found, problems = options(argv, flags=('print_config',))
    special = {key: value for key, value in found if key in ('recipe', 'config', 'resume', 'print_config')}
    settings = []
    if 'resume' in special:
        saved = read_settings(Path(special['resume']) / 'config.yaml')
        settings += [setting for setting in saved if setting[1] != 'weights']  # its own state is what it starts from
    if 'recipe' in special:
        if special['recipe'] not in recipes():
            raise UsageError(f'unknown recipe {special["recipe"]!r}{nearest(special["recipe"], recipes())}; '
                             f'recipes: {", ".join(recipes())}')
        settings += read_settings(recipes()[special['recipe']])
    if 'config' in special:
        settings += read_settings(Path(special['config']))
    settings += [(f'--{key}', key, value) for key, value in found if key not in special]
    config = resolve(Config, settings, problems)
    if 'print_config' in special:
        print(config.to_yaml(), end='')
        return 0

    from .train.loop import Interrupted
    from .train.loop import train as run
    try:
        run(config, special.get('resume'))
    except Interrupted as stop:
        print(stop)
        return 130
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == '__main__':
    entry()
