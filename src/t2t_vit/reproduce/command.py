"""`t2t-vit reproduce`: structures, accuracy at small scale, and the report of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..settings import UsageError
from ..train.signals import RESTART
from .arms import ARMS
from .report import save_report
from .runs import add_arms, failures, follow, make_plan, results, write_once
from .structures import ROWS, measure_structure, save_structures, show_structures


def reproduce(
    what: Literal['structures', 'accuracy', 'report'],
    output: str | None = None,
    data: str | None = None,
    arms: Sequence[str] = (),
    blocks: Sequence[str] = (),
    token_layers: Sequence[str] = (),
    seeds: int = 3,
    parameters: int | None = None,
    img_size: int | None = None,
    reduction: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    train_images: int | None = None,
    val_images: int | None = None,
    recipe: str | None = None,
    precision: Literal['no', 'bf16', 'fp16'] | None = None,
    device: Literal['auto', 'cpu'] = 'auto',
    threads: int | None = None,
    minutes: float | None = None,
) -> None:
    """The paper's tables and claims, again.

    `structures` counts parameters and multiply-adds of every model in the paper's tables. `accuracy` trains the
    compared models from scratch at one budget and judges each claim; any number of processes may do so in one folder,
    and one that is started again goes on. `report` makes the tables of what is done so far.

    Args:
        what: structures, accuracy or report.
        output: Folder for all that is made; structures are only shown without it.
        data: As train's data.root. What a comparison is begun with, from here to `precision`, it keeps.
        arms: The models to train; all that the paper compares by default.
        blocks: Blocks of your own to compare with the plain one of T2T-ViT-14, each FILE.py:CLASS.
        token_layers: Token layers of your own to compare with the Performer of T2T-ViT-14, each FILE.py:CLASS.
        seeds: Runs of each arm, with seeds from 0.
        parameters: Learned parameters of T2T-ViT-14's small form, 500000 by default; the others keep their share.
        img_size: Pixels, 32 by default.
        reduction: Image size over token grid, 4, 8 (default) or 16.
        epochs: Passes over the training images, 30 by default.
        batch_size: Images a step, 128 by default.
        train_images: Train on so many only, the same share of every class.
        val_images: Score on so many only.
        recipe: A shipped recipe or a YAML file with what else the runs share; `reproduce` by default.
        precision: no (float32), bf16 or fp16.
        device: cpu, or auto for the best there is.
        threads: Of the CPU.
        minutes: Save and stop then, with exit code 75; the same command goes on. Where runs failed, the code is 1.
    """
    if what == 'structures':
        rows = [measure_structure(row) for row in ROWS]
        show_structures(rows)
        if output:
            save_structures(rows, Path(output))
        return
    if not output:
        raise UsageError(f'reproduce {what} needs --output, the folder of the comparison')
    folder = Path(output)
    if what == 'accuracy':
        plan = make_plan(
            folder,
            dict(
                data=data,
                parameters=parameters,
                img_size=img_size,
                reduction=reduction,
                epochs=epochs,
                batch_size=batch_size,
                train_images=train_images,
                val_images=val_images,
                recipe=recipe,
                precision=precision,
            ),
        )
        own = own_arms([('block', text) for text in blocks] + [('token_layer', text) for text in token_layers], folder)
        names = list(arms or ARMS)
        add_arms(plan, folder, names, own)
        finished = follow(folder, [*names, *own], seeds, device, threads, minutes)
        if results(folder):
            save_report(folder)
        failed = failures(folder)
        for run, reason in failed.items():
            print(f'failed: {run}: {reason} (left out until {folder / run}/failed.txt is removed)')
        if not finished:
            print('not all runs are done: the same command goes on')
            raise SystemExit(RESTART)
        if failed:
            raise SystemExit(1)
        return
    save_report(folder)


def own_arms(designs: Sequence[tuple[str, str]], folder: Path) -> dict[str, dict[str, str]]:
    """Arms of the user's own designs by the names of their classes, their files kept in the comparison's folder.

    A design is the argument that it stands for, and FILE.py:CLASS.
    """
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for argument, design in designs:
        stem, _, name = design.partition('.py:')
        file = Path(f'{stem}.py').expanduser()
        if not name or not file.is_file():
            problems.append(f'{argument}s: {design!r} is no FILE.py:CLASS' + (f', no file {file}' if name else ''))
            continue
        kept = folder / 'own' / file.name
        if not write_once(kept, file.read_text()) and kept.read_text() != file.read_text():
            problems.append(
                f'{argument}s: {file} has changed since {folder} was begun; keep its copy there, or choose '
                'another output'
            )
        arm, change = name if name not in ARMS else f'own_{name}', {argument: f'own/{file.name}:{name}'}
        if found.setdefault(arm, change) != change:
            problems.append(
                f'{argument}s: {design} is called as another design, {next(iter(found[arm].values()))}: '
                'rename one of the classes'
            )
    if problems:
        raise UsageError('\n'.join(problems))
    return found
