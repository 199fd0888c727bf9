"""Published layouts, files that must be refused, and the fit to other classes, channels and sizes."""

import argparse
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import threading
import urllib.error
from collections import OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv, build_model_with_cfg

from t2t_vit.models.checkpoints import convert_state_dict, load_weights
from t2t_vit.models.published import PUBLISHED
from t2t_vit.models.safe_load import CheckpointError, read_checkpoint, save_weights, verify_file
from t2t_vit.models.timm_api import TimmT2TViT

GOLDEN = Path(__file__).parents[1] / 'golden'
TOKEN_LAYERS = ('performer', 'transformer', 'convolution', 'residual', 'none')


def tiny(token_layer: str = 'performer', **kwargs) -> TimmT2TViT:
    """Build the model of the golden files, untrained."""
    splits = {'splits': ((16, 16, 0),)} if token_layer == 'none' else {}
    return TimmT2TViT(
        token_layer=token_layer,
        **{
            **dict(token_dim=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, img_size=64, num_classes=10),
            **splits,
            **kwargs,
        },
    ).eval()


def perturbed(model: TimmT2TViT) -> TimmT2TViT:
    """Add noise to every parameter, biases and norms too."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def golden_distance(model: TimmT2TViT, figures: str) -> float:
    golden = load_file(GOLDEN / figures)
    return distance(model(golden['input']), golden['logits'])


def release_layout(model: TimmT2TViT) -> dict:
    """Return a checkpoint as the official training saves it; its raw weights are zeros."""
    weights = model.state_dict()
    return {
        'epoch': 309,
        'arch': 'name',
        'optimizer': {},
        'args': argparse.Namespace(lr=5e-4),
        'version': 2,
        'metric': 81.5,
        'state_dict': {f'module.{name}': torch.zeros_like(tensor) for name, tensor in weights.items()},
        'state_dict_ema': OrderedDict(weights),
    }


LAYOUTS = [
    ('performer', 'tiny_performer.pth.tar', 'tiny_performer.safetensors'),
    ('transformer', 'tiny_transformer.pth.tar', 'tiny_transformer.safetensors'),
    ('performer', 'cifar_layout_performer.pth', 'tiny_performer.safetensors'),
]


@pytest.mark.parametrize('token_layer, file, figures', LAYOUTS)
def test_published_layouts_match_the_published_logits(token_layer, file, figures):
    model = tiny(token_layer)
    assert load_weights(model, GOLDEN / file) == []
    assert golden_distance(model, figures) <= 1e-5


def test_mmpretrain_1x_matches_the_golden_logits(tmp_path):
    """The golden logits come from mmpretrain 1.x, which multiplies q·k by √d; the release divides."""
    model, file = tiny('transformer'), GOLDEN / 'mmpretrain_transformer.pth'
    assert load_weights(model, file, mmpretrain_1x=True) == []
    assert golden_distance(model, 'mmpretrain_transformer.safetensors') <= 1e-5

    checkpoint = dict(read_checkpoint(file), meta={'mmengine_version': '0.10.1'})  # as 1.x notes itself
    torch.save(checkpoint, tmp_path / 'new.pth')
    load_weights(model, tmp_path / 'new.pth')
    assert golden_distance(model, 'mmpretrain_transformer.safetensors') <= 1e-5


def test_mmcls_0x_keeps_its_scale():
    """Published weights are from 0.x: every tensor unchanged, under our names."""
    checkpoint = read_checkpoint(GOLDEN / 'mmpretrain_transformer.pth')
    model = tiny('transformer')
    converted = convert_state_dict(checkpoint, model)
    assert list(converted) == list(model.state_dict())
    assert all(ours is tensor for ours, tensor in zip(converted.values(), checkpoint['state_dict'].values()))


@pytest.mark.parametrize(
    'token_layer, file', [('performer', 'tiny_performer.pth.tar'), ('transformer', 'mmpretrain_transformer.pth')]
)
def test_safetensors_round_trip(token_layer, file, tmp_path):
    path = tmp_path / 'model.safetensors'
    converted = convert_state_dict(read_checkpoint(GOLDEN / file), tiny(token_layer))
    save_weights(converted, path, {'model': 'tiny'})
    assert os.listdir(tmp_path) == [path.name]
    again = read_checkpoint(path)
    assert again.keys() == converted.keys() and all(torch.equal(again[name], converted[name]) for name in again)
    model = tiny(token_layer)
    assert load_weights(model, path) == []
    assert all(torch.equal(tensor, converted[name]) for name, tensor in model.state_dict().items())


def test_raw_weights_on_request():
    checkpoint = read_checkpoint(GOLDEN / 'tiny_performer.pth.tar')
    raw = convert_state_dict(checkpoint, tiny(), ema=False)
    assert all(not tensor.any() for tensor in raw.values())
    del checkpoint['state_dict']
    with pytest.raises(CheckpointError, match='state_dict or model or net'):
        convert_state_dict(checkpoint, tiny(), ema=False)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: weights,
        lambda weights: {'model': weights},
        lambda weights: {'model_ema': weights, 'model': {}},
        lambda weights: {'state_dict_ema': None, 'state_dict': weights},
        lambda weights: {f'module._orig_mod.{name}': tensor for name, tensor in weights.items()},
        lambda weights: {f'_orig_mod.module.{name}': tensor for name, tensor in weights.items()},
        lambda weights: {'epoch': 3, 'state_dict': {f'net.model.{name}': tensor for name, tensor in weights.items()}},
        lambda weights: {'state_dict': {f'backbone.{name}': tensor for name, tensor in weights.items()}},
        lambda weights: {  # Lightning
            'state_dict': {
                **{f'model.net.{name}': tensor for name, tensor in weights.items()},
                'criterion.weight': torch.ones(3),
            },
            'pytorch-lightning_version': '2.6',
        },
    ],
)
def test_other_wrappings(wrap):
    weights = tiny().state_dict()
    converted = convert_state_dict(wrap(weights), tiny())
    assert converted.keys() == weights.keys() and all(converted[name] is weights[name] for name in weights)


def test_old_torch_files(tmp_path):
    torch.save(release_layout(tiny()), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert load_weights(tiny(), tmp_path / 'old.pth') == []


def test_conversion_changes_neither_argument():
    checkpoint = read_checkpoint(GOLDEN / 'tiny_performer.pth.tar')
    weights = checkpoint['state_dict_ema']
    names, before = list(weights), {name: tensor.clone() for name, tensor in weights.items()}
    model = tiny(in_chans=1, num_classes=3, img_size=96)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert_state_dict(checkpoint, model)
    assert list(weights) == names and all(torch.equal(weights[name], before[name]) for name in names)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in model.state_dict().items())


# Files that must be refused


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


@pytest.mark.parametrize(
    'write',
    [
        lambda obj, path: torch.save(obj, path),
        lambda obj, path: torch.save(obj, path, _use_new_zipfile_serialization=False),
        lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2)),
        lambda obj, path: path.write_bytes(pickle.dumps(obj)),
    ],
    ids=['zip', 'old', 'pickle 2', 'pickle'],
)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_pickle_with_other_types_is_refused_unexecuted(write, tmp_path):
    marker, path = tmp_path / 'executed', tmp_path / 'model.pth.tar'
    write({'state_dict': tiny().state_dict(), 'args': Attack(marker)}, path)
    with pytest.raises(CheckpointError, match='nothing in it was executed|not a whole torch.save'):
        read_checkpoint(path)
    assert not marker.exists()


def test_error_names_the_class_of_a_pickled_model(tmp_path):
    torch.save(tiny(), tmp_path / 'whole.pth')
    with pytest.raises(CheckpointError, match='asks for t2t_vit.models.timm_api.TimmT2TViT'):
        read_checkpoint(tmp_path / 'whole.pth')


def test_allowed_types_are_reset_after_reading(tmp_path):
    before = torch.serialization.get_safe_globals()
    read_checkpoint(GOLDEN / 'tiny_performer.pth.tar')
    (tmp_path / 'bad.pth').write_bytes(b'PK\x03\x04')
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / 'bad.pth')
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize('file', ['tiny_performer.pth.tar', 'tiny_performer.safetensors', 'old.pth'])
@pytest.mark.parametrize('part', [0, 3, 8, 9, 100, 1000, 0.5, 0.9, -1])
def test_truncated_files(file, part, tmp_path):
    whole = io.BytesIO()
    if file == 'old.pth':
        torch.save(tiny().state_dict(), whole, _use_new_zipfile_serialization=False)
    content = whole.getvalue() or (GOLDEN / file).read_bytes()
    path = tmp_path / file
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(CheckpointError, match=f'{file} is (empty|of an unknown kind|.*damaged or truncated)'):
        read_checkpoint(path)


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'is empty'),
        (b'\n<!DOCTYPE html>\n<html><body>Not Found</body></html>', 'is a web page'),
        (b'<html>' + b' ' * 1000, 'is a web page'),
        (b'Not Found', "of an unknown kind, starting with b'Not Found'"),
        (bytes(range(255, 0, -1)) * 20, 'of an unknown kind'),
        (b'\x80\x02' + bytes(range(256)), 'damaged or truncated'),
        (b'\x10\0\0\0\0\0\0\0{"a": "b"}', 'damaged or truncated safetensors file'),
    ],
)
def test_other_files_are_refused(content, words, tmp_path):
    path = tmp_path / 'model.pth.tar'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_tar_archive_is_refused(tmp_path):
    path = tmp_path / 'model.pth.tar'
    with tarfile.open(path, 'w') as tar:
        tar.add(__file__, 'model.pth')
    with pytest.raises(CheckpointError, match='a tar archive'):
        read_checkpoint(path)


def test_missing_files_and_other_contents(tmp_path):
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        load_weights(tiny(), tmp_path / 'none.pth')
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match='holds a list; expected a dict'):
        read_checkpoint(tmp_path / 'list.pth')


@pytest.mark.parametrize(
    'checkpoint',
    [{}, {'state_dict': {}}, {'epoch': 3, 'acc': 0.5}, {'net': {'a': 'text'}}, {'net': {0: torch.zeros(1)}}],
)
def test_checkpoints_without_weights(checkpoint):
    with pytest.raises(CheckpointError, match='found no weights under .*; expected tensors by name'):
        convert_state_dict(checkpoint, tiny())


def test_file_of_another_model_leaves_the_model_unchanged(tmp_path):
    model = tiny()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cases = {
        'resnet': (
            timm.create_model('resnet18').state_dict(),
            [
                r'found 122 tensors \(conv1.weight, bn1.weight, bn1.bias, ',
                '54 missing: cls_token, pos_embed, ',
                '122 unexpected: conv1.weight, ',
                "expected a T2T-ViT of depth 2 and width 32, token layer 'performer'",
            ],
        ),
        'deeper': (
            tiny(depth=3).state_dict(),
            [
                "depth 3 and width 32, token layer 'performer'; expected a T2T-ViT of depth 2",
                '11 unexpected: blocks.2.norm1.weight, blocks.2.norm1.bias, ',
            ],
        ),
        'shallower': (tiny(depth=1).state_dict(), ['11 missing: blocks.1.norm1.weight, ']),
        'wider': (
            tiny(embed_dim=48).state_dict(),
            ['depth 2 and width 48', r'with another shape: cls_token \(1, 1, 48\) instead of \(1, 1, 32\), pos_embed'],
        ),
        'transformer': (
            tiny('transformer').state_dict(),
            ["token layer 'transformer'", '18 missing: tokens_to_token.attention1.w, ', 'unexpected: '],
        ),
    }
    for name, (weights, messages) in cases.items():
        path = tmp_path / f'{name}.pth'
        torch.save(weights, path)
        for message in [f'{path}: found ', *messages]:
            with pytest.raises(CheckpointError, match=message):
                load_weights(model, path)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('name', ['cls_token', 'pos_embed', 'tokens_to_token.attention1.norm1.bias', 'head.weight'])
@pytest.mark.parametrize('tensor', [None, torch.zeros(()), torch.zeros(5), torch.zeros(2, 3, 5), torch.zeros(1, 0, 32)])
def test_malformed_state_dicts(name, tensor):
    weights = {key: value for key, value in tiny().state_dict().items() if key != name}
    if tensor is not None:
        weights[name] = tensor
    if name == 'head.weight':  # may be missing
        assert name not in convert_state_dict(weights, tiny(in_chans=1))
    else:
        with pytest.raises(CheckpointError, match='found'):
            convert_state_dict(weights, tiny(in_chans=1))


# Other classes, sizes, channels


@pytest.mark.parametrize('classes', [3, 0])
def test_head_swap(classes):
    model = tiny(num_classes=classes)
    head = model.state_dict().get('head.weight')
    missing = load_weights(model, GOLDEN / 'tiny_performer.pth.tar')
    assert missing == ([] if classes == 0 else ['head.weight', 'head.bias'])
    golden = load_file(GOLDEN / 'tiny_performer.safetensors')
    assert distance(model.forward_features(golden['input']), golden['norm']) <= 1e-5
    assert head is None or torch.equal(model.head.weight, head)


def test_file_without_head_keeps_the_initial_head():
    weights = tiny(num_classes=0).state_dict()
    assert 'head.weight' not in convert_state_dict(weights, tiny())


@pytest.mark.parametrize('img_size', [128, 32, (96, 160), (32, 128)])
def test_position_table_is_resized(img_size):
    source, model = perturbed(tiny()), tiny(img_size=img_size)
    source.pos_embed += torch.randn(1, 17, 32)
    model.load_state_dict(convert_state_dict(source.state_dict(), model))
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])
    if model.grid_size[0] * model.grid_size[1] == 16:  # (32, 128): 2×8 tokens, taken as they are
        assert torch.equal(model.pos_embed, source.pos_embed)
    else:  # as the source itself does on such an image
        image = torch.randn(1, 3, *model.img_size)
        assert distance(model(image), source(image)) <= 1e-5


@torch.no_grad()
def test_published_position_table_is_taken_as_square():
    """Also if it has as many tokens as the model: 4×4 in the file, 2×8 in the model."""
    source, model = perturbed(tiny()), tiny(img_size=(32, 128))
    source.pos_embed += torch.randn(1, 17, 32)
    model.load_state_dict(convert_state_dict({'state_dict': source.state_dict()}, model))
    image = torch.randn(1, 3, 32, 128)
    assert distance(model(image), source(image)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('sizes', [(64, (32, 128)), ((32, 128), 64), ((32, 128), (128, 32)), ((32, 96), 64)], ids=str)
def test_table_of_rows_and_columns_tells_its_grid(sizes, dtype):
    """Also where another grid has as many tokens: 4×4, 2×8 and 8×2."""
    source, model = (perturbed(tiny(weight_init='scaled', img_size=size)) for size in sizes)
    weights = {name: tensor.to(dtype) for name, tensor in source.state_dict().items()}
    source.load_state_dict(weights)
    model.load_state_dict(convert_state_dict(weights, model))
    image = torch.randn(1, 3, *model.img_size)
    assert distance(model(image), source(image)) <= (1e-5 if dtype == torch.float32 else 1e-3)


@torch.no_grad()
@pytest.mark.parametrize('sizes', [(64, (32, 128)), ((32, 128), 64), ((32, 96), 64)], ids=str)
def test_image_size_of_training_tells_the_grid_of_a_table(sizes):
    source, model = (perturbed(tiny(img_size=size)) for size in sizes)
    source.pos_embed += torch.randn_like(source.pos_embed)
    model.load_state_dict(convert_state_dict(source.state_dict(), model, img_size=sizes[0]))
    image = torch.randn(1, 3, *model.img_size)
    assert distance(model(image), source(image)) <= 1e-5


def test_image_size_that_does_not_fit_the_table_is_ignored():
    weights = tiny().state_dict()
    assert torch.equal(convert_state_dict(weights, tiny(), img_size=224)['pos_embed'], weights['pos_embed'])


@torch.no_grad()
@pytest.mark.parametrize('size', [(16, 64), (64, 16)], ids=str)
def test_timm_builds_a_saved_model_for_another_grid_of_as_many_tokens(tmp_path, size):
    """32² has 8×8 tokens, 16×64 4×16; the model of the second size also for itself."""
    trained = dict(img_size=size, pretrained_cfg_overlay=dict(input_size=(3, *size)))
    source = timm.create_model('t2t_vit_7_32', depth=1, **trained).eval()
    timm.models.save_for_hf(source, tmp_path, model_args=dict(depth=1, img_size=size))
    image = torch.randn(1, 3, 32, 32)
    for img_size in (32, size):
        model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=img_size).eval()
        assert distance(model(image), source(image)) <= 1e-5


@torch.no_grad()
@pytest.mark.skipif('pretrained_model_args' not in signature(build_model_with_cfg).parameters, reason='older timm')
def test_saved_arguments_tell_the_grid_before_the_saved_configuration(tmp_path):
    """The configuration says 32², the model was built for 16×64."""
    source = timm.create_model('t2t_vit_7_32', depth=1, img_size=(16, 64))
    timm.models.save_for_hf(source, tmp_path, model_args=dict(depth=1, img_size=(16, 64)))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_non_square_position_table_is_refused():
    weights = tiny(img_size=(64, 96)).state_dict()
    convert_state_dict(weights, tiny(img_size=(64, 96)))
    with pytest.raises(CheckpointError, match='table for 24 tokens.* or 16 tokens for 4×4'):
        convert_state_dict(weights, tiny())


@torch.no_grad()
@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
@pytest.mark.parametrize('in_chans', [1, 6])
def test_grey_image_gives_the_same_logits_in_any_number_of_channels(token_layer, in_chans):
    source, model = perturbed(tiny(token_layer)), tiny(token_layer, in_chans=in_chans)
    model.load_state_dict(convert_state_dict(source.state_dict(), model))
    grey = torch.randn(2, 1, 64, 64)
    assert distance(model(grey.expand(-1, in_chans, -1, -1)), source(grey.expand(-1, 3, -1, -1))) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
@pytest.mark.parametrize('in_chans', [1, 2, 4])
def test_first_layer_is_adapted_as_a_convolution(token_layer, in_chans):
    """The linear map of an image, with LayerNorm's gamma, is adapted as timm adapts a first convolution."""
    source, model = perturbed(tiny(token_layer)), tiny(token_layer, in_chans=in_chans)
    weights = source.state_dict()
    adapted = convert_state_dict(weights, model)
    name = {
        'performer': 'attention1.kqv',
        'transformer': 'attention1.attn.qkv',
        'convolution': 'attention1.conv',
        'residual': 'attention1.conv1',
        'none': 'project',
    }[token_layer]
    kernel = source.tokens_to_token.splits[0].kernel

    def image_map(state_dict, chans):
        weight = state_dict[f'tokens_to_token.{name}.weight'].reshape(-1, chans, kernel, kernel)
        if token_layer not in ('performer', 'transformer'):
            return weight
        return weight * state_dict['tokens_to_token.attention1.norm1.weight'].view(chans, kernel, kernel)

    found, expected = image_map(adapted, in_chans), adapt_input_conv(in_chans, image_map(weights, 3))
    if token_layer == 'transformer':  # whose scale is window_dim^-1/2, so q makes up for it
        found = torch.cat([found[:16] / (in_chans / 3) ** 0.5, found[16:]])
    if token_layer in ('performer', 'transformer'):  # normalised values do not see a constant
        found = found - found.mean((1, 2, 3), keepdim=True)
        expected = expected - expected.mean((1, 2, 3), keepdim=True)
        model.load_state_dict(adapted)
        ours, theirs = (
            net.tokens_to_token.attention1(torch.zeros(1, net.tokens_to_token.in_chans, 64, 64))
            for net in (model, source)
        )
        assert distance(ours, theirs) <= 1e-5  # a flat image shows what beta alone adds
    assert distance(found, expected) <= 1e-5
    again = convert_state_dict(adapted, model)
    assert all(torch.equal(again[key], adapted[key]) for key in adapted)


def test_half_precision_stays():
    weights = {name: tensor.half() for name, tensor in tiny().state_dict().items()}
    adapted = convert_state_dict(weights, tiny(in_chans=1, img_size=96))
    assert {tensor.dtype for tensor in adapted.values()} == {torch.float16}


def test_kernel_of_another_size_is_not_adapted_as_channels():
    patches = partial(tiny, 'none', depth=1)
    weights = patches(splits=((32, 32, 0),), img_size=128).state_dict()
    with pytest.raises(CheckpointError, match=r'tokens_to_token.project.weight \(32, 3072\) instead of \(32, 256\)'):
        convert_state_dict(weights, patches(in_chans=1))


# Download, by timm's and torch.hub's own code


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def perturbed_norms(model: TimmT2TViT) -> TimmT2TViT:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    """Serve a release file of t2t_vit_7; yield its model and address."""
    folder = tmp_path_factory.mktemp('release')
    torch.manual_seed(0)
    model = perturbed_norms(timm.create_model('t2t_vit_7').eval())
    torch.save(release_layout(model), folder / 'T2T_ViT_7.pth.tar')
    save_weights(model.state_dict(), folder / 'model.safetensors')
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield model, f'http://127.0.0.1:{server.server_port}', folder
    server.shutdown()
    thread.join()
    server.server_close()


def pretrained(overlay: dict, cache_dir: Path, **kwargs) -> TimmT2TViT:
    return timm.create_model(
        't2t_vit_7', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **kwargs
    ).eval()


@torch.no_grad()
def test_download(release, tmp_path):
    source, address, _ = release
    overlay = dict(url=f'{address}/T2T_ViT_7.pth.tar', custom_load=True)
    image = torch.randn(1, 1, 224, 224).expand(-1, 3, -1, -1)
    assert torch.equal(pretrained(overlay, tmp_path)(image), source(image))
    assert [path.name for path in tmp_path.rglob('*.tar')] == ['T2T_ViT_7.pth.tar']

    fine_tuned = pretrained(overlay, tmp_path, num_classes=10)
    assert fine_tuned(image).shape == (1, 10)
    assert torch.equal(fine_tuned.forward_features(image), source.forward_features(image))

    assert distance(pretrained(overlay, tmp_path, in_chans=1)(image[:, :1]), source(image)) <= 1e-4

    resized, image = pretrained(overlay, tmp_path, img_size=(256, 192)), torch.randn(1, 3, 256, 192)
    assert resized.grid_size == (16, 12)
    assert distance(resized(image), source(image)) <= 1e-5

    features = pretrained(overlay, tmp_path, features_only=True)
    assert torch.equal(features(image)[0], source.forward_intermediates(image, [0], intermediates_only=True)[0])


@torch.no_grad()
@pytest.mark.parametrize('custom_load', [True, False])
def test_timm_loads_a_local_file(release, tmp_path, custom_load):
    source, _, folder = release
    overlay = dict(file=str(folder / 'model.safetensors'), custom_load=custom_load)
    image = torch.randn(1, 1, 224, 224)
    model = pretrained(overlay, tmp_path, in_chans=1, num_classes=10)
    expected = source.forward_features(image.expand(-1, 3, -1, -1))
    assert distance(model.forward_features(image), expected) <= 1e-4


@pytest.mark.parametrize('custom_load', [True, False])
def test_timm_refuses_a_file_of_another_model(release, tmp_path, custom_load):
    save_weights(timm.create_model('resnet18').state_dict(), tmp_path / 'resnet.safetensors')
    overlay = dict(file=str(tmp_path / 'resnet.safetensors'), custom_load=custom_load)
    with pytest.raises(CheckpointError, match='122 unexpected'):
        pretrained(overlay, tmp_path, num_classes=10)


@pytest.mark.parametrize('known, sentence', [(dict(size=1), 'expected 1$'), (dict(sha256='00' * 32), 'expected 00')])
def test_download_with_wrong_hash_is_refused(release, tmp_path, monkeypatch, known, sentence):
    address = release[1]
    row = PUBLISHED['t2t_vit_7.in1k']._replace(file='T2T_ViT_7.pth.tar', **known)
    monkeypatch.setitem(PUBLISHED, 't2t_vit_7.in1k', row)
    with pytest.raises(CheckpointError, match=sentence):
        pretrained(dict(url=f'{address}/T2T_ViT_7.pth.tar', custom_load=True), tmp_path)


def test_save_to_unwritable_path_raises(tmp_path):
    with pytest.raises(OSError, match='cannot write .*model.safetensors'):
        save_weights({'a': torch.zeros(1)}, tmp_path / 'missing' / 'model.safetensors')


def test_missing_download_is_an_error(release, tmp_path):
    _, address, folder = release
    with pytest.raises(urllib.error.HTTPError, match='404'):
        pretrained(dict(url=f'{address}/no_such_file.pth.tar', custom_load=True), tmp_path)
    (folder / 'page.pth.tar').write_text('<html>moved</html>')
    with pytest.raises(CheckpointError, match='is a web page'):
        pretrained(dict(url=f'{address}/page.pth.tar', custom_load=True), tmp_path)


def test_verify_file_checks_size_and_hash(tmp_path):
    path = tmp_path / 'tiny.pth.tar'
    shutil.copy(GOLDEN / 'tiny_performer.pth.tar', path)
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    verify_file(path)
    verify_file(path, size, sha256.upper())
    with pytest.raises(CheckpointError, match=f'has {size} bytes; expected {size + 1}'):
        verify_file(path, size + 1, sha256)
    with pytest.raises(CheckpointError, match=f'has SHA-256 {sha256}; expected 00'):
        verify_file(path, size, '00' * 32)


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / 'model.safetensors'
    save_weights({'a': torch.zeros(1)}, path)
    with pytest.raises(TypeError):
        save_weights({'a': torch.ones(1)}, path, {'epoch': 3})  # metadata is text
    assert os.listdir(tmp_path) == [path.name]
    assert not load_file(path)['a'].any()
