"""The Python interface: load a trained classifier, and predict, embed or evaluate with it.

The commands `predict`, `embed` and `eval` print what these methods return.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

import numpy as np
import torch
import yaml
from PIL import Image

from .classes import few, match_classes, read_classes
from .data import (
    MAX_PIXELS,
    SPLIT_FILE,
    DataError,
    Images,
    Opener,
    Piece,
    Preprocessing,
    Source,
    Split,
    find_images,
    open_batches,
    open_pieces,
    open_source,
    read_image,
)
from .export import ExportedModel, files_of, is_exported, load_exported
from .metrics import Measures, measure
from .models.safe_load import CheckpointError, hash_file
from .settings import UsageError
from .trained import Trained, describe, hash_weights, load_trained, nonfinite_tensors, pick_device, spoken_names
from .vectors import Embedding, Head, Kind, TopK, finite_rows

if TYPE_CHECKING:
    import pandas

Precision = Literal['no', 'bf16', 'fp16']
Augmentation = Literal['none', 'flip', 'crops']
ImageLike = Union[str, 'os.PathLike[str]', Image.Image, np.ndarray]
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
NOT_FINITE = 'the model computed NaN or infinity for this image'


@dataclass
class Prediction:
    """A model's answer for one image; `label` and `probability` are None where `error` says why."""

    image: str
    label: str | None = None
    probability: float | None = None
    top_k: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None


class Predictions(list[Prediction]):
    """A list of predictions, in the order of the images."""

    def to_pandas(self) -> 'pandas.DataFrame':
        """Return a table: image, label, probability, error, and class_1, probability_1, class_2, …

        Raises:
            UsageError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError('to_pandas needs pandas, which is not installed: pip install pandas') from None
        rows = [
            {
                'image': one.image,
                'label': one.label,
                'probability': one.probability,
                'error': one.error,
                **{f'class_{i}': name for i, (name, _) in enumerate(one.top_k, 1)},
                **{f'probability_{i}': value for i, (_, value) in enumerate(one.top_k, 1)},
            }
            for one in self
        ]
        return pandas.DataFrame(rows)


class Scored(NamedTuple):
    """A labelled image and the model's answer; probabilities of the predicted class and of the label."""

    position: int
    image: str
    label: str
    predicted: str
    probability: float
    probability_of_label: float


@dataclass
class Evaluation:
    """The scores of a model on labelled images.

    `classes` are the model's, in the order of its outputs; `measures` has the numbers; `rows` has every image.
    """

    checkpoint: str
    data: str
    split: str
    augmentation: str
    classes: list[str]
    measures: Measures
    rows: list[Scored]
    damaged: list[str]
    not_finite: int
    seconds: float
    notes: list[str]

    def mistakes(self) -> list[Scored]:
        """Return the images that were classified wrongly, the most confident mistakes first."""
        wrong = [row for row in self.rows if row.predicted != row.label]
        return sorted(wrong, key=lambda row: -row.probability)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values, None where there is none: what scores.json holds."""
        found, names = self.measures, self.classes
        plain = {key: value for key, value in vars(found).items() if key not in ('per_class', 'confusion')}
        return dict(
            checkpoint=self.checkpoint,
            data=self.data,
            split=self.split,
            augmentation=self.augmentation,
            **plain,
            per_class=dict(zip(names, found.per_class['recall'])),
            classes={
                name: dict(images=int(count), **{key: values[i] for key, values in found.per_class.items()})
                for i, (name, count) in enumerate(zip(names, found.confusion.sum(1)))
            },
            damaged=self.damaged,
            not_finite=self.not_finite,
            notes=self.notes,
        )


class Held:
    """Images in memory, as a part of `data.Images`."""

    def __init__(self, images: Sequence[Any], first: int) -> None:
        self.images, self.first = images, first

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the file's name if the image knows it, else its position."""
        return str(getattr(self.images[index], 'filename', '') or f'image {self.first + index}')

    def open(self, index: int) -> Any:
        """Return the image, upright."""
        return read_image(self.images[index])


class Answers(NamedTuple):
    """The columns of a head for a run of images: `good` are the places that have a row in each column."""

    start: int
    stop: int
    good: list[int]
    errors: dict[int, str]
    columns: dict[str, np.ndarray]
    not_finite: int


class Classifier:
    """A trained image classifier.

    Example:
        model = Classifier.load('runs/photos')
        for found in model.predict(['a.jpg', 'b.jpg']):
            print(found.image, found.label, found.probability)

    Attributes:
        net: The model in evaluation mode on `device`, or an `ExportedModel`.
        preprocessing: How an image becomes a tensor.
        classes: The class names in the order of the model's outputs.
        named: False if neither the checkpoint nor the user named the classes; `classes` are then ImageNet-1k's for a
            thousand classes, else numbers.
    """

    def __init__(
        self,
        trained: Trained | ExportedModel,
        checkpoint: str = '',
        device: torch.device = torch.device('cpu'),
        precision: Precision = 'no',
        classes: str | None = None,
    ) -> None:
        self.checkpoint, self.device, self.precision, self.choice = checkpoint, device, precision, classes
        self.net: Any
        if isinstance(trained, ExportedModel):
            self.net, names, self.natural = trained, trained.class_names, False
            self.preprocessing: Preprocessing = trained.preprocessing
            self.named = names != [str(i) for i in range(len(names))]
        else:
            self.net, self.preprocessing, names, self.named, self.natural = trained
            self.net = self.net.to(device)
        given = read_classes(classes, len(names)) if classes else None
        if given:
            names, self.named = given, True
        self.outputs = names
        self.classes = spoken_names(names)

    @classmethod
    def load(
        cls,
        checkpoint: 'str | os.PathLike[str]',
        model: str | None = None,
        device: str = 'auto',
        precision: Precision = 'no',
        classes: str | None = None,
        ema: bool = True,
    ) -> 'Classifier':
        """Load a trained classifier.

        Args:
            checkpoint: A run folder, its model.safetensors, a training state (checkpoints/step-*.pt), hf-hub:USER/NAME,
                an exported .onnx, .xml or .pt2, or a file in any published layout (then with `model`).
            model: The registered name of the model in a file without a config.json.
            device: cpu, cuda, cuda:1, mps, or auto for the accelerator if there is one.
            precision: no (float32), bf16 or fp16: autocast.
            classes: A file with the class names in the order of the model's outputs, one a line; or, for a checkpoint
                without names, `text` or `natural`, the order in which its class folders were sorted.
            ema: Take the EMA weights of a training state, else the raw ones.

        Raises:
            CheckpointError: if there is no such model, or the file is damaged.
            UsageError: if the options do not fit together.
        """
        checkpoint = os.fspath(checkpoint)
        if is_exported(checkpoint):
            if device not in ('auto', 'cpu'):
                raise UsageError(f'exported files run on the CPU, not on {device}')
            if precision != 'no':
                raise UsageError(f'{checkpoint} has its own precision: leave out --precision {precision}')
            return cls(load_exported(checkpoint), checkpoint, classes=classes)
        target = pick_device(device)
        return cls(load_trained(checkpoint, model, ema), checkpoint, target, precision, classes)

    @classmethod
    def of(cls, net: torch.nn.Module, device: str = 'cpu') -> 'Classifier':
        """Make a classifier of a model that timm built; its pretrained_cfg may name classes in `label_names`."""
        return cls(describe(net), type(net).__name__, pick_device(device))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model's name and the digest of its weights, to tell it from others."""
        if isinstance(self.net, ExportedModel):
            sha = ' '.join(map(hash_file, files_of(self.checkpoint)))
            kind = f'{self.net.runtime}, {self.net.metadata.precision}'
            return dict(model=self.net.metadata.model, weights=sha, export=kind)
        return dict(model=self.net.pretrained_cfg['architecture'], weights=hash_weights(self.net))

    def note(self) -> str:
        """Return a sentence about class names that were assumed; empty if the checkpoint names its classes."""
        if self.named:
            return ''
        if self.classes != self.outputs:
            return 'the checkpoint names no classes; the names are those of ImageNet-1k, by the number of classes'
        return 'the checkpoint names no classes; numbers are the positions of its outputs (--classes FILE names them)'

    def not_finite(self) -> list[str]:
        """Return the names of weights that hold NaN or infinity."""
        return [] if isinstance(self.net, ExportedModel) else nonfinite_tensors(self.net.state_dict().items())

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, classes), float32, of normalised images (B, C, H, W)."""
        return self.apply(lambda part: {'logits': self.net(part).float()}, images)['logits']

    def apply(self, head: Head, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the columns of a head for normalised images (B, C, H, W), on the device, in the precision."""
        kind = DTYPES.get(self.precision)
        with torch.inference_mode(), torch.autocast(self.device.type, kind, enabled=kind is not None):
            return head(images.to(self.device, non_blocking=True))

    def top_k(self, k: int) -> TopK:
        """Return the head for the k most probable classes."""
        return TopK(self.net, min(k, len(self.classes)))

    def embedding(self, kind: Kind) -> Embedding:
        """Return the head for vectors of a kind."""
        size = self.preprocessing.channels, *self.preprocessing.size
        return Embedding(self.net, kind, torch.zeros(1, *size, device=self.device))

    def answers(
        self, head: Head, opener: Opener, pieces: Iterable[Piece], batch_size: int, workers: int = 0
    ) -> Iterator[Answers]:
        """Yield the columns of a head for images, batch by batch; no batch goes beyond its piece."""
        spans = [*pieces]
        batches = (
            (start, min(start + batch_size, stop)) for begin, stop in spans for start in range(begin, stop, batch_size)
        )
        count = sum(-(-(stop - begin) // batch_size) for begin, stop in spans)
        workers = max(0, min(workers, count - 1))  # for a single batch they do not pay
        for opened in open_pieces(opener, batches, workers, self.device):
            if not opened.good:
                yield Answers(opened.start, opened.stop, [], opened.errors, {}, 0)
                continue
            finite, columns = finite_rows(self.apply(head, opened.images))
            bad = {i: NOT_FINITE for i, good in zip(opened.good, finite) if not good}
            yield Answers(
                opened.start,
                opened.stop,
                [i for i, good in zip(opened.good, finite) if good],
                {**opened.errors, **bad},
                {name: column[finite] for name, column in columns.items()},
                len(bad),
            )

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        top_k: int = 5,
        batch_size: int = 32,
        workers: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> Predictions:
        """Classify images.

        An image that cannot be read has an `error` and no label; the others are not affected.

        Args:
            images: Paths (files, folders, patterns, tars, Parquet files, lists), PIL images, arrays (H, W) or
                (H, W, 3), or a list of these.
            top_k: Classes to return for each image.
            batch_size: Images at once.
            workers: Processes that read images; 0 for none.
            max_pixels: Larger images are not decoded.
        """
        found = open_all(images)
        results = Predictions()
        opener = Opener(found, self.preprocessing, max_pixels)
        for answers in self.answers(self.top_k(top_k), opener, [(0, len(found))], batch_size, workers):
            rows = dict(zip(answers.good, zip(*(answers.columns.values() if answers.good else ((), ())))))
            for i in range(answers.start, answers.stop):
                name = found.name(i)
                if i in rows:
                    classes, values = rows[i]
                    top = [(self.classes[c], float(p)) for c, p in zip(classes, values)]
                    results.append(Prediction(name, *top[0], top_k=top))
                else:
                    results.append(Prediction(name, error=answers.errors[i]))
        return results

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        kind: Kind = 'features',
        batch_size: int = 32,
        workers: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> np.ndarray:
        """Return a vector for each image, (N, D), float32; NaN for one that cannot be read.

        Args:
            images: As for `predict`.
            kind: features (the head's input), class_token, pooled (the mean of the other tokens), or pyramid (means
                over the maps of every stride).
            batch_size: Images at once.
            workers: Processes that read images; 0 for none.
            max_pixels: Larger images are not decoded.

        Raises:
            UsageError: if the model has no such vectors.
        """
        found, head = open_all(images), self.embedding(kind)
        vectors = np.full((len(found), sum(head.levels)), np.nan, np.float32)
        opener = Opener(found, self.preprocessing, max_pixels)
        for answers in self.answers(head, opener, [(0, len(found))], batch_size, workers):
            if answers.good:
                vectors[answers.good] = answers.columns['embedding']
        return vectors

    def evaluate(
        self,
        data: str | None = None,
        split: Literal['train', 'val'] = 'val',
        batch_size: int = 128,
        workers: int = 2,
        augmentation: Augmentation = 'none',
        temperature: bool = False,
        cache: str | None = None,
        download: bool = False,
    ) -> Evaluation:
        """Score the model on labelled images.

        Args:
            data: digits, torch/NAME, hfds/NAME, a folder with val/ of class folders, a folder of class folders, a
                Parquet file or tar, or a folder of them; by default the data that the run was trained on.
            split: val or train.
            batch_size: Images at once.
            workers: Processes that read images.
            augmentation: Test-time augmentation, whose probabilities are averaged: none, flip (the image and its mirror
                image), or crops (the image, its corners and its middle enlarged, and all of them mirrored).
            temperature: Fit the temperature that calibrates the probabilities.
            cache: Folder of torch/ and hfds/ sets; by default ~/.cache/t2t-vit, and the Hub's own.
            download: Fetch a torch/ set that is not there.

        Raises:
            UsageError: if the data's classes are not the model's, or no data are given and the checkpoint is of no run.
            DataError: if the data cannot be used.
        """
        source, name = open_labelled(self.checkpoint, data, split, cache, download)
        return self.score(source, name, split, batch_size, workers, augmentation, temperature)

    def match(self, source: Source, data: str) -> tuple[list[int], str]:
        """Return the model's output of each of a source's classes, and a note; see `match_classes`."""
        names = self.outputs if self.named else None
        return match_classes(names, source.classes, len(self.outputs), data, self.choice, self.natural)

    def score(
        self,
        source: Source,
        data: str,
        split: str = 'val',
        batch_size: int = 128,
        workers: int = 2,
        augmentation: Augmentation = 'none',
        temperature: bool = False,
    ) -> Evaluation:
        """Score the model on an open source of labelled images; see `evaluate`."""
        outputs, note = self.match(source, data)
        if not self.named:  # the data name the outputs
            names = [*self.outputs]
            for i, name in zip(outputs, source.classes):
                names[i] = name
        else:
            names = self.outputs
        position = torch.tensor(outputs)
        batches = open_batches(source, self.preprocessing, batch_size, None, None, workers, device=self.device)
        start = time.perf_counter()
        logits, labels, indices = [], [], []
        try:
            for images, truths, index, *_ in batches.epoch():
                logits.append(self.averaged(images, augmentation).cpu())
                labels.append(position[truths.cpu()])
                indices.append(index.cpu())
        finally:
            batches.close()
        seconds = time.perf_counter() - start
        if not logits:
            raise DataError(f'not one image of {data} can be read: {few(batches.damaged)}')
        every, truth, place = torch.cat(logits), torch.cat(labels), torch.cat(indices)
        good = every.isfinite().all(1)
        if not good.any():
            raise NotFinite(f'{self.checkpoint} computes NaN or infinity for all {len(every)} images of {data}')
        every, truth, place = every[good], truth[good], place[good]
        probabilities = every.softmax(1)
        top = probabilities.max(1)
        rows = [
            Scored(i, source.name(i), names[label], names[answer], p, q)
            for i, label, answer, p, q in zip(
                place.tolist(),
                truth.tolist(),
                top.indices.tolist(),
                top.values.tolist(),
                probabilities.gather(1, truth[:, None])[:, 0].tolist(),
            )
        ]
        return Evaluation(
            self.checkpoint,
            data,
            split,
            augmentation,
            list(names),
            measure(every, truth, temperature),
            rows,
            batches.damaged,
            int((~good).sum()),
            seconds,
            [note] if note else [],
        )

    def averaged(self, images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
        """Return logits (B, classes), of test-time augmentation the log of the mean probabilities."""
        if augmentation == 'none':
            return self.logits(images)
        views = [*corners(images)] if augmentation == 'crops' else [images]
        views += [view.flip(3) for view in views]
        return torch.stack([self.logits(view).softmax(1) for view in views]).mean(0).log()


class NotFinite(ValueError):
    """A model whose outputs are not finite."""

    code = 1  # the command's exit code


def corners(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield images (B, C, H, W), and their four corners and middle, 7/8 of each side, enlarged to the same size."""
    yield images
    height, width = images.shape[2:]
    h, w = height * 7 // 8, width * 7 // 8
    for top, left in ((0, 0), (0, width - w), (height - h, 0), (height - h, width - w)):
        part = images[:, :, top : top + h, left : left + w]
        yield torch.nn.functional.interpolate(part, (height, width), mode='bicubic', antialias=True)
    part = images[:, :, (height - h) // 2 :, (width - w) // 2 :][:, :, :h, :w]
    yield torch.nn.functional.interpolate(part, (height, width), mode='bicubic', antialias=True)


def open_all(images: ImageLike | Iterable[ImageLike]) -> Images:
    """Return images of all kinds as one list.

    Raises:
        UsageError: for anything that is not a path, a PIL image or an array.
        DataError: naming everything that is not there.
    """
    items = [images] if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)) else list(images)
    parts: list[Any] = []
    for position, item in enumerate(items):
        if isinstance(item, (str, os.PathLike)):
            parts += find_images([os.fspath(item)]).parts
        elif isinstance(item, (Image.Image, np.ndarray)):
            parts.append(Held([item], position))
        else:
            raise UsageError(
                f'image {position} is a {type(item).__name__}; expected a path, a PIL image, or an array (H, W, 3)'
            )
    return Images(parts)


def run_folder(checkpoint: str) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None if it belongs to none."""
    path = Path(checkpoint.removeprefix('local-dir:'))
    folders = (path, path.parent, path.parent.parent) if path.suffix else (path,)
    return next((folder for folder in folders if (folder / 'config.yaml').is_file()), None)


def open_labelled(
    checkpoint: str, data: str | None, split: str, cache: str | None = None, download: bool = False
) -> tuple[Source, str]:
    """Open labelled images, and return their name; by default those that a run was trained on.

    Raises:
        UsageError: if no data are given, and the checkpoint does not know them.
    """
    if data is not None:
        return open_source(data, split, cache, download), data
    folder = run_folder(checkpoint)
    if folder is None:
        raise UsageError(f'{checkpoint} is not in a run folder, which would know its data: name the data with --data')
    try:
        saved = yaml.safe_load((folder / 'config.yaml').read_text('utf-8'))['data']
        root = str(saved['root'])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f'{folder / "config.yaml"} cannot be read: {error}') from None
    cache = cache or saved.get('cache')
    if (file := folder / SPLIT_FILE).exists():  # the run divided one set of images
        train, val = Split.load(file).apply(open_source(root, 'all', cache, download), root)
        return train if split == 'train' else val, root
    return open_source(root, split, cache, download), root
