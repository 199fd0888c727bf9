"""Answer programs, such as gradio_client, with named fields instead of HTML.

Each method of `Api` is an endpoint of its name. Images are uploaded files, as `gradio_client.handle_file` sends them.
"""

from typing import Any

import torch

from ..data import DataError
from ..look.attention import Attention, Lattice, class_maps, query_maps, rollout_map
from ..look.gradients import grad_cam
from .explorer import Explorer, Seen, check_numbers
from .uploads import Uploads


class Api:
    """The endpoints. `model` is a name from `models`, by default the first; errors are sentences."""

    def __init__(self, explorer: Explorer, uploads: Uploads) -> None:
        self.explorer, self.uploads = explorer, uploads

    def see(self, image: Any, model: str) -> Seen:
        """Read an upload, delete it, and run a model on it.

        Raises:
            DataError: if it is no image.
            UsageError: if there is no such model.
        """
        token = str(image.get('path') if isinstance(image, dict) else image)
        file = self.uploads.find(token)
        if file is None:
            raise DataError('The upload did not arrive. Please send the image again.')
        model = model or self.explorer.names[0]
        try:
            photo = self.explorer.read(file, model)
        finally:
            self.uploads.remove(token)
        return self.explorer.see(model, photo)

    def models(self) -> list:
        """List the models: name, weights, data and score, number of classes, input size (channels, height, width)."""
        opened = [self.explorer.open(name) for name in self.explorer.names]
        return [
            dict(
                name=one.name,
                weights=one.weights,
                about=one.about,
                classes=len(one.classes),
                input_size=[one.preprocessing.channels, *one.preprocessing.size],
            )
            for one in opened
        ]

    def classify(self, image: dict, model: str = '', top_k: int = 5) -> dict:
        """Classify an image: the most probable classes as index, label and probability."""
        check_numbers(dict(top_k=top_k))
        seen = self.see(image, model)
        ranking = seen.ranking(max(int(top_k), 1))
        return _answer(seen, predictions=[dict(index=i, label=name, probability=p) for i, name, p in ranking])

    def attention(
        self, image: dict, model: str = '', layer: int = -1, row: int | None = None, column: int | None = None
    ) -> dict:
        """Return the attention of a token, by default the class token, in one layer: a map for each head.

        Layers are counted from 0, or from the last with -1. Row and column choose a token of the layer's grid.
        """
        check_numbers(dict(layer=layer, **({} if row is None and column is None else dict(row=row, column=column))))
        seen = self.see(image, model)
        layers = [a for a in seen.trace.attentions.values() if a.grid is not None]
        if not -len(layers) <= layer < len(layers):
            raise DataError(f'There is no layer {layer}; {seen.one.name} has {len(layers)} layers with attention.')
        chosen = layers[int(layer)]
        maps = class_maps(chosen) if row is None or column is None else _token_maps(chosen, int(row), int(column))
        kind = 'kernel' if chosen.eps is not None else 'softmax'
        return _answer(seen, layer=chosen.name, kind=kind, **_map(maps[0], chosen.lattice))

    def evidence(self, image: dict, model: str = '', target: int | None = None) -> dict:
        """Return rollout and Grad-CAM maps; Grad-CAM is for class `target`, by default the predicted one."""
        check_numbers({} if target is None else dict(target=target))
        seen = self.see(image, model)
        backbone = seen.trace.backbone()
        cam = grad_cam(seen.one.model, seen.images, None if target is None else [int(target)])
        label = seen.class_name(int(cam.targets[0]))
        return _answer(
            seen,
            rollout=_map(rollout_map(backbone)[0], backbone[-1].lattice) if backbone else None,
            grad_cam=dict(layer=cam.layer, index=int(cam.targets[0]), label=label, **_map(cam.maps[0], cam.lattice)),
        )

    def layers(self, image: dict, model: str = '') -> dict:
        """Return measures of each layer: grid, channels, how many are dead or rich in structure, and medians."""
        seen = self.see(image, model)
        return _answer(
            seen,
            layers=[
                dict(
                    layer=m.name,
                    grid=list(m.grid),
                    channels=len(m.dead),
                    dead=int(m.dead.sum()),
                    rich=int(m.rich.sum()),
                    edge_agreement=_median(m.edges[~m.dead]),
                    high_frequencies=_median(m.fine[~m.dead]),
                )
                for m in seen.measures
            ],
        )


def _answer(seen: Seen, **fields: Any) -> dict[str, Any]:
    height, width = seen.shown.shape[:2]
    return dict(model=seen.one.name, weights=seen.one.weights, input=dict(height=height, width=width), **fields)


def _map(values: torch.Tensor, lattice: Lattice | None) -> dict[str, Any]:
    """Return a map as lists, with the positions of its cells in pixels of the model's input."""
    cells = dict(lattice._asdict()) if lattice else None
    return dict(grid=list(values.shape[-2:]), cells=cells, values=values.float().cpu().tolist())


def _token_maps(attention: Attention, row: int, column: int) -> torch.Tensor:
    grid = attention.query_grid
    if grid is None or not (0 <= row < grid[0] and 0 <= column < grid[1]):
        there = f'its grid has {grid[0]}×{grid[1]} tokens' if grid else 'it has no grid of tokens'
        raise DataError(f'There is no token at row {row}, column {column} of {attention.name}: {there}.')
    return query_maps(attention, attention.query_prefix + row * grid[1] + column)


def _median(values: torch.Tensor) -> float | None:
    values = values[values.isfinite()]
    return float(values.median()) if len(values) else None
