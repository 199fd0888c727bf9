"""Prepare images for fast training: the command `t2t-vit prepare`."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch.multiprocessing import Event
from torch.utils.data import DataLoader, Dataset

from .console import Live, console, duration
from .data import (
    DataError,
    Source,
    check_training_classes,
    convert_image,
    is_color,
    open_source,
    open_train_val,
    printable,
)
from .data.batches import end_workers, epoch_order, leave_signals
from .data.errors import Undivided
from .data.sources.prepared import INDEX, MANIFEST, PREPARING, VERSION, WHOLE, is_remote, read_record
from .data.split import relative_names
from .data.waiting import explain_worker_death
from .integrity import hash_file, write_text
from .results import locked
from .settings import UsageError, require

SHOWN = 5  # damaged images in a message


class Reduction(NamedTuple):
    """How images are reduced: their shorter side, the quality of the JPEG, the colour below transparent pixels."""

    short_side: int
    quality: int
    background: str


def reduced_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the width and height of an image whose shorter side is reduced to `short_side`; it is never enlarged."""
    scale = min(1.0, short_side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def reduce_image(content: bytes | None, image: Any, to: Reduction) -> bytes:
    """Return a read image as a JPEG of reduced size; a plain small JPEG keeps its bytes."""
    shown = convert_image(image, 3, to.background)
    size = reduced_size(shown.size, to.short_side)
    if content is not None and size == shown.size and is_plain_jpeg(content):
        return content
    buffer = io.BytesIO()
    shown.resize(size, Image.Resampling.BICUBIC).save(buffer, 'JPEG', quality=to.quality)
    return buffer.getvalue()


def is_plain_jpeg(content: bytes) -> bool:
    """Return true for a JPEG without EXIF data, whose pixels are shown as they are stored."""
    with Image.open(io.BytesIO(content)) as image:
        return image.format == 'JPEG' and image.mode == 'RGB' and not image.getexif()


class ShardWriter(Dataset[dict[str, Any]]):
    """Write one shard of a split, a tar in WebDataset's layout; runs in worker processes.

    Args:
        source: The images.
        folder: Where the shards go.
        shards: The indices of the images of each shard.
        to: How images are reduced.
    """

    def __init__(self, source: Source, folder: Path, shards: list[list[int]], to: Reduction) -> None:
        self.source, self.folder, self.shards, self.to = source, folder, shards, to
        self.stopped = Event()  # seen by the workers, which would otherwise complete their shards

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return the record of a shard, which is written under its name when it is complete."""
        path, draft = self.folder / f'{number:06}.tar', self.folder / f'{number:06}.tar.part'
        rows: list[dict[str, Any]] = []
        damaged: list[str] = []
        with tarfile.TarFile(draft, 'w', format=tarfile.USTAR_FORMAT) as tar:
            for index in self.shards[number]:
                if self.stopped.is_set():
                    raise KeyboardInterrupt
                try:
                    image = self.source.open(index)
                    content = self.source.content(index) if hasattr(self.source, 'content') else None
                    jpeg = reduce_image(content, image, self.to)
                except Exception:  # decoders raise any type for damaged bytes
                    damaged.append(self.source.name(index))
                    continue
                label = int(self.source.labels[index])
                for suffix, part in (('jpg', jpeg), ('cls', str(label).encode())):
                    member = tarfile.TarInfo(f'{index:09}.{suffix}')
                    member.size = len(part)
                    if suffix == 'jpg':
                        offset = tar.offset + tarfile.BLOCKSIZE
                        rows.append(dict(name=member.name, shard=number, offset=offset, size=member.size, label=label))
                    tar.addfile(member, io.BytesIO(part))
        with draft.open('rb+') as file:
            os.fsync(file.fileno())
        record = dict(name=f'{self.folder.name}/{path.name}', sha256=hash_file(draft), bytes=draft.stat().st_size)
        record |= dict(images=len(rows), rows=rows, damaged=damaged)
        os.replace(draft, path)
        write_json(path.with_suffix('.json'), record)
        return {**record, 'rows': []}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is complete or absent; names that are not UTF-8 are escaped."""
    write_text(path, json.dumps(content, indent=1) + '\n')


def fingerprint(source: Source, root: str) -> str:
    """Return the SHA-256 of the images' names in the root and labels, and of their sizes where these are soon found."""
    names = relative_names(source, os.path.dirname(root) if os.path.isfile(Path(root).expanduser()) else root)
    try:
        sizes = source.content_sizes()  # type: ignore[attr-defined]
    except (AttributeError, DataError, OSError):
        sizes = [''] * len(names)
    sha = hashlib.sha256()
    for name, label, size in zip(names, source.labels, sizes):
        sha.update(f'{name}\0{label}\0{size}\0'.encode('utf-8', 'surrogateescape'))
    return sha.hexdigest()


def prepare(
    root: str,
    output: str,
    short_side: int = 256,
    quality: int = 90,
    shard_images: int = 2048,
    workers: int = 2,
    background: str = 'white',
    cache: str | None = None,
) -> None:
    """Reduce images once, and write them into shards that train faster than the originals.

    OUTPUT can be given as `--data.root` to `train`, on a disk or, after it is copied there, at an address that fsspec
    reads. The same command continues where it was interrupted, and checks what is complete.

    Args:
        root: A data.root; of one that is not divided, all images are prepared, and training divides them.
        output: A new folder.
        short_side: Pixels of the shorter side; smaller images keep their size.
        quality: Quality of the JPEGs, from 1 to 95.
        shard_images: Images in a shard.
        workers: Processes that reduce images.
        background: Colour that shows through transparent pixels, a name or #rrggbb.
        cache: Where torch/ and hfds/ sets are kept; by default ~/.cache/t2t-vit.
    """
    require(
        (
            (short_side >= 1, f'short_side must be at least 1, got {short_side}'),
            (1 <= quality <= 95, f'quality must be at least 1 and at most 95, got {quality}'),
            (shard_images >= 1, f'shard_images must be at least 1, got {shard_images}'),
            (workers >= 0, f'workers must be at least 0, got {workers}'),
            (is_color(background), f'background is no colour: {background!r}'),
            (not is_remote(output), f'output must be a folder, got {output}: copy it elsewhere when it is complete'),
        )
    )
    folder, to = Path(output).expanduser(), Reduction(short_side, quality, background)
    sources = open_splits(root, cache)
    settings = dict(
        **to._asdict(),
        shard_images=shard_images,
        classes=next(iter(sources.values())).classes,
        images={
            split: dict(count=len(source.labels), sha256=fingerprint(source, root)) for split, source in sources.items()
        },
    )
    with locked(folder / '.lock', f'another process prepares images in {folder}'):
        check_settings(folder, settings)
        write_all(folder, sources, settings, to, workers)


def open_splits(root: str, cache: str | None) -> dict[str, Source]:
    """Open the training and the validation images, with the checks of training; or all, if they are not divided."""
    try:
        train, val, _ = open_train_val(root, cache, channels=3)
    except Undivided:
        whole = open_source(root, 'all', cache, channels=3)
        check_training_classes(whole)
        return {WHOLE: whole}
    return dict(train=train, val=val)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a folder is new, or was begun with the same settings and images.

    Raises:
        UsageError: naming what differs.
        DataError: if the folder's record is damaged.
    """
    path = folder / (MANIFEST if (folder / MANIFEST).exists() else PREPARING)
    if path.exists():
        before = read_record(path)
        if different := [key for key in settings if settings[key] != before.get(key)]:
            raise UsageError(
                f'{folder} was begun with other {", ".join(different)}: give another output, or delete the folder'
            )
    elif any(entry.name != '.lock' for entry in folder.iterdir()):
        raise UsageError(f'{folder} is not empty, and holds no prepared images: give another output')
    else:
        write_json(path, settings)


def write_all(folder: Path, sources: dict[str, Source], settings: dict[str, Any], to: Reduction, workers: int) -> None:
    """Write the shards that are missing, and then the index of each split and the manifest."""
    if (folder / MANIFEST).exists():
        check_shards(folder)
        remove_drafts(folder)
        console().print(f'nothing left to do: {folder} is complete, and its checksums are right', soft_wrap=True)
        return
    records: dict[str, list[dict[str, Any]]] = {}
    count = sum(len(source.labels) for source in sources.values())
    with Live(console(stderr=True), 'image', count, 0) as live:
        done = written = 0
        for split, source in sources.items():
            target = folder / split
            target.mkdir(exist_ok=True)
            order = epoch_order(len(source.labels), 0, 0).tolist()  # mixed, for readers that read in sequence
            size = settings['shard_images']
            shards = [order[i : i + size] for i in range(0, len(order), size)]
            missing = [i for i in range(len(shards)) if not (target / f'{i:06}.json').exists()]
            done += sum(map(len, shards)) - sum(len(shards[i]) for i in missing)
            writer = ShardWriter(source, target, shards, to)
            loader = DataLoader(
                writer,
                batch_size=None,
                sampler=missing,
                num_workers=min(workers, len(missing)),
                worker_init_fn=leave_signals,
            )
            reading = iter(loader)
            try:
                for record in reading:
                    images = record['images'] + len(record['damaged'])
                    done, written = done + images, written + images
                    live.show(done, f'{written / live.seconds:.0f} images/s')
            except KeyboardInterrupt:
                raise KeyboardInterrupt('stopped; the same command continues from what is done') from None
            except OSError as error:
                cause = str(error).strip().rpartition('\n')[2]  # after the traceback of a worker
                raise DataError(f'cannot write the shards in {target}: {cause}') from None
            except RuntimeError as error:
                raise explain_worker_death(error) or error from None
            finally:
                writer.stopped.set()
                end_workers(reading)
            records[split] = [read_record(target / f'{i:06}.json') for i in range(len(shards))]
        seconds = live.seconds
    damaged = [name for found in records.values() for record in found for name in record['damaged']]
    if empty := [split for split, found in records.items() if not any(record['images'] for record in found)]:
        raise DataError(f'no image of {" and ".join(empty)} can be read: {", ".join(damaged[:SHOWN])}')
    splits = {split: finish_split(folder, split, found) for split, found in records.items()}
    write_json(folder / MANIFEST, dict(version=VERSION, **settings, damaged=damaged, splits=splits))
    remove_drafts(folder)
    total = sum(shard['bytes'] for split in splits.values() for shard in split['shards'])
    speed = f', {written / seconds:,.0f} images/s' if written else ''
    console().print(
        f'{count - len(damaged):,} images, {total / 1e6:,.0f} MB ({total / (count - len(damaged)) / 1e3:.0f} kB each), '
        f'in {duration(seconds)}{speed}; train with --data.root {folder}',
        soft_wrap=True,
    )
    if damaged:
        named = ', '.join(map(printable, damaged[:SHOWN]))
        console().print(
            f'{len(damaged):,} damaged images were left out: {named}{", …" * (len(damaged) > SHOWN)}; all of them are '
            f'named in {folder / MANIFEST}',
            soft_wrap=True,
        )


def remove_drafts(folder: Path) -> None:
    """Remove what only an unfinished folder needs, and what a killed process left of it in a finished one."""
    for path in (*folder.glob('*/*.json'), folder / PREPARING):
        path.unlink(missing_ok=True)


def check_shards(folder: Path) -> None:
    """Compare the shards and indices of a complete folder with their checksums.

    Raises:
        DataError: naming those that differ.
    """
    splits = read_record(folder / MANIFEST)['splits'].values()
    files = [record for split in splits for record in (*split['shards'], split['index'])]
    wrong = [
        record['name']
        for record in files
        if not (folder / record['name']).exists() or hash_file(folder / record['name']) != record['sha256']
    ]
    if wrong:
        raise DataError(
            f'{len(wrong)} of {len(files)} files in {folder} are damaged or missing: {", ".join(wrong[:SHOWN])}: '
            'delete the folder, and prepare it again'
        )


def finish_split(folder: Path, split: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the index of a split; return what the manifest says about the split."""
    rows = [row for record in records for row in record['rows']]
    path = folder / split / 'index.parquet'
    pq.write_table(pa.Table.from_pylist(rows, INDEX), path)
    shards = [{key: record[key] for key in ('name', 'sha256', 'bytes', 'images')} for record in records]
    return dict(shards=shards, index=dict(name=f'{split}/{path.name}', sha256=hash_file(path)))
