"""Compare the speed of exported files in interleaved rounds, with ratios to the first file.

scripts/exported_speed.py a.xml b.xml … [--batch_size 8] [--rounds 11] [--seconds 0.5] [--threads 2] [-o out.csv]
"""

import argparse
import csv
from functools import partial
from pathlib import Path

import torch

from t2t_vit.export import load_exported
from t2t_vit.timing import device_name, interleave, spread


def main() -> None:
    """Load and time the files, print a table, and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='+')
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--seconds', type=float, default=0.5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('-o', '--output', type=Path)
    options = parser.parse_args()
    works, models = {}, {}
    for file in options.files:
        exported = models[file] = load_exported(file, threads=options.threads)
        cfg = exported.preprocessing
        images = torch.randn(options.batch_size, cfg.channels, *cfg.size)
        works[file] = partial(exported.run, exported.metadata.pixels_of(images))
        works[file]()
    speeds = interleave(works, options.batch_size, options.rounds, options.seconds)
    base = speeds[options.files[0]]
    rows = []
    for file, values in speeds.items():
        middle, low, high = spread(values)
        ratio, ratio_low, ratio_high = spread([a / b for a, b in zip(values, base)])
        rows.append(
            dict(
                file=Path(file).name,
                model=models[file].metadata.model,
                precision=models[file].metadata.precision,
                runtime=models[file].runtime,
                images_per_second=middle,
                low=low,
                high=high,
                ratio=ratio,
                ratio_low=ratio_low,
                ratio_high=ratio_high,
                batch_size=options.batch_size,
                size='x'.join(map(str, models[file].preprocessing.size)),
                threads=options.threads,
                rounds=options.rounds,
                device=device_name(torch.device('cpu')),
                torch=torch.__version__,
            )
        )
        print(
            f'{Path(file).name:32}{middle:8.1f} images/s ({low:.1f} to {high:.1f}), '
            f'{ratio:.2f} of the first ({ratio_low:.2f} to {ratio_high:.2f})'
        )
    if options.output:
        with options.output.open('w', newline='') as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    main()
