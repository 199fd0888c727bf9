"""What a trained model says of images, few or millions: their classes, or vectors that stand for them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import timm
import torch
from rich.table import Table

from . import __version__
from .console import Live, console, duration
from .data import MAX_PIXELS, DataError, Opened, Opener, Piece, Preprocessing, find_images, open_pieces
from .export import ExportedModel, files_of, is_exported, load_exported
from .models.checkpoints import hash_file
from .plots import plot_predictions
from .results import Results, check_place
from .settings import UsageError, require
from .trained import hash_weights, load_model, pick_device, spoken_names

Kind = Literal['features', 'class_token', 'pooled', 'pyramid']
Precision = Literal['no', 'bf16', 'fp16']
Row = dict[str, Any]
SHOWN, NAMED = 24, 5  # images in a picture, and damaged ones in a message


class Head(Protocol):
    """What is asked of a model: columns of these types."""

    types: dict[str, pa.DataType]
    width: int  # of each of these lists

    def __call__(self, images: torch.Tensor) -> dict[str, pa.Array]:
        """Columns with a value for each of (B, C, H, W)."""


class TopK:
    """The most probable classes: columns `classes` and `probabilities`, k of each in falling order."""

    def __init__(self, net: Callable[[torch.Tensor], torch.Tensor], names: list[str], k: int) -> None:
        self.net, self.names, self.k = net, np.array(names), min(k, len(names))
        self.types = {'classes': pa.list_(pa.string()), 'probabilities': pa.list_(pa.float32())}
        self.width = self.k

    def __call__(self, images: torch.Tensor) -> dict[str, pa.Array]:
        """Columns with a value for each of (B, C, H, W)."""
        values, classes = self.net(images).float().softmax(-1).topk(self.k)
        return {
            'classes': as_lists(self.names[classes.cpu().numpy()], pa.string()),
            'probabilities': as_lists(values.cpu().numpy(), pa.float32()),
        }


class Embedding:
    """A vector for each image: column `embedding`.

    Of kind `features`, what the head reads; `class_token`, the first token behind the last norm; `pooled`, the mean of
    all others, or of a convolutional network's last map; `pyramid`, the means over the maps of every stride (4, 8 and
    16 in T2T-ViT), one behind the other, of `levels` numbers each.

    Raises:
        UsageError: if the model has no such thing.
    """

    def __init__(self, net: Any, kind: Kind, probe: torch.Tensor) -> None:
        self.net, self.kind = net, kind
        if isinstance(net, ExportedModel) and kind != 'features':
            raise UsageError(f'an exported file gives what its head reads, and no more: --kind features, not {kind}')
        if kind == 'class_token' and not getattr(net, 'num_prefix_tokens', 0):
            raise UsageError(f'a {type(net).__name__} has no class token: take --kind pooled')
        if kind == 'pyramid':
            if not hasattr(net, 'forward_intermediates'):
                raise UsageError(f'a {type(net).__name__} gives no maps of several strides: take --kind pooled')
            strides = {level['reduction']: i for i, level in enumerate(net.feature_info)}  # the last of each
            self.indices = sorted(strides.values())
        with torch.inference_mode():
            vectors = self.parts(probe)
        self.levels = [part.shape[1] for part in vectors]
        self.types = {'embedding': pa.list_(pa.float32())}
        self.width = sum(self.levels)

    def parts(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of the vectors, each (B, d)."""
        if self.kind == 'pyramid':
            maps = self.net.forward_intermediates(
                images, indices=self.indices, intermediates_only=True, output_fmt='NCHW'
            )
            return [level.float().mean((2, 3)) for level in maps]
        if isinstance(self.net, ExportedModel):
            return [self.net.features(images)]
        tokens = self.net.forward_features(images)
        if self.kind == 'features':
            return [self.net.forward_head(tokens, pre_logits=True).float()]
        tokens = tokens.float()
        if self.kind == 'class_token':
            return [tokens[:, 0]]
        if tokens.ndim == 4:  # Swin's maps and their kin's have their channels last
            return [tokens.mean((1, 2) if getattr(self.net, 'output_fmt', 'NCHW') == 'NHWC' else (2, 3))]
        return [tokens[:, getattr(self.net, 'num_prefix_tokens', 0) :].mean(1)]

    def __call__(self, images: torch.Tensor) -> dict[str, pa.Array]:
        """Columns with a value for each of (B, C, H, W)."""
        return {'embedding': as_lists(torch.cat(self.parts(images), 1).cpu().numpy(), pa.float32())}


def as_lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """(B, n) as an array of B lists; not of fixed size: few versions of Arrow write and read a missing one of those."""
    starts = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(starts, pa.array(values.ravel(), kind))


@dataclass
class Job:
    """What `predict` and `embed` have in common; see their arguments."""

    inputs: list[str]
    checkpoint: str
    model: str | None
    output: str | None
    batch_size: int
    workers: int
    device: str
    precision: Precision
    shard_size: int
    max_pixels: int

    def check(self, files: tuple[str, ...], rules: tuple[tuple[bool, str], ...] = ()) -> None:
        """UsageError with all that is wrong; `files` are the kinds of file that the output may be."""
        problems = check_place(self.output, files) if self.output else []
        require(
            (
                *rules,
                (self.batch_size >= 1, f'batch_size is at least 1, got {self.batch_size}'),
                (self.workers >= 0, f'workers is at least 0, got {self.workers}'),
                (self.shard_size >= 1, f'shard_size is at least 1, got {self.shard_size}'),
                (self.max_pixels >= 1, f'max_pixels is at least 1, got {self.max_pixels}'),
                *((False, problem) for problem in problems),
            )
        )
        self.rank, self.world = (number(name, default) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))
        require(
            (
                (
                    0 <= self.rank < self.world,
                    f'RANK is at least 0 and below WORLD_SIZE, got {self.rank} of {self.world}',
                ),
                (self.world == 1 or bool(self.output), f'{self.world} processes need an --output to write to'),
            )
        )
        if is_exported(self.checkpoint) and self.device not in ('auto', 'cpu'):
            raise UsageError(f'exported files run on the CPU here, not on {self.device}')
        self.target = pick_device('cpu' if is_exported(self.checkpoint) else self.device)
        if self.world > 1 and self.target.type == 'cuda' and ':' not in self.device:
            self.target = torch.device('cuda', number('LOCAL_RANK', self.rank) % torch.cuda.device_count())

    def load(self) -> tuple[Any, list[str]]:
        """The model on its device, and its classes; `opener` is then what prepares images for it."""
        self.images = find_images(self.inputs)
        net, self.preprocessing, names, identity = self.open_model()
        self.opener = Opener(self.images, self.preprocessing, self.max_pixels)
        names = spoken_names(names)
        self.settings: Row = dict(
            **identity,
            classes=names,
            preprocessing=self.preprocessing.as_cfg(),
            precision=self.precision,
            max_pixels=self.max_pixels,
            images=len(self.images),
            image_names=self.images.digest(),
            shard_size=self.shard_size,
        )
        return net, names

    def open_model(self) -> tuple[Any, Preprocessing, list[str], Row]:
        """A model on its device or an exported file, its preprocessing, its classes, and what tells it from others."""
        if is_exported(self.checkpoint):
            if self.precision != 'no':
                raise UsageError(f'{self.checkpoint} has its own precision: leave out --precision {self.precision}')
            file = load_exported(self.checkpoint)
            sha = ' '.join(map(hash_file, files_of(self.checkpoint)))
            return (
                file,
                file.preprocessing,
                file.class_names,
                dict(model=file.metadata.model, weights=sha, export=f'{file.runtime}, {file.metadata.precision}'),
            )
        net, preprocessing, names = load_model(self.checkpoint, self.model)
        cfg: Any = net.pretrained_cfg
        return net.to(self.target), preprocessing, names, dict(model=cfg['architecture'], weights=hash_weights(net))

    def environment(self) -> Row:
        """What may be another at a restart."""
        return dict(
            inputs=self.inputs,
            checkpoint=self.checkpoint,
            device=str(self.target),
            batch_size=self.batch_size,
            processes=self.world,
            version=__version__,
            torch=torch.__version__,
            timm=timm.__version__,
        )

    def rows(self, head: Head, pieces: list[Piece]) -> Iterator[tuple[Opened, pa.Table]]:
        """The rows of these pieces, batch by batch, none of which goes beyond its piece."""
        batches = (
            (start, min(start + self.batch_size, stop))
            for begin, stop in pieces
            for start in range(begin, stop, self.batch_size)
        )
        count = sum(-(-(stop - begin) // self.batch_size) for begin, stop in pieces)
        workers = max(0, min(self.workers, count - 1))  # for a single batch they do not pay
        kind = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.precision)
        for opened in open_pieces(self.opener, batches, workers, self.target):
            columns = {name: pa.array([], column) for name, column in head.types.items()}
            if opened.good:
                with torch.inference_mode(), torch.autocast(self.target.type, kind, enabled=kind is not None):
                    columns = head(opened.images.to(self.target, non_blocking=True))
            yield opened, self.table(opened, columns)

    def table(self, opened: Opened, columns: dict[str, pa.Array]) -> pa.Table:
        """Columns of the images that could be read, as rows of all."""
        span = range(opened.start, opened.stop)
        places = {index: i for i, index in enumerate(opened.good)}
        order = pa.array([places.get(index) for index in span], pa.int64())
        return pa.table(
            {
                'index': pa.array(span, pa.int64()),
                'image': pa.array([self.images.name(i) for i in span], pa.string()),
                'error': pa.array([opened.errors.get(i) for i in span], pa.string()),
                **{name: column.take(order) for name, column in columns.items()},
            }
        )


def number(name: str, default: int) -> int:
    """A whole number out of the environment.

    Raises:
        UsageError: if it is none.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f'{name} is a whole number, got {text!r}') from None


def follow(job: Job, head: Head, settings: Row) -> Iterator[pa.Table]:
    """Every batch's rows of this process; with an output, they are in it when the next batch is asked for.

    Raises:
        KeyboardInterrupt: where it was stopped, with what to do about it.
    """
    results, pieces, before = None, [(0, len(job.images))], 0
    if job.output:
        results = Results(Path(job.output), len(job.images), job.shard_size, {**job.settings, **settings})
        results.begin(job.environment())
        parts = [part for part in results.missing() if part % job.world == job.rank]
        pieces = [results.piece(part) for part in parts]
        own = range(job.rank, len(results.parts), job.world)
        before = sum(len(range(*results.piece(part))) for part in own) - sum(len(range(*piece)) for piece in pieces)
    read = damaged = 0
    held: list[pa.Table] = []
    total = before + sum(len(range(*piece)) for piece in pieces)
    with Live(console(stderr=True), 'image', total, before, quiet=job.rank > 0) as live:
        try:
            for opened, table in job.rows(head, pieces):
                read, damaged = read + table.num_rows, damaged + len(opened.errors)
                held.append(table)
                if results and (opened.stop % job.shard_size == 0 or opened.stop == len(job.images)):
                    results.write((opened.stop - 1) // job.shard_size, pa.concat_tables(held), head.width)
                    held = []
                live.show(before + read, f'{read / live.seconds:.0f} images/s  {damaged} damaged')
                yield table
        except KeyboardInterrupt:
            raise KeyboardInterrupt('stopped; the same command goes on from what is done' if results else '') from None
        seconds = live.seconds
    if not results:
        return
    whole = results.finish()
    speed = (
        f'{read:,} images in {duration(seconds)}, {read / seconds:.1f} images/s, {damaged:,} of them damaged; '
        if read
        else 'nothing left to do; '
    )
    console().print(
        speed
        + (
            f'all {len(job.images):,} are in {job.output}'
            if whole
            else f'this was the share of process {job.rank + 1} of {job.world}'
        ),
        soft_wrap=True,
    )


def predict(
    inputs: list[str],
    checkpoint: str,
    model: str | None = None,
    output: str | None = None,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 2,
    device: str = 'auto',
    precision: Precision = 'no',
    shard_size: int = 1024,
    max_pixels: int = MAX_PIXELS,
    picture: str | None = None,
) -> None:
    """Name what is in images: the most probable classes of each.

    Args:
        inputs: Image files, folders and patterns of them, tars, Parquet files, lists of paths (.csv, .txt), or digits
            for a few of the embedded test images.
        checkpoint: A run's folder, hf-hub:USER/NAME, an exported .onnx, .xml or .pt2, or a file in any published layout
            (then with --model).
        model: The registered name of the model in a file.
        output: A .csv, .jsonl or .parquet file, or a folder for parts that read as one data set; the screen by default,
            batch by batch. The same command goes on where it was interrupted.
        top_k: Classes to name.
        batch_size: Images at once.
        workers: Processes that open images.
        device: cpu, cuda, mps or auto.
        precision: no (float32), bf16 or fp16.
        shard_size: Images in a part of the output, which is made again where it was interrupted.
        max_pixels: Of an image; what claims to have more is not decoded.
        picture: A PNG file to show the first images in, with what they were taken for.
    """
    job = Job(inputs, checkpoint, model, output, batch_size, workers, device, precision, shard_size, max_pixels)
    job.check(('.csv', '.jsonl', '.parquet'), ((top_k >= 1, f'top_k is at least 1, got {top_k}'),))
    net, names = job.load()
    head = TopK(net, names, top_k)
    screen, total, good = console(), len(job.images), 0
    shown: list[Row] = []
    damaged: list[str] = []
    for table in follow(job, head, dict(top_k=head.k)):
        good += table.column('error').null_count
        rows = table.to_pylist() if not output or picture and len(shown) < SHOWN else []
        shown += [row for row in rows if picture and row['error'] is None][: SHOWN - len(shown)]
        if not output:
            errors = (f'{row["image"]} ({row["error"]})' for row in rows if row['error'] is not None)
            damaged += islice(errors, NAMED - len(damaged))
            screen.print(as_table(rows, head.k))
    if damaged and not good:
        raise DataError(f'not one image can be read: {", ".join(damaged)}')
    if damaged:
        screen.print(f'{total - good} of {total} images cannot be read: {", ".join(damaged)}', soft_wrap=True)
    if picture and shown:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        plot_predictions(
            [
                (
                    job.opener.picture(row['index']),
                    row['classes'][0],
                    row['probabilities'][0],
                    job.images.truth(row['index']),
                )
                for row in shown
            ],
            Path(picture),
        )
        screen.print(f'the picture is {picture}', soft_wrap=True)


def as_table(rows: list[Row], k: int) -> Table:
    """Rows for the screen."""
    table = Table('image', *(f'{i + 1}.' for i in range(k)))
    for row in rows:
        table.add_row(
            row['image'],
            *(
                '–' if row['error'] is not None else f'{row["classes"][i]} {100 * row["probabilities"][i]:.1f} %'
                for i in range(k)
            ),
        )
    return table


def embed(
    inputs: list[str],
    checkpoint: str,
    output: str,
    model: str | None = None,
    kind: Kind = 'features',
    batch_size: int = 32,
    workers: int = 2,
    device: str = 'auto',
    precision: Precision = 'no',
    shard_size: int = 1024,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Turn images into vectors, to search, group or learn from.

    Args:
        inputs: Image files, folders and patterns of them, tars, Parquet files, lists of paths (.csv, .txt), or digits
            for a few of the embedded test images.
        checkpoint: A run's folder, hf-hub:USER/NAME, an exported .onnx, .xml or .pt2, or a file in any published layout
            (then with --model).
        output: A .parquet file; a .npy file, with the images' names in a .csv beside it; or a folder for parts that
            read as one data set. The same command goes on where it was interrupted.
        model: The registered name of the model in a file.
        kind: features (what the head reads), class_token, pooled (the mean of the other tokens), or pyramid (means over
            the maps of every stride).
        batch_size: Images at once.
        workers: Processes that open images.
        device: cpu, cuda, mps or auto.
        precision: no (float32), bf16 or fp16.
        shard_size: Images in a part of the output, which is made again where it was interrupted.
        max_pixels: Of an image; what claims to have more is not decoded.
    """
    job = Job(inputs, checkpoint, model, output, batch_size, workers, device, precision, shard_size, max_pixels)
    job.check(('.parquet', '.npy'))
    net, _ = job.load()
    size = job.preprocessing.channels, *job.preprocessing.size
    head = Embedding(net, kind, torch.zeros(1, *size, device=job.target))
    for _ in follow(job, head, dict(kind=kind, levels=head.levels)):
        pass
