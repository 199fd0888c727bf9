"""`t2t-vit visualize`: draw what models see in images, and how runs went, as PNG files and one HTML report."""

import csv
import itertools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..console import console
from ..data import find_images, left_out
from ..models.shipped import compared
from ..plots import one_line
from ..results import check_writable
from ..settings import UsageError, require
from ..trained import pick_device
from . import draw
from .attention import Attention, class_maps, query_maps, rollout_map
from .draw import Heat, Result
from .features import DEAD, RICH, SIDE, LayerMeasure, measure, principal_colours, splits_of, token_grids, windows
from .gradients import CamMaps, grad_cam
from .opened import OpenModel, Photo, bands, folder_name, open_images, open_model, prepare
from .report import Picture, Section, write_report
from .trace import trace

MAX_IMAGES = 8
DRAWN = ('epoch', 'train_loss', 'images_per_second')  # required in each line of metrics.jsonl
SCORES = ('val_loss', 'val_top1')  # in the lines of epochs that were validated, of which there must be one


@dataclass(frozen=True)
class Options:
    """What the pictures of one model show."""

    query: tuple[float, float] = (0.5, 0.5)  # position of the token, as fractions of height and width
    target: int | None = None  # class of Grad-CAM; by default the predicted one
    layer: str | None = None  # module of Grad-CAM; by default the deepest stage that the score depends on
    dead: float = DEAD


def visualize(
    images: Sequence[str] = (),
    models: Sequence[str] = (),
    runs: Sequence[str] = (),
    output: str | None = None,
    pretrained: bool = False,
    classes: str | None = None,
    ema: bool = True,
    img_size: int | tuple[int, int] | None = None,
    query: tuple[float, float] = (0.5, 0.5),
    target: int | None = None,
    layer: str | None = None,
    dead: float = DEAD,
    device: str = 'auto',
) -> Path:
    """Draw what models see in images, and the curves of runs; returns the folder of the pictures.

    Args:
        images: Image files, folders and lists as predict takes them, digits, or samples (scikit-learn's two photos,
            the default unless only --runs is given).
        models: Run folders, files in them (model.safetensors, checkpoints/step-*.pt), timm names, NAME=FILE,
            hf-hub:USER/NAME or FILE.py:FUNCTION; by default a small ResNet, ViT and T2T-ViT that come with the package,
            trained on photos, the kinds of the paper's Fig. 2.
        runs: Run folders whose curves to compare.
        output: Folder for the pictures, layers.csv and index.html, which contains them all; by default looks, or the
            first of looks-2, looks-3, … that does not exist.
        pretrained: Download timm's weights for models given by name, which are random otherwise.
        classes: A file with the class names in the order of the outputs, one a line, for models without names.
        ema: Take the EMA weights of training states, else the raw ones.
        img_size: Image size in pixels, one number or [height,width]; by default the model's own.
        query: Position of the token whose attention to draw, as fractions of height and width.
        target: Class index for Grad-CAM; by default the predicted class.
        layer: Module for Grad-CAM; by default the deepest stage that the score depends on.
        dead: Call a channel dead if its standard deviation is at most this fraction of that of the median channel.
        device: cpu, cuda, mps or auto.
    """
    started = time.perf_counter()
    sizes = [] if img_size is None else [img_size] if isinstance(img_size, int) else list(img_size)
    require(
        (
            (all(0 <= part <= 1 for part in query), f'query must be two fractions from 0 to 1, got {list(query)}'),
            (all(size >= 1 for size in sizes), f'img_size must be at least 1, got {img_size}'),
            (dead >= 0, f'dead must be at least 0, got {dead}'),
        )
    )
    where, folder = pick_device(device), Path(output) if output else free_folder(Path('looks'))
    check_writable(folder)
    records = {name: read_run(Path(run)) for name, run in zip(unique([folder_name(run) for run in runs]), runs)}
    images = images or (['samples'] if models or not runs else [])
    opened = [open_model(text, pretrained, img_size, classes, ema) for text in models or compared()] if images else []
    notes = [f'{one.name}: {one.note}' for one in opened if one.note]
    photos: list[Photo] = []
    if images:
        found = find_images(images, bands(opened))
        photos = open_images(found, MAX_IMAGES + 1, bands(opened))
        notes += left_out(found, ', '.join(images))
    for note in notes:
        console().print(f'note: {note}', soft_wrap=True)
    if len(photos) > MAX_IMAGES:
        console().print(f'only the first {MAX_IMAGES} images are drawn')
        photos = photos[:MAX_IMAGES]
    if random := [one.name for one in opened if one.weights == 'random weights']:
        console().print(
            f'{", ".join(random)}: random weights. Give a run folder or a file, or --pretrained true to download them.',
            soft_wrap=True,
        )
    files = unique([stem(photo.name) for photo in photos], '-')
    for one, name in zip(opened, unique([one.name for one in opened])):
        one.name = name
        one.model.to(where)
    sections: list[Section] = []
    if photos:
        sections += draw_models(opened, dict(zip(files, photos)), folder, where, Options(query, target, layer, dead))
    if records:
        text = (
            'Losses and validation top-1 over epochs, and the best top-1, which is that of the saved weights, against '
            'the speed of training on the machine of each run.'
        )
        sections.append(Section('Training', '', [Picture(text, draw.save(draw.runs(records), folder / 'runs.png'))]))
    title = 'What the models see' if photos else 'Training runs'
    write_report(folder / 'index.html', title, conditions(opened, where), sections)
    count, seconds = sum(len(section.pictures) for section in sections), time.perf_counter() - started
    console().print(
        f'{count} pictures, and all of them in index.html, are in {folder} ({seconds:.1f} s)', soft_wrap=True
    )
    return folder


def conditions(opened: Sequence[OpenModel], device: torch.device) -> str:
    """Describe weights, device and version of torch in a line; '' without models."""
    named = ', '.join(f'{one.name}: {one.weights}' for one in opened)
    return f'{named}. {device.type}, torch {torch.__version__}.' if named else ''


def free_folder(folder: Path) -> Path:
    """Return the folder, or the first of FOLDER-2, FOLDER-3, … that does not exist, so that nothing is overwritten."""
    names = itertools.chain([folder], (folder.with_name(f'{folder.name}-{i}') for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def draw_models(
    opened: Sequence[OpenModel], photos: dict[str, Photo], folder: Path, device: torch.device, options: Options
) -> list[Section]:
    """Write every picture of these models and photos to `folder`; photos are given by the start of their file names.

    Raises:
        UsageError: if a model has no maps, or not the layer or class of `options`.
    """
    results: dict[str, Result] = {}
    single: list[Section] = []
    for one in opened:
        inputs, shown = prepare([*photos.values()], one.preprocessing)
        inputs = inputs.to(device)
        found = trace(one.model, inputs)
        if not found.maps:
            raise UsageError(f'{one.name} has no feature maps to draw: none of its stages keeps a grid over the image')
        name = f'{one.name} ({one.weights})' if one.weights in ('random weights', 'pretrained') else one.name
        results[name] = Result(found, measure(found, inputs, options.dead), shown)
        single.append(ModelPictures(one, results[name], inputs, folder, options).section(photos))
    tables = {name: table_of(result.measures) for name, result in results.items()}
    write_layers(tables, folder / 'layers.csv')
    pictures = [
        Picture(
            f'Feature maps of {photo.name}, shallow, middle and deep.',
            draw.save(draw.feature_maps(results, i), folder / f'{file}-features.png'),
        )
        for i, (file, photo) in enumerate(photos.items())
    ]
    pictures += [
        Picture(
            'Over depth: medians and quartiles over the channels that are not dead.',
            draw.save(draw.structure_curves(results), folder / 'structure.png'),
        ),
        Picture('Channels of each layer.', draw.save(draw.dead_counts(results), folder / 'channels.png')),
    ]
    distances = {name: layers for name, result in results.items() if (layers := result.trace.backbone())}
    if distances:
        text = 'Mean attention distance of each head, as a fraction of the longest distance in the grid.'
        pictures.append(Picture(text, draw.save(draw.attention_distance(distances), folder / 'distance.png')))
    text = (
        'As Fig. 2 of the paper: a green frame marks a channel that is rich in structure, a dashed red one a dead '
        f'channel. Dead: its standard deviation over each image is at most {options.dead:g} of that of the median '
        'channel of its layer, so that it is zero or constant. Rich in structure: the length of its Sobel gradient '
        f'correlates with that of the image by {RICH:g} or more, both on a grid of {SIDE} points along the shorter '
        'side, each cell at its position in the image, which padding shifts. High frequencies: the fraction of a '
        "channel's variance with periods below four cells of its own grid. Position embeddings are part of the maps. "
        f'Images: {", ".join(photo.name for photo in photos.values())}.'
    )
    return [
        Section(
            'Features, model by model', text, pictures, {f'{name}: all layers': rows for name, rows in tables.items()}
        ),
        *single,
    ]


class ModelPictures:
    """Pictures that need one model only: its windows, tokens and attention, image by image."""

    def __init__(self, one: OpenModel, result: Result, inputs: torch.Tensor, folder: Path, options: Options) -> None:
        self.one, self.result, self.inputs, self.folder, self.options = one, result, inputs, folder, options
        self.backbone = result.trace.backbone()
        self.cam, self.note = self._grad_cam()

    def _grad_cam(self) -> tuple[CamMaps | None, str]:
        """Compute Grad-CAM, or explain why the model has none, unless a layer or class was asked for."""
        options = self.options
        targets = None if options.target is None else [options.target] * len(self.inputs)
        try:
            return grad_cam(self.one.model, self.inputs, targets, options.layer), ''
        except UsageError as error:
            if options.layer is not None or options.target is not None:
                raise
            return None, f' Left out: {error}.'

    def section(self, photos: dict[str, Photo]) -> Section:
        """Draw all pictures; photos are given by the start of their file names."""
        pictures: list[Picture] = []
        for i, (file, photo) in enumerate(photos.items()):
            for kind, caption, figure in (
                ('windows', 'four neighbouring windows of each split.', self.windows(i)),
                ('tokens', 'the tokens of each grid, coloured by their three principal components.', self.tokens(i)),
                ('query', 'attention of the token under the cross, mean over heads.', self.query(i)),
                ('heads', f'attention of {self.reader}, by head and layer.', self.heads(i)),
                ('class', 'evidence for the answer. Grad-CAM is for the class in its title.', self.evidence(i)),
            ):
                if figure is not None:
                    path = self.folder / f'{file}-{file_name(self.one.name)}-{kind}.png'
                    pictures.append(Picture(f'{photo.name}: {caption}', draw.save(figure, path)))
        height, width = self.inputs.shape[-2:]
        text = f'Weights: {self.one.weights}. {self.one.about} Inputs of {height}×{width} pixels.{self.note}'
        return Section(self.one.name, text, pictures)

    @property
    def reader(self) -> str:
        """The token that the head reads, for captions."""
        return 'the class token' if self.backbone and self.backbone[-1].class_token else 'all tokens, on average'

    def windows(self, i: int) -> Any:
        """Draw the windows of the soft splits; None if the model has none."""
        height, width = self.inputs.shape[-2:]
        splits = [split for split in windows(splits_of(self.one.model), (height, width)) if min(split.grid) > 0]
        return draw.split_windows(self.result.inputs[i], splits) if splits else None

    def tokens(self, i: int) -> Any:
        """Draw the tokens in PCA colours."""
        grids = token_grids(self.result.trace)
        return draw.token_colours(self.result.inputs[i], {k: principal_colours(maps)[i] for k, maps in grids.items()})

    def query(self, i: int) -> Any:
        """Draw the attention of the token at the query, of the token layers, the first and the last block."""
        grids = [a for a in self.result.trace.attentions.values() if a.grid is not None and a.query_grid is not None]
        layers = [a for a in grids if a not in self.backbone]
        layers += [a for a in dict.fromkeys(self.backbone[:1] + self.backbone[-1:]) if a in grids]
        height, width = self.inputs.shape[-2:]
        at = height * self.options.query[0], width * self.options.query[1]
        return draw.heat_maps(self.result.inputs[i], [query_heat(a, i, at) for a in layers]) if layers else None

    def heads(self, i: int) -> Any:
        """Draw the attention of the class token; None without attention."""
        return draw.attention_heads(self.backbone, self.result.inputs[i], i) if self.backbone else None

    def evidence(self, i: int) -> Any:
        """Draw the last layer's attention, the rollout and Grad-CAM; None if the model has none of them."""
        heats = []
        if self.backbone:
            last = self.backbone[-1]
            reader = 'class token' if last.class_token else 'all tokens'
            heats += [
                Heat(f'{reader},\nlast layer', class_maps(last)[i].mean(0), last.lattice),
                Heat('rollout,\nall layers', rollout_map(self.backbone)[i], last.lattice),
            ]
        probabilities = self.result.trace.logits[i].float().softmax(-1)
        if self.cam is not None:
            target = int(self.cam.targets[i])
            title = f'Grad-CAM at {draw.short(self.cam.layer)}:\n{self.answer(target, probabilities)}'
            heats.append(Heat(title, self.cam.maps[i], self.cam.lattice))
        answer = self.answer(int(probabilities.argmax()), probabilities)
        return draw.heat_maps(self.result.inputs[i], heats, f'predicted {answer}') if heats else None

    def answer(self, target: int, probabilities: torch.Tensor) -> str:
        """Format a class with its probability."""
        name = self.one.classes[target] if target < len(self.one.classes) else str(target)
        return f'{one_line(name, 18)}: {100 * probabilities[target]:.1f} %'


def query_heat(attention: Attention, image: int, at: tuple[float, float]) -> Heat:
    """Return the attention of the token nearest to a position, (y, x) in pixels: the mean over heads."""
    assert attention.grid is not None and attention.query_grid is not None and attention.query_lattice is not None
    row, col = attention.query_lattice.nearest(*at, attention.query_grid)
    maps = query_maps(attention, attention.query_prefix + row * attention.query_grid[1] + col)
    kind = 'kernel' if attention.eps is not None else 'softmax'
    return Heat(
        f'{draw.short(attention.name)}\n{kind}, {attention.grid[0]}×{attention.grid[1]}',
        maps[image].mean(0),
        attention.lattice,
        attention.query_lattice.centre(row, col),
    )


def table_of(measures: Sequence[LayerMeasure]) -> list[Sequence[str]]:
    """Format the measures of every layer as rows, headings first."""
    rows: list[Sequence[str]] = [
        ('layer', 'grid', 'channels', 'dead', 'rich in structure', 'edge agreement', 'high frequencies')
    ]
    for m in measures:
        counts = (len(m.dead), int(m.dead.sum()), int(m.rich.sum()))
        medians = (draw.quartiles(values[~m.dead])[0] for values in (m.edges, m.fine))
        rows.append((m.name, f'{m.grid[0]}×{m.grid[1]}', *map(str, counts), *(f'{value:.3f}' for value in medians)))
    return rows


def write_layers(tables: dict[str, list[Sequence[str]]], file: Path) -> None:
    """Write the tables of all models as one CSV file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('w', newline='', encoding='utf-8', errors='backslashreplace') as lines:
        writer = csv.writer(lines)
        writer.writerow(('model', *next(iter(tables.values()))[0]))
        writer.writerows((name, *row) for name, rows in tables.items() for row in rows[1:])


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Read the records in metrics.jsonl of a run.

    Raises:
        UsageError: if there are none, a line lacks a value that is drawn, or no epoch was validated.
    """
    file = folder / 'metrics.jsonl'
    try:
        records = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f'cannot read {file}: {error}; expected a run folder') from None
    if not records:
        raise UsageError(f'{file} is empty: the run has finished no epoch')
    for number, record in enumerate(records, 1):
        needed = (*SCORES, *DRAWN) if any(key in record for key in SCORES) else DRAWN
        if missing := [key for key in needed if not isinstance(record, dict) or key not in record]:
            raise UsageError(f'{file}, line {number}, lacks {", ".join(missing)}; expected a line that train wrote')
    if not any(SCORES[0] in record for record in records):
        raise UsageError(f'{file} has no scores: the run has validated no epoch yet (val_interval)')
    return records


def unique(names: Sequence[str], mark: str = ' #') -> list[str]:
    """Make names unique by numbering those that occur more than once."""
    found: list[str] = []
    for name in names:
        numbered = (f'{name}{mark}{i}' for i in itertools.count(1))
        found.append(
            name if names.count(name) == 1 else next(new for new in numbered if new not in found and new not in names)
        )
    return found


def stem(name: str) -> str:
    """Return the start of the file names for an image: the last part of its name, without the suffix."""
    path = Path(name)
    return file_name(path.stem if path.suffix.lower() in Image.registered_extensions() else path.name)


def file_name(name: str) -> str:
    """Replace what is not a letter, digit, dot, dash or underscore; at most 60 characters."""
    return re.sub(r'[^\w.-]+', '-', name)[:60]
