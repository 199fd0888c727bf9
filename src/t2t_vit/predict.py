"""Predict or embed many images: the commands `t2t-vit predict` and `t2t-vit embed`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch

from . import __version__
from .classifier import Answers, Classifier, NotFinite, Precision
from .console import Live, console, duration
from .data import MAX_PIXELS, DataError, Opener, Piece, counted, find_images, printable
from .data.waiting import command_watch
from .export import is_exported
from .results import Results, check_place, check_writable, portable_name, portable_text
from .settings import UsageError, at_least, require
from .vectors import Head, Kind

Row = dict[str, Any]
SHOWN, NAMED = 24, 5  # images in a picture, and damaged ones in a message
TYPES = {'classes': pa.string(), 'probabilities': pa.float32(), 'embedding': pa.float32()}


def as_lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return (B, n) as an array of B lists, of any size: few versions of Arrow handle missing lists of a fixed size."""
    starts = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(starts, pa.array(values.ravel(), kind))


@dataclass
class Job:
    """The arguments that `predict` and `embed` share; see there."""

    inputs: list[str]
    checkpoint: str
    model: str | None
    output: str | None
    classes: str | None
    ema: bool
    batch_size: int
    workers: int
    device: str
    precision: Precision
    shard_size: int
    max_pixels: int
    spreadsheet: bool

    def check(self, files: tuple[str, ...], rules: tuple[tuple[bool, str], ...] = ()) -> None:
        """Raise UsageError with all that is wrong; `files` are the suffixes that the output may have."""
        problems = check_place(self.output, files) if self.output else []
        require(
            (
                *rules,
                *at_least(1, batch_size=self.batch_size, shard_size=self.shard_size, max_pixels=self.max_pixels),
                *at_least(0, workers=self.workers),
                *((False, problem) for problem in problems),
            )
        )
        self.rank, self.world = (number(name, default) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))
        require(
            (
                (
                    0 <= self.rank < self.world,
                    f'RANK must be at least 0 and less than WORLD_SIZE, got {self.rank} of {self.world}',
                ),
                (self.world == 1 or bool(self.output), f'{self.world} processes need an --output to write to'),
            )
        )
        if self.output:
            check_writable(Path(self.output).parent)

    def load(self) -> Classifier:
        """Find the images, and load the model; `opener` then prepares the images for it."""
        self.images = find_images(self.inputs)
        device = self.device
        if self.world > 1 and device in ('auto', 'cuda') and torch.cuda.is_available():
            device = f'cuda:{number("LOCAL_RANK", self.rank) % torch.cuda.device_count()}'
        if is_exported(self.checkpoint) and self.device == 'auto':
            device = 'cpu'
        self.classifier = found = Classifier.load(
            self.checkpoint, self.model, device, self.precision, self.classes, self.ema
        )
        found.watch = command_watch()
        if found.precision_note:
            console().print(f'note: {found.precision_note}', soft_wrap=True)
        if (channels := found.preprocessing.channels) not in (1, 3):
            self.images = find_images(self.inputs, channels)
        self.opener = Opener(self.images, found.preprocessing, self.max_pixels)
        self.settings: Row = dict(
            **found.identity,
            classes=found.classes,
            preprocessing=found.preprocessing.as_cfg(),
            precision=found.precision,
            max_pixels=self.max_pixels,
            images=len(self.images),
            image_names=self.images.digest(),
            shard_size=self.shard_size,
        )
        return found

    def environment(self) -> Row:
        """Return what may change when the command is continued."""
        return dict(
            inputs=[portable_name(name) for name in self.inputs],
            checkpoint=self.checkpoint,
            device=str(self.classifier.device),
            batch_size=self.batch_size,
            processes=self.world,
            version=__version__,
            torch=torch.__version__,
            timm=timm.__version__,
        )

    def table(self, answers: Answers, width: dict[str, int]) -> pa.Table:
        """Return answers as rows of all images, those that could not be read included."""
        span = range(answers.start, answers.stop)
        places = {index: i for i, index in enumerate(answers.good)}
        order = pa.array([places.get(index) for index in span], pa.int64())
        columns = {}
        for name, n in width.items():
            values = answers.columns.get(name, np.empty((0, n), np.int64 if name == 'classes' else np.float32))
            if name == 'classes':
                values = np.array([portable_text(text) for text in self.classifier.classes], object)[values]
            columns[name] = as_lists(values, TYPES[name]).take(order)
        return pa.table(
            {
                'index': pa.array(span, pa.int64()),
                'image': pa.array([portable_name(self.images.name(i)) for i in span], pa.string()),
                'error': pa.array([answers.errors.get(i) for i in span], pa.string()),
                **columns,
            }
        )


def number(name: str, default: int) -> int:
    """Return a whole number from the environment.

    Raises:
        UsageError: if it is not one.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f'{name} must be a whole number, got {text!r}') from None


def follow(job: Job, head: Head, width: dict[str, int], settings: Row) -> Iterator[pa.Table]:
    """Yield every batch's rows of this process; with an output, they are in it when the next batch is asked for.

    Args:
        job: Loaded.
        head: Computes the columns.
        width: Values in each list of each column.
        settings: What the rows depend on besides the job's own settings.

    Raises:
        KeyboardInterrupt: if it is interrupted, with what to do about it.
        NotFinite: at the end, if the model computed NaN or infinity for an image.
    """
    if job.images.skipped and not job.rank:
        console().print(f'left out: {counted(job.images.skipped)}', soft_wrap=True)
    if not job.output:
        yield from rows(job, head, width, None)
        return
    results = Results(Path(job.output), len(job.images), job.shard_size, {**job.settings, **settings}, job.spreadsheet)
    with results.lock(job.rank, job.world):
        results.begin(job.environment())
        yield from rows(job, head, width, results)


def rows(job: Job, head: Head, width: dict[str, int], results: Results | None) -> Iterator[pa.Table]:
    """Yield the rows of `follow`, with its results open."""
    pieces: list[Piece] = [(0, len(job.images))]
    before = read = damaged = not_finite = 0
    if results:
        missing = results.missing()
        pieces = [results.piece(part) for part in missing if part % job.world == job.rank]
        own = range(job.rank, len(results.parts), job.world)
        before = sum(len(range(*results.piece(part))) for part in own) - sum(len(range(*piece)) for piece in pieces)
    held: list[pa.Table] = []
    total = before + sum(len(range(*piece)) for piece in pieces)
    with Live(console(stderr=True), 'image', total, before, quiet=job.rank > 0) as live:
        try:
            for answers in job.classifier.answers(head, job.opener, pieces, job.batch_size, job.workers):
                table = job.table(answers, width)
                read, damaged = read + table.num_rows, damaged + len(answers.errors)
                not_finite += answers.not_finite
                held.append(table)
                if results and (answers.stop % job.shard_size == 0 or answers.stop == len(job.images)):
                    part = (answers.stop - 1) // job.shard_size
                    results.write(part, pa.concat_tables(held), sum(width.values()) // len(width))
                    held = []
                live.show(before + read, f'{read / live.seconds:.0f} images/s  {damaged} damaged')
                yield table
        except KeyboardInterrupt:
            hint = 'stopped; the same command continues from what is done' if results else ''
            raise KeyboardInterrupt(hint) from None
        seconds = live.seconds
    if results:
        whole = results.finish()
        speed = (
            f'{read:,} images in {duration(seconds)}, {read / seconds:.1f} images/s, {damaged:,} of them damaged; '
            if read
            else 'nothing left to do; '
        )
        done = f'all {len(job.images):,} are in {job.output}'
        share = f'this was the part of process {job.rank + 1} of {job.world}'
        console().print(speed + (done if whole else share), soft_wrap=True)
    if not_finite:
        weights = job.classifier.not_finite()
        raise NotFinite(
            f'{job.checkpoint} computes NaN or infinity for {not_finite} of {len(job.images)} images; these have errors'
            + (f'; these weights are not finite: {", ".join(weights[:3])}' if weights else '')
        )


def predict(
    inputs: list[str],
    checkpoint: str,
    model: str | None = None,
    output: str | None = None,
    top_k: int = 5,
    classes: str | None = None,
    ema: bool = True,
    batch_size: int = 32,
    workers: int = 2,
    device: str = 'auto',
    precision: Precision = 'no',
    shard_size: int = 1024,
    max_pixels: int = MAX_PIXELS,
    picture: str | None = None,
    spreadsheet: bool = False,
) -> None:
    """Classify images: the most probable classes of each.

    An image that cannot be read has an error; the others are not affected. Exits with 1 if the model computes NaN or
    infinity for an image.

    Args:
        inputs: Image files, folders and patterns of them, tars, Parquet files, lists of paths (.csv, .txt), or digits
            for a few of the embedded test images.
        checkpoint: A run folder, its model.safetensors, a training state (checkpoints/step-*.pt), hf-hub:USER/NAME, an
            exported .onnx, .xml or .pt2, or a file in any published layout (then with --model).
        model: The registered name of the model in a file without a config.json.
        output: A .csv, .jsonl or .parquet file, or a folder for parts that read as one data set; the screen by default,
            batch by batch. The same command continues where it was interrupted.
        top_k: Classes to print for each image.
        classes: A file with the class names in the order of the model's outputs, one a line.
        ema: Take the EMA weights of a training state, else the raw ones.
        batch_size: Images at once.
        workers: Processes that read images; none for a single batch.
        device: cpu, cuda, cuda:1, mps or auto.
        precision: no (float32), bf16, fp16, or auto for bf16 if the device is faster in it.
        shard_size: Images in a part of the output, which is computed again if it was interrupted.
        max_pixels: Larger images are not decoded.
        picture: A PNG file to show the first images in, with their predictions.
        spreadsheet: Write cells of a .csv that a spreadsheet would execute as formulas (beginning with = + - @) with an
            apostrophe in front.
    """
    job = Job(
        inputs,
        checkpoint,
        model,
        output,
        classes,
        ema,
        batch_size,
        workers,
        device,
        precision,
        shard_size,
        max_pixels,
        spreadsheet,
    )
    rules = at_least(1, top_k=top_k)
    if picture:
        rules.append((Path(picture).suffix.lower() == '.png', f'picture must end in .png, got {picture}'))
    job.check(('.csv', '.jsonl', '.parquet'), (*rules,))
    if picture:
        check_writable(Path(picture).parent)
    classifier = job.load()
    head = classifier.top_k(top_k)
    screen, good, bad = console(), 0, 0
    shown: list[Row] = []
    damaged: list[str] = []
    if note := classifier.note():
        screen.print(f'note: {note}', soft_wrap=True)
    try:
        for table in follow(job, head, dict(classes=head.k, probabilities=head.k), dict(top_k=head.k)):
            good += (answered := table.column('error').null_count)
            bad += table.num_rows - answered
            found = table.to_pylist() if not output or picture and len(shown) < SHOWN else []
            shown += [row for row in found if picture and row['error'] is None][: SHOWN - len(shown)]
            if not output:
                errors = (f'{printable(row["image"])} ({row["error"]})' for row in found if row['error'] is not None)
                damaged += islice(errors, NAMED - len(damaged))
                print_rows(found)
    finally:
        if picture and shown:
            save_picture(job, shown, Path(picture))
            screen.print(f'the picture is {picture}', soft_wrap=True)
        if damaged and good:
            screen.print(f'{bad} of {bad + good} images have no prediction: {", ".join(damaged)}', soft_wrap=True)
    if picture and not shown:
        screen.print(f'{picture} is not drawn: this command classified no image', soft_wrap=True)
    if damaged and not good:
        raise DataError(f'not one image can be read: {", ".join(damaged)}')


def save_picture(job: Job, shown: list[Row], path: Path) -> None:
    """Draw images with their predictions."""
    rows = [
        (job.opener.picture(row['index']), row['classes'][0], row['probabilities'][0], job.images.truth(row['index']))
        for row in shown
    ]
    from .plots import plot_predictions  # imports matplotlib

    plot_predictions(rows, path)


def print_rows(rows: list[Row]) -> None:
    """Print predictions: a line each if all of them fit the screen, else the name and its classes on two lines.

    Nothing is cut or wrapped.
    """
    screen = console()
    lines = [
        (
            printable(row['image']),
            '–'
            if row['error'] is not None
            else '   '.join(f'{printable(c)} {100 * p:.1f} %' for c, p in zip(row['classes'], row['probabilities'])),
        )
        for row in rows
    ]
    width = max((len(name) for name, _ in lines), default=0)
    fits = all(width + 3 + len(answer) <= screen.width for _, answer in lines)
    for name, answer in lines:
        screen.print(f'{name:{width}}   {answer}' if fits else f'{name}\n    {answer}', soft_wrap=True)


def embed(
    inputs: list[str],
    checkpoint: str,
    output: str,
    model: str | None = None,
    kind: Kind = 'features',
    ema: bool = True,
    batch_size: int = 32,
    workers: int = 2,
    device: str = 'auto',
    precision: Precision = 'no',
    shard_size: int = 1024,
    max_pixels: int = MAX_PIXELS,
    spreadsheet: bool = False,
) -> None:
    """Turn images into vectors, to search, group or learn from.

    An image that cannot be read has an error and no vector. Exits with 1 if the model computes NaN or infinity for an
    image.

    Args:
        inputs: Image files, folders and patterns of them, tars, Parquet files, lists of paths (.csv, .txt), or digits
            for a few of the embedded test images.
        checkpoint: A run folder, its model.safetensors, a training state (checkpoints/step-*.pt), hf-hub:USER/NAME, an
            exported .onnx, .xml or .pt2, or a file in any published layout (then with --model).
        output: A .parquet file; a .npy file, with the images' names in a .csv beside it; or a folder for parts that
            read as one data set. The same command continues where it was interrupted.
        model: The registered name of the model in a file without a config.json.
        kind: features (the head's input), class_token, pooled (the mean of the other tokens), or pyramid (means over
            the maps of every stride).
        ema: Take the EMA weights of a training state, else the raw ones.
        batch_size: Images at once.
        workers: Processes that read images; none for a single batch.
        device: cpu, cuda, cuda:1, mps or auto.
        precision: no (float32), bf16, fp16, or auto for bf16 if the device is faster in it.
        shard_size: Images in a part of the output, which is computed again if it was interrupted.
        max_pixels: Larger images are not decoded.
        spreadsheet: Write names in the .csv that a spreadsheet would execute as formulas (beginning with = + - @) with
            an apostrophe in front.
    """
    job = Job(
        inputs,
        checkpoint,
        model,
        output,
        None,
        ema,
        batch_size,
        workers,
        device,
        precision,
        shard_size,
        max_pixels,
        spreadsheet,
    )
    job.check(('.parquet', '.npy'))
    head = job.load().embedding(kind)
    for _ in follow(job, head, dict(embedding=sum(head.levels)), dict(kind=kind, levels=head.levels)):
        pass
