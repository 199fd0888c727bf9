"""Measure dead channels and local structure in trained models over many photos, the observations of the paper's Fig. 2.

    python scripts/structure.py PHOTOS OUT.csv RUN…

Every image of the folder PHOTOS is seen by every model. The table is the layers.csv of `t2t-vit visualize`, which
measures as few images as it draws (docs/visualize.md); models are named by the last two folders of their runs.
"""

import sys
from pathlib import Path

import torch

from t2t_vit.look.features import measure
from t2t_vit.look.opened import open_images, open_model, prepare
from t2t_vit.look.trace import trace
from t2t_vit.look.visualize import table_of, write_layers


def main(photos: str, output: str, *runs: str) -> None:
    """Write the measures of all layers, and print those of each model's last layer."""
    opened, images, tables = [open_model(run) for run in runs], open_images([photos]), {}
    for run, one in zip(runs, opened):
        inputs, _ = prepare(images, one.preprocessing)
        with torch.inference_mode():
            table = table_of(measure(trace(one.model, inputs), inputs))
        tables['/'.join(Path(run).parts[-2:])] = table
        print(run, *table[-1], sep='  ', flush=True)
    write_layers(tables, Path(output))


if __name__ == '__main__':
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
