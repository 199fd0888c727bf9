"""Names and texts under other locales, and in worker processes that are spawned."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='locales are made by localedef')

SCRIPT = r"""
import json, locale, multiprocessing, sys
from pathlib import Path

def main():
    from t2t_vit.data import DiskBatches, Opener, Preprocessing, Split, SplitOptions, find_images, open_pieces
    from t2t_vit.data import open_source, open_train_val
    from torch.utils.data import DataLoader
    locale.setlocale(locale.LC_ALL, '')
    root, out, workers = sys.argv[1:]
    size = Preprocessing((4, 4), 3, (0.5,) * 3, (0.5,) * 3)
    train, val, split = open_train_val(f'{root}/set', options=SplitOptions(0.5))
    split.save(Path(out) / 'split.json')
    assert Split.load(Path(out) / 'split.json') == split
    tar, table = open_source(f'{root}/a.tar', 'val'), open_source(f'{root}/a.csv', 'val')
    found = find_images([f'{root}/set'])
    names = {'tar': tar, 'table': table, 'train': train, 'val': val}
    result = {key: [source.name(i) for i in range(len(source.labels))] for key, source in names.items()}
    result['classes'] = [source.classes for source in names.values()]
    result['found'] = [found.name(i) for i in range(len(found))]
    opened = [piece for piece in open_pieces(Opener(found, size), [(0, len(found))], int(workers))]
    result['errors'] = {found.name(i): text for piece in opened for i, text in piece.errors.items()}
    batches = DiskBatches(train, size, 2, None, int(workers))
    result['spawned'] = sum(len(batch.labels) for batch in batches.epoch())
    result['damaged'] = batches.damaged
    batches.close()
    (Path(out) / 'result.json').write_text(json.dumps(result), encoding='utf-8')

if __name__ == '__main__':
    multiprocessing.set_start_method('spawn')
    main()
"""
LOCALES = {  # name, charmap and source of localedef
    'C': None,
    'en_US.ISO-8859-1': ('ISO-8859-1', 'en_US'),
    'ja_JP.SJIS': ('SHIFT_JIS', 'ja_JP'),
    'en_US.CP1252': ('CP1252', 'en_US'),
}
CLASSES = ['caf\u00e9', '\u732b']


@pytest.fixture(scope='module')
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes with names in other scripts, and files with every kind of odd name, one of them damaged."""
    import io
    import tarfile

    from PIL import Image

    root = tmp_path_factory.mktemp('odd')
    Image.new('RGB', (4, 4)).save(buffer := io.BytesIO(), 'png')
    rows = ['path,label']
    for name in CLASSES:
        folder = root / 'set' / name
        folder.mkdir(parents=True)
        for file in (b'\xe9.png', b'a"b.png', b'-c\n.png', '\u00fc.png'.encode()):
            Path(os.fsdecode(os.fsencode(folder) + b'/' + file)).write_bytes(buffer.getvalue())
        rows.append(f'set/{name}/\u00fc.png,{name}')
    Path(os.fsdecode(os.fsencode(root / 'set' / CLASSES[0]) + b'/truncated\xff.png')).write_bytes(
        buffer.getvalue()[:40]
    )
    (root / 'a.csv').write_text('\n'.join(rows), encoding='utf-8')
    with tarfile.open(root / 'a.tar', 'w', encoding='utf-8', errors='surrogateescape') as tar:
        tar.add(root / 'set', arcname='.')
    return root


def run(root: Path, out: Path, locale: str, made: Path) -> dict[str, object]:
    (out / 'script.py').write_text(SCRIPT, encoding='utf-8')
    kept = {key: value for key, value in os.environ.items() if not key.startswith('LC_') and key not in ('LANG',)}
    variables = {**kept, 'LC_ALL': locale, 'LOCPATH': str(made), 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = subprocess.run(
        [sys.executable, str(out / 'script.py'), str(root), str(out), str(int(locale == 'ja_JP.SJIS'))],
        env=variables,
        capture_output=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr.decode(errors='replace')[-2000:]
    return json.loads((out / 'result.json').read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', LOCALES)
def test_names_are_the_same_under_every_locale(name, odd, tmp_path):
    if LOCALES[name]:
        if not shutil.which('localedef'):
            pytest.skip('localedef is not installed')
        charmap, source = LOCALES[name]
        made = subprocess.run(
            ['localedef', '-c', '-i', source, '-f', charmap, str(tmp_path / name)], capture_output=True, timeout=100
        )
        if not (tmp_path / name).is_dir():
            pytest.skip(f'localedef cannot make {name}: {made.stderr.decode(errors="replace")[:100]}')
    result = run(odd, tmp_path, name, tmp_path)
    expected = {os.fsencode(path) for path in (odd / 'set').rglob('*.png')}
    encode = lambda names: {name.encode('utf-8', 'surrogateescape') for name in names}  # noqa: E731
    assert encode(result['found']) == expected == encode([*result['train'], *result['val']])
    assert {name.rpartition(b'/')[2] for name in encode(result['tar'])} == {
        name.rpartition(b'/')[2] for name in expected
    }
    assert result['classes'] == [sorted(CLASSES)] * 4 and len(result['table']) == 2
    truncated = os.fsencode(odd / 'set' / CLASSES[0]) + b'/truncated\xff.png'
    assert encode(result['errors']) == {truncated}
    assert encode(result['damaged']) <= {truncated} and result['spawned'] + len(result['damaged']) == len(
        result['train']
    )
