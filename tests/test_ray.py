"""The example with Ray Data: labels and embeddings equal those of the classifier."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, SMALLER
from PIL import Image

from t2t_vit import Classifier
from t2t_vit.hub import save_pretrained

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.timeout(600)]  # of Ray and of its workers
ray = pytest.importorskip('ray')
pytest.importorskip('ray.data')
SCRIPT = Path(__file__).parents[1] / 'scripts' / 'ray_predict.py'


@pytest.fixture(scope='module')
def local_ray(tmp_path_factory):
    """Start Ray on this machine, and end it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        patch.setenv('RAY_worker_niceness', '0')  # 15 by default, which starves workers beside other tests
        patch.setenv('PYTHONPATH', str(SCRIPT.parent), prepend=':')  # workers import the script
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield
        ray.shutdown()


@pytest.fixture(scope='module')
def script():
    """Import scripts/ray_predict.py."""
    spec = importlib.util.spec_from_file_location('ray_predict', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Return the folder of an untrained model."""
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    torch.nn.init.normal_(net.head.weight)
    net.pretrained_cfg.update(label_names=CLASSES, num_classes=3)
    return save_pretrained(net, tmp_path_factory.mktemp('models') / 'small', model_args=SMALLER)


def write_images(source: Path, folder: Path) -> None:
    """Write two photos of one size into a folder, one of them stored turned with the tag that says so."""
    folder.mkdir()
    image = Image.open(sorted(source.glob('*.png'))[0])
    image.save(folder / 'a.png')
    exif = Image.Exif()
    exif[0x0112] = 3
    image.transpose(Image.Transpose.ROTATE_180).save(folder / 'b.png', exif=exif)


def test_ray_data_reads_bytes_as_the_classifier_does(local_ray, script, folder, photos, tmp_path):
    write_images(photos / 'val' / 'sky', tmp_path / 'images')
    (tmp_path / 'images' / 'damaged.png').write_bytes(b'\x89PNG damaged')
    files = ray.data.read_binary_files(str(tmp_path / 'images'), include_paths=True)
    rows = script.predict(str(folder), files).take_all()
    rows = sorted(rows, key=lambda row: row['path'])
    paths = [row['path'] for row in rows]
    assert [Path(path).name for path in paths] == ['a.png', 'b.png', 'damaged.png']
    model = Classifier.load(folder, device='cpu')
    found = model.predict(paths)
    assert [row['label'] for row in rows] == [found[0].label, found[0].label, '']
    assert [row['error'] for row in rows] == ['', '', found[2].error]
    assert [row['probability'] for row in rows[:2]] == pytest.approx([found[0].probability] * 2, abs=1e-6)
    vectors = np.stack([row['embedding'] for row in rows])
    assert np.allclose(vectors, model.embed(paths), atol=1e-5, equal_nan=True) and np.isnan(vectors[2]).all()


def test_ray_data_reads_images_as_arrays(local_ray, script, folder, photos, tmp_path):
    write_images(photos / 'val' / 'sky', tmp_path / 'images')
    images = ray.data.read_images(str(tmp_path / 'images'), include_paths=True, mode='RGB')
    rows = sorted(script.predict(str(folder), images).take_all(), key=lambda row: row['path'])
    expected = Classifier.load(folder, device='cpu').predict(rows[0]['path'])
    assert rows[0]['label'] == expected[0].label
    assert rows[0]['probability'] == pytest.approx(expected[0].probability, abs=1e-6)
