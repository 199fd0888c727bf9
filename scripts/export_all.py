"""Export every registered model at its full size to ONNX and compare it in onnxruntime and OpenVINO.

    scripts/export_all.py [MODEL …] [-o export.csv]

Weights are random and all different; images are eight windows of scikit-learn's photographs. Models that are in the
table are skipped: delete a row to repeat it.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from t2t_vit import VARIANTS
from t2t_vit.export import load_exported
from t2t_vit.export.check import TOLERANCES, compare, versions
from t2t_vit.export.command import describe, load
from t2t_vit.export.formats import export_model
from t2t_vit.export.images import batches, open_images
from t2t_vit.timing import device_name


def row(name: str) -> dict[str, Any]:
    """Compare one model in both runtimes; the relative difference is that of the worst image."""
    classifier = load(None, name)
    net, cfg = classifier.net, classifier.preprocessing
    metadata = describe(net, classifier.outputs, cfg, 'float32', 'float', None, 'batch')
    images = [*batches(open_images('samples', 'val'), cfg, 4, 8, [])]
    found: dict[str, Any] = {'model': name, 'size': cfg.size[0]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'{name}.onnx'
        export_model(net, path, metadata, 'batch')
        found['megabytes'] = round(path.stat().st_size / 1e6, 1)
        for runtime in ('onnxruntime', 'openvino'):
            exported = load_exported(path, runtime)  # type: ignore[arg-type]
            difference, _ = compare(net, exported, images)
            found[f'{runtime}_relative_difference'] = f'{difference.worst:.2e}'
            found[f'{runtime}_same_first_class'] = f'{difference.agreed}/{difference.images}'
            found[runtime] = versions(metadata, runtime)[runtime]
            if difference.broken or not difference.worst <= TOLERANCES['float32'].difference:
                raise SystemExit(
                    f'{name} in {runtime} is outside tolerance: {difference.worst:.2e}, '
                    f'{difference.broken} of {difference.images} not finite'
                )
    return {**found, 'images': 8, 'device': device_name(torch.device('cpu')), 'torch': torch.__version__}


def main() -> None:
    """Compare all models and write each to the table when it is finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=[*VARIANTS])
    parser.add_argument('-o', '--output', type=Path, default=Path('export.csv'))
    options = parser.parse_args()
    done = [*csv.DictReader(options.output.open())] if options.output.exists() else []
    for name in track([name for name in options.models if name not in {old['model'] for old in done}]):
        done.append(row(name))
        with options.output.open('w', newline='') as file:
            writer = csv.DictWriter(file, list(done[-1]))
            writer.writeheader()
            writer.writerows(done)


if __name__ == '__main__':
    main()
