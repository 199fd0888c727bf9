"""Store trained runs in the package as small models in float16, and score what was stored.

    python scripts/ship_weights.py imagenette runs/t2t_vit_6_64 runs/vit_6_64 runs/resnet18

writes src/t2t_vit/models/shipped/MODEL.imagenette for each run: weights rounded to float16, config.json, and a model
card with the score of the rounded weights on the run's validation images. A model that is not of this package (a narrow
ResNet) is named MODEL_PIXELS.
"""

import argparse
import json
import re
from pathlib import Path

import yaml

from t2t_vit import Classifier
from t2t_vit.models.listing import count_parameters
from t2t_vit.models.shipped import FOLDER, shipped
from t2t_vit.models.variants import VARIANTS
from t2t_vit.trained import hash_weights, save_folder

LICENCE = """Apache-2.0, as the package. The weights were trained on photos of Imagenette, ten classes of ImageNet. The
photos, which are not in the package, belong to their owners, and ImageNet's terms allow research and teaching without
commercial use. For other uses, train on your photos."""


def ship(run: Path, data: str) -> str:
    """Store the model of a run, and return a line about it."""
    model = Classifier.load(run, device='cpu')
    config = json.loads((run / 'config.json').read_text('utf-8'))
    recipe = yaml.safe_load((run / 'config.yaml').read_text('utf-8'))
    model.net.half().float()  # what is stored, computed in float32 as after loading
    scores = model.evaluate(workers=0).measures
    net = model.net.half()
    net.pretrained_cfg['license'] = 'apache-2.0'
    net.pretrained_cfg.pop('origin_url', None)
    net.pretrained_cfg.pop('paper_ids', None)
    architecture, pixels = config['architecture'], config['pretrained_cfg']['input_size'][1]
    name = f'{architecture if architecture in VARIANTS else f"{architecture}_{pixels}"}.{data}'
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    total, _ = count_parameters(net)
    card = CARD.format(
        name=name,
        architecture=architecture,
        data=data,
        top1=scores.top1,
        percent=100 * scores.top1,
        low=100 * scores.intervals['top1'][0],
        high=100 * scores.intervals['top1'][1],
        images=scores.images,
        classes=', '.join(model.classes),
        parameters=total,
        pixels=pixels,
        epochs=recipe['epochs'],
        sha=hash_weights(net),
        licence=LICENCE,
        recipe=yaml.safe_dump({key: recipe[key] for key in RECIPE}, sort_keys=False).rstrip(),
    )
    args = {key: value for key, value in config.get('model_args', {}).items() if key not in ('in_chans', 'img_size')}
    save_folder(net, folder, args, card)
    size = (folder / 'model.safetensors').stat().st_size
    return f'{name}: top-1 {100 * scores.top1:.2f} % of {scores.images:,} images, {total:,} parameters, {size:,} bytes'


def write_table() -> None:
    """Replace the table of these models in docs/models.md."""
    rows = []
    for name, folder in shipped().items():
        card = (folder / 'README.md').read_text('utf-8')
        score, count = re.search(r'([\d.]+) % top-1', card), re.search(r'([\d,]+) parameters', card)
        assert score and count
        rows.append(f'| {name} | {count[1]} | {score[1]} |')
    text = PAGE.read_text('utf-8')
    head, rest = text.split(HEAD)
    tail = rest[rest.index('\n\n') :]
    PAGE.write_text('\n'.join([head + HEAD, *rows]) + tail, 'utf-8')


PAGE = Path(__file__).parents[1] / 'docs' / 'models.md'
HEAD = """| weights in the package | parameters | top-1 % on Imagenette's 3,925 validation images |
|---|---|---|"""
RECIPE = ('model', 'model_args', 'weight_init', 'augment', 'optimizer', 'epochs', 'batch_size', 'ema_decay', 'seed')
CARD = """---
library_name: timm
pipeline_tag: image-classification
license: apache-2.0
model-index:
- name: {architecture}
  results:
  - task:
      type: image-classification
    dataset:
      name: {data}
      type: {data}
      split: validation
    metrics:
    - type: accuracy
      value: {top1:.4f}
      name: top-1
---

# {name}

An image classifier of photos of {pixels}×{pixels} pixels, {parameters:,} parameters, in float16. It comes with
t2t-vit, to show what trained models see and to fine-tune.

## Data

{data}: 9,469 training and {images:,} validation images of 10 classes: {classes}.

## Scores

{percent:.2f} % top-1 on the {images:,} validation images (95 % interval {low:.1f} to {high:.1f} %), of the stored
weights. The epoch was chosen by this score, which flatters it a little.

SHA-256 of the tensors: `{sha}`

## Recipe

From scratch in {epochs} epochs, by `t2t-vit train --config` with

```yaml
{recipe}
```

## Licence of the weights

{licence}
"""


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument('data', help='name of the data, the tag of the weights')
    parser.add_argument('runs', nargs='+', type=Path)
    given = parser.parse_args()
    for run in given.runs:
        print(ship(run, given.data), flush=True)
    write_table()
