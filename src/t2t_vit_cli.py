"""The `t2t-vit` command: answer help, version and typing mistakes at once, and leave the rest to the package.

Importing the package imports torch and timm, which takes seconds, so this module stands beside it and not in it.
"""

import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

RECIPES = Path(__file__).parent / 't2t_vit' / 'recipes'
USAGE = 'usage: t2t-vit COMMAND [options]     (t2t-vit COMMAND --help describes one)'


class Command(NamedTuple):
    """Describe a command in the form that `t2t-vit COMMAND --help` prints."""

    summary: str
    usage: str
    options: str  # the ten or so that most people need, at most 80 columns wide
    examples: tuple[str, ...]
    function: str = ''  # MODULE:NAME in the package; its arguments are the options
    positional: tuple[str, ...] = ()  # arguments that need no name, in their order


TRAIN_OPTIONS = """
  FOLDER              class folders, or train/ and val/ with class folders
  --recipe NAME       start from a shipped configuration (t2t-vit recipes)
  --model NAME        t2t-vit models lists them
  --weights FILE      start from trained weights
  --pretrained        start from the published weights of --model
  --epochs N          passes over the training images
  --minutes N         as many epochs as fit into this time
  --batch N           images in a step
  --lr X              peak learning rate
  --imgsz N           pixels
  --workers N         processes that read images
  --device NAME       auto, cpu, cuda, cuda:1 or mps
  --output FOLDER     the run's folder; default: a new one in runs/
  --resume FOLDER     continue a run; auto: continue the one in --output, if any
  --dry-run           print the plan and stop
"""

COMMANDS = {
    'train': Command(
        'train a model on your images',
        '[FOLDER] [options]',
        TRAIN_OPTIONS,
        ('photos --epochs 30', '--recipe small-images photos --imgsz 96', '--resume runs/photos'),
    ),
    'finetune': Command(
        'fine-tune trained weights on your images',
        'FOLDER --weights WEIGHTS [options]',
        """
  FOLDER              class folders, or train/ and val/ with class folders
  --weights WEIGHTS   a timm tag such as t2t_vit_14.in1k, hf-hub:USER/NAME, a
                      run's folder, or a file of weights (then with --model)
  --pretrained        the published weights of --model instead
  --recipe NAME       finetune trains all layers, finetune-head only the head
  --lora N            train adapters of rank N and the head instead
  --epochs N          passes over the training images
  --minutes N         as many epochs as fit into this time
  --batch N           images in a step
  --lr X              peak learning rate
  --imgsz N           pixels
  --output FOLDER     the run's folder; default: a new one in runs/
  --dry-run           print the plan and stop
""",
        (
            'photos --pretrained --model t2t_vit_14',
            'photos --weights runs/photos --recipe finetune-head',
            'photos --weights 81.5_T2T_ViT_14.pth.tar --model t2t_vit_14',
        ),
    ),
    'eval': Command(
        'score trained models on labelled images',
        'RUN… [options]',
        """
  RUN…                runs' folders, hf-hub:USER/NAME, or files of weights; of
                      several, such as the folds of a set, means are printed
  --model NAME        the model that a file of weights is for
  --data FOLDER       labelled images; default: those that the run validated on
  --split NAME        val or train
  --classes FILE      class names of a checkpoint that has none, one a line
  --output FOLDER     write scores.json and confusion.png
  --batch-size N      images at a time
  --workers N         processes that read images
  --device NAME       auto, cpu, cuda or mps
""",
        (
            'runs/photos --data photos',
            'runs/fold-0 runs/fold-1 runs/fold-2 --output folds',
            '81.5_T2T_ViT_14.pth.tar --model t2t_vit_14 --data imagenet',
        ),
        'evaluate:evaluate',
        ('checkpoint',),
    ),
    'predict': Command(
        'classify images',
        'IMAGE… --checkpoint RUN [options]',
        """
  IMAGE…              files, folders, patterns, tar or Parquet files, lists
  --checkpoint RUN    a run's folder, hf-hub:USER/NAME, an exported file, or
                      a file of weights
  --model NAME        the model that a file of weights is for
  --output FILE       .csv, .jsonl or .parquet, or a folder for many images
  --top-k N           classes to list for each image
  --batch-size N      images at a time
  --workers N         processes that read images
  --device NAME       auto, cpu, cuda or mps
  --precision NAME    no (float32), bf16, fp16, auto
  --picture FILE      draw the first images with their classes as a PNG file
""",
        (
            'photos/*.jpg --checkpoint runs/photos',
            'photos --checkpoint runs/photos --output classes.csv',
            'photo.jpg --checkpoint model.onnx --top-k 3',
        ),
        'predict:predict',
        ('inputs',),
    ),
    'embed': Command(
        'compute a feature vector for each image',
        'IMAGE… --checkpoint RUN --output FILE [options]',
        """
  IMAGE…              files, folders, patterns, tar or Parquet files, lists
  --checkpoint RUN    a run's folder, hf-hub:USER/NAME, an exported file, or
                      a file of weights
  --output FILE       .parquet or .npy, or a folder for many images
  --kind NAME         features (what the head reads), class_token, pooled or
                      pyramid
  --model NAME        the model that a file of weights is for
  --batch-size N      images at a time
  --workers N         processes that read images
  --device NAME       auto, cpu, cuda or mps
  --precision NAME    no (float32), bf16, fp16, auto
""",
        (
            'photos --checkpoint runs/photos --output vectors.parquet',
            'photos --checkpoint runs/photos --output a.npy --kind pooled',
            'shards --checkpoint hf-hub:USER/NAME --output vectors',
        ),
        'predict:embed',
        ('inputs',),
    ),
    'push': Command(
        'publish a run on the Hugging Face Hub',
        'RUN USER/NAME [options]',
        """
  RUN                 a run's folder
  USER/NAME           the repository, which is created if it does not exist
  --license NAME      of the weights, such as apache-2.0
  --private           create a private repository
  --revision NAME     the branch
  --message TEXT      describes the change
""",
        (
            'runs/photos you/photos --license apache-2.0',
            'runs/photos you/photos --private',
            'runs/photos you/photos --revision next --message "Train longer"',
        ),
        'hub:push',
        ('run', 'repo'),
    ),
    'models': Command(
        'list the models with their sizes',
        '[PATTERN] [--json]',
        """
  PATTERN             only names that match, such as t2t_vit_t_*
  --json              print JSON
""",
        ('', "'t2t_vit_t_*'", '--json > models.json'),
        'models.listing:models',
        ('pattern',),
    ),
    'recipes': Command(
        'list the shipped training recipes',
        '[NAME]',
        """
  NAME                print the whole recipe, such as digits
""",
        ('', 'digits', 'small-images > mine.yaml'),
    ),
    'convert': Command(
        'convert a published checkpoint to safetensors',
        'FILE --model NAME -o FILE [options]',
        """
  FILE                a checkpoint in any published layout
  --model NAME        the model that it is for
  -o, --output FILE   the safetensors file to write
  --ema false         take the raw weights if the file also has EMA weights
  --num-classes N     a new head for N classes
  --img-size N        resize the position embedding, in pixels
""",
        (
            '81.5_T2T_ViT_14.pth.tar --model t2t_vit_14 -o a.safetensors',
            'a.pth.tar --model t2t_vit_14 -o b.safetensors --num-classes 5',
            'a.pth.tar --model t2t_vit_14 -o b.safetensors --img-size 384',
        ),
        'models.listing:convert',
        ('file',),
    ),
    'export': Command(
        'write a model as ONNX, .pt2 or OpenVINO and compare the results',
        '-o FILE [--checkpoint RUN] [options]',
        """
  -o, --output FILE   .onnx, .pt2 or .xml
  --checkpoint RUN    a run's folder, hf-hub:USER/NAME, or a file of weights
  --model NAME        the model, for a file of weights or without one
  --precision NAME    float32, fp16, bf16 or int8
  --dynamic NAME      sizes that stay open: none, batch, or all
  --pixels NAME       the input: float, uint8-nchw, uint8-nhwc, or image
  --img-size N        pixels
  --data FOLDER       images to compare on
  --tolerance X       largest accepted difference
""",
        (
            '--checkpoint runs/photos -o photos.onnx',
            '--checkpoint runs/photos -o photos.xml --precision int8',
            '--checkpoint a.pth.tar --model t2t_vit_14 -o t2t_vit_14.pt2',
        ),
        'export.command:export',
    ),
    'serve': Command(
        'serve predictions of an ONNX file over HTTP, without torch',
        'FILE [options]',
        """
  FILE                written by t2t-vit export --pixels image
  --host ADDRESS      default: 127.0.0.1, this machine only
  --port N            default: 8000
  --names NAME…       host names to answer to, besides localhost and addresses
  --threads N         of onnxruntime
""",
        ('photos.onnx', 'photos.onnx --port 9000 --threads 4', 'photos.onnx --host 0.0.0.0 --names photos.example.org'),
        positional=('file',),
    ),
    'prepare': Command(
        'reduce images once, into shards that train faster',
        'FOLDER OUTPUT [options]',
        """
  FOLDER              train/ and val/ with class folders, or what train reads
  OUTPUT              a new folder; then t2t-vit train OUTPUT
  --short-side N      pixels of the shorter side; default: 256
  --quality N         of the JPEGs, from 1 to 95; default: 90
  --shard-images N    images in a shard
  --workers N         processes that reduce images
""",
        (
            'imagenet imagenet256',
            'photos photos384 --short-side 384 --workers 16',
            'imagenet imagenet256 --quality 95 --shard-images 4096',
        ),
        'prepare:prepare',
        ('root', 'output'),
    ),
    'bench': Command(
        'compare models in speed, memory and size',
        '[MODEL…] [options]',
        """
  MODEL…              names that timm knows, or FILE.py:FUNCTION
  --baseline MODEL    the model to compare with
  --modes NAME…       infer, train
  --precision NAME    float32, bf16, fp16, bf16_weights or fp16_weights
  --batch-size N      images at a time
  --img-sizes N…      pixels
  --device NAME       auto, cpu, cuda or mps
  --threads N         of the CPU
  --output FOLDER     write bench.csv and README.md
""",
        ('t2t_vit_14 vit_small_patch16_224', 't2t_vit_14 --modes train', 't2t_vit_14 --device cuda --output speed'),
        'benchmark:bench',
        ('models',),
    ),
    'visualize': Command(
        'draw what models see, and curves of runs',
        '[IMAGE…] [--models MODEL…] [--runs RUN…] [options]',
        """
  IMAGE…              files, folders, digits, or samples (two photos)
  --models MODEL…     runs, names that timm knows, NAME=FILE, hf-hub:USER/NAME,
                      or FILE.py:FUNCTION
  --runs RUN…         runs whose curves to compare
  --output FOLDER     default: looks, or the next free looks-2, looks-3, …
  --pretrained        download the weights of models given by name
  --img-size N        pixels
  --device NAME       auto, cpu, cuda or mps
""",
        ('photo.jpg --models runs/photos', 'samples --models t2t_vit_14 resnet50 --pretrained', '--runs runs/a runs/b'),
        'look.visualize:visualize',
        ('images',),
    ),
    'explore': Command(
        'open a web page that looks inside a model',
        '[--checkpoint RUN] [options]',
        """
  --checkpoint RUN    a run, hf-hub:USER/NAME, a name that timm knows, or a file
                      of weights; default: the last run, or the package's models
  --model NAME        the model that a file of weights is for
  --compare MODEL…    more models to show beside it
  --pretrained        download the weights of models given by name
  --port N            default: the first free one from 7860 on
  --host ADDRESS      default: 127.0.0.1, this machine only
  --device NAME       auto, cpu, cuda or mps
  --browser           open the page in the browser
""",
        ('--browser', '--checkpoint runs/photos', '--checkpoint runs/photos --compare resnet50 --pretrained'),
        'explore.command:explore',
    ),
    'reproduce': Command(
        "repeat the paper's tables and claims at a smaller scale",
        'structures|accuracy|report [options]',
        """
  structures          compare sizes with the printed ones
  accuracy            train the models and compare them
  report              write tables of the finished runs
  --output FOLDER     for the runs and tables
  --data FOLDER       as for train
  --arms NAME…        models to train; default: all that the paper compares
  --seeds N           runs of each model
  --epochs N
  --batch-size N      images in a step
  --img-size N        pixels
  --device NAME       auto, cpu, cuda, cuda:1 or mps
  --minutes N         save and stop after this time; the same command continues
""",
        ('structures', 'accuracy --output compared --data photos', 'report --output compared'),
        'reproduce.command:reproduce',
        ('what',),
    ),
    'completion': Command(
        'print a completion script for a shell',
        'bash|zsh|tcsh|fish|powershell',
        '',
        (
            'bash > ~/.local/share/bash-completion/completions/t2t-vit',
            'zsh > ~/.zfunc/_t2t-vit',
            'tcsh > ~/.t2t-vit.tcsh',
        ),
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 for a failed check, 2 for a user's mistake, 130 for a run that was stopped and saved.
    """
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal lacks must not end a command
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['help'] and argv[1:2]:
        argv = [argv[1], '--help']
    if not argv or argv[0] in ('-h', '--help', '--help-all', 'help'):
        print('\n'.join([USAGE, '', *(f'  {name:12}{command.summary}' for name, command in COMMANDS.items())]))
        return 0
    if argv[0] in ('--version', '-V'):
        print(version())
        return 0
    name, words = argv[0], argv[1:]
    if name not in COMMANDS:
        near = ''.join(f', did you mean {word}?' for word in difflib.get_close_matches(name, COMMANDS, n=1))
        print(f't2t-vit: unknown command {name!r}{near}; commands: {", ".join(COMMANDS)}', file=sys.stderr)
        return 2
    if {'-h', '--help'} & set(words) or name == 'serve' and '--help-all' in words:
        print(short_help(name))
        return 0
    if name == 'recipes':
        return list_recipes(*words)
    if name == 'serve':
        return serve(words)
    from t2t_vit.cli import run  # imports torch

    return run(name, words)


def version() -> str:
    """Return the version of the package without importing it."""
    text = (Path(__file__).parent / 't2t_vit' / '__init__.py').read_text(encoding='utf-8')
    return next(line.split("'")[1] for line in text.splitlines() if line.startswith('__version__'))


def short_help(name: str) -> str:
    """Return the help of one command: its usage, its main options and three examples."""
    command = COMMANDS[name]
    examples = [f'  t2t-vit {name} {words}'.rstrip() for words in command.examples]
    described = command.function or name in ('train', 'finetune')
    more = f'\nt2t-vit {name} --help-all describes all options.' if described else ''
    return '\n'.join(
        [f'usage: t2t-vit {name} {command.usage}', '', f'{command.summary[0].upper()}{command.summary[1:]}.']
        + [command.options.rstrip('\n') or '', '\nexamples:', *examples]
        + ([more] if more else [])
    )


def list_recipes(*names: str) -> int:
    """Print the header of every recipe, or one whole recipe."""
    files = {file.stem: file for file in sorted(RECIPES.glob('*.yaml'))}
    if unknown := [name for name in names if name not in files]:
        near = ''.join(f', did you mean {word}?' for word in difflib.get_close_matches(unknown[0], files, n=1))
        print(f't2t-vit: unknown recipe {unknown[0]!r}{near}; recipes: {", ".join(files)}', file=sys.stderr)
        return 2
    for name in names:
        print(files[name].read_text(encoding='utf-8'), end='')
    for name, file in files.items() if not names else ():
        lines = takewhile(lambda line: line.startswith('#'), file.read_text(encoding='utf-8').splitlines())
        print(name, *wrapped(line[1:] for line in lines), sep='\n', end='\n\n')
    return 0


def wrapped(lines: Iterable[str]) -> list[str]:
    """Return a recipe's header for the terminal: sentences wrapped at its width, commands (indented) unchanged."""
    width = min(shutil.get_terminal_size().columns, 100)
    found = []
    for command, group in groupby(lines, lambda line: line.startswith('  ')):
        text = [f'   {line}' for line in group]
        indent = ' ' * 4
        found += (
            text
            if command
            else textwrap.wrap(' '.join(map(str.strip, text)), width, initial_indent=indent, subsequent_indent=indent)
        )
    return found


def serve(words: list[str]) -> int:
    """Run the prediction server; see `t2t_vit_serve`."""
    try:
        import t2t_vit_serve

        t2t_vit_serve.main(words)
    except ImportError as error:
        print(f"t2t-vit: this needs {error.name}, not installed here: pip install 't2t-vit[serve]'", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f't2t-vit: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the server ends by it
        return 0
    return 0


def entry() -> None:
    """Run the console script."""
    try:
        code = main()
        if sys.stdout:  # None if it is closed
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        code = 141  # as a program that SIGPIPE ends
    sys.exit(code)


if __name__ == '__main__':
    entry()
