"""Inference without torch: the page's code, and the server, in processes that cannot import torch."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, SMALLER
from PIL import Image

from t2t_vit import Classifier
from t2t_vit.export import serve
from t2t_vit.export.command import describe
from t2t_vit.export.formats import export_model

ROOT = Path(__file__).parents[2]
BLOCK_TORCH = (
    'import sys\n'
    'for name in ("torch", "torchvision", "timm", "t2t_vit"):\n'
    '    sys.modules[name] = None  # importing it raises\n'
)
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')


@pytest.fixture(scope='module')
def classifier() -> Classifier:
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    torch.nn.init.normal_(net.head.weight)
    net.pretrained_cfg.update(label_names=CLASSES, num_classes=3)
    return Classifier.of(net)


@pytest.fixture(scope='module')
def folder(classifier, photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos.onnx with its preprocessing, batch.onnx without, and two photographs."""
    folder = tmp_path_factory.mktemp('served')
    for name, pixels in (('photos', 'image'), ('batch', 'uint8-nhwc')):
        metadata = describe(
            classifier.net, classifier.outputs, classifier.preprocessing, 'float32', pixels, None, 'batch'
        )
        export_model(classifier.net, folder / f'{name}.onnx', metadata, 'batch')
    for name, source in (('a', 'sky'), ('b', 'flower')):
        image = Image.open(sorted((photos / 'val' / source).glob('*.png'))[0]).convert('RGB')
        image.resize((301, 200)).save(folder / f'{name}.jpg', quality=95)
    return folder


def test_code_of_the_page_runs_without_torch(classifier, folder):
    blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / 'inference.md').read_text(), re.M | re.S)
    found = [
        subprocess.run(
            [sys.executable, '-c', BLOCK_TORCH + block], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.split()
        for block in blocks
    ]
    expected = classifier.predict([folder / 'a.jpg', folder / 'b.jpg'])
    assert found[0][0] == expected[0].label and float(found[0][1]) == pytest.approx(expected[0].probability, abs=2e-3)
    assert ' '.join(found[1]) == str([one.label for one in expected])


def test_server_imports_neither_torch_nor_the_package(folder):
    code = f'{BLOCK_TORCH}sys.path.insert(0, {str(Path(serve.__file__).parent)!r})\nimport serve\n'
    code += 'import json\nmodel = serve.Model("photos.onnx", 1)\n'
    code += 'print(json.dumps(model.predict(open("a.jpg", "rb").read(), 2)))'
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)['top_k']) == 2


def test_server_answers_as_the_model(classifier, folder, monkeypatch):
    from fastapi.testclient import TestClient

    client = TestClient(serve.create_app(serve.Model(str(folder / 'photos.onnx'), 1)))
    expected = classifier.predict(folder / 'a.jpg')[0]
    content = (folder / 'a.jpg').read_bytes()
    for answer in (client.post('/predict', files={'image': content}), client.post('/predict', content=content)):
        assert answer.status_code == 200 and answer.json()['label'] == expected.label
        assert answer.json()['probability'] == pytest.approx(expected.probability, abs=2e-3)
        assert len(answer.json()['top_k']) == 3
    assert client.get('/classes').json() == CLASSES and client.get('/health').json() == {'status': 'ok'}
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 4), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), 'png')  # transparent: on white, as everywhere
    found = client.post('/predict', content=buffer.getvalue()).json()
    assert found['probability'] == pytest.approx(classifier.predict(Image.fromarray(pixels))[0].probability, abs=2e-3)
    for body, code, text in ((b'no image', 422, 'not an image'), (b'', 422, 'not an image')):
        answer = client.post('/predict', content=body)
        assert answer.status_code == code and text in answer.json()['detail']
    assert client.post('/predict?top_k=0', content=content).status_code == 422
    assert client.post('/predict', files={'other': content}).status_code == 422
    monkeypatch.setattr(serve, 'MAX_BYTES', 1000)
    assert client.post('/predict', content=content).status_code == 413
    monkeypatch.setattr(serve, 'MAX_BYTES', 10**7)
    monkeypatch.setattr(serve, 'MAX_PIXELS', 1000)
    assert '301x200 pixels' in client.post('/predict', content=content).json()['detail']


def test_server_refuses_a_file_without_preprocessing(folder):
    with pytest.raises(SystemExit, match='export it with --pixels image'):
        serve.Model(str(folder / 'batch.onnx'))
    with pytest.raises(SystemExit, match='there is no file nowhere'):
        serve.main(['nowhere'])
