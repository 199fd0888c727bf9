"""List the kinds of input of the fuzz run, and make recipes and options."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fuzz import Case, Maker
from fuzz_damage import NASTY, mangle, mangle_tree
from fuzz_exported import Exported
from fuzz_images import Images, Sources
from fuzz_weights import Checkpoints

from t2t_vit import cli
from t2t_vit.settings import recipes


class Configs:
    """Make recipes and configuration files, damaged as text and as trees, and options of any form."""

    def __init__(self, seeds: Path) -> None:
        self.recipes = [file.read_bytes() for file in recipes().values()]
        self.keys = [
            'model',
            'epochs',
            'batch_size',
            'seed',
            'data.root',
            'data.img_size',
            'data.mean',
            'data.std',
            'data.workers',
            'augment.scale',
            'augment.aa',
            'augment.ratio',
            'augment.reprob',
            'optimizer.name',
            'optimizer.lr',
            'optimizer.frozen',
            'optimizer.warmup_epochs',
            'model_args',
            'model_args.depth',
            'model_args.embed_dim',
            'model_args.num_heads',
            'model_args.splits',
            'model_args.token_layer',
            'model_args.block',
            'objective.kind',
            'objective.teacher_size',
            'trackers',
            'precision',
            'weights',
            'output',
            'threads',
            'recipe',
            'config',
            'resume',
            'model_args.img_size',
            'model_args.token_dim',
            'model_args.mlp_ratio',
            'ema_decay',
            'grad_accum_steps',
            'keep',
        ]
        self.texts = [
            b'a: &a [x, x]\nb: &b [*a, *a]\n',
            b'base: digits\nmodel_args: &a {depth: *a}',
            b'&a {epochs: 3, b: *a}',
            b'[' * 20000,
            b'{a: ' * 3000,
            b'- ' * 3000,
            b'!!python/object/apply:os.system ["touch executed"]',
            b'!!python/name:os.system',
            b'!!binary "////"',
            b'? [a, b]\n: 1',
            b'epochs: 2001-01-01',
            b'<<: {epochs: 3}',
            b'base: base.yaml',
            b'base: [1, 2]',
            b'model_args: {' + b', '.join(b'k%d: 1' % i for i in range(5000)) + b'}',
            b'epochs: 0x' + b'f' * 5000,
            b'epochs: 1_' + b'0' * 5000,
            '\n'.join(
                f'a{i}: &a{i} {{' + ', '.join(f'k{j}: *a{i - 1}' for j in range(9)) + '}' if i else 'a0: &a0 {x: 1}'
                for i in range(12)
            ).encode(),
            b'\xff\xfe\0',
            b'',
            b'---\n---\n',
            b'%YAML 9.9\n---\na: 1',
            b'a: 1\na: 2',
            b'null',
            b'3',
        ]

    def make(self, rng: random.Random, folder: Path) -> Case:
        """Make one input."""
        file, kind = folder / 'base.yaml', rng.choice(('bytes', 'tree', 'tree', 'options', 'options', 'text'))
        if kind == 'options':
            argv = self.options(rng)
            return Case(f'options {argv}'[:300], lambda: cli.train([*argv, '--print_config']))
        content = rng.choice(self.recipes)
        if kind == 'bytes':
            content, what = mangle(rng, content, self.recipes)
        elif kind == 'tree':
            full = {**yaml.safe_load(content)} if rng.random() < 0.5 else yaml.safe_load(FULL)
            tree, what = mangle_tree(rng, full)
            content = yaml.safe_dump(tree).encode()
        else:
            content = rng.choice(self.texts)
            what = str(content[:60])
            if rng.random() < 0.3:
                content, how = mangle(rng, content[:2000], self.recipes)
                what = f'{what}, {how}'
        file.write_bytes(content)
        return Case(f'file, {what}', lambda: cli.train(['--config', str(file), '--print_config']))

    def options(self, rng: random.Random) -> list[str]:
        argv = rng.choice(([], ['--recipe', 'digits']))
        for _ in range(rng.choice((1, 1, 2, 4))):
            key, value = rng.choice(self.keys), rng.choice(NASTY)
            if rng.random() < 0.1:
                key = rng.choice(
                    (key[::-1], f'{key}.', f'.{key}', f'{key}.x.y', '', '-', '=', key.upper(), '__class__', 'x' * 3000)
                )
            text = value if isinstance(value, str) else rng.choice((str, json.dumps, repr))(value)
            argv += rng.choice(([f'--{key}', text], [f'--{key}={text}'], [f'--{key}'], [text]))
        return [word.replace('\0', '') for word in argv]


FULL = """
model: t2t_vit_14
epochs: 30
batch_size: 64
model_args: {depth: 3, embed_dim: 64, num_heads: 2, mlp_ratio: 2, splits: [[7, 4, 2], [3, 2, 1], [3, 2, 1]],
             token_layer: performer, block: plain, drop_path_rate: 0.1, token_dim: 16}
data: {root: digits, img_size: [64, 96], mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], crop_pct: 0.9, workers: 0,
       channels: 3}
augment: {scale: [0.5, 1.0], ratio: [0.8, 1.2], hflip: 0.5, aa: rand-m9-mstd0.5, reprob: 0.1,
          mixup: 0.1, pad: 2, rotate: 3}
optimizer: {name: adamw, lr: 0.001, frozen: [norm.*], warmup_epochs: 2, layer_decay: 0.8, clip_grad: 1.0}
objective: {kind: labels, teacher_size: [32, 32]}
trackers: []
"""


KINDS: dict[str, Any] = {
    'checkpoints': Checkpoints,
    'images': Images,
    'sources': Sources,
    'configs': Configs,
    'exported': Exported,
}


def makers(seeds: Path, chosen: Sequence[str] = tuple(KINDS)) -> dict[str, Maker]:
    """Return the makers of the chosen kinds of input, which write their seeds to a folder."""
    for name in chosen:
        (seeds / name).mkdir()
    return {name: KINDS[name](seeds / name).make for name in chosen}
