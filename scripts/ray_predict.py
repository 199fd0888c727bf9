"""Classify and embed a folder of images with Ray Data, on one machine or a cluster.

    pip install 't2t-vit[ray]'
    python scripts/ray_predict.py runs/photos photos out --workers 2

This writes Parquet files with the columns path, label, probability, error and embedding into `out`. The images are
read as bytes and decoded by the classifier, by the rules of every command (upright, transparency on white; a damaged
file has an error). `Classify` also takes the arrays of `ray.data.read_images`, which may leave photos of phones on
their side.
"""

import argparse
import time
from typing import Any

import ray.data

from t2t_vit import Classifier


class Classify:
    """A classifier that `map_batches` starts once in every worker and calls with batches of images."""

    def __init__(self, checkpoint: str, device: str = 'auto') -> None:
        self.model = Classifier.load(checkpoint, device=device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return path, label, probability, error and embedding of each image, given `path` and `bytes` or `image`."""
        images = list(batch['bytes'] if 'bytes' in batch else batch['image'])
        found = self.model.predict(images, top_k=1)
        return {
            'path': batch['path'],
            'label': [one.label or '' for one in found],
            'probability': [float('nan') if one.probability is None else one.probability for one in found],
            'error': [one.error or '' for one in found],
            'embedding': self.model.embed(images),
        }


def predict(checkpoint: str, images: ray.data.Dataset, workers: int = 1, **options: Any) -> ray.data.Dataset:
    """Return a row for each image of a data set; they are computed when they are read or written.

    Args:
        checkpoint: As for `Classifier.load`; a path that every machine can read.
        images: With the columns path and bytes (`read_binary_files`) or image (`read_images`).
        workers: Classifiers, each in a process of its own.
        options: Of `map_batches`: batch_size, num_cpus and num_gpus of a worker.
    """
    return images.map_batches(
        Classify, fn_constructor_args=[checkpoint], compute=ray.data.ActorPoolStrategy(size=workers), **options
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument('checkpoint')
    parser.add_argument('images', help='a folder, or an address that Ray reads')
    parser.add_argument('output')
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--gpus', type=float, default=0, help='of each worker')
    given = parser.parse_args()
    files = ray.data.read_binary_files(given.images, include_paths=True)
    began = time.perf_counter()
    rows = predict(given.checkpoint, files, given.workers, batch_size=given.batch_size, num_gpus=given.gpus)
    rows.write_parquet(given.output)
    seconds = time.perf_counter() - began
    count = ray.data.read_parquet(given.output).count()
    print(f'{count:,} images in {seconds:.1f} s, {count / seconds:.1f} images/s, the start of the workers included')
