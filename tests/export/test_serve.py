"""Inference without torch: the page's code, and the server, in processes that cannot import torch."""

import io
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, SMALLER
from PIL import Image

import t2t_vit_serve as serve
from t2t_vit import Classifier, cli
from t2t_vit.data import decode_image
from t2t_vit.export.command import describe
from t2t_vit.export.formats import export_model
from t2t_vit_cli import main

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


@pytest.fixture(scope='module')
def address(folder) -> Iterator[str]:
    """Run the command `serve` in a process that can import neither torch nor the package; yield its address."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    code = f'{BLOCK_TORCH}from t2t_vit_cli import main\nsys.exit(main(["serve", "photos.onnx", "--port", "{port}"]))'
    command = [sys.executable, '-c', code]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f'Predictions at http://127.0.0.1:{port}/predict (stop with Ctrl-C)\n'
        yield f'http://127.0.0.1:{port}'
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and 'Traceback' not in process.stdout.read()


def test_command_serves_without_torch(classifier, folder, address):
    with httpx.Client(base_url=address) as client:
        answer = client.post('/predict?top_k=2', files={'image': (folder / 'a.jpg').read_bytes()})
        assert answer.json()['label'] == classifier.predict(folder / 'a.jpg')[0].label
        assert len(answer.json()['top_k']) == 2 and answer.headers['x-content-type-options'] == 'nosniff'
        content = (folder / 'a.jpg').read_bytes()
        for headers in ({'Host': 'evil.example'}, {'Origin': 'https://evil.example'}, {'Sec-Fetch-Site': 'cross-site'}):
            assert client.post('/predict', content=content, headers=headers).status_code == 403
        port = address.rpartition(':')[2]
        assert client.get('/health', headers={'Host': f'localhost:{port}'}).json() == {'status': 'ok'}
        assert client.post('/predict', content=bytes(serve.MAX_BYTES + 100_000)).status_code == 413
        chunked = client.post('/predict', content=iter([content]))
        assert chunked.status_code == 411 and 'Send the number of bytes in Content-Length' in chunked.text


def test_commands_refuse_a_file_with_its_own_preprocessing(folder, capsys):
    assert cli.main(['predict', 'digits', '--checkpoint', str(folder / 'photos.onnx')]) == 2
    assert 'give the run, or a file that was exported without --pixels image' in capsys.readouterr().err


def test_more_than_eight_waiting_images_get_503(folder, monkeypatch):
    from fastapi.testclient import TestClient

    monkeypatch.setattr(serve, 'MAX_WAITING', 0)
    client = TestClient(serve.create_app(serve.Model(str(folder / 'photos.onnx'), 1)))
    answer = client.post('/predict', content=b'x')
    assert answer.status_code == 503 and answer.headers['retry-after'] == '1'


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


@pytest.mark.parametrize(
    'kind, dtype, top',
    [
        ('png', 'uint16', 65535),
        ('ppm', 'uint16', 65535),
        ('tiff', 'uint16', 65535),
        ('tiff', 'int32', 65535),
        ('tiff', 'int32', 255),
        ('tiff', 'float32', 1),
    ],
)
def test_server_reduces_deep_grey_images_as_the_package(folder, kind, dtype, top):
    pixels = (np.random.default_rng(0).random((30, 40)) * top).astype(dtype)
    image = Image.fromarray(pixels)
    image.save(buffer := io.BytesIO(), kind, **({'transparency': int(pixels[0, 0])} if kind == 'png' else {}))
    found = serve.Model(str(folder / 'photos.onnx'), 1).decode(buffer.getvalue())[0]
    assert np.array_equal(found, np.asarray(decode_image(buffer.getvalue())))


def test_server_refuses_values_without_a_known_range(folder):
    Image.fromarray(np.full((9, 9), 70000, np.int32)).save(buffer := io.BytesIO(), 'tiff')
    with pytest.raises(ValueError, match='values up to 70000; expected the range 0 to 1, to 255 or to 65535'):
        serve.Model(str(folder / 'photos.onnx'), 1).decode(buffer.getvalue())


@pytest.mark.parametrize(
    'words, message',
    [
        (['batch.onnx'], 'export it with --pixels image'),
        (['a.jpg'], 'a.jpg is damaged, or no ONNX file'),
        (['nowhere'], 'there is no file nowhere'),
        ([], 'the following arguments are required: file'),
        (['photos.onnx', '--port', '70000'], 'port must be from 1 to 65535, got 70000'),
        (['photos.onnx', '--port', 'BUSY'], 'choose another --port'),
        (['photos.onnx', '--prot', '1'], 'unrecognized arguments: --prot 1'),
    ],
)
def test_command_names_mistakes(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    with socket.create_server(('127.0.0.1', 0)) as busy:
        port = str(busy.getsockname()[1])
        assert main(['serve', *(port if word == 'BUSY' else word for word in words)]) == 2
    assert message in capsys.readouterr().err
