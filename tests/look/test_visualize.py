"""`t2t-vit visualize` from the command line to its pictures and its report."""

import base64
import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from t2t_vit import cli
from t2t_vit.look import draw
from t2t_vit.look.attention import Attention, Lattice, query_maps
from t2t_vit.look.features import LayerMeasure, windows
from t2t_vit.look.opened import folder_name
from t2t_vit.look.report import Section, write_report
from t2t_vit.look.trace import Trace
from t2t_vit.look.visualize import query_heat, unique
from t2t_vit.plots import GREEN, RED, label_points, style

PNG = b'\x89PNG'


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.parts: dict[str, str] = {}
        self.text = ''
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:  # type: ignore[override]
        values = dict(attrs)
        self.sources += [values['src']] if 'src' in values else []
        self.links += [values['href']] if 'href' in values else []
        self.parts.update({f'#{values["id"]}': tag} if 'id' in values else {})

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory, digits_run: Path) -> Path:
    """Pictures of a trained T2T-ViT and a CNN, for a wide image, and of two runs."""
    root = tmp_path_factory.mktemp('looks')
    image = torch.randint(256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(image.numpy()).save(root / 'a photo.png')
    (root / 'more').mkdir()
    Image.fromarray(image.numpy()[::-1]).save(root / 'more' / 'a photo.png')
    argv = [
        'visualize',
        root / 'a photo.png',
        root / 'more',
        '--models',
        digits_run,
        'resnet10t',
        '--runs',
        digits_run,
        digits_run,
        '--output',
        root / 'out',
        '--img_size',
        '[32,48]',
        '--query',
        '[0,1]',
        '--target',
        3,
    ]
    assert cli.main(list(map(str, argv))) == 0
    return root / 'out'


def test_pictures_of_everything(folder):
    own = {
        f'a-photo-{i}-{name}.png'
        for i in (1, 2)
        for name in (
            'features',
            'resnet10t-class',
            'resnet10t-tokens',
            *(f'digits-{kind}' for kind in ('windows', 'tokens', 'query', 'heads', 'class')),
        )
    }
    shared = {'structure.png', 'channels.png', 'distance.png', 'runs.png'}
    assert {file.name for file in folder.iterdir()} == {*own, *shared, 'layers.csv', 'index.html'}
    for name in own | shared:
        with Image.open(folder / name) as picture:
            assert 300 < picture.width <= draw.WIDTH * draw.DPI and np.asarray(picture.convert('L')).std() > 5


def test_the_report_holds_its_pictures(folder):
    page = Page((folder / 'index.html').read_text(encoding='utf-8'))
    heads = [source.partition(',') for source in page.sources]
    assert {head for head, _, _ in heads} == {'data:image/png;base64'}
    held = {base64.b64decode(data) for _, _, data in heads}
    assert len(heads) == len(held) and held == {file.read_bytes() for file in folder.glob('*.png')}
    assert page.links and all(link in page.parts for link in page.links)  # within the page only
    assert all(words in page.text for words in ('random weights', 'Grad-CAM', 'at most 0.01 of that of its layer'))


def test_the_table_of_layers(folder):
    rows = list(csv.DictReader((folder / 'layers.csv').read_text().splitlines()))
    ours = [row for row in rows if row['model'] == 'digits']
    assert [row['layer'] for row in ours] == [
        'tokens_to_token.attention1',
        'tokens_to_token.attention2',
        'tokens_to_token.project',
        'blocks.0',
    ]
    assert [row['grid'] for row in ours] == ['16×24', '8×12', '8×12', '8×12']
    assert {row['model'] for row in rows} == {'digits', 'resnet10t (random weights)'}
    assert all(0 <= int(row['dead']) <= int(row['channels']) for row in rows)


def test_names_never_meet():
    assert unique(['a', 'a', 'a-1', 'b'], '-') == ['a-2', 'a-3', 'a-1', 'b']
    assert [folder_name(text) for text in ('runs/x', 'cmp/runs/t2t_vit_14/seed-0')] == ['x', 't2t_vit_14/seed-0']
    places = [style(i) for i in range(12)]
    assert len(set(places)) == 12


def test_names_beside_points_cover_nothing():
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    points = {f'a_long_name_{i}': (1 + 0.05 * (i % 3), 2 + 0.01 * i) for i in range(6)}
    axes.plot(*zip(*points.values()), 'o')
    boxes = [label.get_window_extent() for label in label_points(figure, axes, points)]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_what_a_model_has_not_is_left_out(tmp_path):
    """No gradient to take, and no token under the cross: a note, and the other pictures."""
    (tmp_path / 'mine.py').write_text(
        'import timm\n\n\ndef pooled(img_size):\n    model = timm.create_model("vit_base_patch16_siglip_224", depth=1, '
        'embed_dim=24, num_heads=2, img_size=img_size, num_classes=3)\n    model.head.weight.data.zero_()\n'
        '    return model\n'
    )
    assert (
        cli.main(
            [
                'visualize',
                'samples',
                '--models',
                f'{tmp_path}/mine.py:pooled',
                '--img_size',
                '32',
                '--output',
                str(tmp_path / 'out'),
            ]
        )
        == 0
    )
    assert 'Left out: Grad-CAM needs' in (tmp_path / 'out' / 'index.html').read_text()
    assert (tmp_path / 'out' / 'china-pooled-query.png').exists()


def test_a_damaged_record_is_named(tmp_path, capsys):
    (tmp_path / 'metrics.jsonl').write_text('{"epoch": 0, "train_loss": 1.0, "val_loss": 1.0}\n')
    assert cli.main(['visualize', '--runs', str(tmp_path), '--output', str(tmp_path / 'out')]) == 2
    assert 'line 1, has no val_top1, images_per_second' in capsys.readouterr().err


def test_runs_alone(digits_run, tmp_path):
    assert cli.main(['visualize', '--runs', str(digits_run), '--output', str(tmp_path / 'new')]) == 0
    assert {file.name for file in (tmp_path / 'new').iterdir()} == {'runs.png', 'index.html'}


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nowhere.png'], 'not there: nowhere.png'),
        (['samples', '--models', 'resnet188'], "unknown model 'resnet188', did you mean resnet18"),
        (['samples', '--models', '.'], 'it has no model.safetensors and no config.json'),
        (['samples', '--query', '[0.5,2]', '--img_size', '0'], 'query is two shares from 0 to 1, got [0.5, 2.0]'),
        (['--runs', 'nowhere'], 'cannot read nowhere/metrics.jsonl'),
        (['samples', '--modles', 'resnet18'], 'unknown option --modles, did you mean models?'),
        (
            ['samples', '--models', 'resnet10t', '--img_size', '32', '--layer', 'layer5'],
            'the model has no layer layer5',
        ),
        (['samples', '--models', 'resnet10t', '--img_size', '32', '--target', '1000'], 'a class from 0 to 999'),
    ],
)
def test_what_cannot_be_shown(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['visualize', *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


# drawing


def measured(channels: int, rich: list[int], dead: list[int], name: str = 'layer') -> LayerMeasure:
    edges, is_dead = torch.zeros(channels), torch.zeros(channels, dtype=torch.bool)
    edges[rich], is_dead[dead] = 1, True
    return LayerMeasure(name, (4, 6), edges, torch.full((channels,), 0.5), is_dead)


def test_frames_are_round_the_channels_they_speak_of():
    trace = Trace(torch.zeros(1, 2), {'layer': torch.randn(1, 9, 4, 6)})
    figure = draw.feature_maps({'model': draw.Looked(trace, [measured(9, [0, 4], [8])])}, side=3, rows=1)
    ax = figure.axes[0]
    frames = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    found = {}
    for frame in frames:
        height, width = ax.images[0].get_array().shape
        x, y = frame.get_x() + frame.get_width() / 2, frame.get_y() + frame.get_height() / 2
        found[int(3 * x / width), int(3 * y / height)] = frame.get_edgecolor(), frame.get_linestyle()
    green, red = (tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)) + (1,) for color in (GREEN, RED))
    assert found == {
        (0, 0): (pytest.approx(green), '-'),
        (1, 1): (pytest.approx(green), '-'),
        (2, 2): (pytest.approx(red), '--'),
    }
    assert '2 rich, 1 dead' in ax.get_title()


def test_channels_are_shown_evenly_and_a_dead_one_is_never_missed():
    assert draw.sample_channels(measured(100, [], []), 5) == [0, 25, 50, 74, 99]
    assert draw.sample_channels(measured(100, [], [7]), 5) == [0, 25, 50, 74, 7]
    assert draw.sample_channels(measured(100, [], [50]), 5) == [0, 25, 50, 74, 99]
    assert draw.sample_channels(measured(3, [], []), 5) == [0, 1, 2]


def test_a_mosaic_shows_every_map_in_its_place():
    maps = {(0, 0): torch.rand(4, 6), (0, 1): torch.rand(4, 6), (1, 2): torch.rand(4, 6)}
    canvas, frames = draw.mosaic([(row, col, values) for (row, col), values in maps.items()])
    for (left, top, width, height), values in zip(frames, maps.values()):
        part = canvas[round(top + 0.5) : round(top + height + 0.5), round(left + 0.5) : round(left + width + 0.5)]
        part = part[~np.isnan(part).all(1)][:, ~np.isnan(part).all(0)]
        assert np.array_equal(part[:: part.shape[0] // 4, :: part.shape[1] // 6], values.numpy())


def test_a_cross_stands_on_its_token():
    keys, queries = Lattice(1.5, 1.5, 16.0, 16.0), Lattice(0.5, 0.5, 4.0, 4.0)
    attention = Attention(
        'a',
        torch.randn(1, 2, 260, 3),
        torch.randn(1, 2, 20, 3),
        torch.randn(1, 2, 20, 3),
        (4, 5),
        lattice=keys,
        query_grid=(13, 20),
        query_lattice=queries,
    )
    heat = query_heat(attention, 0, (15.0, 65.0))  # nearest is row 4, column 16
    assert torch.equal(heat.map, query_maps(attention, 4 * 20 + 16)[0].mean(0))
    ax = draw.heat_maps(torch.rand(52, 80, 3), [heat]).axes[1]
    assert all((line.get_xdata()[0], line.get_ydata()[0]) == (64.5, 16.5) for line in ax.lines) and ax.lines
    assert ax.images[-1].get_extent() == [-6.5, 73.5, 57.5, -6.5] and ax.get_xlim() == (0, 80)
    assert ax.images[-1].get_alpha() is None  # or its colours were not the bar's


def test_a_share_of_the_diagonal():
    """A head that looks from everywhere at one corner, and one that looks at itself."""
    keys = torch.full((12, 12), -1e9)
    keys[:, 0] = 0
    attention = Attention(
        'a',
        torch.zeros(1, 2, 12, 1),
        torch.zeros(1, 2, 12, 1),
        torch.zeros(1, 2, 12, 1),
        (3, 4),
        bias=torch.stack([keys, torch.where(torch.eye(12) > 0, 0.0, -1e9)])[None],
    )
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    expected = places.norm(dim=1).mean() / torch.tensor([2.0, 3.0]).norm()
    assert draw.share_of_diagonal(attention).tolist() == pytest.approx([expected.item(), 0], abs=1e-6)


def test_windows_are_drawn_where_they_are():
    splits = windows(((7, 4, 2), (3, 2, 1)), (32, 48))
    figure = draw.split_windows(torch.rand(32, 48, 3), splits)
    for ax, split in zip(figure.axes[1:], splits):
        drawn = {(p.get_y(), p.get_x(), p.get_y() + p.get_height(), p.get_x() + p.get_width()) for p in ax.patches}
        row, col = split.grid[0] // 2, split.grid[1] // 2
        assert drawn == {split.box(i, j) for i in (row - 1, row) for j in (col - 1, col)}


def test_runs_side_by_side():
    records = {
        'a': [
            dict(epoch=i, train_loss=2 - i, val_loss=1 / (i + 1), val_top1=0.1 * i, images_per_second=50.0 + i)
            for i in range(2)
        ],
        'b': [
            dict(
                epoch=0,
                train_loss=1.0,
                val_loss=1.0,
                val_top1=0.1,
                val_loss_ema=0.5,
                val_top1_ema=0.4,
                images_per_second=10.0,
            )
        ],
    }
    train, val, top1, speed = draw.runs(records).axes
    assert [
        line.get_ydata().tolist() if hasattr(line.get_ydata(), 'tolist') else list(line.get_ydata())
        for line in top1.lines
    ] == [[0, 10], [40]]
    assert [float(np.ravel(line.get_xdata())[0]) for line in speed.lines] == [50.5, 10]
    assert list(val.lines[1].get_ydata()) == [0.5] and list(train.lines[0].get_ydata()) == [2, 1]


def test_a_report_is_escaped(tmp_path):
    (tmp_path / 'a.png').write_bytes(PNG)
    write_report(
        tmp_path / 'new' / 'a.html',
        '<b>',
        'a & b',
        [Section('<i>', '<u>', [('<q>', tmp_path / 'a.png')], [('<s>', [('h',), ('<p>',)])])],
    )
    page = Page((tmp_path / 'new' / 'a.html').read_text())
    assert all(word in page.text for word in ('<b>', 'a & b', '<i>', '<u>', '<q>', '<s>', '<p>'))
    assert page.sources == ['data:image/png;base64,' + base64.b64encode(PNG).decode()]


def test_pictures_of_the_guide_are_there_and_small():
    folder = Path(__file__).parents[2] / 'docs'
    guide = (folder / 'visualize.md').read_text()
    named = {folder / name for name in re.findall(r'\((pictures/[^)]+)\)', guide)}
    pages = {file for file in (folder / 'pictures').iterdir() if not file.name.startswith('explore-')}
    assert named == pages and max(file.stat().st_size for file in named) < 250_000
