"""The Python interface: load a trained classifier, and predict, embed or evaluate with it.

The commands `predict`, `embed` and `eval` print what these methods return.
"""

import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .answers import Evaluation, Prediction, Predictions, Scored
from .classes import few, match_classes, read_classes
from .data import (
    MAX_PIXELS,
    DataError,
    Opener,
    Piece,
    Preprocessing,
    Source,
    left_out,
    open_batches,
    open_pieces,
    open_source,
)
from .data.waiting import DataWatch, Item, shorten_names
from .export import ExportedModel, files_of, is_exported, load_exported
from .inputs import ImageLike, open_all, open_own, trained_on
from .integrity import hash_file
from .models.precision import choose_precision, describe_precision
from .settings import Setting, UsageError, at_least, flatten, nearest, read_settings, recipes, require, resolve
from .trained import (
    Trained,
    describe,
    hash_weights,
    load_trained,
    nonfinite_tensors,
    note_on_names,
    pick_device,
    spoken_names,
)
from .vectors import Embedding, Head, Kind, TopK, finite_rows

Precision = Literal['no', 'bf16', 'fp16', 'auto']
Augmentation = Literal['none', 'flip', 'crops']
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
NOT_FINITE = 'the model computed NaN or infinity for this image'


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
        watch: Limits the time that it waits for images.
        named: False if neither the checkpoint nor the user named the classes; `classes` are then ImageNet-1k's for a
            thousand classes, else numbers.
    """

    history: list[dict[str, Any]] = []  # of `train`

    def __init__(
        self,
        trained: Trained | ExportedModel,
        checkpoint: str = '',
        device: torch.device = torch.device('cpu'),
        precision: Precision = 'no',
        classes: str | None = None,
    ) -> None:
        self.checkpoint, self.device, self.precision, self.choice = checkpoint, device, precision, classes
        self.precision_note = ''
        if precision == 'auto' and isinstance(trained, ExportedModel):
            self.precision = 'no'  # the file's own
        elif precision == 'auto':
            self.precision, reason = choose_precision(device)
            self.precision_note = describe_precision(self.precision, reason)
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
        self.watch = DataWatch(say=warnings.warn)
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
            precision: no (float32), bf16 or fp16 by autocast, or auto for bf16 if the device is faster in it.
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
            if precision not in ('no', 'auto'):
                raise UsageError(f'{checkpoint} has its own precision: leave out --precision {precision}')
            exported = load_exported(checkpoint)
            if exported.metadata.pixels == 'image':
                raise UsageError(
                    f'{checkpoint} resizes and crops images by itself, for t2t-vit serve and programs without torch: '
                    'give the run, or a file that was exported without --pixels image'
                )
            return cls(exported, checkpoint, classes=classes)
        target = pick_device(device)
        return cls(load_trained(checkpoint, model, ema), checkpoint, target, precision, classes)

    @classmethod
    def of(cls, net: torch.nn.Module, device: str = 'cpu') -> 'Classifier':
        """Make a classifier of a model that timm built; its pretrained_cfg may name classes in `label_names`."""
        return cls(describe(net), type(net).__name__, pick_device(device))

    @classmethod
    def train(
        cls,
        data: 'str | os.PathLike[str]',
        /,
        recipe: str | None = None,
        output: 'str | os.PathLike[str] | None' = None,
        verbose: bool = False,
        **settings: Any,
    ) -> 'Classifier':
        """Train a classifier, and return it with its best weights; the run folder is its `checkpoint`.

        The same as `t2t-vit train`, or `finetune` with the recipe finetune or finetune-head: what is not given is
        chosen from the data and the machine. The records of all epochs are in the attribute `history`.

        Args:
            data: As for --data of the command: digits, torch/NAME, hfds/NAME, or a folder.
            recipe: The name of a shipped recipe (`t2t-vit recipes`).
            output: The run folder; by default a new one in runs.
            verbose: Print the plan and the progress.
            settings: Options of the command, groups as dictionaries: epochs=10, data={'img_size': 64}.

        Raises:
            UsageError: for settings that cannot be used; all problems in one message.
            DataError: for data that cannot be used.
        """
        from .train.choose import FINETUNING, choose_settings
        from .train.config import Config
        from .train.run import train

        tree = {**settings, 'data': {'root': os.fspath(data), **settings.get('data', {})}}
        given, choices = [Setting(key, key, value) for key, value in flatten(tree)], list[str]()
        if recipe is not None and recipe not in recipes():
            raise UsageError(f'unknown recipe {recipe!r}{nearest(recipe, recipes())}; recipes: {", ".join(recipes())}')
        if recipe in (None, *FINETUNING):
            resolve(Config, given)  # mistakes before the data is opened
            base, choices = choose_settings(given, recipe)
        else:
            base = read_settings(recipes()[str(recipe)])
        config = resolve(Config, [*base, *given])
        folder = os.fspath(output) if output else f'runs/{config.model}-{datetime.now():%Y%m%d-%H%M%S}'
        quiet = io.StringIO()
        with nullcontext() if verbose else redirect_stdout(quiet):
            train(replace(config, output=folder), choices=choices)
        found = cls.load(folder, device=config.device)
        lines = (Path(folder) / 'metrics.jsonl').read_text('utf-8').splitlines()
        found.history = [json.loads(line) for line in lines]
        return found

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
        return note_on_names(self.named, self.classes, self.outputs)

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
        spans = [
            (start, min(start + batch_size, stop)) for begin, stop in pieces for start in range(begin, stop, batch_size)
        ]
        workers = max(0, min(workers, len(spans) - 1))  # for a single batch they do not pay

        def names(i: int) -> str:
            return shorten_names([opener.images.name(index) for index in range(*spans[min(i, len(spans) - 1)])])

        for opened in self.watched(open_pieces(opener, spans, workers, self.device), names):
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

        An image that cannot be read has an `error` and no label; the others are not affected. The list counts them in
        `damaged`, and the files that are no images in `skipped`.

        Args:
            images: Paths (files, folders, patterns, tars, Parquet files, lists), the bytes of image files, PIL images,
                arrays (H, W) or (H, W, 3), or a list of these.
            top_k: Classes to return for each image.
            batch_size: Images at once.
            workers: Processes that read images; 0 for none.
            max_pixels: Larger images are not decoded.

        Raises:
            UsageError: if `images` are something else, or a number is too small.
            DataError: naming all paths that are not there.
        """
        sizes = at_least(1, top_k=top_k, batch_size=batch_size, max_pixels=max_pixels)
        require([*sizes, *at_least(0, workers=workers)])
        found = open_all(images, self.preprocessing.channels)
        results = Predictions(skipped=found.skipped)
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
            UsageError: if the model has no such vectors; else as for `predict`.
        """
        require([*at_least(1, batch_size=batch_size, max_pixels=max_pixels), *at_least(0, workers=workers)])
        found, head = open_all(images, self.preprocessing.channels), self.embedding(kind)
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
            UsageError: if the data's classes are not the model's, or no data are given and the checkpoint is of no run;
                if a number is too small.
            DataError: if the data cannot be used.
        """
        require([*at_least(1, batch_size=batch_size), *at_least(0, workers=workers)])
        source, name = self.open_labelled(data, split, cache, download)
        return self.score(source, name, split, batch_size, workers, augmentation, temperature)

    def open_labelled(
        self, data: str | None, split: str, cache: str | None = None, download: bool = False
    ) -> tuple[Source, str]:
        """Open labelled images, and return their name; by default those that the run was trained on.

        Raises:
            UsageError: if no data are given, and the checkpoint does not know them.
            DataError: if there are no such data.
        """
        channels = self.preprocessing.channels
        if data is None:
            return open_own(self.checkpoint, split, cache, channels)
        return open_source(data, split, cache, download, channels), data

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
        batches = open_batches(
            source, self.preprocessing, batch_size, None, None, workers, device=self.device, watch=self.watch
        )
        start = time.perf_counter()
        logits, labels, indices = [], [], []

        def names_of(step: int) -> str:
            return shorten_names([source.name(i) for part in batches.steps.epoch(0, step)[:1] for i in part.tolist()])

        try:
            for images, truths, index, *_ in self.watched(batches.epoch(), names_of):
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
        from .metrics import measure  # imports torchmetrics and scipy.stats, which predictions do not need

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
            [*([note] if note else []), *trained_on(self.checkpoint, source, data), *left_out(source, data)],
        )

    def watched(self, items: Iterable[Item], describe: Callable[[int], str]) -> Iterator[Item]:
        """Yield what images become, and stop if one of them does not come; `describe` names them by their number.

        Raises:
            Stalled: if a source does not answer for `watch.timeout` seconds; only in the main thread.
            DataError: if a process that opens images was killed.
        """
        with self.watch.active():
            yield from self.watch.each(items, describe)

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
