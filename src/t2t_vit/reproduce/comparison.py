"""Read and write the folder of a comparison.

FOLDER/plan.yaml                    what all runs have in common
FOLDER/recipe.yaml                  a copy of the recipe, its base recipes merged into it
FOLDER/cnn_recipe.yaml              the same of the recipe of ResNets and MobileNets, if they have another one
FOLDER/arms/ARM.yaml                a model: name, arguments, trainable parameters
FOLDER/custom/FILE.py               a copy of the user's own designs
FOLDER/runs/ARM/seed-N/             an ordinary run folder: config.yaml, metrics.jsonl, model.safetensors
FOLDER/runs/ARM/seed-N/result.json  the figures of the tables; its presence marks the run as finished
FOLDER/runs/ARM/seed-N/failed.txt   why training failed; the run is skipped until this file is removed
FOLDER/runs/ARM/seed-N.lock         locked by the process that trains the run
"""

import json
import os
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..custom import refuse_code
from ..models.variants import VARIANTS
from ..settings import Setting, UsageError, flatten, nest, read_settings, recipes, resolve
from ..train.config import Config
from .arms import ARMS, SPLITS, Inputs

RESULT = 'result.json'


@dataclass
class Plan:
    """Hold what all runs of a comparison have in common."""

    data: str
    img_size: int = 32
    reduction: int = 8
    parameters: int = 500_000
    epochs: int = 30
    batch_size: int = 128
    train_images: int | None = None
    val_images: int | None = None
    recipe: str = 'reproduce'
    cnn_recipe: str | None = None  # for ResNets and MobileNets; the same by default
    precision: str = 'no'
    in_chans: int = 3
    num_classes: int = 10
    count: int = 0  # training images
    val_count: int = 0
    majority: float = 0.0  # fraction of the largest class among the validation images; 0 if unknown

    @property
    def chance(self) -> float:
        """Return the top-1 of always answering the same class, 0 to 1."""
        return max(self.majority, 1 / self.num_classes)

    @property
    def inputs(self) -> Inputs:
        """Return what the models are built for."""
        return Inputs(self.img_size, self.reduction, self.in_chans, self.num_classes)

    @property
    def images_seen(self) -> int:
        """Return the number of images that each run trains on, counted once per epoch."""
        return self.epochs * (self.count // self.batch_size) * self.batch_size

    @property
    def recipes(self) -> dict[str, str]:
        """Return the recipes by the names of their copies in the folder."""
        return {'recipe': self.recipe} | ({'cnn_recipe': self.cnn_recipe} if self.cnn_recipe is not None else {})

    def problems(self) -> list[str]:
        """Return a sentence for each wrong value."""
        rules = [
            (self.reduction in SPLITS, f'reduction must be one of {", ".join(map(str, SPLITS))}, got {self.reduction}'),
            (
                self.reduction not in SPLITS or self.img_size % (2 * self.reduction) == 0,
                f'img_size must be a multiple of {2 * self.reduction}, twice the reduction, got {self.img_size}',
            ),
            (self.parameters > 0, f'parameters must be above 0, got {self.parameters}'),
            *(
                (
                    recipe in recipes() or Path(recipe).is_file(),
                    f'{key} must be a YAML file or one of {", ".join(recipes())}, got {recipe!r}',
                )
                for key, recipe in self.recipes.items()
            ),
        ]
        return [sentence for valid, sentence in rules if not valid]


OPTIONS = (
    'data',
    'img_size',
    'reduction',
    'parameters',
    'epochs',
    'batch_size',
    'train_images',
    'val_images',
    'recipe',
    'cnn_recipe',
    'precision',
)  # fields of a plan that a user can set


def read_plan(folder: Path) -> Plan:
    """Read the plan of a comparison.

    Raises:
        UsageError: if the plan is missing or damaged.
    """
    file = folder / 'plan.yaml'
    if not file.is_file():
        raise UsageError(f'{folder} is not the folder of a comparison: it has no plan.yaml')
    try:
        tree = yaml.safe_load(file.read_text(encoding='utf-8'))
        later = ('majority', 'cnn_recipe')  # which older plans do not have
        missing = [key.name for key in fields(Plan) if key.name not in (*later, *tree)]
        plan = Plan(**tree)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f'{file} is damaged: {error}') from None
    if missing:
        raise UsageError(f'{file} is damaged: it lacks {", ".join(missing)}')
    return plan


def read_recipe(recipe: str) -> str:
    """Return a shipped recipe or a recipe file, its base recipes merged into it, as YAML."""
    tree: dict[str, Any] = {}
    for _, key, value, _ in read_settings(recipes().get(recipe, Path(recipe))):
        nest(tree, key, value)
    return yaml.safe_dump(tree, sort_keys=False)


def write_once(file: Path, text: str) -> bool:
    """Write a file atomically; return False and change nothing if it exists."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f'.{file.name}-{socket.gethostname()}-{os.getpid()}')
    draft.write_text(text, encoding='utf-8')
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def custom_folder(folder: Path) -> str:
    """Return the name of the subfolder with copies of the user's files; version 0.1 called it `own`."""
    return 'own' if (folder / 'own').is_dir() else 'custom'


def read_arm(folder: Path, name: str) -> dict[str, Any]:
    """Read an arm's `model`, `args` and `parameters`, with the absolute path of a custom design's file."""
    file = folder / 'arms' / f'{name}.yaml'
    arm = yaml.safe_load(file.read_text(encoding='utf-8'))
    if name in ARMS:  # a custom one is only read after it was named on the command line
        refuse_code(arm['args'], str(file))
    arm['args'] = {
        key: f'{folder.resolve()}/{value}' if '.py:' in str(value) else value for key, value in arm['args'].items()
    }
    return arm


def run_config(
    plan: Plan,
    folder: Path,
    model: str,
    args: dict[str, Any],
    seed: int,
    output: Path | None,
    device: str = 'auto',
    threads: int | None = None,
) -> Config:
    """Return the configuration of one run: the recipe, changed by the plan, changed by the arm."""
    given: dict[str, Any] = {
        'model': model,
        'data.root': plan.data,
        'data.img_size': plan.img_size,
        'data.train_images': plan.train_images,
        'data.val_images': plan.val_images,
        'epochs': plan.epochs,
        'optimizer.cooldown_epochs': 0,
        'batch_size': plan.batch_size,
        'precision': plan.precision,
        'device': device,
        'threads': threads,
        'seed': seed,
        'output': str(output) if output else None,
    }
    key = 'cnn_recipe' if plan.cnn_recipe and model not in VARIANTS else 'recipe'
    copy, recipe = folder / f'{key}.yaml', plan.recipes[key]
    base = read_settings(copy if copy.is_file() else recipes().get(recipe, Path(recipe)))
    settings = [setting for setting in base if not setting.key.startswith('model')]
    last = {setting.key: setting.value for setting in base}
    for key in ('data.mean', 'data.std'):  # of RGB, for other channels: their mean, as for timm's models
        if (values := last.get(key)) and len(values) != plan.in_chans:
            given[key] = [sum(values) / len(values)] * plan.in_chans
    settings += [Setting(key, key, value) for key, value in given.items()]
    settings += [Setting(f'model_args.{key}', f'model_args.{key}', value) for key, value in flatten(args)]
    return resolve(Config, settings)


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Return the folder of a run."""
    return folder / 'runs' / arm / f'seed-{seed}'


def results(folder: Path) -> list[dict[str, Any]]:
    """Read the results of all finished runs, arm by arm."""
    found = [json.loads(file.read_text(encoding='utf-8')) for file in sorted(folder.glob(f'runs/*/seed-*/{RESULT}'))]
    for result in found:
        if 'own' in result:  # version 0.1
            result['custom'] = result.pop('own')
    return found


def failures(folder: Path) -> dict[str, str]:
    """Return why runs failed, by their paths relative to the folder."""
    return {
        str(file.parent.relative_to(folder)): file.read_text(encoding='utf-8').strip()
        for file in sorted(folder.glob('runs/*/seed-*/failed.txt'))
        if not (file.parent / RESULT).exists()
    }
