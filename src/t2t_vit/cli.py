"""The command line: `t2t-vit COMMAND …`. Each command is one typed function, imported when it is called."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from . import __version__

COMMANDS = {  # what it is for, where its function stands
    'train': ('train a model, from scratch or from weights', 'train.run:train'),
    'eval': ('score a trained model on labelled images', 'evaluate:evaluate'),
    'predict': ('name what is in images', 'predict:predict'),
    'embed': ('turn images into vectors', 'predict:embed'),
    'push': ('publish a run on the Hub', 'hub:push'),
    'models': ('list the models with their sizes', 'models.listing:models'),
    'convert': ('turn a published checkpoint into safetensors', 'models.listing:convert'),
    'export': ('write a model as ONNX, .pt2 or OpenVINO, and compare', 'export.command:export'),
    'bench': ('compare models in speed, memory and size', 'benchmark:bench'),
    'visualize': ('show what models see, and how runs went', 'look.visualize:visualize'),
    'explore': ('open a page to look inside a model', 'explore.command:explore'),
    'reproduce': ("the paper's tables and claims, again, at a scale of your own", 'reproduce.command:reproduce'),
}
INPUTS = {
    'inputs': dict(
        nargs='+', help='images: files, folders, patterns, tars, Parquet files, lists, digits, or samples (two photos)'
    )
}
POSITIONAL: dict[str, dict[str, dict[str, Any]]] = {  # arguments that need no --name
    'predict': INPUTS,
    'embed': INPUTS,
    'push': {'run': dict(help="a run's folder"), 'repo': dict(help='USER/NAME')},
    'bench': {'models': dict(nargs='*', help='names that timm knows, or FILE.py:FUNCTION; by default a choice')},
    'models': {'pattern': dict(nargs='?', default='*', help='only names that match, as t2t_vit_t_*')},
    'reproduce': {
        'what': dict(
            choices=['structures', 'accuracy', 'report'],
            help='structures: sizes beside the '
            'printed ones; accuracy: train the arms and compare; report: tables of what is done',
        )
    },
    'convert': {'file': dict(help='a checkpoint in any published layout')},
    'visualize': {'images': {**INPUTS['inputs'], 'nargs': '*'}},
}
SEVERAL = {  # options that take several words
    'visualize': {
        'models': 'run folders, names that timm knows, NAME=FILE, hf-hub:USER/NAME, or FILE.py:FUNCTION',
        'runs': 'folders of runs whose curves to compare',
    },
    'explore': {'compare': 'more models, to be seen beside it: as visualize --models takes them'},
}
FLAGS = ('print_config', 'dry_run')
SPECIAL = ('recipe', 'config', 'resume', *FLAGS)  # of train, beside its configuration
SHORT = {'convert': {'output': '-o'}, 'export': {'output': '-o'}}


def main(argv: list[str] | None = None) -> int:
    """Run one command; gives 0, 1 for a failed check, 2 for a user's mistake, 130 for a run stopped and saved."""
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
            raise UsageError(
                f'unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; commands: {", ".join(COMMANDS)}'
            )
        return train(argv[1:]) if argv[0] == 'train' else call(argv[0], argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        print('\n'.join(f't2t-vit: {line}' for line in str(error).splitlines()), file=sys.stderr)
        return getattr(error, 'code', 2)  # 1: done, and not good enough
    except KeyboardInterrupt as stop:
        print(f't2t-vit: {stop}' if str(stop) else 't2t-vit: stopped, nothing to save', file=sys.stderr)
        return 130


def call(command: str, argv: list[str]) -> int:
    """Run a command whose options are the arguments of its function."""
    from jsonargparse import ArgumentParser

    from .settings import UsageError, booleans, nearest, options, spell_out

    module, name = COMMANDS[command][1].split(':')
    function = getattr(import_module(f'.{module}', __package__), name)
    argv = spell_out(argv, booleans(function))
    parser = ArgumentParser(prog=f't2t-vit {command}', exit_on_error=False)
    for argument, how in POSITIONAL.get(command, {}).items():
        parser.add_argument(argument, type=str, **how)
    for argument, short in SHORT.get(command, {}).items():
        parser.add_argument(short, f'--{argument}', type=str, required=True)
    for argument, text in SEVERAL.get(command, {}).items():
        parser.add_argument(f'--{argument}', nargs='+', type=str, default=[], help=text)
    special = {*POSITIONAL.get(command, {}), *SHORT.get(command, {}), *SEVERAL.get(command, {})}
    parser.add_function_arguments(function, skip=special, as_positional=False)
    known = [*vars(parser.get_defaults()), 'help']
    unknown = [word[2:].partition('=')[0] for word in argv if word.startswith('--')]
    problems = [f'unknown option --{key}{nearest(key, known)}' for key in unknown if key not in known]
    if problems:
        raise UsageError('\n'.join(problems))
    try:
        given = parser.parse_args(argv)
    except argparse.ArgumentError as error:  # the first; then what is wrong with each option by itself
        wrong = [' '.join(str(error).split())]
        for key, value in options(argv)[0]:
            try:
                parser.parse_args([f'--{key}={value}'])
            except argparse.ArgumentError as other:
                message = ' '.join(str(other).split())
                wrong += [message] * (f'"{key}"' in message and message not in wrong)
        raise UsageError('\n'.join(wrong)) from None
    function(**vars(given))
    return 0


def train(argv: list[str]) -> int:
    """`t2t-vit train`: a recipe, then a configuration file, then options, each over the ones before."""
    from jsonargparse import ArgumentParser

    from .settings import UsageError, booleans, nearest, options, read_settings, recipes, resolve, spell_out
    from .train.config import Config

    if {'-h', '--help'} & set(argv):
        parser = ArgumentParser(
            prog='t2t-vit train',
            description='Options go over the file, the file over the recipe. '
            'A name may have - for _, --data is short for --data.root, and a flag needs no value.',
        )
        parser.add_argument('--recipe', help=f'a shipped configuration to begin with: {", ".join(recipes())}')
        parser.add_argument('--config', help='a YAML file of the options below, as every run folder has one')
        parser.add_argument(
            '--resume',
            help='the folder of a run, or a state file of one, to go on with, with its own '
            'configuration; auto: what stands in --output where it holds a run, else a new one',
        )
        parser.add_argument('--dry_run', action='store_true', help='say what would be done, and stop')
        parser.add_argument('--print_config', action='store_true', help='print the resolved configuration, and stop')
        parser.add_class_arguments(Config)
        parser.print_help()
        return 0
    found, problems = options(spell_out(argv, [*FLAGS, *booleans(Config)]))
    special = {key: value for key, value in found if key in SPECIAL and value != 'false'}
    settings = []
    if special.get('resume', 'auto') != 'auto':
        settings += saved_settings(Path(special['resume']))
    if 'recipe' in special:
        if special['recipe'] not in recipes():
            raise UsageError(
                f'unknown recipe {special["recipe"]!r}{nearest(special["recipe"], recipes())}; '
                f'recipes: {", ".join(recipes())}'
            )
        settings += read_settings(recipes()[special['recipe']])
    if 'config' in special:
        settings += read_settings(Path(special['config']))
    settings += [
        (f'--{key}', 'data.root' if key == 'data' else key, value) for key, value in found if key not in SPECIAL
    ]
    config = resolve(Config, settings, problems)
    if 'print_config' in special:
        print(config.to_yaml(), end='')
        return 0

    from .train.run import train as run
    from .train.signals import Interrupted

    try:
        run(config, special.get('resume'), 'dry_run' in special)
    except Interrupted as stop:
        print(stop)
        return stop.code
    return 0


def saved_settings(place: Path) -> list[Any]:
    """What the run in a folder, or of a state file, was configured as; its own state is what it starts from.

    Where it stood then is left out: a folder may have been moved.
    """
    from .settings import flatten, parse_settings, read_settings
    from .train.state import read_state

    if place.is_file():
        config = parse_settings(str(read_state(place).get('config')), str(place))
        saved = [(f'{key} in {place}', key, value) for key, value in flatten(config)]
    else:
        saved = read_settings(place / 'config.yaml')
    return [setting for setting in saved if setting[1] not in ('weights', 'output')]


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == '__main__':
    entry()
