"""`t2t-vit visualize`: what models see in images, and how runs went, as PNG files and one HTML report."""

import csv
import itertools
import json
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ..console import console
from ..settings import UsageError, require
from ..trained import pick_device
from . import draw
from .attention import Attention, class_maps, query_maps, rollout_map
from .draw import Heat, Looked
from .features import DEAD, RICH, SIDE, LayerMeasure, measure, principal_colours, splits_of, token_grids, windows
from .gradients import grad_cam
from .opened import OpenModel, Photo, folder_name, open_images, open_model, prepare
from .report import Section, write_report
from .trace import trace

MODELS = ('resnet50', 'vit_small_patch16_224', 't2t_vit_14')  # the paper's three, of one size
MOST = 8  # images
DRAWN = ('epoch', 'train_loss', 'val_loss', 'val_top1', 'images_per_second')  # of each line of metrics.jsonl


def visualize(
    images: Sequence[str] = (),
    models: Sequence[str] = (),
    runs: Sequence[str] = (),
    output: str = 'looks',
    pretrained: bool = False,
    img_size: int | tuple[int, int] | None = None,
    query: tuple[float, float] = (0.5, 0.5),
    target: int | None = None,
    layer: str | None = None,
    dead: float = DEAD,
    device: str = 'auto',
) -> Path:
    """Show what models see in images, and how runs went; gives the folder.

    Args:
        images: What predict takes, as image files and folders, digits, or samples for scikit-learn's two photos.
        models: What to look into; by default resnet50, vit_small_patch16_224 and t2t_vit_14.
        runs: Folders of runs whose curves to compare.
        output: Folder for the pictures, layers.csv and index.html, which holds them all.
        pretrained: Fetch the weights that timm knows for models given by name, instead of random ones.
        img_size: Pixels, one number or [height,width]; by default the model's own.
        query: The token whose attention is shown, as shares of the height and the width.
        target: The class that Grad-CAM is for; by default the one with the highest score.
        layer: The module that Grad-CAM is taken at; by default the deepest stage that the score depends on.
        dead: Channels are dead if their deviation is at most this share of their layer's.
        device: cpu, cuda, mps or auto.
    """
    begun = time.perf_counter()
    sizes = [] if img_size is None else [img_size] if isinstance(img_size, int) else list(img_size)
    require(
        (
            (all(0 <= share <= 1 for share in query), f'query is two shares from 0 to 1, got {list(query)}'),
            (all(size >= 1 for size in sizes), f'img_size is at least 1, got {img_size}'),
            (dead >= 0, f'dead is at least 0, got {dead}'),
        )
    )
    where, folder = pick_device(device), Path(output)
    if not images and (models or not runs):
        images = ['samples']
    records = {name: read_run(Path(run)) for name, run in zip(unique([folder_name(run) for run in runs]), runs)}
    opened = [open_model(text, pretrained, img_size) for text in (models or MODELS)] if images else []
    photos = open_images(images, MOST + 1) if images else []
    if len(photos) > MOST:
        console().print(f'only the first {MOST} images are shown')
        photos = photos[:MOST]
    files = unique([stem(photo.name) for photo in photos], '-')
    for one, name in zip(opened, unique([one.name for one in opened])):
        one.name = name
        one.model.to(where)
    sections: list[Section] = []
    if photos:
        sections += look(opened, dict(zip(files, photos)), folder, where, query, target, layer, dead)
    if records:
        file = draw.save(draw.runs(records), folder / 'runs.png')
        sections.append(
            Section(
                'Training',
                '',
                [
                    (
                        'Losses and accuracy on validation images over epochs, and the best accuracy against the speed '
                        'of training, on the machine that each run was made on.',
                        file,
                    )
                ],
            )
        )
    named = ', '.join(f'{one.name}: {one.weights}' for one in opened)
    write_report(
        folder / 'index.html',
        'What the models see' if photos else 'How the runs went',
        f'{named}. {where.type}, torch {torch.__version__}.' if named else '',
        sections,
    )
    count, seconds = sum(len(section.pictures) for section in sections), time.perf_counter() - begun
    console().print(
        f'{count} pictures and index.html, which holds them, are in {folder} ({seconds:.1f} s)', soft_wrap=True
    )
    return folder


def look(
    opened: Sequence[OpenModel],
    photos: dict[str, Photo],
    folder: Path,
    device: torch.device,
    query: tuple[float, float],
    target: int | None,
    layer: str | None,
    dead: float,
) -> list[Section]:
    """Every picture of these models and images, by what their files begin with, written to `folder`."""
    looked: dict[str, Looked] = {}
    single: list[Section] = []
    for one in opened:
        seen, shown = prepare([*photos.values()], one.preprocessing)
        seen = seen.to(device)
        found = trace(one.model, seen)
        if not found.maps:
            raise UsageError(f'{one.name} gives no maps of an image')
        name = f'{one.name} ({one.weights})' if one.weights in ('random weights', 'pretrained') else one.name
        looked[name] = Looked(found, measure(found, seen, dead))
        single.append(of_model(one, looked[name], seen, shown, photos, folder, query, target, layer))
    write_layers({name: measures for name, (_, measures) in looked.items()}, folder / 'layers.csv')
    pictures = [
        (
            f'Feature maps of {photo.name}, shallow, middle and deep.',
            draw.save(draw.feature_maps(looked, i), folder / f'{file}-features.png'),
        )
        for i, (file, photo) in enumerate(photos.items())
    ]
    pictures += [
        (
            'Over depth: medians over channels that live, with quartiles.',
            draw.save(draw.structure_curves(looked), folder / 'structure.png'),
        ),
        ('Channels of each layer.', draw.save(draw.dead_counts(looked), folder / 'channels.png')),
    ]
    distant = {name: layers for name, (found, _) in looked.items() if (layers := found.backbone())}
    if distant:
        pictures.append(
            (
                'How far the heads of each layer look, as shares of the longest distance in the grid.',
                draw.save(draw.attention_distance(distant), folder / 'distance.png'),
            )
        )
    text = (
        'As Fig. 2 of the paper: a green frame marks a channel that is rich in structure, a dashed red one a dead '
        f"channel. Dead: its deviation over each image is at most {dead:g} of that of its layer's median channel, so "
        'that it is zero or constant. Rich in structure: the length of its Sobel gradient correlates with that of the '
        f'image by {RICH:g} or more, both on a grid of {SIDE} places along the shorter side, each cell where its '
        "layer's padding puts it. High frequencies: the share of a channel's variance with periods below four "
        'places of its own grid. Position tables are part of the maps. '
        f'Images: {", ".join(photo.name for photo in photos.values())}.'
    )
    tables = [(f'{name}: all layers', table_of(measures)) for name, (_, measures) in looked.items()]
    return [Section('Features, model by model', text, pictures, tables), *single]


def of_model(
    one: OpenModel,
    looked: Looked,
    seen: torch.Tensor,
    shown: torch.Tensor,
    photos: dict[str, Photo],
    folder: Path,
    query: tuple[float, float],
    target: int | None,
    layer: str | None,
) -> Section:
    """What only one model is needed for: its windows, tokens and attention, image by image."""
    found, base = looked.trace, clean(one.name)
    pictures: list[tuple[str, Path]] = []
    height, width = seen.shape[-2:]
    place = height * query[0], width * query[1]

    def add(name: str, caption: str, figure: Figure) -> None:
        pictures.append((caption, draw.save(figure, folder / f'{name}.png')))

    cuts = windows(splits_of(one.model), (height, width))
    cuts = [cut for cut in cuts if min(cut.grid) > 0]
    backbone = found.backbone()
    staged = [a for a in found.attentions.values() if a.grid is not None]
    staged = [a for a in staged if a not in backbone] + list(dict.fromkeys(backbone[:1] + backbone[-1:]))
    staged = [a for a in staged if a.query_grid is not None]  # not those of a class token or a latent alone
    colours = {name: principal_colours(maps) for name, maps in token_grids(found).items()}
    targets = None if target is None else [target] * len(seen)
    cam, without = None, ''
    try:
        cam = grad_cam(one.model, seen, targets, layer)
    except UsageError as error:
        if layer is not None or target is not None:
            raise
        without = f' Left out: {error}.'
    for i, (file, photo) in enumerate(photos.items()):
        at = f'{file}-{base}'
        if cuts:
            add(
                f'{at}-windows',
                f'{photo.name}: what a token of each split is cut from, four neighbours each.',
                draw.split_windows(shown[i], cuts),
            )
        add(
            f'{at}-tokens',
            f'{photo.name}: the tokens of each grid, by their first three principal components.',
            draw.token_colours(shown[i], {name: colour[i] for name, colour in colours.items()}),
        )
        if staged:
            heats = [query_heat(attention, i, place) for attention in staged]
            add(
                f'{at}-query',
                f'{photo.name}: where the token under the cross looks, the mean over heads.',
                draw.heat_maps(shown[i], heats),
            )
        if backbone:
            reader = 'the class token' if backbone[-1].class_token else 'all tokens, on average,'
            add(
                f'{at}-heads',
                f'{photo.name}: where {reader} looks, head by head and layer by layer.',
                draw.attention_heads(backbone, shown[i], i),
            )
        heats = (
            [
                Heat(
                    'class token,\nlast layer' if backbone[-1].class_token else 'all tokens,\nlast layer',
                    class_maps(backbone[-1])[i].mean(0),
                    backbone[-1].lattice,
                ),
                Heat('rollout,\nall layers', rollout_map(backbone)[i], backbone[-1].lattice),
            ]
            if backbone
            else []
        )
        if cam is not None:
            best = int(cam.targets[i])
            named = one.classes[best] if best < len(one.classes) else str(best)
            title = f'Grad-CAM for {textwrap.shorten(named, 18, placeholder="…")}\nat {draw.short(cam.layer)}'
            heats.append(Heat(title, cam.maps[i], cam.lattice))
        if heats:
            add(
                f'{at}-class',
                f'{photo.name}: what the scores are made from. Grad-CAM is for the class it names.',
                draw.heat_maps(shown[i], heats),
            )
    text = (
        f"Weights: {one.weights}. Images of {height}×{width} pixels, as the model's preprocessing gives them.{without}"
    )
    return Section(one.name, text, pictures)


def query_heat(attention: Attention, image: int, place: tuple[float, float]) -> Heat:
    """Where the token that is centred nearest to a place, (y, x) in pixels, looks: the mean over heads."""
    assert attention.grid is not None and attention.query_grid is not None and attention.query_lattice is not None
    row, col = attention.query_lattice.nearest(*place, attention.query_grid)
    maps = query_maps(attention, attention.query_prefix + row * attention.query_grid[1] + col)
    kind = 'kernel' if attention.eps is not None else 'softmax'
    return Heat(
        f'{draw.short(attention.name)}\n{kind}, {attention.grid[0]}×{attention.grid[1]}',
        maps[image].mean(0),
        attention.lattice,
        attention.query_lattice.centre(row, col),
    )


def table_of(measures: Sequence[LayerMeasure]) -> list[Sequence[str]]:
    """Figures of every layer, headings first."""
    rows: list[Sequence[str]] = [
        ('layer', 'grid', 'channels', 'dead', 'rich in structure', 'edge agreement', 'high frequencies')
    ]
    for m in measures:
        edges, fine = draw.quartiles(m.edges[~m.dead])[0], draw.quartiles(m.fine[~m.dead])[0]
        rows.append(
            (
                m.name,
                f'{m.grid[0]}×{m.grid[1]}',
                str(len(m.dead)),
                str(int(m.dead.sum())),
                str(int(m.rich.sum())),
                f'{edges:.3f}',
                f'{fine:.3f}',
            )
        )
    return rows


def write_layers(measures: dict[str, list[LayerMeasure]], file: Path) -> None:
    """The same for all models, as CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('w', newline='') as lines:
        writer = csv.writer(lines)
        for i, (name, found) in enumerate(measures.items()):
            head, *rows = table_of(found)
            writer.writerows([('model', *head)] if i == 0 else [])
            writer.writerows((name, *row) for row in rows)


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The records of a run.

    Raises:
        UsageError: if the folder holds none, or a line that lacks what is drawn.
    """
    file = folder / 'metrics.jsonl'
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f'cannot read {file}: {error}; expected the folder of a run') from None
    if not records:
        raise UsageError(f'{file} is empty: the run has finished no epoch')
    for number, record in enumerate(records, 1):
        if missing := [key for key in DRAWN if not isinstance(record, dict) or key not in record]:
            raise UsageError(f'{file}, line {number}, has no {", ".join(missing)}; expected a line that train wrote')
    return records


def unique(names: Sequence[str], mark: str = ' #') -> list[str]:
    """Names with a number where there are several of one kind, one that no other has."""
    found: list[str] = []
    for name in names:
        numbers = (f'{name}{mark}{i}' for i in itertools.count(1))
        found.append(
            name if names.count(name) == 1 else next(new for new in numbers if new not in found and new not in names)
        )
    return found


def stem(name: str) -> str:
    """An image's name as part of a file's: its last part, without its ending."""
    path = Path(name)
    return clean(path.stem if path.suffix.lower() in ('.jpg', '.jpeg', '.png') else path.name)


def clean(name: str) -> str:
    """A name without what file systems dislike."""
    return re.sub(r'[^\w.-]+', '-', name)
