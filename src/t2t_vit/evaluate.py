"""Score a trained model on labelled images: the command `t2t-vit eval`."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from rich.table import Column, Table
from scipy.stats import binomtest

from .classifier import Augmentation, Classifier, Evaluation, NotFinite, Precision
from .console import console
from .data import Opener, Source, printable
from .data.waiting import command_watch
from .plots import plot_confusion, plot_predictions
from .results import appearing, cell, check_writable, portable_name
from .settings import at_least, require

SHOWN = 24  # mistakes in the picture
MEASURES = {  # on the screen
    'top1': 'top-1',
    'top5': 'top-5',
    'balanced_accuracy': 'balanced accuracy',
    'precision': 'precision',
    'f1': 'F1',
    'auroc': 'AUROC',
    'calibration_error': 'calibration error',
}
MOST_CLASSES = 40  # lines in the table on the screen


def evaluate(
    checkpoint: Sequence[str],
    data: str | None = None,
    model: str | None = None,
    split: Literal['train', 'val'] = 'val',
    classes: str | None = None,
    ema: bool = True,
    augmentation: Augmentation = 'none',
    temperature: bool = False,
    batch_size: int = 128,
    workers: int = 2,
    device: str = 'auto',
    precision: Precision = 'no',
    cache: str | None = None,
    download: bool = False,
    output: str | None = None,
    spreadsheet: bool = False,
) -> list[dict[str, Any]]:
    """Score trained models on labelled images; only the split that is scored has to be there.

    Of several, as the runs of a k-fold cross-validation, the means are printed too. Exits with 1 if a model computes
    NaN or infinity for an image, with 2 if the data's classes are not the model's.

    Args:
        checkpoint: One or more of: a run folder, its model.safetensors, a training state (checkpoints/step-*.pt),
            hf-hub:USER/NAME, an exported .onnx, .xml or .pt2, or a file in any published layout (then with --model).
        data: digits, torch/NAME, hfds/NAME, a folder with val/ of class folders, a folder of class folders, a Parquet
            file or tar, or a folder of them; by default the data that the run was trained on.
        model: The registered name of the model in a file without a config.json.
        split: val or train.
        classes: A file with the class names in the order of the model's outputs, one a line; for a checkpoint without
            names `text` or `natural`, the order of its class folders (timm's is natural); `by-name` to match
            classes that stand in another order.
        ema: Take the EMA weights of a training state, else the raw ones.
        augmentation: Test-time augmentation, whose probabilities are averaged: none, flip (the image and its mirror
            image), or crops (the image, its corners and its middle enlarged, and all of them mirrored).
        temperature: Fit the temperature that calibrates the probabilities, and report the calibration error with it.
        batch_size: Images at once.
        workers: Processes that read images.
        device: cpu, cuda, cuda:1, mps, or auto.
        precision: no (float32), bf16, fp16, or auto for bf16 if the device is faster in it.
        cache: Folder of torch/ and hfds/ sets; by default ~/.cache/t2t-vit, and the Hub's own.
        download: Fetch a torch/ set that is not there.
        output: Folder for scores.json, images.csv (every image), confusion.csv, confusion.png and mistakes.png; by
            default the run's own, none for a file. For several models a folder of such folders, and means.json.
        spreadsheet: Write cells of images.csv and confusion.csv that a spreadsheet would execute as formulas
            (beginning with = + - @) with an apostrophe in front.
    """
    require([*at_least(1, batch_size=batch_size), *at_least(0, workers=workers)])
    evaluations: list[Evaluation] = []
    for path in checkpoint:
        if len(checkpoint) > 1:
            console().print(f'\n{printable(path)}', soft_wrap=True)
        folder = Path(path) if Path(path).is_dir() else None
        if output:
            folder = Path(output) if len(checkpoint) == 1 else Path(output, f'{len(evaluations)}-{Path(path).name}')
        if folder:
            check_writable(folder)
        classifier = Classifier.load(path, model, device, precision, classes, ema)
        classifier.watch = command_watch()
        if classifier.precision_note:
            console().print(f'note: {classifier.precision_note}', soft_wrap=True)
        source, name = classifier.open_labelled(data, split, cache, download)
        found = classifier.score(source, name, split, batch_size, workers, augmentation, temperature)
        report(found)
        if folder:
            save(found, folder, source, classifier, spreadsheet)
            files = 'scores.json, images.csv, confusion.csv, confusion.png'
            more = ', mistakes.png' if found.mistakes() else ''
            console().print(f'written to {folder}:\n  {files}{more}', soft_wrap=True)
        evaluations.append(found)
    if len(evaluations) > 1:
        means = average(evaluations)
        report_means(means)
        if output:
            with appearing(Path(output, 'means.json')) as draft:
                draft.write_text(json.dumps(means, indent=2) + '\n', 'utf-8')
    if bad := [found for found in evaluations if found.not_finite]:
        raise NotFinite(
            '\n'.join(
                f'{found.checkpoint} computes NaN or infinity for {found.not_finite} of '
                f'{found.not_finite + found.measures.images} images, which are not in the scores'
                for found in bad
            )
        )
    return [found.as_dict() for found in evaluations]


def average(found: Sequence[Evaluation]) -> dict[str, Any]:
    """Return mean and standard deviation of each measure over models, and the scores of all their images together.

    The latter are None if the models were scored on the same images, or on several data sets.
    """
    means: dict[str, Any] = {'checkpoints': [one.checkpoint for one in found]}
    for key in MEASURES:
        values = [value for one in found if (value := getattr(one.measures, key)) is not None]
        if len(values) == len(found):
            means[key] = {'mean': mean(values), 'std': stdev(values), 'values': values}
    rows = [(one.data, row.image, row.label == row.predicted) for one in found for row in one.rows]
    apart = len({one.data for one in found}) == 1 and len({row[1] for row in rows}) == len(rows)
    means['together'] = None
    if apart:
        right = sum(row[2] for row in rows)
        interval = binomtest(right, len(rows)).proportion_ci(0.95, 'wilson')
        means['together'] = {'images': len(rows), 'top1': right / len(rows), 'interval': [interval.low, interval.high]}
    return means


def report_means(means: dict[str, Any]) -> None:
    """Print what `average` returns."""
    screen = console()
    screen.print(f'\nmean and standard deviation over {len(means["checkpoints"])} models')
    for key, label in MEASURES.items():
        if key in means:
            screen.print(f'{label:18} {100 * means[key]["mean"]:6.2f} % ± {100 * means[key]["std"]:.2f}')
    if whole := means['together']:
        low, high = map(percent, whole['interval'])
        screen.print(
            f'all {whole["images"]} images together: top-1 {100 * whole["top1"]:.2f} %   95 % interval {low}–{high} %',
            soft_wrap=True,
        )


def percent(value: float | None) -> str:
    """Return a rate for the screen."""
    return '–' if value is None else f'{100 * value:.1f}'


def report(found: Evaluation) -> None:
    """Print the scores."""
    screen, measures = console(), found.measures
    numbers = (Column(name, justify='right') for name in ('images', 'recall %', 'precision %', 'F1 %', 'AUROC %'))
    table = Table('class', *numbers, box=None, pad_edge=False)
    columns = [measures.per_class[key] for key in ('recall', 'precision', 'f1', 'auroc')]
    rows = list(zip(found.classes, measures.confusion.sum(1).tolist(), *columns))
    shown = rows
    if len(rows) > MOST_CLASSES:
        shown = sorted((row for row in rows if row[1]), key=lambda row: row[2])[:MOST_CLASSES]
        screen.print(f'the {len(shown)} classes of {len(rows)} with the lowest recall; scores.json has all')
    for label, count, *values in shown:
        table.add_row(printable(label), str(count), *map(percent, values))
    screen.print(table)
    for note in found.notes:
        screen.print(f'note: {note}', soft_wrap=True)
    for key, label in MEASURES.items():
        if (value := getattr(measures, key)) is not None:
            low, high = measures.intervals.get(key, (None, None))
            between = f'   95 % interval {percent(low)}–{percent(high)} %' if low is not None else ''
            screen.print(f'{label:18} {100 * value:6.2f} %{between}')
    if measures.temperature is not None:
        screen.print(
            f'temperature {measures.temperature:.3f}: calibration error '
            f'{100 * (measures.calibration_error_scaled or 0):.2f} % (cross-fitted on halves)',
            soft_wrap=True,
        )
    screen.print(
        f'loss {measures.loss:.4f}; {measures.images} images of {found.data} ({found.split}), '
        f'{measures.images / found.seconds:.0f} images/s'
        + (f', test-time augmentation {found.augmentation}' if found.augmentation != 'none' else ''),
        soft_wrap=True,
    )
    if found.damaged:
        names = ', '.join(map(printable, found.damaged[:5]))
        screen.print(f'{len(found.damaged)} damaged images are left out: {names}', soft_wrap=True)


def save(found: Evaluation, folder: Path, source: Source, classifier: Classifier, spreadsheet: bool) -> None:
    """Write scores.json, images.csv, confusion.csv, confusion.png and mistakes.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with appearing(folder / 'scores.json') as draft:
        draft.write_text(json.dumps(found.as_dict(), indent=2, allow_nan=False) + '\n', 'utf-8')
    header = ('index', 'image', 'label', 'predicted', 'probability', 'probability_of_label')
    rows: list[Any] = [header, *(row._replace(image=portable_name(row.image)) for row in found.rows)]
    write_rows(folder / 'images.csv', rows, spreadsheet)
    counts = found.measures.confusion.tolist()
    rows = [['true', *found.classes], *([name, *row] for name, row in zip(found.classes, counts))]
    write_rows(folder / 'confusion.csv', rows, spreadsheet)
    measures = found.measures
    title = f'{Path(found.data).name} ({found.split}), balanced accuracy {100 * measures.balanced_accuracy:.2f} %'
    plot_confusion(torch.as_tensor(measures.confusion), found.classes, folder / 'confusion.png', title)
    opener = Opener(source, classifier.preprocessing)
    mistakes = found.mistakes()[:SHOWN]
    if mistakes:
        pictures = [(opener.picture(row.position), row.predicted, row.probability, row.label) for row in mistakes]
        plot_predictions(pictures, folder / 'mistakes.png')


def write_rows(path: Path, rows: list[Any], spreadsheet: bool) -> None:
    """Write a CSV file; it appears when it is complete."""
    with appearing(path) as draft, draft.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([cell(value, spreadsheet) for value in row] for row in rows)
