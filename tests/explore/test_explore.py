"""The page that looks inside models: what it reads, draws, answers and refuses. tests/stress/browser.py drives it."""

import importlib.util
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from t2t_vit.cli import main
from t2t_vit.data import DataError, Preprocessing
from t2t_vit.explore.command import examples, last_run, offer
from t2t_vit.explore.explorer import MAX_PASSES, SIDE, Explorer, Limits, Seen, TimeUp, explain, read_photo, untrained
from t2t_vit.explore.views import CROSS_TOKEN, VIEWS, Choice, gallery, show
from t2t_vit.look.opened import OpenModel, Photo, open_model
from t2t_vit.models.shipped import compared
from t2t_vit.settings import UsageError

LIMITS = Limits(megabytes=1, megapixels=2, seconds=60)
FLOWER = Image.fromarray(load_sample_images().images[1])
needs_gradio = pytest.mark.skipif(not importlib.util.find_spec('gradio'), reason='Gradio is not installed')


def png(width: int, height: int) -> bytes:
    """Return the start of a PNG with these sizes in its header."""
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + struct.pack('>I', 13)
        + header
        + struct.pack('>I', zlib.crc32(header))
        + (struct.pack('>I', 0) + b'IDAT' + struct.pack('>I', zlib.crc32(b'IDAT')))
    )


def encoded(image: Image.Image, kind: str = 'jpeg', **how: Any) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **how)
    return buffer.getvalue()


def bad_files() -> dict[str, bytes]:
    photo = encoded(FLOWER)
    return {
        'text.png': b'a letter',
        'empty.jpg': b'',
        'torn.jpg': photo[: len(photo) // 3],
        'torn.png': encoded(FLOWER.resize((64, 64)), 'png')[:3000],
        'bomb.png': png(40_000, 40_000),
        'long.png': encoded(Image.new('L', (1, 400)), 'png'),
        'heavy.bmp': encoded(FLOWER.resize((700, 600)), 'bmp'),
    }


@pytest.mark.parametrize(
    'name, says',
    [
        ('text.png', 'not an image'),
        ('empty.jpg', 'cannot be read'),
        ('torn.jpg', 'damaged'),
        ('torn.png', 'damaged'),
        ('bomb.png', '2,000,000 pixels'),
        ('long.png', 'cannot be read'),
        ('heavy.bmp', 'the limit is 1 MB'),
    ],
)
def test_unreadable_uploads_are_explained_in_a_sentence(name, says, tmp_path):
    (tmp_path / name).write_bytes(bad_files()[name])
    with pytest.raises(DataError, match=says) as caught:
        read_photo(tmp_path / name, LIMITS)
    assert name in str(caught.value) and '\n' not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_photos_are_upright_and_small(tmp_path):
    turned = Image.new('RGB', (1400, 700), 'red')
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by 90°
    turned.save(tmp_path / 'phone.jpg', exif=exif)
    assert read_photo(tmp_path / 'phone.jpg', LIMITS).image.size == (SIDE // 2, SIDE)
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert read_photo(tmp_path / 'clear.png', LIMITS).image.getpixel((0, 0)) == (0, 0, 0, 0)  # until a model sees it
    Image.new('I;16', (8, 8), 257 * 100).save(tmp_path / 'deep.png')
    assert read_photo(tmp_path / 'deep.png', LIMITS).image.getpixel((0, 0)) == (100, 100, 100)


def test_models_of_other_bands_and_backgrounds_see_the_upload_as_they_need_it(tmp_path):
    four, blue = (small('t2t_vit_4_16', in_chans=channels, img_size=32) for channels in (4, 3))
    four.preprocessing = Preprocessing((32, 32), 4, (0.0,) * 4, (1.0,) * 4)
    blue.preprocessing = Preprocessing((32, 32), 3, (0.0,) * 3, (1.0,) * 3, background='#0000ff')
    explorer = Explorer({'four': lambda: four, 'blue': lambda: blue}, torch.device('cpu'), LIMITS)
    values = np.random.default_rng(0).random((32, 32, 4), np.float32)
    np.save(tmp_path / 'bands.npy', values)
    seen = explorer.see('four', explorer.read(tmp_path / 'bands.npy', 'four'))
    assert abs(float(seen.images[0, 3].mean()) - values[..., 3].mean()) < 0.02
    Image.new('RGBA', (40, 40), (0, 0, 0, 0)).save(tmp_path / 'clear.png')
    seen = explorer.see('blue', explorer.read(tmp_path / 'clear.png', 'blue'))
    assert torch.equal(seen.images[0].amax((1, 2)), torch.tensor([0.0, 0.0, 1.0]))
    with pytest.raises(DataError, match='expected 4 bands'):
        explorer.see('four', Photo('flower', FLOWER))


def small(name: str, size: int = 32, **how: Any) -> OpenModel:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **how).eval()
    return OpenModel(
        name,
        'random weights',
        model,
        Preprocessing((size, size), 3, (0.5,) * 3, (0.5,) * 3),
        ['one', 'two', 'three', '<b>four'],
    )


@pytest.fixture(scope='module')
def explorer() -> Explorer:
    openers = {'ours': lambda: small('t2t_vit_7_32', depth=2), 'flat': lambda: small('test_resnet', 64)}
    return Explorer(openers, torch.device('cpu'), LIMITS)


@pytest.fixture(scope='module')
def seen(explorer: Explorer) -> list[Seen]:
    return [explorer.see(name, Photo('flower', FLOWER)) for name in ('ours', 'flat')]


@pytest.mark.parametrize('view', VIEWS)
def test_every_view_shows_two_models_side_by_side(view, seen):
    shown = show(view, seen, Choice())
    assert shown.count('<section') == 2 and 'models n2' in shown
    assert shown.count('class="card"') == 2
    assert '<b>four' not in shown  # class names are escaped
    for drawing in re.findall(r'<svg[^>]*>', shown):
        assert 'role="img" aria-label="' in drawing


def test_controls_change_the_view(seen):
    def shows(view: str, **how: Any) -> str:
        return show(view, seen[:1], Choice(**how))

    assert shows('Answer', top_k=2).count('<li>') == 2
    assert 'Token at row 8, column 1:' in shows('Windows', across=0.0, down=1.0)
    assert 'animate' not in shows('Windows') and shows('Windows', moving=True).count('attributeName="viewBox"') == 3
    assert 'Layer 1 of 4, attention1, kernel, 32×32' in shows('Attention', depth=0.0)
    assert 'Layer 4 of 4, blocks.1.attn, softmax, 8×8: attention of the class token, mean of 4' in shows('Attention')
    assert 'the class token, head 3 of 4' in shows('Attention', head=3)
    assert 'attention of the token at row 1, column 8' in shows('Attention', reader=CROSS_TOKEN, across=1.0, down=0.0)
    assert shows('Evidence', residual=0.1) != shows('Evidence', residual=0.9)
    probability = 100 * float(seen[0].trace.logits[0].softmax(-1)[2])
    assert f'“three” ({probability:.1f} %)' in shows('Evidence', target=2)
    assert 'channels 65 to 128 of 256' in shows('Feature maps', page=2)
    assert 'attention1, 32×32: channels 1 to 64 of 64' in shows('Feature maps', stage=0.0, page=9)
    assert all('class="scale"' in shows(view) for view in ('Attention', 'Evidence'))  # the colour bar


def test_dead_channels_are_marked(seen):
    assert ': dead<' not in show('Feature maps', seen[:1], Choice())
    one = seen[0]
    last = one.measures[-1]
    dead = torch.zeros_like(last.dead)
    dead[5] = True
    marked = show('Feature maps', [one._replace(measures=[*one.measures[:-1], last._replace(dead=dead)])], Choice())
    assert 'channel 6: dead<' in marked and 'Of all, 1 dead (dashed red)' in marked


def test_passes_are_kept_up_to_a_limit(explorer):
    photos = [Photo('grey', Image.new('RGB', (9, 9), (i, i, i))) for i in range(MAX_PASSES + 2)]
    assert explorer.see('ours', photos[0]) is explorer.see('ours', photos[0])
    for photo in photos:
        explorer.see('ours', photo)
    assert len(explorer.passes) == MAX_PASSES
    with pytest.raises(UsageError, match="no model 'other'.*ours or flat"):
        explorer.see('other', photos[0])


def test_half_precision_of_the_model_and_float32_of_the_pictures(explorer):
    photo = Photo('flower', FLOWER)
    half = Explorer(explorer.openers, torch.device('cpu'), LIMITS, torch.bfloat16)
    for name in explorer.names:
        exact, found = explorer.see(name, photo), half.see(name, photo)
        for key, expected in exact.trace.maps.items():
            maps = found.trace.maps[key]
            assert maps.dtype == torch.float32 and not torch.equal(maps, expected)
            assert (maps - expected).norm() < 0.1 * expected.norm()
        assert found.trace.logits.dtype == torch.float32
        for view in VIEWS:
            assert show(view, [found], Choice())


@needs_gradio
@pytest.mark.parametrize(
    'precision, half', [('no', None), ('bf16', torch.bfloat16), ('auto', torch.float16), ('fp16', torch.float16)]
)
def test_precision_of_the_page_is_chosen_and_said(precision, half, monkeypatch, capsys):
    def stub(*args: Any) -> None:
        raise UsageError(f'half {args[3]}')

    monkeypatch.setattr('t2t_vit.explore.command.Explorer', stub)
    monkeypatch.setattr('t2t_vit.explore.command.choose_precision', lambda device: ('fp16', f'fast on {device}'))
    assert main(['explore', '--device', 'cpu', '--precision', precision]) == 2
    said = capsys.readouterr()
    assert f'half {half}' in said.err and ('precision fp16: fast on cpu' in said.out) == (precision == 'auto')


def test_request_ends_when_its_time_is_up():
    explorer = Explorer({'ours': lambda: small('t2t_vit_7_32', depth=1)}, torch.device('cpu'), Limits(seconds=-1))
    explorer.open('ours')
    with explorer.request(), pytest.raises(TimeUp, match='longer than'):
        explorer.see('ours', Photo('flower', FLOWER))
    assert not explorer.passes and not explorer.lock.locked()
    explorer.check_time()  # no limit outside a request


def test_errors_are_explained():
    assert 'not enough memory' in explain(torch.OutOfMemoryError('CUDA out of memory'))
    assert 'not enough memory' in explain(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert explain(RuntimeError('a defect')) == ''


def test_untrained_model_has_the_same_random_weights_each_time():
    one = small('t2t_vit_7_32', depth=1)
    with torch.no_grad():
        one.model.head.bias += 1
    weights = [untrained(one).model.state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not weights[0]['head.bias'].any() and one.model.head.bias.any()


def test_untrained_model_has_answers_even_if_its_head_starts_at_zero():
    one = small('t2t_vit_7_32', depth=1, weight_init='scaled')
    assert not one.model.head.weight.any()
    random = [untrained(one).model for _ in range(2)]
    assert random[0].head.weight.any() and torch.equal(random[0].head.weight, random[1].head.weight)


def test_last_run_is_the_default_model(digits_run, tmp_path):
    assert last_run(tmp_path) is None and last_run(digits_run.parent) == digits_run
    run = open_model(str(digits_run))
    assert list(offer(run, [str(digits_run)])) == ['digits #1', 'digits #2', 'digits #1, untrained']


@needs_gradio
def test_page_shows_trained_models_of_photos_if_there_is_no_run(tmp_path, monkeypatch, capsys):
    seen = {}

    def stop(explorer, photos, uploads):
        seen.update(names=explorer.names, photos=[photo.name for photo in photos])
        raise KeyboardInterrupt

    monkeypatch.setattr('t2t_vit.explore.page.build', stop)
    assert main(['explore', '--runs', str(tmp_path)]) == 130
    t2t, vit, resnet = reversed(compared())
    photos = ['samples/china.jpg', 'samples/flower.jpg']
    assert seen == {'names': [t2t, vit, resnet, f'{t2t}, untrained'], 'photos': photos}
    assert 'showing small models of photos' in capsys.readouterr().out


def test_examples_fit_the_model(digits_run, photos, tmp_path):
    (tmp_path / 'config.yaml').write_text(f'data:\n  root: {photos}\n')
    other = open_model('t2t_vit_7')
    found = examples(other, str(tmp_path), compared=False)
    assert [photo.name for photo in found] == [f'validation image, {name}' for name in ('flower', 'roof', 'sky')]
    assert [photo.name for photo in examples(other, 't2t_vit_7', False)] == ['samples/china.jpg', 'samples/flower.jpg']
    assert len(examples(open_model(str(digits_run)), str(digits_run), compared=True)) == 12
    assert gallery(found, other.preprocessing).count('<img') == 3
    assert '<script' not in gallery([Photo('"><script>', FLOWER)], other.preprocessing)


def test_wrong_options_are_explained(capsys):
    assert main(['explore', '--port', '0', '--max_seconds', '0', '--max_waiting', '1']) == 2
    error = capsys.readouterr().err
    for text in ('port must be from 1 to 65535', 'max_seconds must be greater than 0', 'at least max_megabytes'):
        assert text in error


class Server:
    """The page, asked by HTTP and by gradio_client."""

    def __init__(self, address: str, temp: Path) -> None:
        from gradio_client import Client

        self.address, self.temp, self.log = address, temp, temp / 'log'
        self.client = Client(address, verbose=False)

    def get(self, path: str, body: bytes | None = None, method: str | None = None, **headers: str) -> str:
        """Return the text of an answer, or its status if it is an error."""
        headers = {name.replace('_', '-'): value for name, value in headers.items()}
        try:
            with urlopen(Request(self.address + path, body, headers, method=method), timeout=60) as answer:
                return answer.read().decode(errors='replace')
        except OSError as error:
            return str(getattr(error, 'code', error))

    def upload(self, name: str, content: bytes, **headers: str) -> str:
        """Return the token of an uploaded file, or the status of a refusal."""
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b'\r\n--x--\r\n'
        answer = self.get('gradio_api/upload', body, Content_Type='multipart/form-data; boundary=x', **headers)
        found = re.fullmatch(r'\["(.+)"\]', answer)
        return found[1] if found else answer

    def ask(self, name: str, image: Any = None, **fields: Any) -> Any:
        """Return the answer of an endpoint, or its error; `image` is a token."""
        from gradio_client.exceptions import AppError

        given = {} if image is None else {'image': {'path': image}}
        try:
            return self.client.predict(**given, **fields, api_name=f'/{name}')
        except AppError as error:
            return str(error)

    def call(self, name: str, *values: Any) -> str:
        """Return the events of a call over plain HTTP."""
        body = json.dumps({'data': values}).encode()
        answer = self.get(f'gradio_api/call/{name}', body, Content_Type='application/json')
        return self.get(f'gradio_api/call/{name}/{json.loads(answer)["event_id"]}')

    def files(self) -> list[Path]:
        """All files that the server keeps."""
        return [file for file in self.temp.glob('t2t-vit-explore-*/**/*') if file.is_file()]


def start_server(temp: Path, *options: str) -> tuple['subprocess.Popen[bytes]', str]:
    """Start the page in a process; returns it and the address."""
    argv = [sys.executable, '-u', '-m', 't2t_vit.cli', 'explore', *options]
    log = temp / 'log'
    with open(log, 'w') as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, 'TMPDIR': str(temp)})
    for _ in range(1200):
        if (found := re.search(r'http://[\w.]+:\d+/', log.read_text())) or process.poll() is not None:
            break
        time.sleep(0.1)
    assert found, log.read_text()
    return process, found[0]


@pytest.fixture(scope='module')
def server(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip('gradio')
    temp = tmp_path_factory.mktemp('temp')
    limits = ['--max_megabytes', '1', '--max_megapixels', '2', '--max_waiting', '2']
    process, address = start_server(temp, '--runs', str(digits_run.parent), *limits)
    try:
        yield Server(address, temp)
    finally:
        process.terminate()
    assert process.wait(60) == 0 and not list(temp.glob('t2t-vit-explore-*'))
    log = (temp / 'log').read_text()
    assert 'Traceback' not in log and str(temp) not in log, log
    assert max(map(len, log.splitlines())) < 300


def test_api_answers_with_named_fields(server):
    models = server.ask('models')
    assert [model['name'] for model in models] == ['digits', 'digits, untrained']
    assert models[0]['classes'] == 10 and models[0]['input_size'] == [1, 16, 16] and '% on digits' in models[0]['about']
    flower = encoded(FLOWER)
    answer = server.ask('classify', server.upload('flower.jpg', flower), top_k=3)
    assert (answer['model'], answer['input']) == ('digits', {'height': 16, 'width': 16})
    assert len(answer['predictions']) == 3 and set(answer['predictions'][0]) == {'index', 'label', 'probability'}
    everything = server.ask('classify', server.upload('flower.jpg', flower), model='digits, untrained', top_k=99)
    assert everything['weights'] == 'random weights'
    assert sum(p['probability'] for p in everything['predictions']) == pytest.approx(1, abs=1e-5)
    found = server.ask('attention', server.upload('flower.jpg', flower))
    assert found['kind'] == 'softmax' and found['grid'] == [4, 4] and len(found['values'][0]) == 4
    found = server.ask('attention', server.upload('flower.jpg', flower), layer=0, row=7, column=0)
    assert found['kind'] == 'kernel' and found['grid'] == [8, 8]
    found = server.ask('evidence', server.upload('flower.jpg', flower), target=3)
    assert found['grad_cam']['label'] == '3' and len(found['rollout']['values']) == 4
    found = server.ask('layers', server.upload('flower.jpg', flower))
    assert [layer['grid'] for layer in found['layers']][:2] == [[8, 8], [4, 4]]


def test_api_takes_files_from_gradio_client(server, tmp_path):
    """As its documentation shows; the answer is that of the model."""
    from gradio_client import handle_file

    FLOWER.save(tmp_path / 'flower.png')
    answer = server.client.predict(image=handle_file(tmp_path / 'flower.png'), api_name='/classify')
    again = server.ask('classify', server.upload('flower.png', (tmp_path / 'flower.png').read_bytes()))
    assert answer == again and len(answer['predictions']) == 5


def test_uploads_are_deleted_when_read(server):
    first, second = (server.upload('../twice.jpg', encoded(FLOWER)) for _ in range(2))
    assert first != second and 'twice.jpg' in first and str(server.temp) not in first  # clients learn no path
    assert [file.name for file in server.files()] == ['twice.jpg'] * 2
    assert 'predictions' in server.ask('classify', first)
    assert 'did not arrive' in server.ask('classify', first)
    assert 'predictions' in server.ask('classify', second) and not server.files()


def test_wrong_values_are_explained(server):
    for fields, says in (
        (dict(top_k='many'), 'A number is missing: top_k'),
        (dict(model='resnet'), "There is no model 'resnet' on this page; choose digits or digits, untrained."),
        (dict(model=['digits']), 'There is no model'),
    ):
        token = server.upload('flower.jpg', encoded(FLOWER))
        assert says in server.ask('classify', token, **fields)
        server.ask('classify', token)  # which deletes it
    for fields, says in ((dict(layer=9), 'There is no layer 9'), (dict(row=99, column=0), 'no token at row 99')):
        assert says in server.ask('attention', server.upload('flower.jpg', encoded(FLOWER)), **fields)


def test_bad_uploads_are_explained_and_deleted(server):
    for name, content in bad_files().items():
        answer = server.upload(name, content)
        assert answer == '413' if name == 'heavy.bmp' else name in server.ask('classify', answer)
    assert not server.files()


def test_waiting_uploads_have_a_limit(server):
    large = encoded(FLOWER.resize((500, 500)), 'bmp')  # 750 kB of 2 MB
    tokens = [server.upload('large.bmp', large) for _ in range(4)]
    assert [token.isdigit() for token in tokens] == [False, False, True, True] and tokens[-1] == '503'
    for token in tokens[:2]:
        assert 'predictions' in server.ask('classify', token)
    assert 'predictions' in server.ask('classify', server.upload('large.bmp', large))


@needs_gradio
def test_old_uploads_are_deleted(tmp_path):
    from t2t_vit.explore.uploads import MAX_AGE, Uploads

    for age in (MAX_AGE - 60, MAX_AGE + 60):
        (tmp_path / str(age)).mkdir()
        os.utime(tmp_path / str(age), (time.time() - age,) * 2)
    Uploads(tmp_path, 1e6).sweep()
    assert [folder.name for folder in tmp_path.iterdir()] == [str(MAX_AGE - 60)]


def test_no_other_file_is_served(server, tmp_path):
    (tmp_path / 'secret.png').write_bytes(encoded(FLOWER, 'png'))
    token = server.upload('flower.jpg', encoded(FLOWER))
    key = token.split('/')[1]
    for path in (
        str(tmp_path / 'secret.png'),
        '/etc/passwd',
        str(Path('pyproject.toml').resolve()),
        'https://example.org/a.png',
        f'upload/{key}/..',
        f'upload/{key}/../../secret.png',
        'upload/../../../etc/passwd',
    ):
        assert server.get(f'gradio_api/file={path}') in ('403', '404')
        assert 'did not arrive' in server.ask('classify', path) or path.startswith('https:')
        file = {'path': path, 'url': path, 'meta': {'_type': 'gradio.FileData'}}  # of which Gradio makes a copy
        assert 'predictions' not in server.call('classify', file, '', 5)
    assert [file.name for file in server.files()] == ['flower.jpg']
    assert (tmp_path / 'secret.png').exists() and 'predictions' in server.ask('classify', token)
    for path in (
        'deep_link?session_hash=x',
        'proxy=https://example.org',
        'stream/x/y/playlist.m3u8',
        'component_server',
    ):
        assert server.get(f'gradio_api/{path}') == '404'


def test_foreign_pages_and_host_names_are_refused(server):
    """DNS rebinding has another Host, a form of another page another Origin; neither gets credentials."""
    host = server.address.removeprefix('http://').strip('/')
    assert server.get('config', Host='evil.example') == '403'
    assert server.get('config', Host=f'evil.example:{host.split(":")[1]}') == '403'
    assert server.get('config', Host='10.0.0.1') == '403'  # it listens at 127.0.0.1
    assert server.get('config', Host='') == '403'
    assert '"components"' in server.get('config', Host='localhost:7860')
    flower = encoded(FLOWER)
    for origin in ('https://evil.example', 'null', 'http://127.0.0.1:9999', 'http://localhost'):
        assert server.upload('flower.jpg', flower, Origin=origin) == '403'
        assert server.get('config', Origin=origin) == '403'
        assert server.get('config', method='OPTIONS', Origin=origin, Access_Control_Request_Method='POST') == '403'
    assert server.upload('flower.jpg', flower, Sec_Fetch_Site='cross-site') == '403'
    token = server.upload('flower.jpg', flower, Origin=f'http://{host}', Sec_Fetch_Site='same-origin')
    assert 'predictions' in server.ask('classify', token)
    assert 'What models see' in server.get('', Sec_Fetch_Site='cross-site')  # a link to the page


@needs_gradio
def test_hosts_of_a_page_for_others():
    from t2t_vit_serve import Guard

    guard = Guard(None, '0.0.0.0', ['photos.example.org'], 1)
    for host in ('photos.example.org', 'Photos.example.org:80', '10.0.0.1:7860', '[fe80::1]:7860', 'localhost'):
        assert guard.knows(host)
    for host in ('evil.example', 'photos.example.org.evil.example', '', '[', '10.0.0.1.evil.example'):
        assert not guard.knows(host)


@needs_gradio
def test_half_open_connections_end(monkeypatch):
    """A head that never ends, a body that stops, a body that trickles."""
    import asyncio

    import uvicorn

    import t2t_vit_serve as module

    monkeypatch.setattr(module, 'HEAD_SECONDS', 0.3)
    monkeypatch.setattr(module, 'SILENT_SECONDS', 0.3)
    monkeypatch.setattr(module, 'BODY_SECONDS', 0.9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get('more_body'):
            pass
        await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-length', b'2')]})
        await asyncio.sleep(0.6)  # a slow answer is no silence of the client
        await send({'type': 'http.response.body', 'body': b'ok'})

    async def talk(*parts: bytes, pause: float = 0.0) -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        begun = time.monotonic()
        try:
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause)
            answer = await asyncio.wait_for(reader.read(), 5)
        except ConnectionError:
            answer = b''
        writer.close()
        return answer, time.monotonic() - begun

    head = b'POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 40\r\n\r\n'

    async def check() -> None:
        config = uvicorn.Config(app, http=module.TimedProtocol, lifespan='off', log_config=None, log_level='critical')
        running = uvicorn.Server(config)
        serving = asyncio.create_task(running.serve(sockets=[listener]))
        while not running.started:
            await asyncio.sleep(0.01)
        silent, stopped, trickle, whole = await asyncio.gather(
            talk(b'GET / HT'), talk(head + b'x'), talk(head, *[b'x'] * 20, pause=0.1), talk(head, b'x' * 40)
        )
        assert silent[0] == stopped[0] == trickle[0] == b''
        assert silent[1] < 2 and stopped[1] < 2 and trickle[1] < 4
        assert whole[0].endswith(b'ok')
        running.should_exit = True
        await serving

    with socket.create_server(('127.0.0.1', 0)) as listener:
        asyncio.run(check())


def test_bad_requests_leave_the_terminal_readable(server):
    before = server.log.read_text()
    join = 'gradio_api/queue/join'
    for body in (b'', b'{', b'[]', b'{"data": [], "fn_index": 99, "session_hash": "x"}', b'{"fn_index": "y"}'):
        assert server.get(join, body or b' ', Content_Type='application/json').isdigit()
    assert server.get('gradio_api/call/classify', b'{"data": 5}', Content_Type='application/json').isdigit()
    for path in ('%00', 'gradio_api/info?' + 9000 * 'x', 'static/../../etc/passwd'):
        server.get(path)
    with socket.create_connection(server.address[7:-1].split(':')) as connection:
        connection.sendall(b'\x16\x03\x01 no HTTP\r\n\r\n')
        connection.recv(1000)
    time.sleep(0.5)
    said = server.log.read_text().removeprefix(before)
    assert 'Traceback' not in said and len(said.splitlines()) < 8 and 'site-packages' not in said


def test_page_needs_no_other_machine(server):
    page = server.get('')
    with urlopen(server.address) as answer:
        assert "default-src 'self'" in answer.headers['Content-Security-Policy']
        assert answer.headers['X-Content-Type-Options'] == 'nosniff'
        assert 'Access-Control-Allow-Credentials' not in answer.headers
    assert '"analytics_enabled":false' in page.replace(' ', '')
    assert 'fonts.googleapis.com/css' not in page


@needs_gradio
def test_report_contains_every_picture(explorer, tmp_path):
    from t2t_vit.explore.page import Page
    from t2t_vit.explore.uploads import Uploads

    uploads = Uploads(tmp_path, 1e9)
    controls = [3, 0.5, 0.5, False, 3, 0, 'the class token', 0.5, -1, 1, 1]
    link = Page(explorer, [], uploads).report(Photo('a $photo$ <b>', FLOWER), 'ours', 'flat', *controls)
    token = re.search(r'file=(\S+)"', link)
    file = uploads.find(token[1]) if token else None
    assert file is not None
    report = file.read_text(encoding='utf-8')
    assert report.count('data:image/png') >= 9 and 'a $photo$ &lt;b&gt;' in report and '<b>' not in report


@needs_gradio
def test_empty_controls_are_explained(explorer, tmp_path):
    from t2t_vit.explore.page import Page
    from t2t_vit.explore.uploads import Uploads

    page = Page(explorer, [Photo('flower', FLOWER)], Uploads(tmp_path, 1e9))
    draw, values = page.guarded(page.draw, 2), [None, 'much', 0.5, False, 3, 0, 'the class token', 0.5, -1, 1, 1]
    error = draw(page.photos[0], 'ours', 'no other', 'Answer', *values)[-1]
    assert 'role="alert"' in error and 'A number is missing: Classes, Cross: left to right.' in error
    assert 'There is no view' in draw(page.photos[0], 'ours', 'no other', 'Sense', *values)[-1]
    assert 'no such example' in page.guarded(page.example, 3)({'index': 9})[-1]
