"""Measure dead channels and local structure in trained models over many photos, the observations of the paper's Fig. 2.

    python scripts/structure.py PHOTOS OUT.csv RUN…

Every image of the folder PHOTOS is seen by every model. A row a layer, with the measures that `t2t-vit visualize`
draws for a few images (docs/visualize.md); models are named by the last two folders of their runs: resnet50/seed-0.
"""

import csv
import sys
from pathlib import Path

import torch

from t2t_vit.look.features import measure
from t2t_vit.look.opened import open_images, open_model, prepare
from t2t_vit.look.trace import trace

COLUMNS = ('model', 'layer', 'grid', 'images', 'channels', 'dead', 'rich in structure', 'edge agreement')


def main(photos: str, output: str, *runs: str) -> None:
    """Write the measures of all layers, and print those of each model's first and last layer."""
    opened, images = [open_model(run) for run in runs], open_images([photos])
    rows = []
    for run, one in zip(runs, opened):
        inputs, _ = prepare(images, one.preprocessing)
        with torch.inference_mode():
            layers = measure(trace(one.model, inputs), inputs)
        name = '/'.join(Path(run).parts[-2:])
        found = [
            (name, layer.name, '×'.join(map(str, layer.grid)), len(inputs), len(layer.dead), int(layer.dead.sum()))
            + (int(layer.rich.sum()), f'{float(layer.edges[~layer.dead].median()):.3f}')
            for layer in layers
        ]
        for row in (found[0], found[-1]):
            print(*row, sep='  ')
        print(f'{name}: {sum(row[5] for row in found)} of {sum(row[4] for row in found)} channels are dead')
        rows += found
    with open(output, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == '__main__':
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
