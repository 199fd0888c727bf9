"""Every command, as typed, gives a model the pixels of the images' 8-bit upright twins, and counts what it leaves out.

tests/data/test_every_source.py holds the same over sources and modes, by the functions that the commands call.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_records
from test_every_source import MODES, model_inputs, stored

from t2t_vit.cli import main
from t2t_vit.explore.api import Api
from t2t_vit.look.report import Section
from t2t_vit.settings import UsageError

SMALL = ['--threads', '1', '--device', 'cpu']
TRAINING = [
    *('--model', 't2t_vit_4_16', '--model_args', '{depth: 1, token_dim: 16}', '--data.img_size', '16'),
    *('--epochs', '1', '--batch_size', '4', '--optimizer.warmup_epochs', '0', '--data.workers', '0', *SMALL),
]
Data = tuple[Path, Path]  # the images in many modes, and their twins


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Write train/ and val/ of two classes twice; of the first also a file that is no image."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(0)
    for split in ('train', 'val'):
        for i, mode in enumerate(MODES):
            pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
            pixels[0, 0], pixels[-1, -1] = 0, 255
            suffix, content, twin = stored(pixels, mode, 2 + i % 7, rng.random((12, 14)) < 0.3)
            for root, file in ((f'odd/{split}', f'{i:02}{suffix}'), (f'twin/{split}', f'{i:02}.png')):
                (folder / root / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
                (folder / root / 'ab'[i % 2] / file).write_bytes(content if root.startswith('odd') else twin)
        (folder / 'odd' / split / 'a' / 'notes.txt').touch()
    return folder / 'odd', folder / 'twin'


@pytest.fixture(scope='module')
def run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp('run') / 'run'
    assert main(['train', '--data.root', str(data[1]), '--output', str(folder), *TRAINING]) == 0
    return str(folder)


def train(memory: str) -> 'Callable[..., None]':
    def command(root: Path, run: str, output: Path, patch: Any) -> None:
        words = ['train', '--data.root', root, '--output', output / 'run', '--data.memory', memory, *TRAINING]
        assert main(list(map(str, words))) == 0

    return command


def typed(*words: str) -> 'Callable[..., None]':
    """Return a function that runs a command line, in which RUN, ROOT, VAL and OUT stand for paths."""

    def command(root: Path, run: str, output: Path, patch: Any) -> None:
        paths = {'RUN': run, 'ROOT': str(root), 'VAL': str(root / 'val'), 'OUT': str(output / 'out')}
        assert main([paths.get(word, word) for word in words]) == 0

    return command


def visualize(root: Path, run: str, output: Path, patch: Any) -> None:
    """Draw nothing, which takes long."""

    def stub(figure: Any, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return file

    patch.setattr('t2t_vit.look.draw.save', stub)
    patch.setattr('t2t_vit.look.visualize.ModelPictures.section', lambda self, photos: Section('model'))
    for figure in ('feature_maps', 'structure_curves', 'dead_counts', 'attention_distance'):
        patch.setattr(f't2t_vit.look.draw.{figure}', lambda *args: None)
    typed('visualize', 'VAL', '--models', 'RUN', '--output', 'OUT', '--device', 'cpu')(root, run, output, patch)


def reproduce(root: Path, run: str, output: Path, patch: Any) -> None:
    """Train one arm; it trains in another process, whose losses are compared instead of its inputs."""
    words = [
        *('reproduce', 'accuracy', '--data', 'ROOT', '--output', 'OUT', '--arms', '[t2t_vit_14]', '--seeds', '1'),
        *('--epochs', '1', '--img_size', '16', '--reduction', '4', '--parameters', '150000', '--batch_size', '4'),
    ]
    patch.setattr('t2t_vit.reproduce.command.save_report', lambda *args: None)
    typed(*words, *SMALL)(root, run, output, patch)
    (record,) = read_records(output / 'out' / 'runs' / 't2t_vit_14' / 'seed-0' / 'metrics.jsonl')
    SEEN.append(torch.tensor([[record['train_loss'], record['val_loss']]]))


def explore(root: Path, run: str, output: Path, patch: Any) -> None:
    """Start the page without a server, look at its examples, and send it every image."""
    config = Path(run, 'config.yaml')
    before = config.read_text()

    def page(explorer: Any, photos: Any, uploads: Any) -> None:
        for photo in photos:
            explorer.see(explorer.names[0], photo)
        for file in sorted((root / 'val').glob('*/*.*[!t]')):  # but for notes.txt
            token, place = uploads.create(file.name)
            place.write_bytes(file.read_bytes())
            assert Api(explorer, uploads).classify({'path': token})['predictions']

    @contextmanager
    def stopped() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    @contextmanager
    def serve(*args: Any) -> Iterator[str]:
        yield 'nowhere'

    patch.setattr('t2t_vit.explore.page.build', page)
    patch.setattr('t2t_vit.explore.server.serve', serve)
    patch.setattr('t2t_vit.explore.command.stop_signals', stopped)
    try:
        unsigned = before[: before.index('# sha256')]
        config.write_text(unsigned.replace(str(root.parent / 'twin'), str(root)))
        assert main(['explore', '--checkpoint', run, '--device', 'cpu']) == 0
    finally:
        config.write_text(before)


def export(*words: str) -> 'Callable[..., None]':
    """Return a function that exports until the images are read, to calibrate with or to compare on."""

    def command(root: Path, run: str, output: Path, patch: Any) -> None:
        def quantizer(metadata: Any, form: str, images: Any, kept: Any) -> None:
            raise_with([torch.as_tensor(image) for image in images])

        def compare(net: Any, exported: Any, images: Any) -> None:
            raise_with([batch.images for batch in images])

        def raise_with(batches: list[torch.Tensor]) -> None:
            SEEN.extend(batches)
            raise UsageError('the images are read')

        for name, stub in (('quantizer', quantizer), ('compare', compare)):
            patch.setattr(f't2t_vit.export.command.{name}', stub)
        for name in ('export_model', 'load_exported'):
            patch.setattr(f't2t_vit.export.command.{name}', lambda *args: None)
        paths = ['export', '-o', str(output / 'out.onnx'), '--checkpoint', run]
        assert main([*paths, *(str(root) if word == 'ROOT' else word for word in words)]) == 2

    return command


SEEN: list[torch.Tensor] = []
COMMANDS = {
    'train, from disk': train('false'),
    'train, in memory': train('true'),
    'eval': typed('eval', '--checkpoint', 'RUN', '--data', 'ROOT', '--workers', '0', '--output', 'OUT'),
    'predict': typed('predict', 'VAL', '--checkpoint', 'RUN', '--workers', '0'),
    'embed': typed('embed', 'VAL', '--checkpoint', 'RUN', '--workers', '0', '--output', 'OUT'),
    'visualize': visualize,
    'explore': explore,
    'export, comparison': export('--data', 'ROOT'),
    'export, calibration': export('--precision', 'int8', '--calibration', 'ROOT'),
    'reproduce': reproduce,
}


@pytest.mark.parametrize('name', COMMANDS)
def test_command_gives_the_model_the_pixels_of_8_bit_twins(name, data, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen, said = [], []
    for root in data:
        SEEN.clear()
        with model_inputs() as inputs:
            COMMANDS[name](root, run, tmp_path / root.name, monkeypatch)
        seen.append({image.numpy().tobytes() for batch in [*inputs, *SEEN] for image in batch})
        said.append(' '.join(capsys.readouterr().out.split()))
    least = {'visualize': 8, 'reproduce': 1}.get(name, len(MODES))
    assert len(seen[0]) >= least and seen[0] == seen[1]
    if name != 'explore':  # which shows examples only
        assert 'files ending in .txt' in said[0] and 'files ending in .txt' not in said[1]
