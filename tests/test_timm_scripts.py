"""Scripts that know timm only run on our models through `python -m t2t_vit.timm`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import argparse, json, sys
from beside import K
import timm, torch
from timm.data import create_dataset, create_loader, resolve_data_config

parser = argparse.ArgumentParser()
parser.add_argument('data')
parser.add_argument('--model')
args = parser.parse_args()
model = timm.create_model(args.model, num_classes=3).eval()
config = resolve_data_config({'input_size': (3, 16, 16)}, model=model)
dataset = create_dataset('', args.data)
loader = create_loader(dataset, config['input_size'], 4, use_prefetcher=False, num_workers=0, device='cpu')
with torch.inference_mode():
    labels = torch.cat([model(images).topk(K).indices for images, _ in loader])
print(json.dumps({'shape': list(labels.shape), 'argv': sys.argv, 'main': __name__}))
sys.exit(3)
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-m', 't2t_vit.timm', *map(str, words)], capture_output=True, text=True)


def test_timm_script_scores_our_model(photos: Path, tmp_path: Path):
    (tmp_path / 'scripts').mkdir()
    script = tmp_path / 'scripts' / 'score.py'
    script.write_text(SCRIPT)
    (tmp_path / 'scripts' / 'beside.py').write_text('K = 2')
    done = run(script, photos / 'val', '--model', 't2t_vit_4_16')
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        'shape': [12, 2],
        'argv': [str(script), str(photos / 'val'), '--model', 't2t_vit_4_16'],
        'main': '__main__',
    }


@pytest.mark.parametrize('words, message', [([], 'no script given'), (['nowhere.py'], 'no script nowhere.py')])
def test_missing_script_is_named(words, message):
    done = run(*words)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
