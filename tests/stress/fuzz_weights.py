"""Make damaged and hostile checkpoints of every published layout, run folders and training states."""

import argparse
import copy
import io
import json
import math
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from fuzz import Case
from fuzz_damage import NASTY, mangle, mangle_tree
from fuzz_twins import LAYOUTS, digest, encode_weights
from safetensors.torch import save as save_safetensors
from test_checkpoints import GOLDEN, release_layout, tiny

from t2t_vit import cli
from t2t_vit.models.checkpoints import load_weights
from t2t_vit.train.state import load_state
from t2t_vit.trained import load_trained, save_folder

SMALL = dict(depth=1, token_dim=16, num_classes=3)  # a t2t_vit_4_16 that loads quickly


class Payload:
    """Pickle as a call, which leaves a file or does worse if a reader executes pickles."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def payloads() -> list[Payload]:
    import builtins
    import operator
    import subprocess
    import webbrowser

    code = "open('executed', 'w').close()"
    inner = pickle.dumps(Payload(os.system, 'touch executed'))
    rebuild = torch._utils._rebuild_tensor_v2
    return [
        Payload(os.system, 'touch executed'),
        Payload(os.mkdir, 'executed'),
        Payload(builtins.exec, code),
        Payload(builtins.eval, code),
        Payload(builtins.open, 'executed', 'w'),
        Payload(builtins.__import__, 'antigravity'),
        Payload(subprocess.check_call, ['touch', 'executed']),
        Payload(pickle.loads, inner),
        Payload(torch.load, io.BytesIO(inner)),
        Payload(torch.storage._load_from_bytes, inner),
        Payload(shutil.rmtree, '.'),
        Payload(operator.attrgetter('system'), os.path),
        Payload(partial, os.system, 'touch executed'),
        Payload(webbrowser.open, 'http://127.0.0.1'),
        Payload(bytearray, 10**12),
        Payload(builtins.range, 10**12),
        Payload(torch.zeros, 10**12),
        Payload(rebuild, torch.FloatStorage(1), 0, (10**9, 10**9), (0, 0), False, {}),
        Payload(rebuild, torch.FloatStorage(4), -8, (10**9,), (1,), False, {}),
        Payload(getattr, torch, 'load'),
        Payload(type, 'T', (), {}),
    ]


def mangle_weights(rng: random.Random, weights: dict[Any, Any]) -> tuple[dict[Any, Any], str]:
    """Drop, rename, exchange, reshape, convert or enlarge one to three tensors of a state dict."""
    weights, done = dict(weights), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice([*weights] or [''])
        tensor = weights.get(name)
        if not isinstance(tensor, torch.Tensor):
            continue
        kind, value = rng.choice(
            [
                ('drop', None),
                ('rename', None),
                ('exchange', None),
                ('flat', lambda t: t.flatten()),
                ('turned', lambda t: t.mT if t.ndim > 1 else t),
                ('one more axis', lambda t: t[None]),
                ('scalar', lambda t: torch.tensor(1.0)),
                ('empty', lambda t: t.new_zeros(0, *t.shape[1:])),
                ('longer', lambda t: torch.cat([t, t]) if t.ndim else t),
                ('shorter', lambda t: t[:1] if t.ndim else t),
                (
                    'other dtype',
                    lambda t: t.to(
                        rng.choice(
                            (
                                torch.int8,
                                torch.bool,
                                torch.float16,
                                torch.bfloat16,
                                torch.complex64,
                                torch.float64,
                                torch.float8_e5m2,
                            )
                        )
                    ),
                ),
                ('nan', lambda t: torch.full_like(t, math.nan)),
                ('inf', lambda t: torch.full_like(t, math.inf)),
                ('sparse', lambda t: t.to_sparse()),
                ('meta', lambda t: t.to('meta')),
                ('absurd', lambda t: torch.zeros(1).expand(10**6, *(10**6 for _ in t.shape[1:]))),
                ('wide', lambda t: torch.zeros(1).expand(*t.shape[:-1], 10**9)),
                ('many classes', lambda t: torch.zeros(1).expand(10**8, *t.shape[1:])),
                ('not a tensor', lambda t: rng.choice(NASTY)),
                ('quantized', lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
                ('parameter', lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point())),
                ('strided', lambda t: t.new_zeros(1).expand(t.shape)),
            ]
        )
        if kind == 'drop':
            del weights[name]
        elif kind == 'rename':
            weights[
                rng.choice(
                    (
                        f'module.{name}',
                        f'{name}.',
                        '',
                        name[1:],
                        7,
                        f'backbone.{name}',
                        'x' * 5000,
                        '\x1b[2J',
                        'head.weight',
                        'pos_embed',
                        'cls_token',
                        'blocks.0',
                        'blocks.9999.x',
                    )
                )
            ] = weights.pop(name)
        elif kind == 'exchange':
            other = rng.choice([*weights])
            weights[name], weights[other] = weights[other], weights[name]
        else:
            weights[name] = value(tensor)
        done.append(f'{name[:40]} {kind}' if isinstance(name, str) else f'{name} {kind}')
    return weights, ', '.join(done) or 'nothing'


def rewrite_zip(rng: random.Random, content: bytes, donor: bytes) -> tuple[bytes, str]:
    """Change, drop, rename, repeat or compress one record of an archive; its checksums stay right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [i for i, (name, _) in enumerate(records) if name.endswith('.pkl')]
    at = pickles[0] if pickles and rng.random() < 0.6 else rng.randrange(len(records))
    name, record = records[at]
    kind = rng.choice(('mangle', 'mangle', 'mangle', 'drop', 'rename', 'twice', 'foreign', 'packed', 'bomb'))
    if kind == 'mangle':
        record, how = mangle(rng, record, (donor,))
        records[at], kind = (name, record), how
    elif kind == 'drop':
        del records[at]
    elif kind == 'rename':
        records[at] = (
            rng.choice(('data.pkl', '../../outside', '/outside', name.upper(), name + '/', 'a/constants.pkl')),
            record,
        )
    elif kind == 'twice':
        records.append((name + rng.choice(('', '2')), record))
    elif kind == 'foreign':
        records[at] = (name, donor)
    elif kind == 'bomb':
        data = [i for i, (name, _) in enumerate(records) if '/data/' in name]
        at = rng.choice(data or [at])
        records[at] = (records[at][0], bytes(1 << 28))
    written = io.BytesIO()
    with zipfile.ZipFile(
        written, 'w', zipfile.ZIP_DEFLATED if kind in ('packed', 'bomb') else zipfile.ZIP_STORED, compresslevel=1
    ) as archive:
        for name, record in records:
            archive.writestr(name, record)
    return written.getvalue(), f'{name}: {kind}'


def rewrite_header(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Change the header of a safetensors file, with a right or a wrong length."""
    size = int.from_bytes(content[:8], 'little')
    header, what = mangle_tree(rng, json.loads(content[8 : 8 + size]))
    text = json.dumps(header, default=str).encode()
    length = rng.choice((len(text), len(text), len(text), rng.choice((0, 1, size + 8, 1 << 31, 1 << 40, 2**64 - 1))))
    return length.to_bytes(8, 'little') + text + content[8 + size :], what


def written(obj: Any, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def answer(folder: Path) -> str:
    """Return what a model folder answers: a digest of its weights, its classes and its preprocessing."""
    net, preprocessing, names, *_ = load_trained(str(folder))
    return f'{digest(net.state_dict())} {names} {preprocessing}'


class Checkpoints:
    """Make files of weights in every published layout, run folders, and training states."""

    def __init__(self, seeds: Path) -> None:
        torch.manual_seed(0)
        self.folder = seeds / 'run'
        self.folder.mkdir()
        self.net = timm.create_model('t2t_vit_4_16', **SMALL)
        save_folder(self.net, self.folder, SMALL)
        self.config = json.loads((self.folder / 'config.json').read_text())
        del self.config['sha256']
        self.state = dict(position=dict(epoch=1, step=2), model=self.net.state_dict(), config='model: t2t_vit_4_16\n')
        weights = tiny().state_dict()
        self.models = {layer: tiny(layer) for layer in ('performer', 'transformer')}
        self.weights = dict(performer=weights, transformer=self.models['transformer'].state_dict())
        published = [
            (GOLDEN / name, layer)
            for name, layer in (
                ('tiny_performer.pth.tar', 'performer'),
                ('tiny_transformer.pth.tar', 'transformer'),
                ('cifar_layout_performer.pth', 'performer'),
                ('mmpretrain_transformer.pth', 'transformer'),
            )
        ]
        self.files = [(file.name, file.read_bytes(), layer) for file, layer in published] + [
            ('release', written(release_layout(tiny())), 'performer'),
            ('old', written(weights, True), 'performer'),
            ('raw', written(weights), 'performer'),
            ('safetensors', save_safetensors(weights), 'performer'),
        ]

    def make(self, rng: random.Random, folder: Path) -> Case:
        """Make one input."""
        return rng.choice(
            (
                self.twin,
                self.damaged,
                self.damaged,
                self.other_weights,
                self.other_weights,
                self.hostile,
                self.of_a_run,
                self.of_a_run,
                self.state_of_a_run,
            )
        )(rng, folder)

    def damaged(self, rng: random.Random, folder: Path) -> Case:
        name, content, layer = rng.choice(self.files)
        others = [content for _, content, _ in self.files]
        if name == 'safetensors' and rng.random() < 0.6:
            content, what = rewrite_header(rng, content)
        elif content[:2] == b'PK' and rng.random() < 0.6:
            content, what = rewrite_zip(rng, content, pickle.dumps({'a': Payload(os.system, 'touch executed')}, 2))
        else:
            content, what = mangle(rng, content, others)
        return self.used(rng, folder, content, layer, f'{name}: {what}')

    def twin(self, rng: random.Random, folder: Path) -> Case:
        """Make the same weights in another layout, or an archive whose damage its checksums show."""
        weights, model = self.weights['performer'], copy.deepcopy(self.models['performer'])
        layout, damaged = rng.choice(LAYOUTS), rng.random() < 0.5
        content, what = encode_weights(weights, layout, rng, old=not damaged and rng.random() < 0.3), layout
        if damaged and layout != 'safetensors':  # it has no checksums
            content, what = mangle(rng, content)
        else:
            damaged = False
        file = folder / 'model.pth'
        file.write_bytes(content)

        def use() -> str:
            load_weights(model, file)
            return digest(model.state_dict())

        return Case(f'same weights, {what}', use, expected=digest(weights), refusable=damaged)

    def other_weights(self, rng: random.Random, folder: Path) -> Case:
        layer = rng.choice([*self.weights])
        weights, what = mangle_weights(rng, self.weights[layer])
        wrapped = rng.choice(
            (
                weights,
                {'state_dict_ema': weights, 'state_dict': {}},
                {'net': {f'module.{k}': v for k, v in weights.items()}},
                {'model': weights, 'epoch': 3},
                {'state_dict': weights, 'meta': {'mmengine_version': '1'}},
                {'state_dict': {'state_dict': weights}},
                [weights],
                {'state_dict_ema': weights, 'args': argparse.Namespace(lr=1)},
            )
        )
        return self.used(rng, folder, written(wrapped, rng.random() < 0.2), layer, what)

    def hostile(self, rng: random.Random, folder: Path) -> Case:
        payload, weights = rng.choice(payloads()), self.weights['performer']
        obj = rng.choice(
            (payload, {'state_dict': weights, 'args': payload}, {**weights, 'head.weight': payload}, [payload])
        )
        kind = rng.choice(('zip', 'old', 'pickle', 'text'))
        try:
            content = {
                'zip': lambda: written(obj),
                'old': lambda: written(obj, True),
                'text': self.text(rng),
                'pickle': lambda: pickle.dumps(obj, rng.randrange(5)),
            }[kind]()
        except (TypeError, pickle.PicklingError):  # its content cannot be pickled
            content = pickle.dumps(Payload(os.system, 'touch executed'))
        return self.used(
            rng, folder, content, 'performer', f'{kind} of {getattr(payload.call, "__name__", payload.call)}'
        )

    def text(self, rng: random.Random) -> Callable[[], bytes]:
        return lambda: rng.choice(
            (
                b'',
                b'<!DOCTYPE html><html>404</html>',
                b'\xef\xbb\xbf <html>',
                b'version https://git-lfs.github.com/spec/v1\n',
                b'{"error": "not found"}',
                b'PK\x03\x04',
                b'\x80',
                b'\x80\x02.',
                b'PK\x05\x06' + bytes(18),
                rng.randbytes(3000),
                b'\x93NUMPY' + bytes(100),
                b'\x1f\x8b' + bytes(50),
                b'0' * 257 + b'ustar' + b'0' * 300,
                bytes(8) + b'{}',
            )
        )

    def used(self, rng: random.Random, folder: Path, content: bytes, layer: str, what: str) -> Case:
        file = folder / rng.choice(('model.pth.tar', 'model.safetensors', 'model.bin'))
        file.write_bytes(content)
        way = rng.randrange(4)
        if way == 0:
            return Case(f'load_trained, {what}', lambda: load_trained(str(file), 't2t_vit_4_16'))
        if way == 1:
            return Case(
                f'convert, {what}',
                lambda: cli.call('convert', [str(file), '--model', 't2t_vit_4_16', '-o', 'out.safetensors']),
                ('out.safetensors',),
            )
        model = copy.deepcopy(self.models[layer])
        return Case(f'load_weights, {what}', lambda: load_weights(model, file))

    def of_a_run(self, rng: random.Random, folder: Path) -> Case:
        shutil.copytree(self.folder, folder / 'run')
        file = folder / 'run' / rng.choice(('config.json', 'config.json', 'model.safetensors'))
        if file.name == 'config.json' and rng.random() < 0.5:  # without a digest
            config, what = mangle_tree(rng, self.config)
            file.write_text(json.dumps(config, default=str))
            return Case(f'load_trained, {file.name}: {what}', lambda: load_trained(str(folder / 'run')))
        content, what = mangle(rng, file.read_bytes())
        file.write_bytes(content)
        return Case(f'load_trained, {file.name}: {what}', lambda: answer(folder / 'run'), expected=answer(self.folder))

    def state_of_a_run(self, rng: random.Random, folder: Path) -> Case:
        state, what = mangle_tree(rng, {**self.state, 'model': {}}) if rng.random() < 0.3 else (self.state, '')
        content = written(state)
        if not what:
            content, what = mangle(rng, content) if rng.random() < 0.5 else rewrite_zip(rng, content, b'\x80\x02}.')
        (folder / 'step-00000002.pt').write_bytes(content)
        if rng.random() < 0.5:
            return Case(f'load_state, {what}', lambda: load_state(folder))
        return Case(
            f'train --resume, {what}',
            lambda: cli.train(['--resume', str(folder / 'step-00000002.pt'), '--print_config']),
        )
