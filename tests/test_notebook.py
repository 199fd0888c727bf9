"""The notebook runs from its first cell to its last, holds no outputs, and says what its cells compute."""

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / 'docs' / 'quickstart.ipynb'


def test_cells_of_the_notebook_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text('utf-8'))['cells'] if cell['cell_type'] == 'code']
    assert all(not cell['outputs'] and cell['execution_count'] is None for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile(''.join(cell['source']), f'{NOTEBOOK.name}, cell {number}', 'exec'), names)
    assert len(names['found']) == 12 and names['measures'].images == 360 and names['vectors'].shape[0] == 12
    assert 'balanced accuracy' in capsys.readouterr().out
