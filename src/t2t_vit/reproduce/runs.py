"""Runs of a comparison on disk: one folder each, taken by whoever is first, each trained in a process of its own.

FOLDER/plan.yaml                    what all runs share
FOLDER/recipe.yaml                  the recipe, as it was, its bases in it
FOLDER/arms/ARM.yaml                a model: name, arguments, learned parameters
FOLDER/own/FILE.py                  the user's own designs, as they were
FOLDER/runs/ARM/seed-N/             a run folder as any other: config.yaml, metrics.jsonl, model.safetensors
FOLDER/runs/ARM/seed-N/result.json  what the tables are made of; its presence says that the run is done
FOLDER/runs/ARM/seed-N/failed.txt   why it cannot be finished; without it, it is tried again
FOLDER/runs/ARM/seed-N/taken-K      whose it is
"""

import json
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..benchmark import count_macs, device_name
from ..data import Part, open_source
from ..models.listing import count_parameters
from ..settings import Setting, UsageError, flatten, nest, read_settings, recipes, resolve
from ..train.config import Config
from ..train.run import train
from ..train.signals import RESTART, Interrupted, stop_signals
from ..train.state import git_revision
from ..trained import pick_device
from .arms import REFERENCE, SPLITS, Place, Small, base_of, build_small, check_arms, published_share, shrink

RESULT = 'result.json'
BEAT = 20  # seconds between the signs of life of whoever holds a run
LOST = 300  # seconds without one after which a run counts as left
FAILED = 3  # exit code of a run that cannot be finished


@dataclass
class Plan:
    """What all runs of a comparison share."""

    data: str
    img_size: int = 32
    reduction: int = 8
    parameters: int = 500_000
    epochs: int = 30
    batch_size: int = 128
    train_images: int | None = None
    val_images: int | None = None
    recipe: str = 'reproduce'
    precision: str = 'no'
    in_chans: int = 3
    num_classes: int = 10
    count: int = 0  # images to train on
    val_count: int = 0
    majority: float = 0.0  # share of the largest class among the images that are scored; 0 where it was not counted

    @property
    def chance(self) -> float:
        """Top-1 of a model that says the same of every image, 0 to 1."""
        return max(self.majority, 1 / self.num_classes)

    @property
    def place(self) -> Place:
        """What the models are built for."""
        return Place(self.img_size, self.reduction, self.in_chans, self.num_classes)

    @property
    def images_seen(self) -> int:
        """Images that every run trains on, each counted as often as it is seen."""
        return self.epochs * (self.count // self.batch_size) * self.batch_size

    def problems(self) -> list[str]:
        """What is wrong with the values, each in a sentence."""
        rules = [
            (self.reduction in SPLITS, f'reduction is one of {", ".join(map(str, SPLITS))}, got {self.reduction}'),
            (
                self.reduction not in SPLITS or self.img_size % (2 * self.reduction) == 0,
                f'img_size is a multiple of {2 * self.reduction}, twice the reduction, got {self.img_size}',
            ),
            (self.parameters > 0, f'parameters is above 0, got {self.parameters}'),
            (
                self.recipe in recipes() or Path(self.recipe).is_file(),
                f'recipe is a YAML file or one of {", ".join(recipes())}, got {self.recipe!r}',
            ),
        ]
        return [sentence for holds, sentence in rules if not holds]


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
    'precision',
)  # of a plan, that a user may give


def read_plan(folder: Path) -> Plan:
    """The plan of a comparison.

    Raises:
        UsageError: if there is none, or it is damaged.
    """
    file = folder / 'plan.yaml'
    if not file.is_file():
        raise UsageError(f'{folder} holds no comparison: it has no plan.yaml')
    try:
        tree = yaml.safe_load(file.read_text())
        missing = [key.name for key in fields(Plan) if key.name != 'majority' and key.name not in tree]
        plan = Plan(**tree)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f'{file} is damaged: {error}') from None
    if missing:
        raise UsageError(f'{file} is damaged: it has no {", ".join(missing)}')
    return plan


def recipe_text(recipe: str) -> str:
    """A recipe, shipped or a file, with its bases in it, as YAML."""
    tree: dict[str, Any] = {}
    for _, key, value in read_settings(recipes().get(recipe, Path(recipe))):
        nest(tree, key, value)
    return yaml.safe_dump(tree, sort_keys=False)


def keep_recipe(folder: Path, recipe: str) -> None:
    """Put the recipe into the folder, or see that it is the one which stands there.

    Raises:
        UsageError: if it is another.
    """
    kept, text = folder / 'recipe.yaml', recipe_text(recipe)
    if not write_once(kept, text) and kept.read_text() != text:
        raise UsageError(
            f'recipe: {recipe} has changed since {folder} was begun; leave it out, to go on with its copy '
            'there, or choose another output'
        )


def make_plan(folder: Path, given: dict[str, Any]) -> Plan:
    """The plan that stands in a folder, or a new one there, of what is given; None is not given.

    Raises:
        UsageError: if what is given cannot be, or is not what the folder's runs were begun with.
        DataError: if the data cannot be used.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if (folder / 'plan.yaml').is_file():
        plan = agree(read_plan(folder), folder, given)
        if Path(plan.recipe).is_file() and 'recipe' in given:
            keep_recipe(folder, plan.recipe)
        return plan
    if 'data' not in given:
        raise UsageError('a new comparison needs --data: digits, torch/NAME, hfds/NAME or a folder')
    plan = Plan(**given)
    if problems := plan.problems():
        raise UsageError('\n'.join(problems))
    config = run_config(plan, folder, REFERENCE, {}, 0, None)  # a recipe that cannot be run is refused here
    sources = [open_source(plan.data, split, config.data.cache, config.data.download) for split in ('train', 'val')]
    plan.count, plan.val_count = (
        min(len(source.labels), limit or len(source.labels))
        for source, limit in zip(sources, (plan.train_images, plan.val_images))
    )
    scored = Part(sources[1], plan.val_count).labels
    plan.majority = max(Counter(scored).values(), default=0) / max(len(scored), 1)
    plan.num_classes, plan.in_chans = len(sources[0].classes), config.data.channels or 1 + 2 * (plan.data != 'digits')
    if plan.count < plan.batch_size:
        raise UsageError(f'{plan.count} training images make no batch of {plan.batch_size}')
    keep_recipe(folder, plan.recipe)
    write_once(folder / 'plan.yaml', yaml.safe_dump(asdict(plan), sort_keys=False))
    return agree(read_plan(folder), folder, given)  # another process may have been first


def agree(plan: Plan, folder: Path, given: dict[str, Any]) -> Plan:
    """The plan that stands in a folder, unless what is given is another one: then UsageError."""
    if changed := [key for key, value in given.items() if getattr(plan, key) != value]:
        raise UsageError(
            '\n'.join(
                f'{key} is {getattr(plan, key)} in {folder}, and cannot become {given[key]} there' for key in changed
            )
        )
    return plan


def write_once(file: Path, text: str) -> bool:
    """Make a file that is whole when it gets its name; False, and nothing done, where it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f'.{file.name}-{socket.gethostname()}-{os.getpid()}')
    draft.write_text(text)
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def read_arm(folder: Path, name: str) -> dict[str, Any]:
    """An arm's `model`, `args` and `parameters`; the file of an own design is found from where the folder is now.

    Its path is the folder's one true one, however that was spelled, or a run would not know itself again.
    """
    arm = yaml.safe_load((folder / 'arms' / f'{name}.yaml').read_text())
    arm['args'] = {
        key: f'{folder.resolve()}/{value}' if '.py:' in str(value) else value for key, value in arm['args'].items()
    }
    return arm


def add_arms(plan: Plan, folder: Path, names: list[str], own: dict[str, dict[str, Any]]) -> None:
    """Put into a folder the arms that are not there yet: the paper's at their scaled widths, and the user's own.

    Each is a function of the plan and the arms above it: it is the same whichever process writes it.

    Args:
        plan: The folder's.
        folder: Of the comparison.
        names: The paper's arms.
        own: Arms that are T2T-ViT-14 but for these arguments, by name; files by their place in the folder.

    Raises:
        UsageError: for an unknown arm, a budget that is too small, or an own design that cannot be built.
    """

    def add(name: str, small: Small, **more: Any) -> None:
        text = yaml.safe_dump({**small._asdict(), **more}, sort_keys=False)
        if not write_once(file := folder / 'arms' / f'{name}.yaml', text) and file.read_text() != text:
            raise UsageError(f'{folder} has another arm named {name}')

    def there(name: str) -> bool:
        return (folder / 'arms' / f'{name}.yaml').is_file()

    check_arms(names)
    if not there(REFERENCE):
        add(REFERENCE, shrink(REFERENCE, plan.parameters, plan.place))
    for name in dict.fromkeys(arm for wanted in names for arm in (base_of(wanted), wanted)):
        if not there(name):
            base = base_of(name)
            add(name, shrink(name, published_share(name, base) * read_arm(folder, base)['parameters'], plan.place))
    reference = read_arm(folder, REFERENCE)
    for name, change in own.items():
        args = {**reference['args'], **change}
        try:
            here = {**args, **{key: f'{folder}/{file}' for key, file in change.items()}}
            count = count_parameters(build_small(reference['model'], here, plan.place))[1]
        except Exception as error:  # whatever it is, it is over the user's class
            raise UsageError(f'{next(iter(change.values()))} cannot be built: {error}') from error
        add(name, Small(reference['model'], args, count), own=True)


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
    """The configuration of one run: the recipe, then what the plan says, then the arm."""
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
    kept = folder / 'recipe.yaml'
    base = read_settings(kept if kept.is_file() else recipes().get(plan.recipe, Path(plan.recipe)))
    settings: list[Setting] = [entry for entry in base if not entry[1].startswith('model')]
    settings += [(key, key, value) for key, value in given.items()]
    settings += [(f'model_args.{key}', f'model_args.{key}', value) for key, value in flatten(args)]
    return resolve(Config, settings)


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """Where a run stands."""
    return folder / 'runs' / arm / f'seed-{seed}'


class Taken:
    """A run that this process holds, from `take` to `release`."""

    def __init__(self, file: Path) -> None:
        self.file, self.over = file, threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        """Give signs of life."""
        while not self.over.wait(BEAT):
            if self.file.exists():
                os.utime(self.file)

    def release(self) -> None:
        """Let others have it."""
        self.over.set()
        self.file.unlink(missing_ok=True)


def holder(run: Path) -> tuple[int, Path | None]:
    """The number and file of the last claim on a run; -1 and None where nobody ever took it."""
    claims = [(int(file.name.partition('-')[2]), file) for file in run.glob('taken-*')]
    return max(claims, default=(-1, None))


def held(file: Path | None) -> bool:
    """Whether whoever made a claim still lives: gave a sign of life of late, and, on this machine, has its process."""
    try:
        if file is None:
            return False
        host, _, pid = file.read_text().partition(' ')
        age = time.time() - file.stat().st_mtime
    except OSError:  # gone since it was listed
        return False
    if age > LOST or host != socket.gethostname():
        return age <= LOST
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def take(run: Path) -> Taken | None:
    """Claim a run; None where it is done, or another living process has it.

    Claims are numbered files that are never overwritten: whoever finds claim K left by a dead process must be the one
    that makes the file of claim K + 1, which one alone can. The file is whole when it gets its name.
    """
    run.mkdir(parents=True, exist_ok=True)
    number, file = holder(run)
    if (run / RESULT).exists() or held(file):
        return None
    mine = run / f'taken-{number + 1}'
    if not write_once(mine, f'{socket.gethostname()} {os.getpid()}'):
        return None
    taken = Taken(mine)
    if (run / RESULT).exists():  # done by another since
        taken.release()
        return None
    return taken


def work(folder: Path, arm: str, seed: int, device: str, threads: int | None) -> None:
    """Train one run from where it is to its result; the whole of a child process. Its exit code says how it went."""
    run = run_folder(folder, arm, seed)
    taken = take(run)
    if taken is None:
        return
    try:
        plan = read_plan(folder)
        row = read_arm(folder, arm)
        config = run_config(plan, folder, row['model'], row['args'], seed, run, device, threads)
        last = train(config, resume='auto')
        write_once(run / RESULT, json.dumps(result(plan, row, config, last) | dict(arm=arm), indent=1) + '\n')
        for state in (run / 'checkpoints').glob('*.pt'):  # of no use any more, and large
            state.unlink()
    except Interrupted as stop:
        raise SystemExit(stop.code) from None
    except Exception as error:  # the other runs go on; a damaged installation shows in all of them
        traceback.print_exc()
        (run / 'failed.txt').write_text(f'{type(error).__name__}: {error}\n')
        raise SystemExit(FAILED) from None
    finally:
        taken.release()


def result(plan: Plan, row: dict[str, Any], config: Config, last: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run: its score behind the last epoch, its size and speed, and under what conditions."""
    known = [json.loads(file.read_text()) for file in Path(str(config.output)).parent.glob(f'*/{RESULT}')]
    macs, macs_weights = (
        (known[0]['macs'], known[0]['macs_weights'])
        if known
        else count_macs(build_small(row['model'], row['args'], plan.place), plan.img_size, plan.in_chans)
    )
    records = [json.loads(line) for line in (Path(str(config.output)) / 'metrics.jsonl').read_text().splitlines()]
    speeds = sorted(record['images_per_second'] for record in records)
    device = pick_device(config.device)
    return dict(
        seed=config.seed,
        own=row.get('own', False),
        top1=last['val_top1'],
        train_loss=last['train_loss'],
        val_loss=last['val_loss'],
        parameters=row['parameters'],
        macs=macs,
        macs_weights=macs_weights,
        images_per_second=speeds[len(speeds) // 2],
        images_seen=plan.images_seen,
        train_images=plan.count,
        val_images=plan.val_count,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        device=device_name(device),
        threads=torch.get_num_threads(),
        precision=plan.precision,
        torch=torch.__version__,
        version=__version__,
        revision=git_revision(),
    )


def results(folder: Path) -> list[dict[str, Any]]:
    """The results of all runs that are done, arm by arm."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f'runs/*/seed-*/{RESULT}'))]


@contextmanager
def child(*args: Any) -> Iterator[Any]:
    """A process that does `work`; told to save and stop where this one is stopped."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    if 'forkserver' in methods:
        context.set_forkserver_preload([__name__])  # what takes seconds to import is there when a child starts
    process = context.Process(target=work, args=args)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def follow(
    folder: Path,
    names: list[str],
    seeds: int,
    device: str = 'auto',
    threads: int | None = None,
    minutes: float | None = None,
) -> bool:
    """Train all runs that nobody else does, first seed first; whether all that were asked for are done or failed.

    A run that failed is left out until its failed.txt is removed (`failures`). After Ctrl-C, SIGTERM or SIGUSR1 the run
    under way is saved.

    Args:
        folder: Of the comparison.
        names: The arms.
        seeds: How many of each, from 0.
        device: As train's.
        threads: As train's.
        minutes: Stop then, with the run under way saved; by default when all is done.
    """
    end = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    runs = [(arm, seed, run_folder(folder, arm, seed)) for seed in range(seeds) for arm in names]
    with stop_signals() as stopped:
        for arm, seed, run in runs:
            if settled(run) or held(holder(run)[1]):
                continue
            if stopped or time.monotonic() >= end:
                return False
            with child(folder, arm, seed, device, threads) as process:
                while process.is_alive() and not stopped and time.monotonic() < end:
                    process.join(min(1.0, max(end - time.monotonic(), 0)))
            if process.exitcode in (RESTART, 130, -signal.SIGTERM, -signal.SIGINT):  # also where it alone was told to
                return False
            if process.exitcode not in (0, FAILED):  # as for want of memory: it would be so again
                write_once(run / 'failed.txt', f'its process ended with exit code {process.exitcode}\n')
    return all(settled(run) for _, _, run in runs)


def settled(run: Path) -> bool:
    """Whether a run is done, or has failed."""
    return (run / RESULT).exists() or (run / 'failed.txt').exists()


def failures(folder: Path) -> dict[str, str]:
    """Why runs failed, by their places in the folder."""
    return {
        str(file.parent.relative_to(folder)): file.read_text().strip()
        for file in sorted(folder.glob('runs/*/seed-*/failed.txt'))
        if not (file.parent / RESULT).exists()
    }
