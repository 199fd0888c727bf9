"""Provide small datasets and one trained run, shared by all tests."""

import os

if 'PYTEST_XDIST_WORKER' in os.environ:  # before torch reads it; subprocesses inherit it
    os.environ['OMP_NUM_THREADS'] = '1'

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

if not torch.cuda.is_available():  # before Triton reads it: test_fused.py runs kernels on a CPU
    os.environ['TRITON_INTERPRET'] = '1'

from t2t_vit.settings import read_settings, recipes, resolve
from t2t_vit.train import run
from t2t_vit.train.config import Config
from t2t_vit.train.run import train
from t2t_vit.train.state import read_state, saved_states

if 'PYTEST_XDIST_WORKER' in os.environ:
    torch.set_num_threads(1)

pytest_plugins = ['client_fixtures']
CLASSES = ['flower', 'roof', 'sky']
SHORT = {'epochs': 1, 'optimizer.warmup_epochs': 0}
PHOTOS = {'data.mean': None, 'data.std': None, 'augment.rotate': 0}
SMALLER = {'depth': 1, 'token_dim': 16}


def crops() -> Iterator[tuple[str, str, Image.Image]]:
    """Yield split, class name and crop: per class eight to train on and four to validate, of three sizes."""
    china, flower = load_sample_images().images
    areas = {'flower': flower[100:340, 200:520], 'roof': china[180:420, 100:600], 'sky': china[:120, :640]}
    chance = np.random.default_rng(0)
    for name, area in areas.items():
        for i in range(12):
            height, width = 64, 64 + 8 * (i % 3)
            y, x = (chance.integers(n - m) for n, m in zip(area.shape, (height, width)))
            yield 'train' if i < 8 else 'val', name, Image.fromarray(area[y : y + height, x : x + width])


@pytest.fixture(scope='session')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train/ and val/ of three class folders; read-only."""
    root = tmp_path_factory.mktemp('photos')
    for i, (split, name, image) in enumerate(crops()):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        image.save(root / split / name / f'{i:02}.{"png" if i % 2 else "jpg"}', quality=90)
    return root


def write_parquet(file: Path, images: list[bytes], labels: list[object], names: list[str]) -> None:
    """Write a Parquet file as the Hugging Face Hub does; without class names, leave out its metadata."""
    table = pa.table({'image': [{'bytes': image, 'path': None} for image in images], 'label': labels})
    features = {'image': {'_type': 'Image'}, 'label': {'names': names, '_type': 'ClassLabel'}}
    metadata = {'huggingface': json.dumps({'info': {'features': features}})} if names else {}
    pq.write_table(table.replace_schema_metadata(metadata), file)


@pytest.fixture(scope='session')
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the same photos, one Parquet file per split; read-only."""
    root = tmp_path_factory.mktemp('parquet')
    for split, file in (('train', 'train-00000-of-00001.parquet'), ('val', 'validation-00000-of-00001.parquet')):
        images, labels = [], []
        for _, name, image in (crop for crop in crops() if crop[0] == split):
            image.save(buffer := io.BytesIO(), 'png')
            images.append(buffer.getvalue())
            labels.append(CLASSES.index(name))
        write_parquet(root / file, images, labels, CLASSES)
    return root


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of every epoch, without times and speeds."""
    return [
        {
            key: value
            for key, value in record.items()
            if key not in ('images_per_second', 'input_alone', 'model_alone', 'waited', 'seconds')
        }
        for record in read_records(folder / 'metrics.jsonl')
    ]


def same_run(folder: Path, expected: Path) -> bool:
    """Return whether metrics, model, and last weights, EMA weights and moments are equal, bit for bit."""
    states = [read_state(saved_states(f / 'checkpoints')[0]) for f in (folder, expected)]
    moments = [list(state['optimizer']['state'].values()) for state in states]
    return records(folder) == records(expected) and all(
        found.keys() == want.keys() and all(torch.equal(*map(torch.as_tensor, (found[key], want[key]))) for key in want)
        for found, want in (
            [load_file(f / 'model.safetensors') for f in (folder, expected)],
            *([state[part] for state in states] for part in ('model', 'ema')),
            *zip(*moments),
        )
    )


def digits_config(**changes: object) -> Config:
    """Return the quick start's recipe with two epochs of five steps and a smaller model; `changes` has dotted keys."""
    small = {'epochs': 2, 'batch_size': 256, 'optimizer.warmup_epochs': 1, 'model_args': SMALLER, **changes}
    return resolve(Config, read_settings(recipes()['digits']) + [(key, key, value) for key, value in small.items()])


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing the curves, which takes longer than most training runs of the tests."""
    monkeypatch.setattr(run, 'plot_curves', lambda records, file: None)


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short training run on the digits; read-only."""
    folder = tmp_path_factory.mktemp('runs') / 'digits'
    train(digits_config(output=str(folder)))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start tests with a `timeout` marker first: they are the longest, and no worker should end alone with one."""
    items.sort(key=lambda item: item.get_closest_marker('timeout') is None)
