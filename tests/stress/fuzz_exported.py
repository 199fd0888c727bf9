"""Make damaged exported files: records and JSON of a .pt2, bytes of an .onnx, text and weights of an .xml."""

import io
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from fuzz import Case
from fuzz_damage import mangle, mangle_tree
from fuzz_twins import digest

from t2t_vit.export import load_exported

SUFFIXES = ('.pt2', '.onnx', '.xml')
HOSTILE = (
    "__import__('os').system('touch executed')",
    'images=open("executed", "w")',
    '9**9**9**9',
    'Pow(Integer(9), Pow(Integer(9), Integer(9)))',
    'torch.hub.load',
    'torch.ops.aten.from_file.default',
    'os.system',
    '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]',
    '../../weight_0',
    'opaque_obj_0',
)
RECORDS = (
    'model/models/model.json',
    'model/MODELS/model.json',
    'other/version',
    'model/data/aotinductor/model/a.so',
    '../executed',
    'version',
    'model/data/constants/opaque_obj_0',
    'model/data/weights/weight_0',
    'model/extra/x',
)


class Exported:
    """Damage files of a small model as bytes, trees and archives; load them and call them on an image."""

    def __init__(self, seeds: Path) -> None:
        import onnxruntime  # noqa: F401  (before the audit hook is armed)
        import openvino  # noqa: F401

        # in a new process: the converters start threads, which do not survive a fork
        subprocess.run([sys.executable, __file__, str(seeds)], check=True, capture_output=True)
        self.seeds = {file.suffix: file.read_bytes() for file in seeds.iterdir()}
        with zipfile.ZipFile(seeds / 'model.pt2') as archive:
            self.records = [(name, archive.read(name)) for name in archive.namelist()]
        self.answers = {suffix: use(seeds / f'model{suffix}') for suffix in SUFFIXES}

    def make(self, rng: random.Random, folder: Path) -> Case:
        """Make one input."""
        suffix = rng.choice(('.pt2', '.pt2', '.pt2', '.onnx', '.xml'))
        changed = '.bin' if suffix == '.xml' and rng.random() < 0.3 else suffix
        rewritten = suffix == '.pt2' and rng.random() < 0.8  # with right checksums
        if rewritten:
            content, what = self.archive(rng)
        else:
            content, what = mangle(rng, self.seeds[changed], [*self.seeds.values()])
        for kind in {suffix, changed, *(['.bin'] if suffix == '.xml' else [])}:
            (folder / f'model{kind}').write_bytes(content if kind == changed else self.seeds[kind])
        expected = None if rewritten else self.answers[suffix]
        return Case(f'{changed}, {what}', lambda: use(folder / f'model{suffix}'), expected=expected)

    def archive(self, rng: random.Random) -> tuple[bytes, str]:
        """Change a tree or a record of the .pt2."""
        records: list[tuple[str, bytes]] = [*self.records]
        trees = [i for i, (name, _) in enumerate(records) if name.endswith(('.json', 'extra/t2t_vit'))]
        kind = rng.choice(('tree', 'tree', 'text', 'text', 'add', 'drop', 'bytes'))
        place = rng.choice(trees) if kind in ('tree', 'text') else rng.randrange(len(records))
        name, content = records[place]
        what = ''
        if kind == 'tree':
            tree, what = mangle_tree(rng, json.loads(content))
            records[place] = name, json.dumps(tree, default=str).encode(errors='replace')
        elif kind == 'text':  # a value, in all its places
            words = [word for word in content.split(b'"')[1::2] if word]
            old, new = rng.choice(words), rng.choice(HOSTILE)
            what = f'{old!r} as {new}'
            records[place] = name, content.replace(b'"' + old + b'"', json.dumps(new).encode())
        elif kind == 'add':
            records.append((rng.choice(RECORDS), rng.choice((b'', content, bytes(1 << 20)))))
            what = records[-1][0]
        elif kind == 'drop':
            del records[place]
        else:
            content, what = mangle(rng, content)
            records[place] = name, content
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(file := io.BytesIO(), 'w', method) as archive:
            for entry in records:
                archive.writestr(*entry)
        return file.getvalue(), f'{kind} of {name[:60]} {what}'[:300]


def use(file: Path) -> str:
    """Load an exported file and return a digest of its logits for a black image; an empty string if it is large."""
    exported = load_exported(file, threads=1)
    channels, (height, width) = exported.preprocessing.channels, exported.preprocessing.size
    return digest(exported(torch.zeros(1, channels, height, width))) if channels * height * width < 1 << 16 else ''


if __name__ == '__main__':
    from test_export import small, written

    for suffix in SUFFIXES:
        written(small('vit_s_16', embed_dim=16, num_heads=2), Path(sys.argv[1]) / f'model{suffix}')
