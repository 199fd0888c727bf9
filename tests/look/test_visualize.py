"""`t2t-vit visualize` from the command line to its pictures and its report."""

import base64
import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from t2t_vit import cli
from t2t_vit.look import draw
from t2t_vit.look.attention import Attention, Lattice, query_maps
from t2t_vit.look.features import LayerMeasure, windows
from t2t_vit.look.opened import folder_name, read_card
from t2t_vit.look.report import Picture, Section, write_report
from t2t_vit.look.trace import Trace
from t2t_vit.look.visualize import file_name, free_folder, query_heat, stem, unique
from t2t_vit.plots import (
    GREEN,
    RED,
    best_epoch,
    label_points,
    one_line,
    plot_confusion,
    plot_curves,
    plot_predictions,
    style,
)

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


def test_visualize_writes_every_picture(folder):
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


def test_report_contains_its_pictures(folder):
    page = Page((folder / 'index.html').read_text(encoding='utf-8'))
    heads = [source.partition(',') for source in page.sources]
    assert {head for head, _, _ in heads} == {'data:image/png;base64'}
    held = {base64.b64decode(data) for _, _, data in heads}
    assert len(heads) == len(held) and held == {file.read_bytes() for file in folder.glob('*.png')}
    assert page.links and all(link in page.parts for link in page.links)  # within the page only
    assert all(
        words in page.text for words in ('random weights', 'Grad-CAM', 'at most 0.01 of that of the median channel')
    )


def test_layers_csv(folder):
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


def test_names_are_unique():
    assert unique(['a', 'a', 'a-1', 'b'], '-') == ['a-2', 'a-3', 'a-1', 'b']
    assert [folder_name(text) for text in ('runs/x', 'cmp/runs/t2t_vit_14/seed-0')] == ['x', 't2t_vit_14/seed-0']
    assert len({style(i) for i in range(12)}) == 12


def test_labels_of_points_do_not_overlap():
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    points = {f'a_long_name_{i}': (1 + 0.05 * (i % 3), 2 + 0.01 * i) for i in range(6)}
    axes.plot(*zip(*points.values()), 'o')
    boxes = [label.get_window_extent() for label in label_points(figure, axes, points)]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_pictures_that_a_model_lacks_are_left_out_with_a_note(tmp_path):
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
    assert 'Left out: Grad-CAM needs a map' in (tmp_path / 'out' / 'index.html').read_text()
    assert (tmp_path / 'out' / 'china-pooled-query.png').exists()


def test_incomplete_metrics_are_rejected(tmp_path, capsys):
    (tmp_path / 'metrics.jsonl').write_text('{"epoch": 0, "train_loss": 1.0, "val_loss": 1.0}\n')
    assert cli.main(['visualize', '--runs', str(tmp_path), '--output', str(tmp_path / 'out')]) == 2
    assert 'line 1, lacks val_top1, images_per_second' in capsys.readouterr().err
    (tmp_path / 'metrics.jsonl').write_text('{"epoch": 0, "train_loss": 1.0, "images_per_second": 9.0}\n')
    assert cli.main(['visualize', '--runs', str(tmp_path), '--output', str(tmp_path / 'out')]) == 2
    assert 'has validated no epoch yet' in capsys.readouterr().err


def test_runs_without_images(digits_run, tmp_path):
    assert cli.main(['visualize', '--runs', str(digits_run), '--output', str(tmp_path / 'new')]) == 0
    assert {file.name for file in (tmp_path / 'new').iterdir()} == {'runs.png', 'index.html'}


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nowhere.png'], 'not found: nowhere.png'),
        (['samples', '--models', 'resnet188'], "unknown model 'resnet188', did you mean resnet18"),
        (['samples', '--models', 't2t_vit_14.in1kk'], "unknown model 't2t_vit_14.in1kk'"),
        (['samples', '--models', '.'], 'it has no model.safetensors and no config.json'),
        (
            ['samples', '--query', '[0.5,2]', '--img_size', '0'],
            'query must be two fractions from 0 to 1, got [0.5, 2.0]',
        ),
        (['--runs', 'nowhere'], 'cannot read nowhere/metrics.jsonl'),
        (['samples', '--modles', 'resnet18'], 'unknown option --modles, did you mean --models?'),
        (
            ['samples', '--models', 'resnet10t', '--img_size', '32', '--layer', 'layer5'],
            'the model has no layer layer5',
        ),
        (['samples', '--models', 'resnet10t', '--img_size', '32', '--target', '1000'], 'a class from 0 to 999'),
    ],
)
def test_bad_arguments_exit_with_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['visualize', *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


def test_file_as_output_is_refused_before_anything_is_drawn(tmp_path, capsys):
    (tmp_path / 'taken').touch()
    assert cli.main(['visualize', 'samples', '--models', 'unknown', '--output', str(tmp_path / 'taken')]) == 2
    assert f'{tmp_path / "taken"} is a file; expected a folder' in capsys.readouterr().err


def test_default_folder_never_overwrites_pictures(tmp_path):
    assert free_folder(tmp_path / 'looks') == tmp_path / 'looks'
    (tmp_path / 'looks').mkdir()
    (tmp_path / 'looks-2').mkdir()
    assert free_folder(tmp_path / 'looks') == tmp_path / 'looks-3'


# drawing


def metrics(*scores: tuple[float, float]) -> list[dict[str, float]]:
    """Return records of epochs with top-1 of the raw and the EMA weights."""
    return [
        dict(
            epoch=i,
            train_loss=1.3 - 0.01 * i,
            val_loss=1.25 - 0.01 * i,
            val_loss_ema=1.24 - 0.01 * i,
            val_top1=raw,
            val_top1_ema=ema,
            images_per_second=10.0,
        )
        for i, (raw, ema) in enumerate(scores)
    ]


def test_best_epoch_is_the_one_that_training_saves():
    """The last epoch decides nothing: the maximum may be of the other kind, and of equal ones the last is saved."""
    assert best_epoch(metrics((0.5, 0.7), (0.8, 0.6), (0.1, 0.7))) == (2, '', 0.8)
    assert best_epoch(metrics((0.5, 0.7), (0.3, 0.7), (0.1, 0.2))) == (2, '_ema', 0.7)
    assert best_epoch(metrics((0.7, 0.7))).suffix == ''
    assert best_epoch([dict(epoch=4, val_top1=0.25)]) == (5, '', 0.25)


def test_best_epoch_of_a_run_is_the_score_of_its_model_card(digits_run):
    records = [json.loads(line) for line in (digits_run / 'metrics.jsonl').read_text().splitlines()]
    card = ModelCard.load(digits_run / 'README.md')
    assert card.data.eval_results[0].metric_value == pytest.approx(best_epoch(records).top1, abs=1e-4)
    assert f'top-1 {100 * best_epoch(records).top1:.2f} % on digits' in read_card(digits_run)
    assert read_card(digits_run.parent) == ''


def drawn(monkeypatch: pytest.MonkeyPatch, plot: Callable[..., None], *args: Any) -> list[str]:
    """All text of a figure as it is drawn, tick labels too."""
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **how: (figures.append(self), savefig(self, *a, **how)))
    plot(*args)
    texts = figures[0].findobj(Text)
    assert not any(text.get_parse_math() for text in texts)
    return [text.get_text() for text in texts if text.get_text()]


def test_curves_have_plain_ticks_and_the_best_epoch(tmp_path, monkeypatch):
    texts = drawn(monkeypatch, plot_curves, metrics((0.5, 0.7), (0.8, 0.6)), tmp_path / 'curves.png')
    assert 'Best top-1 80.00 % in epoch 2' in texts
    assert not any('$' in text or '×' in text for text in texts)
    assert {'1.24', '1.26', '1.28'} <= set(texts)
    assert texts.count('validation') == 1  # one legend


NAMES = ['$x_{2', 'a|b', '<b>bold</b>', 'two\nlines', '$\\frac{', 'tab\t', 'caf\udce9', 'a' * 99]


def test_confusion_shows_score_counts_and_literal_names(tmp_path, monkeypatch):
    counts = 3 * torch.eye(len(NAMES), dtype=torch.int64)
    counts[0, 1] = 7
    texts = drawn(monkeypatch, plot_confusion, counts, NAMES, tmp_path / 'confusion.png', 'a $run$ on photos (val)')
    assert 'a $run$ on photos (val)\ntop-1 77.42 %: 24 of 31 images' in texts
    assert '7' in texts and {'$x_{2', 'a|b', '<b>bold</b>', 'two lines', '$\\frac{', 'tab'} <= set(texts)
    assert {'$x_{2 (10)', 'a|b (3)'} <= set(texts) and max(map(len, texts)) < 70


def test_predictions_show_literal_names(tmp_path, monkeypatch):
    rows = [(Image.new('L', (4, 4)), name, 0.5, NAMES[0]) for name in NAMES]
    texts = drawn(monkeypatch, plot_predictions, rows, tmp_path / 'predictions.png')
    assert '$x_{2  50 %' in texts and 'two lines  50 %\ntrue: $x_{2' in texts


def test_names_in_one_line_and_in_files():
    assert one_line(' two\n lines\x1b[31m ') == 'two lines [31m' and one_line('abcdef', 4) == 'abc…'
    assert [file_name(name) for name in ('a|b', '<b>', '../..', 'caf\udce9')] == ['a-b', '-b-', '..-..', 'caf-']
    assert len(stem('x/' + 200 * 'y' + '.webp')) == 60


def measured(channels: int, rich: list[int], dead: list[int], name: str = 'layer') -> LayerMeasure:
    edges, is_dead = torch.zeros(channels), torch.zeros(channels, dtype=torch.bool)
    edges[rich], is_dead[dead] = 1, True
    return LayerMeasure(name, (4, 6), edges, torch.full((channels,), 0.5), is_dead)


def test_frames_mark_the_right_channels():
    trace = Trace(torch.zeros(1, 2), {'layer': torch.randn(1, 9, 4, 6)})
    figure = draw.feature_maps(
        {'model': draw.Result(trace, [measured(9, [0, 4], [8])], torch.rand(1, 4, 6, 3))}, side=3, rows=1
    )
    ax = figure.axes[1]  # after the input
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


@pytest.mark.parametrize('models', [1, 3, 5, 7])
def test_titles_of_models_side_by_side_do_not_meet(models):
    trace = Trace(torch.zeros(1, 2), {'blocks.10': torch.randn(1, 400, 4, 4)})
    result = draw.Result(trace, [measured(400, [*range(150)], [*range(200, 399)], 'blocks.10')], torch.rand(1, 4, 4, 3))
    figure = draw.feature_maps({f't2t_vit_14_no_t2t/seed-{i}': result for i in range(models)}, rows=1)
    figure.draw_without_rendering()
    boxes = sorted((ax.title.get_window_extent() for ax in figure.axes), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_sampled_channels_are_even_and_include_a_dead_one():
    assert draw.sample_channels(measured(100, [], []), 5) == [0, 25, 50, 74, 99]
    assert draw.sample_channels(measured(100, [], [7]), 5) == [0, 25, 50, 74, 7]
    assert draw.sample_channels(measured(100, [], [50]), 5) == [0, 25, 50, 74, 99]
    assert draw.sample_channels(measured(3, [], []), 5) == [0, 1, 2]


def test_mosaic_positions():
    maps = {(0, 0): torch.rand(4, 6), (0, 1): torch.rand(4, 6), (1, 2): torch.rand(4, 6)}
    canvas, frames = draw.mosaic([(row, col, values.numpy()) for (row, col), values in maps.items()])
    for (left, top, width, height), values in zip(frames, maps.values()):
        part = canvas[round(top + 0.5) : round(top + height + 0.5), round(left + 0.5) : round(left + width + 0.5)]
        part = part[~np.isnan(part).all(1)][:, ~np.isnan(part).all(0)]
        assert np.array_equal(part[:: part.shape[0] // 4, :: part.shape[1] // 6], values.numpy())


def test_cross_marks_the_nearest_token():
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
    assert ax.images[-1].get_extent() == [0, 80, 52, 0]


def test_overlay_draws_cells_at_their_positions_in_the_colours_of_the_bar():
    photo = torch.full((6, 8, 3), 0.5)
    values = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    picture = draw.overlay(photo, values, Lattice(1.0, 2.0, 2.0, 2.0))  # rows 0–3, columns 1–4
    colours = [draw.SCALE(round(255 * value))[:3] for value in (0, 0.25, 0.5, 1)]
    assert np.allclose(picture[0, 1], colours[0]) and np.allclose(picture[1, 4], colours[1], atol=0.01)
    assert np.allclose(picture[2, 2], colours[2], atol=0.01) and np.allclose(picture[3, 3], colours[3])
    assert np.allclose(picture[4:], 0.5) and np.allclose(picture[:, 5:], 0.5) and np.allclose(picture[:, 0], 0.5)
    even = draw.overlay(photo, values)
    assert np.allclose(even[:3, :4], colours[0]) and np.allclose(even[3:, 4:], colours[3])


def test_fraction_of_diagonal():
    """One head attends to a corner, the other to the query itself."""
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
    positions = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    expected = positions.norm(dim=1).mean() / torch.tensor([2.0, 3.0]).norm()
    assert draw.fraction_of_diagonal(attention).tolist() == pytest.approx([expected.item(), 0], abs=1e-6)


def test_windows_are_drawn_at_their_positions():
    splits = windows(((7, 4, 2), (3, 2, 1)), (32, 48))
    figure = draw.split_windows(torch.rand(32, 48, 3), splits)
    for ax, split in zip(figure.axes[1:], splits):
        drawn = {(p.get_y(), p.get_x(), p.get_y() + p.get_height(), p.get_x() + p.get_width()) for p in ax.patches}
        row, col = split.grid[0] // 2, split.grid[1] // 2
        assert drawn == {split.box(i, j) for i in (row - 1, row) for j in (col - 1, col)}


def test_runs_draws_the_saved_weights_of_each_run():
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
    ] == [[0, 10], [10], [40], [40]]  # curve and mark of the best epoch
    assert [float(np.ravel(line.get_xdata())[0]) for line in speed.lines] == [50.5, 10]
    assert [text.get_text() for text in speed.texts] == ['10.00 %\nepoch 2', '40.00 %\nepoch 1']
    assert list(val.lines[1].get_ydata()) == [0.5] and list(train.lines[0].get_ydata()) == [2, 1]


def test_report_escapes_text(tmp_path):
    (tmp_path / 'a.png').write_bytes(PNG)
    write_report(
        tmp_path / 'new' / 'a.html',
        '<b>',
        'a & b',
        [Section('<i>', '<u>', [Picture('<q>', tmp_path / 'a.png')], {'<s>': [('h',), ('<p>',)]})],
    )
    page = Page((tmp_path / 'new' / 'a.html').read_text())
    assert all(word in page.text for word in ('<b>', 'a & b', '<i>', '<u>', '<q>', '<s>', '<p>'))
    assert page.sources == ['data:image/png;base64,' + base64.b64encode(PNG).decode()]


def test_pictures_of_the_guide_exist_and_are_small():
    folder = Path(__file__).parents[2] / 'docs'
    guide = (folder / 'visualize.md').read_text()
    named = {folder / name for name in re.findall(r'\((pictures/[^)]+)\)', guide)}
    pages = {file for file in (folder / 'pictures').iterdir() if not file.name.startswith('explore-')}
    assert named == pages and max(file.stat().st_size for file in named) < 250_000
