"""The page that looks inside models: what it reads, what it shows, what it refuses. In a browser: browser.py."""

import html
import importlib.util
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from t2t_vit.cli import main
from t2t_vit.data import DataError, Preprocessing
from t2t_vit.explore import command
from t2t_vit.explore.command import examples, last_run, offer
from t2t_vit.explore.seen import KEPT, SIDE, Explorer, Limits, Seen, TimeUp, read_photo, sentence, untrained
from t2t_vit.explore.views import PLACE, VIEWS, Choice, show
from t2t_vit.look.opened import OpenModel, Photo
from t2t_vit.settings import UsageError

LIMITS = Limits(megabytes=1, megapixels=2, seconds=60)
FLOWER = Image.fromarray(load_sample_images().images[1])


def png(width: int, height: int) -> bytes:
    """A PNG's beginning that claims to be so large."""
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
        ('text.png', 'is not an image'),
        ('empty.jpg', 'is not an image'),
        ('torn.jpg', 'is damaged'),
        ('torn.png', 'is damaged'),
        ('bomb.png', 'more than 2 million pixels'),
        ('long.png', 'too narrow'),
        ('heavy.bmp', 'at most 1 MB'),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(name, says, tmp_path):
    (tmp_path / name).write_bytes(bad_files()[name])
    with pytest.raises(DataError, match=says) as caught:
        read_photo(tmp_path / name, LIMITS)
    assert '\n' not in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_photos_are_upright_opaque_and_small(tmp_path):
    turned = Image.new('RGB', (1400, 700), 'red')
    exif = turned.getexif()
    exif[0x0112] = 6  # lying on its side
    turned.save(tmp_path / 'phone.jpg', exif=exif)
    assert read_photo(tmp_path / 'phone.jpg', LIMITS).image.size == (SIDE // 2, SIDE)
    Image.new('RGBA', (8, 8), (0, 0, 0, 0)).save(tmp_path / 'clear.png')
    assert read_photo(tmp_path / 'clear.png', LIMITS).image.getpixel((0, 0)) == (255, 255, 255)
    Image.new('I;16', (8, 8), 256 * 100).save(tmp_path / 'deep.png')
    assert read_photo(tmp_path / 'deep.png', LIMITS).image.getpixel((0, 0)) == (100, 100, 100)


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
    return Explorer(
        {'ours': lambda: small('t2t_vit_7_32', depth=2), 'flat': lambda: small('test_resnet', 64)},
        torch.device('cpu'),
        LIMITS,
    )


@pytest.fixture(scope='module')
def seen(explorer: Explorer) -> list[Seen]:
    return [explorer.see(name, Photo('flower', FLOWER)) for name in ('ours', 'flat')]


@pytest.mark.parametrize('view', VIEWS)
def test_every_view_shows_two_models_side_by_side(view, seen):
    shown = show(view, seen, Choice())
    assert shown.count('<section') == 2 and 'models n2' in shown
    assert '<b>four' not in shown  # class names are no markup
    for drawing in re.findall(r'<svg[^>]*>', shown):
        assert 'role="img" aria-label="' in drawing


def test_the_controls_change_what_is_shown(seen):
    def shows(view: str, **how: Any) -> str:
        return show(view, seen[:1], Choice(**how))

    assert shows('Answer', top_k=2).count('<li>') == 2
    assert 'Token at row 8, column 1:' in shows('Windows', across=0.0, down=1.0)
    assert 'animate' not in shows('Windows') and shows('Windows', moving=True).count('attributeName="viewBox"') == 3
    assert 'Layer 1 of 4, attention1, kernel, 32×32' in shows('Attention', depth=0.0)
    assert 'Layer 4 of 4, blocks.1.attn, softmax, 8×8: where the class token looks, mean of 4' in shows('Attention')
    assert 'looks, head 3 of 4' in shows('Attention', head=3)
    assert 'where the token at row 1, column 8 looks' in shows('Attention', reader=PLACE, across=1.0, down=0.0)
    assert shows('Evidence', residual=0.1) != shows('Evidence', residual=0.9)
    assert '“three”' in shows('Evidence', target=2)
    assert 'channels 65 to 128 of 256' in shows('Feature maps', page=2)
    assert 'attention1, 32×32: channels 1 to 64 of 64' in shows('Feature maps', stage=0.0, page=9)


def test_dead_channels_are_marked(seen):
    assert ': dead<' not in show('Feature maps', seen[:1], Choice())
    one = seen[0]
    last = one.measures[-1]
    dead = torch.zeros_like(last.dead)
    dead[5] = True
    marked = show('Feature maps', [one._replace(measures=[*one.measures[:-1], last._replace(dead=dead)])], Choice())
    assert 'channel 6: dead<' in marked and 'Of all, 1 dead (dashed red)' in marked


def test_passes_are_remembered_and_bounded(explorer):
    photos = [Photo('grey', Image.new('RGB', (9, 9), (i, i, i))) for i in range(KEPT + 2)]
    assert explorer.see('ours', photos[0]) is explorer.see('ours', photos[0])
    for photo in photos:
        explorer.see('ours', photo)
    assert len(explorer.passes) == KEPT
    with pytest.raises(UsageError, match="no model 'other'.*ours, flat"):
        explorer.see('other', photos[0])


def test_a_request_ends_when_its_time_is_up():
    explorer = Explorer({'ours': lambda: small('t2t_vit_7_32', depth=1)}, torch.device('cpu'), Limits(seconds=-1))
    explorer.open('ours')
    with explorer.request(), pytest.raises(TimeUp, match='longer than'):
        explorer.see('ours', Photo('flower', FLOWER))
    assert not explorer.passes and not explorer.lock.locked()
    explorer.check()  # outside of a request there is no limit


def test_errors_are_sentences():
    assert 'not enough memory' in sentence(torch.OutOfMemoryError('CUDA out of memory'), LIMITS)
    assert 'not enough memory' in sentence(RuntimeError("DefaultCPUAllocator: can't allocate memory"), LIMITS)
    assert sentence(RuntimeError('a bug'), LIMITS) == ''


def test_untrained_is_the_same_model_with_other_weights():
    one = small('t2t_vit_7_32', depth=1)
    with torch.no_grad():
        one.model.head.bias += 1
    twins = untrained(one), untrained(one)
    weights = [{key: value for key, value in twin.model.state_dict().items()} for twin in twins]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not weights[0]['head.bias'].any() and one.model.head.bias.any()


def test_the_last_run_is_the_default(digits_run, tmp_path, monkeypatch, capsys):
    assert last_run(tmp_path) is None
    assert last_run(digits_run.parent) == digits_run
    assert list(offer([str(digits_run), str(digits_run)])) == ['digits #1', 'digits #2', 'digits #1, untrained']
    trained: list[Any] = []
    monkeypatch.setattr(command, 'train', lambda config, resume: trained.append((config, resume)))
    assert command.train_digits(tmp_path / 'digits-explore') == tmp_path / 'digits-explore'
    assert (trained[0][0].data.root, trained[0][0].output) == ('digits', str(tmp_path / 'digits-explore'))
    assert 'training on the embedded digits' in capsys.readouterr().out


def test_a_wrong_option_is_said(capsys):
    assert main(['explore', '--port', '0', '--max_seconds', '0']) == 2
    said = capsys.readouterr().err
    assert 'port is from 1 to 65535' in said and 'max_seconds is more than 0' in said


CONTROLS = [3, 0.5, 0.5, False, 3, 0, 'the class token', 0.5, -1, 1, 1]


class Server:
    """The page, asked as a browser asks it."""

    def __init__(self, address: str, temp: Path) -> None:
        self.address, self.temp = address, temp

    def get(self, path: str, body: bytes = b'', **headers: str) -> str:
        """The text of an answer, or its status where it is an error."""
        try:
            with urlopen(Request(self.address + path, body or None, headers), timeout=60) as answer:
                return answer.read().decode(errors='replace')
        except OSError as error:
            return str(getattr(error, 'code', error))

    def upload(self, name: str, content: bytes) -> str:
        """The path it was written to."""
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b'\r\n--x--\r\n'
        answer = self.get('gradio_api/upload', body, **{'Content-Type': 'multipart/form-data; boundary=x'})
        return answer if answer.isdigit() else json.loads(answer)[0]

    def call(self, name: str, values: list[Any]) -> str:
        """What an event of the page's answers."""
        event = json.loads(
            self.get(
                f'gradio_api/call/{name}', json.dumps({'data': values}).encode(), **{'Content-Type': 'application/json'}
            )
        )['event_id']
        return self.get(f'gradio_api/call/{name}/{event}')

    def look(self, path: str, model: str = 'digits') -> str:
        """What the page says of an uploaded file."""
        file = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
        return self.call('look', [file, model, f'{model}, untrained', 'Answer', *CONTROLS])


@pytest.fixture(scope='module')
def server(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In a process of its own: Gradio's warnings are not ours."""
    if not importlib.util.find_spec('gradio'):
        pytest.skip('Gradio is not installed')
    temp = tmp_path_factory.mktemp('temp')
    words = [
        sys.executable,
        '-u',
        '-m',
        't2t_vit.cli',
        'explore',
        '--runs',
        str(digits_run.parent),
        '--max_megabytes',
        '1',
        '--max_megapixels',
        '2',
    ]
    with (
        open(temp / 'log', 'w+') as log,
        subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, 'TMPDIR': str(temp)}) as process,
    ):
        for _ in range(1200):
            if (found := re.search(r'http://127\.0\.0\.1:\d+/', (temp / 'log').read_text())) or process.poll():
                break
            time.sleep(0.1)
        assert found, (temp / 'log').read_text()
        yield Server(found[0], temp)
        assert list(temp.glob('t2t-vit-explore-*'))
        process.terminate()
        process.wait(60)
        assert process.returncode == 0 and not list(temp.glob('t2t-vit-explore-*'))
        assert 't2t_vit/explore' not in (temp / 'log').read_text()  # as a traceback would; Gradio's refusals have some


def test_an_upload_is_looked_at_and_not_kept(server):
    path = server.upload('flower.jpg', encoded(FLOWER))
    assert Path(path).exists()
    answer = server.look(path)
    assert 'event: complete' in answer and 'class=\\"bars\\"' in answer
    assert not Path(path).exists()
    assert not list(server.temp.rglob('*flower.jpg'))
    assert answer.count('<section') == 2


def test_two_people_upload_the_same(server):
    """Each has a file of his own, so that no answer takes the other's away."""
    paths = [server.upload('../twice.jpg', encoded(FLOWER)) for _ in range(2)]
    assert all('class=\\"bars\\"' in server.look(path) for path in paths)
    assert 'did not arrive' in server.look(paths[0]) and not list(server.temp.rglob('twice.jpg'))


def test_what_is_no_value_is_said_in_a_sentence(server):
    """An emptied box of a slider, after another model was chosen too; a view or a model that is not there."""
    for place, value, says in (
        (2, 'Sense', "There is no view 'Sense'"),
        (0, ['digits'], 'There is no model'),
        (3, None, 'A number is missing: Classes, Cross: left to right.'),
    ):
        values = ['digits', 'no other', 'Answer', *CONTROLS]
        values[place] = value
        if value is None:
            values[4] = 'much'
        path = server.upload('flower.jpg', encoded(FLOWER))
        answer = server.call('look', [{'path': path, 'meta': {'_type': 'gradio.FileData'}}, *values])
        assert says in html.unescape(answer) and 'role=\\"alert\\"' in answer


def test_what_is_left_behind_is_deleted(tmp_path):
    pytest.importorskip('gradio')
    from t2t_vit.explore.uploads import OLD, Uploads

    for age in (OLD - 60, OLD + 60):
        (tmp_path / str(age)).mkdir()
        os.utime(tmp_path / str(age), (time.time() - age,) * 2)
    Uploads(tmp_path).sweep()
    assert [place.name for place in tmp_path.iterdir()] == [str(OLD - 60)]


def test_bad_uploads_are_answered_and_deleted(server):
    for name, content in bad_files().items():
        if name == 'heavy.bmp':
            assert server.upload(name, content) == '413'
        else:
            path = server.upload(name, content)
            assert 'role=\\"alert\\"' in server.look(path) and not Path(path).exists()


def test_no_file_outside_its_own_is_served(server, tmp_path):
    (tmp_path / 'secret.png').write_bytes(encoded(FLOWER, 'png'))
    for path in (
        str(tmp_path / 'secret.png'),
        '/etc/passwd',
        str(Path('pyproject.toml').resolve()),
        'https://example.org/a.png',
    ):
        assert server.get(f'gradio_api/file={path}') in ('403', '404')
        assert 'bars' not in server.look(path)
    assert (tmp_path / 'secret.png').exists()
    image = {'path': 'https://example.org/a.png', 'meta': {'_type': 'gradio.FileData'}}
    assert 'Only uploaded files' in server.call('report', ['digits', 'no other', image, *CONTROLS[1:]])
    own = [file for file in server.temp.rglob('*.webp') if 't2t-vit-explore' in str(file)]  # thumbnails of examples
    assert own and all('bars' not in server.look(str(file)) and file.exists() for file in own[:2])
    assert server.get('gradio_api/deep_link?session_hash=x') == '404'
    assert server.get('gradio_api/proxy=https://example.org') == '404'


def test_the_page_takes_nothing_from_elsewhere(server):
    page = server.get('')
    with urlopen(server.address) as answer:
        assert "default-src 'self'" in answer.headers['Content-Security-Policy']
        assert answer.headers['X-Content-Type-Options'] == 'nosniff'
    assert '"analytics_enabled":false' in page.replace(' ', '')
    assert 'fonts.googleapis.com/css' not in page


def test_a_report_holds_every_picture(server):
    answer = server.call('report', ['digits', 'no other', *CONTROLS])
    path = re.search(r'"path": "([^"]*t2t-vit-report.html)"', answer)
    assert path, answer
    report = server.get(f'gradio_api/file={path[1]}')
    assert report.count('data:image/png') >= 6 and 'digit 9' in report


def test_examples_are_photos_and_a_digit_of_each_kind():
    assert [photo.name for photo in examples()[1:4]] == ['samples/flower.jpg', 'digit 0', 'digit 1']
    assert len(examples()) == 12
