"""Exported files return the model's answers in their own runtimes; damaged and foreign ones are refused."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from t2t_vit import VARIANTS, CheckpointError
from t2t_vit.cli import main
from t2t_vit.data import Preprocessing, convert_image, find_images
from t2t_vit.export import ExportedModel, int8, load_exported
from t2t_vit.export.archive import is_size
from t2t_vit.export.check import TOLERANCES, Comparison, Report, markdown_cell
from t2t_vit.export.command import describe, export
from t2t_vit.export.formats import export_model, save_onnx, save_openvino
from t2t_vit.export.metadata import Metadata
from t2t_vit.settings import UsageError
from t2t_vit.trained import load_trained

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')  # of the converters

# every registered model is one of these, but for depth, widths and heads; `scripts/export_all.py` takes all as they are
STRUCTURES = {(variant.token_layer, variant.block, variant.splits): name for name, variant in VARIANTS.items()}
FILES = ('.onnx', '.pt2', '.xml')  # `files` has the structure of 16² pixels, for any size


def small(name: str, **kwargs: Any) -> torch.nn.Module:
    """Build a registered model with fewer blocks, and weights that make its logits differ."""
    torch.manual_seed(0)
    variant = VARIANTS[name]
    depth = 1 if isinstance(variant.depth, int) else (1, 1)
    size = {'img_size': 32} if variant.img_size > 32 else {}
    model = timm.create_model(name, depth=depth, num_classes=10, **{**size, **kwargs}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return model


def described(model: torch.nn.Module, dynamic: str = 'batch', **changes: Any) -> Metadata:
    cfg = Preprocessing.of(model.pretrained_cfg)
    cfg.size = model.img_size
    wanted: dict[str, Any] = {'precision': 'float32', 'pixels': 'float', 'batch': None, **changes}
    return describe(model, [*'abcdefghij'], cfg, dynamic=dynamic, **wanted)


def written(model: torch.nn.Module, path: Path, dynamic: str = 'batch', **changes: Any) -> Path:
    export_model(model, path, described(model, dynamic, **changes), dynamic)
    return path


def weight_bytes(path: Path) -> int:
    """Return the size of a file, of an archive without the graph's text, which outweighs a small model."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(item.file_size for item in archive.infolist() if '/data/weights/' in item.filename)


def check(model: torch.nn.Module, exported: ExportedModel, *shape: int, tolerance: float = 1e-4) -> None:
    images = torch.randn(*shape)
    with torch.inference_mode():
        expected = model(images)
        tokens = model.forward_head(model.forward_features(images), pre_logits=True)
    logits, features = exported.both(images)
    scale = expected.abs().max()
    assert scale > 0.1 and logits.dtype == torch.float32
    assert (logits - expected).abs().max() < tolerance * scale
    assert (features - tokens).abs().max() < tolerance * tokens.abs().max()


@pytest.fixture(scope='module')
def model() -> torch.nn.Module:
    return small('t2t_vit_4_16')


@pytest.fixture(scope='module')
def files(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export the model in every format, for images of any size, as uint8."""
    folder = tmp_path_factory.mktemp('files')
    return {suffix: written(model, folder / f'model{suffix}', 'all', pixels='uint8-nhwc') for suffix in FILES}


@pytest.mark.parametrize('name', STRUCTURES.values())
def test_structures_in_onnxruntime_and_openvino(name, tmp_path):
    """One model for each structure of the graph."""
    narrow = {} if VARIANTS[name].token_layer == 'none' else {'token_dim': 8}
    model = small(name, embed_dim=4 * VARIANTS[name].num_heads, **narrow)
    size = model.img_size[0]
    path = written(model, tmp_path / 'model.onnx')
    check(model, load_exported(path, threads=1), 3, 3, size, size)
    check(model, load_exported(path, 'openvino', threads=1), 1, 3, size, size)


@pytest.mark.parametrize('suffix, runtime', [*((suffix, None) for suffix in FILES), ('.onnx', 'openvino')])
def test_any_size_with_uint8_pixels(suffix, runtime, model, files):
    """One file for all sizes, which normalises."""
    exported = load_exported(files[suffix], runtime)
    cfg = exported.preprocessing
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (cfg.mean, cfg.std))
    for shape in ((2, 3, 16, 16), (1, 3, 24, 40)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        images = (pixels / 255 - mean) / std
        with torch.inference_mode():
            torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-4)
        raw = exported.run(pixels.permute(0, 2, 3, 1).contiguous().numpy())
        assert np.array_equal(np.asarray(raw[0]), exported(images).numpy())  # the very same pixels
    with pytest.raises(ValueError, match=r'takes images of shape \(B, 3, H, W\), got \(1, 1, 16, 16\)'):
        exported(torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize(
    'suffix, args',
    [
        ('.xml', {'global_pool': 'avg', 'init_values': 0.5, 'norm_layer': 'rmsnorm'}),
        ('.pt2', {'norm_layer': 'rmsnorm'}),
    ],
)
def test_any_size_of_models_that_compute_all_tokens(suffix, args, tmp_path):
    model = small('t2t_vit_4_16', **args)
    path = written(model, tmp_path / f'model{suffix}', 'all')
    check(model, load_exported(path, threads=1), 2, 3, 24, 40)


class Adapted(torch.nn.Linear):
    """A Linear with an adapter, as peft has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.repeat(1, 1, 3)


def test_adapter_is_in_the_exported_graph(tmp_path):
    model = small('t2t_vit_4_16')
    model.blocks[0].attn.qkv.__class__ = Adapted
    check(model, load_exported(written(model, tmp_path / 'model.pt2')), 2, 3, 16, 16)


@pytest.mark.parametrize('suffix, converter', [('.onnx', 'torch.onnx.export'), ('.xml', 'openvino.convert_model')])
def test_failure_of_a_converter_is_explained(suffix, converter, model, tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError('no operator aten.new\nmore')

    monkeypatch.setattr(converter, fail)
    with pytest.raises(UsageError, match='^t2t_vit_4_16 cannot be written .*: no operator aten.new$'):
        written(model, tmp_path / f'model{suffix}')


@pytest.mark.parametrize('name, suffix, precision', [('t2t_vit_4_16', '.pt2', 'bf16'), ('vit_s_16', '.onnx', 'fp16')])
def test_half_precision_with_a_fixed_batch(name, suffix, precision, tmp_path):
    model = small(name)
    size = model.img_size[0]
    path = written(model, tmp_path / f'model{suffix}', 'none', precision=precision, batch=2)
    exported = load_exported(path)
    check(model, exported, 3, 3, size, size, tolerance=3e-2)  # three images by a file for two
    if suffix == '.onnx':
        check(model, load_exported(path, 'openvino'), 2, 3, size, size, tolerance=3e-2)
    assert weight_bytes(path) < 0.8 * 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match='another size needs another export'):
        exported(torch.zeros(1, 3, size + 8, size + 8))


@pytest.mark.parametrize('suffix', ['.onnx', '.xml'])
def test_int8_leaves_kernel_attention_in_float(suffix, model, files, tmp_path):
    import onnx
    import openvino

    metadata = described(model, 'all', precision='int8', pixels='uint8-nhwc')
    graph_of, save, read = (
        (int8.onnx_graph, save_onnx, onnx.load)
        if suffix == '.onnx'
        else (int8.openvino_graph, save_openvino, openvino.Core().read_model)
    )
    floats = read(files[suffix])
    graph = graph_of(floats)
    kept = int8.kept_in_float(graph)
    products = [name for name in kept if graph[name].kind == 'MatMul']
    assert len(products) == 2 * 4  # of two layers: φ's, Σ φ(k)ᵀv, the quotient's two
    assert [graph[name].kind for name in kept].count('Convolution') == 2  # the windows of the statistics
    assert not {graph[name].kind for name in kept} & {'Gelu', 'Softmax', 'LayerNormalization', 'MVN'}
    images = torch.randint(0, 256, (8, 1, 16, 16, 3), dtype=torch.uint8)
    path = tmp_path / f'model{suffix}'
    save(int8.quantize(floats, graph, list(images.numpy())), path, metadata)
    found = Comparison()
    exact, exported = load_exported(files[suffix]), load_exported(path)
    for image in images.numpy():
        found.add(*(torch.as_tensor(loaded.run(image)[0]) for loaded in (exact, exported)), None)
    assert 1e-3 < max(found.relative) < 0.3  # quantised, and not beyond recognition


def test_command_compares_the_file(digits_run, tmp_path, capsys):
    path = tmp_path / 'out' / 'digits.pt2'
    command = [
        'export',
        '-o',
        str(path),
        '--checkpoint',
        str(digits_run),
        '--data',
        'digits',
        '--rounds',
        '2',
        '--seconds',
        '0.01',
        '--max_images',
        '64',
        '--threads',
        '1',
    ]
    assert main(command) == 0
    report = json.loads((tmp_path / 'out' / 'digits.pt2.report.json').read_text())
    assert report['problems'] == [] and report['images'] == 64 and report['top1_agreement'] == 1
    assert report['top1_pytorch'] == report['top1_exported'] > 0.1
    assert report['relative_difference'] < 1e-4
    assert report['speed']['rounds'] == 2 and report['speed']['exported'][0] > 0
    text = (tmp_path / 'out' / 'digits.pt2.report.md').read_text()
    assert 'Within tolerance' in text and text.strip() in capsys.readouterr().out

    net, preprocessing, names, *_ = load_trained(str(digits_run))
    exported = load_exported(path)
    assert exported.class_names == names and exported.preprocessing == preprocessing
    cfg = exported.metadata.pretrained_cfg
    assert cfg['architecture'] == report['model'] == 't2t_vit_4_16'
    assert str(digits_run) not in json.dumps(cfg)  # no path of this machine leaves it

    assert main([*command, '--precision', 'bf16', '--tolerance', '1e-12', '--rounds', '0']) == 1
    assert 'outside tolerance: relative difference' in capsys.readouterr().err
    assert 'OUTSIDE' in (tmp_path / 'out' / 'digits.pt2.report.md').read_text()


def verdict(**changes: Any) -> list[str]:
    """Return the problems of a report."""
    report = Report.__new__(Report)
    values: dict[str, Any] = dict(
        relative_difference=1e-5, mean_relative_difference=1e-6, top1_agreement=1.0, images=1000, not_finite=0,
        labelled=1000, top1_pytorch=0.9, top1_exported=0.9, only_pytorch=0, only_exported=0,
        tolerance=TOLERANCES['float32'],
    )  # fmt: skip
    report.__dict__.update({**values, **changes})
    return report.problems


def test_verdict_beyond_tolerance():
    assert verdict() == []
    found = verdict(relative_difference=0.1, top1_agreement=0.5, top1_exported=0.8, only_pytorch=100)
    assert [problem.split()[0] for problem in found] == ['relative', 'first', 'top-1']
    assert verdict(relative_difference=None, not_finite=2) == [
        '2 images have logits that are not finite',
        'relative difference unknown, at most 0.001 allowed',
    ]
    limits = TOLERANCES['int8']
    assert not verdict(relative_difference=9.0, mean_relative_difference=0.1, tolerance=limits)  # of one image
    assert verdict(mean_relative_difference=0.3, tolerance=limits) == [
        'mean relative difference 0.3, at most 0.2 allowed'
    ]


def test_verdict_knows_sampling_error():
    """int8 allows 0.5 points: one image of 60 is 1.7 and shows nothing, nor do 6 of 600 beside 5 gained; 30 do."""
    int8_of = dict(tolerance=TOLERANCES['int8'], top1_exported=0.88)
    assert not verdict(images=60, labelled=60, only_pytorch=1, top1_agreement=59 / 60, **int8_of)
    assert not verdict(images=600, labelled=600, only_pytorch=6, only_exported=5, **int8_of)
    assert 'which shows at least' in verdict(images=600, labelled=600, only_pytorch=30, only_exported=5, **int8_of)[0]
    assert 'first class differs on 20.00 %' in verdict(images=600, top1_agreement=0.8, **int8_of)[0]
    assert not verdict(images=10, top1_agreement=0.8, **int8_of)


def test_comparison_counts_nan_and_infinity():
    ours, found = torch.arange(12.0).view(4, 3), Comparison()
    theirs = ours.clone()
    theirs[1, 2], theirs[2, 0] = float('nan'), float('inf')
    found.add(ours, theirs, torch.tensor([2, 2, 2, 2]))
    found.add(torch.zeros(1, 3), torch.zeros(1, 3), again=True)
    assert (found.broken, found.images, found.agreed, found.worst) == (2, 4, 2, 0) and found.right[0] == 4
    assert Comparison().worst is None


def test_data_of_other_classes_and_incomplete_batch(digits_run, photos, tmp_path, capsys):
    """They need --labels false; a batch is filled. Reports of two formats stand beside each other."""
    (tmp_path / 'm.bin').write_bytes(bytes(1 << 20))
    words = [
        '--checkpoint',
        str(digits_run),
        '--rounds',
        '1',
        '--seconds',
        '0.01',
        '--dynamic',
        'none',
        '--max_images',
        '3',
        '--threads',
        '1',
        '--data',
        str(photos),
    ]
    assert main(['export', '-o', str(tmp_path / 'm.onnx'), *words]) == 2
    assert f'the model has 10 classes, {photos} has 3' in capsys.readouterr().err
    words += ['--labels', 'false']
    assert main(['export', '-o', str(tmp_path / 'm.onnx'), *words]) == 0
    report = json.loads((tmp_path / 'm.onnx.report.json').read_text())
    assert report['top1_pytorch'] is None and report['images'] == 3 and report['bytes'] < 1 << 20
    int8_words = ['--precision', 'int8', '--calibration_images', '9', '--tolerance', '9']
    assert main(['export', '-o', str(tmp_path / 'm.xml'), *words, *int8_words]) in (0, 1)
    report = json.loads((tmp_path / 'm.xml.report.json').read_text())
    assert report['calibration'].startswith('9 images of') and (tmp_path / 'm.onnx.report.md').exists()


def test_invalid_options_are_refused_first(tmp_path, monkeypatch, capsys):
    (tmp_path / 'taken').touch()
    for wish, answer in (
        (['-o', 'm.onnx', '--model', 't2t_vit_4_16', '--precision', 'bf16'], 'no bf16'),
        (['-o', 'm.pt2', '--model', 't2t_vit_4_16', '--precision', 'int8'], 'write .xml or .onnx'),
        (['-o', 'm.onx', '--model', 't2t_vit_4_16'], 'did you mean .onnx?'),
        (['-o', f'{tmp_path}/taken/m.pt2', '--model', 't2t_vit_4_16'], 'taken is a file; expected a folder'),
        (['-o', 'm.pt2'], 'expected --checkpoint FOLDER, or --model NAME'),
        (['-o', 'm.pt2', '--model', 't2t_vit_4_61'], 'did you mean t2t_vit_4_16?'),
        (['-o', 'm.pt2', '--model', 't2t_vit_4_16', '--batch_size', '0', '--rounds', '-1'], 'rounds must be at least'),
    ):
        assert main(['export', *wish]) == 2
        assert answer in capsys.readouterr().err
    monkeypatch.setattr('t2t_vit.export.runtime.find_spec', lambda name: None)
    with pytest.raises(UsageError, match=r"openvino, not installed here: pip install 't2t-vit\[export\]'"):
        export(str(tmp_path / 'm.xml'), model='t2t_vit_4_16')


@pytest.mark.parametrize('suffix', ['.onnx', '.pt2', '.xml'])
def test_damaged_and_foreign_files_are_refused(suffix, files, tmp_path):
    whole, path = files[suffix].read_bytes(), tmp_path / f'model{suffix}'
    for content in (b'', b'<html>not found</html>', whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f'model{suffix}'):
            load_exported(path)
    with pytest.raises(CheckpointError, match='there is no file'):
        load_exported(tmp_path / f'none{suffix}')


def rewritten(file: Path, path: Path, changes: dict[str, tuple[bytes, bytes]], more: dict[str, bytes]) -> None:
    """Copy an archive with some bytes exchanged and more entries."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            for end, (a, b) in changes.items():
                assert not name.endswith(end) or a in content
                content = content.replace(a, b) if name.endswith(end) else content
            new.writestr(name, content)
        for name, content in more.items():
            new.writestr(name, content)


new_layout = pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 8), reason='another layout')
CODE = b"__import__('pathlib').Path('executed').touch()"


@new_layout
@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize(
    'change, more, answer',
    [
        ((b"Symbol('s", CODE + b" or Symbol('s"), {}, 'as expr_str'),
        ((b'"guards_code": []', b'"guards_code": ["' + CODE + b'"]'), {}, 'as guards_code'),
        (
            (b'"images"', b'"images=' + CODE + b'"'),
            {},
            'as name',
        ),  # of an argument, in the Python code that torch makes
        ((b'"torch.ops.aten.exp.default"', b'"torch.hub.load"'), {}, 'torch.hub.load.* as target'),
        ((b'"torch.ops.aten.exp.default"', b'"torch.ops.aten.from_file.default"'), {}, 'aten.from_file.* as target'),
        ((b'"torch.ops.aten.exp.default"', b'"torch.ops.aten.save.default"'), {}, 'aten.save.* as target'),
        ((b'"as_int": 1}', b'"as_string": "/etc/passwd"}'), {}, 'as as_string'),
        ((b'"as_int": 1}', b'"as_graph": {"name": ""}}'), {}, 'as as_graph'),
        ((rb'builtins.dict\", \"context\": \"[]', rb'builtins.dict\", \"context\": \"{}'), {}, 'as in_spec'),
        ((b'builtins.dict', b'collections.defaultdict'), {}, 'as in_spec'),
        (None, {'model/data/aotinductor/model/run.so': b'\x7fELF'}, 'run.so'),
        (None, {'model/models/model.json': b'{}'}, 'two records of one name'),
        (None, {'model/models/MODEL.json': b'{}'}, 'MODEL.json'),
        (None, {'model/extra/A': b'', 'model/extra/a': b''}, 'two records of one name'),
        (None, {'other/models/model.json': b'{}'}, 'more than one folder'),
        (None, {'model/extra/bomb': bytes(1 << 27)}, 'would take 13.* in memory'),
    ],
)
def test_pt2_executes_no_code(files, tmp_path, monkeypatch, change, more, answer):
    monkeypatch.chdir(tmp_path)
    rewritten(files['.pt2'], tmp_path / 'model.pt2', {'model.json': change} if change else {}, more)
    with pytest.raises(CheckpointError, match=answer):
        load_exported(tmp_path / 'model.pt2')
    assert [*tmp_path.iterdir()] == [tmp_path / 'model.pt2']


@new_layout
def test_pt2_with_foreign_weights_is_refused(files, tmp_path):
    for a, b, answer in (
        (b'"use_pickle": false', b'"use_pickle": true', "'True' as use_pickle"),
        (b'"weight_0"', b'"opaque_obj_0"', 'as path_name'),
        (b'"as_int": 3', b'"as_int": 30000000000', 'would take .* in memory'),
    ):
        rewritten(files['.pt2'], tmp_path / 'model.pt2', {'weights_config.json': (a, b)}, {})
        with pytest.raises(CheckpointError, match=answer):
            load_exported(tmp_path / 'model.pt2')
    torch.save((torch.zeros(1),), tmp_path / 'inputs')
    with zipfile.ZipFile(files['.pt2']) as old, zipfile.ZipFile(tmp_path / 'model.pt2', 'w') as new:
        for name in old.namelist():
            new.writestr(name, (tmp_path / 'inputs').read_bytes() if name.endswith('.pt') else old.read(name))
    with pytest.raises(CheckpointError, match='example inputs'):
        load_exported(tmp_path / 'model.pt2')


@pytest.mark.parametrize(
    'text, good',
    [
        ("Add(Mul(Integer(-3), Symbol('s0', positive=True, integer=True)), Pow(Symbol('u1'), Integer(2)))", True),
        ('4*s0//2 - 1', True),
        ('9**9**9**9', False),
        ('Pow(9, Pow(9, 9))', False),
        ('Pow(s0, Integer(99))', False),
        ('Pow(Pow(s0, Integer(9)), Integer(9))', False),
        ('s0.__class__', False),
        ("Symbol('os')", False),
        ('Add(*s0)', False),
        ('(lambda: s0)()', False),
        ('s0(1)', False),
        ('9' * 40, False),
        ('1j', False),
        ('', False),
        ('(' * 3000, False),
        ('-' * 1999 + 's0', False),
    ],
)
def test_is_size_allows_arithmetic_only(text, good):
    assert is_size(text) is good


def test_file_of_another_exporter_is_refused(files, tmp_path):
    import onnx

    proto = onnx.load(files['.onnx'])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / 'other.onnx')
    with pytest.raises(CheckpointError, match='was not written by `t2t-vit export`'):
        load_exported(tmp_path / 'other.onnx')


@pytest.mark.parametrize('size', [[32], [32, 0], [32, 32, 3], ['a', 'b'], 32])
def test_metadata_with_an_invalid_size(size):
    tree = {**json.loads(described(timm.create_model('t2t_vit_4_16'), 'all').to_text()), 'size': size}
    with pytest.raises(CheckpointError, match='its metadata cannot be read'):
        Metadata.of_text(json.dumps(tree), 'model.onnx')


def test_file_with_its_own_preprocessing(model, tmp_path):
    """It takes decoded images of any size, and its pixels are Pillow's and timm's."""
    path = written(model, tmp_path / 'm.onnx', pixels='image', batch=1)
    exported = load_exported(path)
    photos, transform = find_images(['samples']), exported.preprocessing.transform()
    for size in ((640, 427), (31, 50), (16, 16), (99, 17), (17, 18)):
        image = convert_image(photos.open(0)).resize(size)
        logits, features = exported.classify(np.asarray(image))
        with torch.inference_mode():
            expected = model(transform(image)[None])
        assert (logits - expected).abs().max() < 2e-3 * expected.abs().max()
        assert features.shape == (1, model.num_features)
    with pytest.raises(ValueError, match=r'call classify\(pixels\)'):
        exported(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r'expected uint8 \(H, W, 3\)'):
        exported.classify(np.zeros((9, 9), np.uint8))


def test_opset_and_latency(digits_run, tmp_path, capsys):
    import onnx

    path = tmp_path / 'm.onnx'
    words = ['--checkpoint', str(digits_run), '--threads', '1', '--rounds', '1', '--seconds', '0.01']
    assert main(['export', '-o', str(path), *words, '--opset', '20', '--pixels', 'image', '--max_images', '4']) == 0
    assert next(entry.version for entry in onnx.load(path).opset_import if not entry.domain) == 20
    report = json.loads((tmp_path / 'm.onnx.report.json').read_text())
    assert report['opset'] == 20 and report['latency']['batch_size'] == 1 and report['pixels'] == 'image'
    assert 'latency at batch 1' in capsys.readouterr().out
    assert main(['export', '-o', str(tmp_path / 'm.pt2'), *words, '--opset', '20', '--pixels', 'image']) == 2
    said = capsys.readouterr().err
    assert 'opset is for .onnx' in said and 'pixels image is for .onnx' in said


def test_onnx_with_external_data_is_refused(files, tmp_path):
    import onnx

    (tmp_path / 'secret').write_bytes(bytes(1 << 20))
    for location in ('secret', '../secret', '/etc/passwd', 'https://example.com/weights'):
        proto = onnx.load(files['.onnx'])
        weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.ClearField('raw_data')
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key='location', value=location)
        (tmp_path / 'm.onnx').write_bytes(proto.SerializeToString())
        for runtime in ('onnxruntime', 'openvino'):
            with pytest.raises(CheckpointError, match=f'keeps 1 tensors in other files .{location}'):
                load_exported(tmp_path / 'm.onnx', runtime)


@pytest.mark.parametrize('text', ['a|b', 'a<b', 'a\nb', 'a$b', 'a\\b'])
def test_markdown_cells_hold_any_text(text):
    assert not re.search(r'(?<!\\)[|$]|<|\n', markdown_cell(text))
