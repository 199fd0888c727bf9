"""Text is UTF-8 in every locale, and a terminal that lacks a character does not end a command."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import t2t_vit

SOURCES = sorted(Path(t2t_vit.__file__).parent.rglob('*.py'))
LOCALES = {  # name: (source, character map) of localedef
    'C': None,
    'de_DE.ISO-8859-1': ('de_DE', 'ISO-8859-1'),
    'de_DE.CP1252': ('de_DE', 'CP1252'),
    'ja_JP.SJIS': ('ja_JP', 'SHIFT_JIS'),
}
SCRIPT = """
import locale, sys
from pathlib import Path
import t2t_vit_cli
from t2t_vit.settings import read_settings, recipes

folder = Path(sys.argv[1])
assert locale.getpreferredencoding(False).lower().replace('-', '') not in ('utf8', 'utf_8'), 'not the locale asked for'
assert any('×' in file.read_text(encoding='utf-8') for file in recipes().values())
for file in recipes().values():
    read_settings(file)
(folder / 'mine.yaml').write_text('{base: digits, output: "größe × 2 – 日本"}', encoding='utf-8')
assert t2t_vit_cli.main(['recipes']) == 0
assert t2t_vit_cli.main(['predict', '--help']) == 0
assert t2t_vit_cli.main(['models', 't2t_vit_7']) == 0
assert t2t_vit_cli.main(['train', '--config', str(folder / 'mine.yaml'), '--print-config']) == 0
assert t2t_vit_cli.main(['train', '--recipe', 'digits', '--data', '×', '--print-config']) == 0
assert t2t_vit_cli.main(['train', '--größe', '1']) == 2
code = t2t_vit_cli.main(['predict', 'digits', '--checkpoint', sys.argv[2], '--output', str(folder / 'a.csv')])
assert code == 0 and (folder / 'a.csv').read_text(encoding='utf-8')
"""


def unspecified(call: ast.Call) -> bool:
    """Return whether a call opens a text file in the encoding of the locale."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, 'id', '')
    words = [str(word.value) for word in call.args if isinstance(word, ast.Constant)]
    if any(word.arg == 'encoding' for word in call.keywords):
        return False
    if name == 'read_text':
        return not call.args
    if name == 'write_text':
        return len(call.args) < 2
    modes = [word for word in words if word and set(word) <= set('rwax+bt')]
    return name == 'open' and bool(modes) and 'b' not in modes[0]


@pytest.mark.parametrize('file', SOURCES, ids=lambda file: file.stem)
def test_text_files_are_opened_with_an_encoding(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if unspecified(call)]


@pytest.mark.skipif(not shutil.which('localedef'), reason='needs localedef')
@pytest.mark.parametrize('name', LOCALES)
def test_commands_work_in_any_locale(name, digits_run, tmp_path):
    if source := LOCALES[name]:
        made = subprocess.run(
            ['localedef', '-i', source[0], '-f', source[1], tmp_path / name], capture_output=True, text=True
        )
        if not (tmp_path / name).exists():
            pytest.skip(f'localedef cannot make {name}: {made.stderr[-200:]}')
    (tmp_path / 'script.py').write_text(SCRIPT, encoding='utf-8')
    env = {**os.environ, 'LOCPATH': str(tmp_path), 'LC_ALL': name, 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    env.pop('PYTHONIOENCODING', None)
    done = subprocess.run(
        [sys.executable, tmp_path / 'script.py', tmp_path, digits_run], capture_output=True, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode(errors='replace')
