"""Model folders, model cards, and pushing to and loading from a small local Hub."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import SMALLER, digits_config, read_records
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from t2t_vit import cli, hub
from t2t_vit.hub import Card, from_pretrained, public, save_pretrained
from t2t_vit.models.safe_load import CheckpointError
from t2t_vit.results import locked
from t2t_vit.settings import UsageError, flatten
from t2t_vit.train.run import train
from t2t_vit.train.state import read_state, saved_states

SHORT = {'epochs': 1, 'optimizer.warmup_epochs': 0}


class Hub(BaseHTTPRequestHandler):
    """A Hub that accepts a commit of small files and serves them."""

    files: dict[str, bytes] = {}
    asked: dict[str, Any] = {}

    def answer(self, content: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {'Content-Length': str(len(content)), 'X-Repo-Commit': '0' * 40, **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers['Content-Length']))
        address = f'http://{self.headers["Host"]}/me/digits'
        if self.path.endswith('/repos/create'):
            self.asked.update(json.loads(body), authorization=self.headers['Authorization'])
            reply: dict[str, Any] = {'url': address, 'name': 'me/digits', 'id': '0'}
        elif '/preupload/' in self.path:
            reply = {
                'files': [
                    {'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                    for file in json.loads(body)['files']
                ]
            }
        elif '/commit/' not in self.path:  # the card's metadata, to be checked
            reply = {}
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files.update(
                {
                    line['value']['path']: base64.b64decode(line['value']['content'])
                    for line in lines
                    if line['key'] == 'file'
                }
            )
            reply = {'commitUrl': f'{address}/commit/{"0" * 40}', 'commitOid': '0' * 40, 'success': True}
        self.answer(json.dumps(reply).encode(), Content_Type='application/json')

    def do_GET(self) -> None:  # noqa: N802
        content = self.files.get(self.path.partition('?')[0].rpartition('/')[2])
        if '/me/digits/resolve/' not in self.path or content is None:
            self.send_response(404)
            self.send_header('X-Error-Code', 'RepoNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[str]:
    with ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def trained(digits_run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train a run from scratch, and one that starts from it and is resumed."""
    first, second = (tmp_path_factory.mktemp('runs') / name for name in ('first', 'second'))
    shutil.copytree(digits_run, first)
    config = json.loads((first / 'config.json').read_text())
    del config['sha256']
    config['pretrained_cfg']['license'] = 'cc-by-4.0'
    (first / 'config.json').write_text(json.dumps(config))
    train(digits_config(output=str(second), weights=str(first), **SHORT))
    train(digits_config(output=str(second), **{**SHORT, 'epochs': 2}), resume=str(second))
    return first, second


def test_card_of_a_run(trained):
    card = ModelCard.load(trained[0] / 'README.md')
    assert card.data.license is None and card.data.pipeline_tag == 'image-classification'
    assert card.data.eval_results[0].dataset_name == 'digits'
    records = read_records(trained[0] / 'metrics.jsonl')
    best = max(max(record['val_top1'], record['val_top1_ema']) for record in records)
    assert card.data.eval_results[0].metric_value == round(best, 4)
    for said in (
        f'| top-1 | {100 * best:.2f} % |',
        '1,437 training and 360 validation images of 10 classes: 0, 1, 2',
        'From scratch',
        hub.UNSTATED,
        'of 2, on 360 images',
        "'hf-hub:USER/NAME'",
    ):
        assert said in card.text
    recipe = yaml.safe_load(re.search(r'```yaml\n(.*?)```', card.text, re.DOTALL)[1])
    assert recipe['model'] == 't2t_vit_4_16' and recipe['augment']['aa'] is None
    assert str(trained[0].parent) not in card.text and 'output' not in recipe


def test_card_names_the_initial_weights(trained):
    """Also after it is resumed; the licence stays with the weights."""
    states = saved_states(trained[1] / 'checkpoints')
    assert (
        read_state(states[0])['origin']
        == read_state(states[1])['origin']
        == {'weights': 'first', 'license': 'cc-by-4.0'}
    )
    card, cfg = ModelCard.load(trained[1] / 'README.md'), json.loads((trained[1] / 'config.json').read_text())
    assert card.data.license == cfg['pretrained_cfg']['license'] == 'cc-by-4.0'
    assert 'From the weights first' in card.text and 'they started from, first, keep their licence' in card.text


def test_card_holds_no_local_paths(tmp_path):
    (tmp_path / 'photos').mkdir()
    config = digits_config(output='x', **{'data.root': str(tmp_path / 'photos'), 'data.cache': 'y'})
    tree = public(flatten(yaml.safe_load(config.to_yaml())))
    assert tree['data']['root'] == 'photos' and 'cache' not in tree['data'] and str(tmp_path) not in str(tree)


def test_save_and_load_a_folder(tmp_path):
    net = timm.create_model('t2t_vit_4_16', num_classes=2, in_chans=1, **SMALLER).eval()
    net.pretrained_cfg.update(label_names=['cat', 'dog'], input_size=(1, 16, 16), mean=(0.5,), std=(0.5,))
    save_pretrained(net, tmp_path / 'new' / 'cats', Card(data='Cats.', license='mit'), SMALLER)
    images = torch.randn(2, 1, 16, 16)
    for place in (str(tmp_path / 'new' / 'cats'), f'local-dir:{tmp_path / "new" / "cats"}'):
        again = from_pretrained(place).eval()
        assert torch.equal(again(images), net(images)) and again.pretrained_cfg['label_names'] == ['cat', 'dog']
    assert from_pretrained(place, num_classes=5)(images).shape == (2, 5)
    assert 'Cats.' in (tmp_path / 'new' / 'cats' / 'README.md').read_text()
    net.pretrained_cfg['label_names'] = ['cat']
    with pytest.raises(UsageError, match='the model has 2 classes, its pretrained_cfg names 1'):
        save_pretrained(net, tmp_path / 'other')
    with pytest.raises(CheckpointError, match='it has no model.safetensors and no config.json'):
        from_pretrained(str(tmp_path))


def test_push_and_load_from_a_hub(trained, served, tmp_path, monkeypatch, capsys):
    """Push three files, and nothing else, to a local server, and load them from it."""
    for name, value in {
        'ENDPOINT': served,
        'HUGGINGFACE_CO_URL_TEMPLATE': served + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_CACHE': str(tmp_path),
        'HF_HUB_DISABLE_XET': True,
        'HF_HUB_DISABLE_TELEMETRY': True,
    }.items():
        monkeypatch.setattr(f'huggingface_hub.constants.{name}', value, raising=False)  # the oldest has no Xet
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setenv('COLUMNS', '100')
    (trained[0] / 'README.md').write_text((trained[0] / 'README.md').read_text() + '\nBy hand.\n')
    assert cli.main(['push', str(trained[0]), 'me/digits', '--license', 'apache-2.0']) == 0
    assert cli.main(['predict', 'digits', '--checkpoint', 'hf-hub:me/digits', '--top_k', '1']) == 0
    output = capsys.readouterr().out
    assert 'loads as hf-hub:me/digits' in output and '\ndigits/21 ' in output
    assert cli.main(['eval', '--checkpoint', 'hf-hub:me/nothing']) == 2
    assert {*Hub.files} == {'README.md', 'config.json', 'model.safetensors'}
    assert Hub.asked['authorization'] == 'Bearer hf_secret' and Hub.asked['name'] == 'digits'
    assert Hub.files['model.safetensors'] == (trained[0] / 'model.safetensors').read_bytes()
    card = ModelCard(Hub.files['README.md'].decode())
    assert card.data.license == 'apache-2.0' and 'apache-2.0.' in card.text and hub.UNSTATED not in card.text
    assert "'hf-hub:me/digits'" in card.text and 'By hand.' in card.text and '## Use' in card.text
    assert json.loads(Hub.files['config.json'])['pretrained_cfg']['license'] == 'apache-2.0'
    assert cli.main(['push', str(trained[1]), 'me/digits', '--license', 'mit']) == 0
    said = 'mit. The weights that they started from, first, keep their licence: cc-by-4.0.'
    assert said in capsys.readouterr().out and said in ModelCard(Hub.files['README.md'].decode()).text
    assert hub.relicense('By hand.', 'mit', None) == 'By hand.\n\n## Licence of the weights\n\nmit.\n'
    downloaded = tmp_path / 'downloaded'
    downloaded.mkdir()
    for name, content in Hub.files.items():
        (downloaded / name).write_bytes(content)
    assert cli.main(['predict', 'digits', '--checkpoint', str(downloaded), '--top_k', '1']) == 0
    assert cli.main(['push', str(trained[1]), 'digits']) == 0  # the Hub completes the name
    assert "'hf-hub:me/digits'" in ModelCard(Hub.files['README.md'].decode()).text


def test_push_errors(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    assert cli.main(['push', str(tmp_path), 'me/digits']) == 2
    assert 'is not the folder of a trained model' in capsys.readouterr().err
    weights = tmp_path / 'copy'
    weights.mkdir()
    save_file(load_file(trained[0] / 'model.safetensors'), weights / 'model.safetensors')
    (weights / 'config.json').write_bytes((trained[0] / 'config.json').read_bytes())
    assert cli.main(['push', str(weights), 'me/digits']) == 2
    assert 'cannot reach the Hub' in capsys.readouterr().err and 'Not recorded.' in (weights / 'README.md').read_text()
    assert cli.main(['push', str(weights), 'no good/name']) == 2


def test_push_during_training_is_refused(trained, capsys):
    with locked(trained[0] / '.lock', ''):
        code = 'import sys; from t2t_vit import cli; sys.exit(cli.main(sys.argv[1:]))'
        words = ['push', str(trained[0]), 'me/digits']
        done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and 'another process is training in' in done.stderr
