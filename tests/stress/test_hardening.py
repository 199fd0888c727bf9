"""Test each fault that the fuzz run found."""

import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from fuzz_images import bombs, png
from PIL import Image
from test_checkpoints import tiny

from t2t_vit import CheckpointError, load_weights
from t2t_vit.data import DataError, decode_image, open_source
from t2t_vit.data.sources.labels import number_labels, read_lines
from t2t_vit.data.sources.webdataset import read_label
from t2t_vit.settings import UsageError, parse_settings, resolve
from t2t_vit.train.config import Config
from t2t_vit.train.state import read_state
from t2t_vit.trained import load_trained, save_folder

SMALL = dict(depth=1, token_dim=16, num_classes=3)


def test_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / 'small.pth')
    with (
        zipfile.ZipFile(tmp_path / 'small.pth') as whole,
        zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, bytes(1 << 27) if name.endswith('/data/0') else whole.read(name))
    for read in (lambda file: load_weights(tiny(), file), read_state):
        with pytest.raises(CheckpointError, match='would take .* in memory'):
            read(tmp_path / 'bomb.pth')


def test_tensor_larger_than_its_storage_is_refused(tmp_path):
    torch.save({**tiny().state_dict(), 'head.weight': torch.zeros(1).expand(10**8, 32)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='would take .* in memory'):
        load_weights(tiny(), tmp_path / 'a.pth')


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda t: t.to('meta'), 'sparse or quantized tensors, or tensors without values: norm.weight'),
        (lambda t: t.to(torch.int8), '1 with another kind of number: norm.weight int8 instead of float32'),
        (lambda t: t.to(torch.complex64), 'norm.weight complex64 instead of float32'),
    ],
)
def test_tensors_of_another_kind_than_the_weights_are_refused(change, message, tmp_path):
    weights = tiny().state_dict()
    torch.save({**weights, 'norm.weight': change(weights['norm.weight'])}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=message):
        load_weights(tiny(), tmp_path / 'a.pth')


def test_weights_of_mmpretrain_1x_are_scaled_in_float8_and_refused_in_int8(tmp_path):
    loaded, name = [], 'blocks.0.attn.qkv.weight'
    narrow = tiny().state_dict()[name].to(torch.float8_e5m2)
    for weight in (narrow, narrow.float(), narrow.float().to(torch.int8)):
        torch.save(
            {'state_dict': {**tiny().state_dict(), name: weight}, 'meta': {'mmengine_version': '1'}}, tmp_path / 'a.pth'
        )
        model = tiny()
        if weight.dtype == torch.int8:
            with pytest.raises(CheckpointError, match=name):
                load_weights(model, tmp_path / 'a.pth')
        else:
            load_weights(model, tmp_path / 'a.pth')
            loaded.append(model.state_dict()[name])
    assert torch.equal(*loaded)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    save_folder(timm.create_model('t2t_vit_4_16', **SMALL), folder, SMALL)
    return folder


@pytest.mark.parametrize(
    'change',
    [
        dict(architecture=None),
        dict(architecture='resnet'),
        dict(model_args={**SMALL, 'num_classes': 10**9}),
        dict(model_args=[3]),
        dict(model_args={**SMALL, 'depth': 10**8}),
        dict(model_args={**SMALL, 'img_size': 10**9}),
        dict(label_names=['a']),
        dict(pretrained_cfg=None),
        dict(pretrained_cfg={'input_size': 3}),
    ],
    ids=str,
)
def test_run_folder_with_wrong_settings_is_refused(change, folder, tmp_path):
    """Check that wrong settings are refused before anything of their size is allocated."""
    shutil.copytree(folder, tmp_path / 'run')
    config = json.loads((folder / 'config.json').read_text())
    del config['sha256']
    (tmp_path / 'run' / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=str(tmp_path / 'run')):
        load_trained(str(tmp_path / 'run'))


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
def test_truncated_file_of_a_run_folder_is_refused(file, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'run')
    (tmp_path / 'run' / file).write_bytes((folder / file).read_bytes()[:99])
    with pytest.raises(CheckpointError, match=str(tmp_path / 'run')):
        load_trained(str(tmp_path / 'run'))


def test_exponential_aliases_are_refused():
    lines = ['a0: &a0 {x: 1}'] + [
        f'a{i}: &a{i} {{' + ', '.join(f'k{j}: *a{i - 1}' for j in range(9)) + '}' for i in range(1, 12)
    ]
    with pytest.raises(UsageError, match=r'file expands to [\d,]{12,} values'):
        parse_settings('\n'.join(lines), 'file')


def test_data_of_a_name_that_no_file_can_have_is_not_found():
    with pytest.raises(DataError, match='no data at xxx'):
        open_source('x' * 5000, 'train')


@pytest.mark.parametrize(
    'text',
    [
        '&a {b: *a}',
        '[' * 20000,
        'a: 1_' + '0' * 5000,
        'a: 0x' + 'f' * 5000,
        'a: 2001-99-99',
        '!!python/name:os.system',
        '3',
    ],
)
def test_text_that_is_no_mapping_of_settings_is_refused(text):
    with pytest.raises(UsageError, match='file'):
        parse_settings(text, 'file')


def test_class_names_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / 'classes.txt').write_bytes(b'\xff\xfe\x00cat')
    with pytest.raises(DataError, match='classes.txt is not text'):
        read_lines(tmp_path / 'classes.txt')


@pytest.mark.parametrize('bomb', ['png of 30000²', 'png of 1×3000000', 'png of 60000000×1', 'ppm', 'eps', 'xpm', 'tga'])
@pytest.mark.filterwarnings('ignore:.*decompression bomb:PIL.Image.DecompressionBombWarning')
def test_image_that_would_take_all_memory_or_start_a_program_is_refused(bomb):
    with pytest.raises((DataError, OSError, Image.DecompressionBombError)):
        decode_image(io.BytesIO(BOMBS[bomb]))


BOMBS = bombs()


@pytest.mark.filterwarnings('ignore:.*decompression bomb:PIL.Image.DecompressionBombWarning')
def test_images_beyond_the_limits_of_pixels_and_sides_are_refused():
    assert decode_image(io.BytesIO(png(500, 1, 8, 0, True))).size == (500, 1)
    with pytest.raises(DataError, match='501x1 pixels: its sides are more than 500 to 1'):
        decode_image(io.BytesIO(png(501, 1, 8, 0, True)))
    with pytest.raises(DataError, match='10000x10000 pixels; at most 89,478,485 are decoded'):
        decode_image(io.BytesIO(png(10000, 10000)))


def test_labels_that_are_neither_integer_nor_text_are_refused():
    with pytest.raises(DataError, match='no integer or text label for every image: label holds list'):
        number_labels([[0], [1]], [], 'a.parquet', 'label')
    for content in (b'9' * 5000, b'[' * 100000):
        with pytest.raises(DataError, match='holds no label'):
            read_label(content, 'json' if content[:1] == b'[' else 'cls', 'a.tar/1')


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('epochs', None, 'epochs: expected a whole number, got None'),
        ('optimizer', 3, 'optimizer is a group of options, such as optimizer.name; got 3'),
        ('data', None, 'data is a group of options, such as data.root; got None'),
        ('model.a', 'x', 'model.a'),
    ],
)
def test_settings_of_another_type_are_refused(key, value, message):
    with pytest.raises(UsageError, match=message):
        resolve(Config, [(key, key, value), ('epochs', 'epochs', 30)][: 1 if key == 'epochs' else 2])


DOCKER = Path(__file__).parents[2] / 'docker'


@pytest.mark.parametrize('file', sorted(DOCKER.glob('*Dockerfile')), ids=lambda file: file.name)
def test_dockerfile_follows_the_rules_of_a_linter(file):
    """Check pinned and small base images, no downloads, no root, and the exec form of commands."""
    lines = re.sub(r'\\\n', ' ', re.sub(r'^#.*\n', '', file.read_text(), flags=re.MULTILINE)).splitlines()
    steps = [(line.split()[0], line.partition(' ')[2].strip()) for line in lines if line]
    of = {kind: [value for name, value in steps if name == kind] for kind, _ in steps}
    assert all(re.fullmatch(r'[\w./-]+:[\d.]+-slim', image) for image in of['FROM'])  # a version, and a small one
    assert 'ADD' not in of and all(':' not in source for source in of['COPY'])  # nothing from elsewhere
    assert all('sudo' not in run and ('apt-get' not in run or 'rm -rf /var/lib/apt/lists' in run) for run in of['RUN'])
    assert 'PIP_NO_CACHE_DIR=1' in of['ENV'][0] and not any('curl' in run or 'wget' in run for run in of['RUN'])
    assert of['USER'][-1] not in ('0', 'root') and [name for name, _ in steps][-3:] == ['USER', 'ENTRYPOINT', 'CMD']
    assert json.loads(of['ENTRYPOINT'][0])[0] in ('t2t-vit', 'python') and json.loads(of['CMD'][0])  # exec form
    assert not re.search(r'(?i)token|password|secret', ' '.join(lines))
