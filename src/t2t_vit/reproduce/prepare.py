"""Check everything about a comparison, then write its folder: plan, recipe, arms and custom designs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..console import console
from ..data import Part, open_train_val, report_data
from ..models.listing import count_parameters
from ..settings import UsageError
from .arms import ARMS, REFERENCE, ScaledModel, base_of, build_scaled, published_ratio, scale, unknown_arms
from .comparison import OPTIONS, Plan, custom_folder, read_arm, read_plan, read_recipe, run_config, write_once


def prepare(
    folder: Path,
    given: dict[str, Any],
    arms: Sequence[str] = (),
    blocks: Sequence[str] = (),
    token_layers: Sequence[str] = (),
    seeds: int = 1,
    threads: int | None = None,
    minutes: float | None = None,
) -> list[str]:
    """Check a comparison, write what its folder lacks, and return the names of its arms. Errors leave it unchanged.

    Every file depends only on the arguments and the data, so processes that start together write the same.

    Args:
        folder: Folder of the comparison, new or existing.
        given: Values for the plan; None stands for the folder's value or the default.
        arms: The paper's models to train, all by default.
        blocks: Custom blocks, each FILE.py:CLASS.
        token_layers: Custom token layers, each FILE.py:CLASS.
        seeds: Runs per arm.
        threads: CPU threads of each run.
        minutes: Time limit.

    Raises:
        UsageError: with a line for each problem.
        DataError: if the data cannot be used.
    """
    given = {key: value for key, value in given.items() if value is not None}
    exists = (folder / 'plan.yaml').is_file()
    problems = []
    plan = None
    if exists:
        plan = read_plan(folder)
        problems += changes(plan, folder, given)
    elif 'data' in given:
        plan = Plan(**given)
        problems += plan.problems()
    else:
        problems.append('a new comparison needs --data: digits, torch/NAME, hfds/NAME or a folder')
    problems += unknown_arms(arms)
    designs, wrong = read_designs([('block', d) for d in blocks] + [('token_layer', d) for d in token_layers], folder)
    problems += wrong
    limits = {'seeds': (seeds, 1), 'threads': (threads, 1), 'minutes': (minutes, 0)}
    problems += [
        f'{name} must be at least {least}, got {value}'
        for name, (value, least) in limits.items()
        if value is not None and value < least
    ]
    if problems or plan is None:
        raise UsageError('\n'.join(problems))
    if not exists:
        complete(plan, folder)
    rows = scaled_arms(plan, folder, list(arms or ARMS)) | custom_arms(plan, folder, designs)

    for key, recipe in plan.recipes.items():
        if not (folder / f'{key}.yaml').exists():
            write_once(folder / f'{key}.yaml', read_recipe(recipe))
    write_once(folder / 'plan.yaml', yaml.safe_dump(asdict(plan), sort_keys=False))
    if problems := changes(read_plan(folder), folder, given):  # another process may have been first
        raise UsageError('\n'.join(problems))
    for _, file, _ in designs.values():
        write_once(folder / custom_folder(folder) / file.name, file.read_text(encoding='utf-8'))
    for name, row in rows.items():
        write_once(folder / 'arms' / f'{name}.yaml', yaml.safe_dump(row, sort_keys=False))
    return [*(arms or ARMS), *designs]


def changes(plan: Plan, folder: Path, given: dict[str, Any]) -> list[str]:
    """Return a sentence for each given value that differs from the folder's."""
    found = [
        f'{key} is {getattr(plan, key)} in {folder} and cannot change to {given[key]}; choose another output'
        for key in OPTIONS
        if key in given and getattr(plan, key) != given[key]
    ]
    if found:
        return found
    return [
        f'{key}: {recipe} has changed since {folder} was started; leave --{key} out to continue with the copy there, '
        'or choose another output'
        for key, recipe in plan.recipes.items()
        if key in given
        and (copy := folder / f'{key}.yaml').is_file()
        and Path(recipe).is_file()
        and copy.read_text(encoding='utf-8') != read_recipe(recipe)
    ]


def complete(plan: Plan, folder: Path) -> None:
    """Set the fields of a new plan that depend on the data."""
    for model in (REFERENCE, 'resnet50'):
        config = run_config(plan, folder, model, {}, 0, None)  # refuses a recipe that cannot be run
    data = config.data
    train, val, _ = open_train_val(plan.data, data.cache, data.download, data.channels, data.split_options)
    train, val = Part(train, plan.train_images or len(train.labels)), Part(val, plan.val_images or len(val.labels))
    plan.count, plan.val_count = len(train.labels), len(val.labels)
    report = report_data(train, val)
    for line in (*report.lines(), *(f'warning: {text}' for text in report.warnings())):
        console().print(line, soft_wrap=True)
    labels = val.labels
    plan.majority = max(Counter(labels).values(), default=0) / max(len(labels), 1)
    plan.num_classes, plan.in_chans = len(train.classes), data.channels or 1 + 2 * (plan.data != 'digits')
    if plan.count < plan.batch_size:
        raise UsageError(
            f'batch_size is {plan.batch_size}, but there are only {plan.count} training images; choose a smaller one'
        )


def scaled_arms(plan: Plan, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the paper's arms at their scaled widths, by name; those in the folder stay as they are."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(arm for wanted in [REFERENCE, *names] for arm in (base_of(wanted), wanted)):
        if (folder / 'arms' / f'{name}.yaml').is_file():
            rows[name] = read_arm(folder, name)
            if rows[name]['model'] not in (name, f'scaled_{name}') or '.py:' in str(rows[name]['args']):
                raise UsageError(
                    f'{folder}/arms/{name}.yaml is not that of {name}; remove it, or choose another output'
                )
        else:
            base = base_of(name)
            budget = (
                plan.parameters
                if name == base == REFERENCE
                else (published_ratio(name, base) * rows[base]['parameters'])
            )
            rows[name] = scale(name, budget, plan.inputs)._asdict()
    return rows


def custom_arms(plan: Plan, folder: Path, designs: dict[str, tuple[str, Path, str]]) -> dict[str, dict[str, Any]]:
    """Return T2T-ViT-14 with each custom design in place of its own.

    Raises:
        UsageError: if one cannot be built, or if the folder has another arm of that name.
    """
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    for name, (argument, file, class_name) in designs.items():
        reference = scaled_arms(plan, folder, [REFERENCE])[REFERENCE]
        try:
            model = build_scaled(
                reference['model'], {**reference['args'], argument: f'{file}:{class_name}'}, plan.inputs
            )
        except Exception as error:  # the user's class can raise anything
            problems.append(f'{argument}s: {file}:{class_name} cannot be built: {type(error).__name__}: {error}')
            continue
        args = {**reference['args'], argument: f'{custom_folder(folder)}/{file.name}:{class_name}'}
        parameters = count_parameters(model)[1]
        rows[name] = {**ScaledModel(reference['model'], args, parameters)._asdict(), 'custom': True}
        existing = folder / 'arms' / f'{name}.yaml'
        if existing.is_file() and yaml.safe_load(existing.read_text(encoding='utf-8'))['args'] != args:
            problems.append(f'{argument}s: {folder} has another arm named {name}: rename the class')
    if problems:
        raise UsageError('\n'.join(problems))
    return rows


def read_designs(given: Sequence[tuple[str, str]], folder: Path) -> tuple[dict[str, tuple[str, Path, str]], list[str]]:
    """Return argument, file and class of each custom design by the name of its arm, and a sentence for each problem.

    Args:
        given: Pairs of the model argument that the design replaces (block, token_layer) and FILE.py:CLASS.
        folder: Folder of the comparison.
    """
    found: dict[str, tuple[str, Path, str]] = {}
    problems = []
    for argument, text in given:
        stem, _, class_name = text.partition('.py:')
        file = Path(f'{stem}.py').expanduser()
        if not class_name:
            problems.append(f'{argument}s: expected FILE.py:CLASS, got {text!r}')
            continue
        if not file.is_file():
            problems.append(f'{argument}s: there is no file {file}, got {text!r}')
            continue
        copy = folder / custom_folder(folder) / file.name
        if copy.is_file() and copy.read_text(encoding='utf-8') != file.read_text(encoding='utf-8'):
            problems.append(
                f'{argument}s: {file} has changed since {folder} was started; use its copy {copy}, or choose another '
                'output'
            )
        if twin := next((f for _, f, _ in found.values() if f.name == file.name and f != file), None):
            problems.append(f'{argument}s: {twin} and {file} would overwrite each other in {folder}: rename one')
        arm = class_name if class_name not in ARMS else f'custom_{class_name}'
        if found.setdefault(arm, (argument, file, class_name)) != (argument, file, class_name):
            problems.append(
                f'{argument}s: {text} and {found[arm][1]} would have the same name: rename one of the classes'
            )
    return found, problems
