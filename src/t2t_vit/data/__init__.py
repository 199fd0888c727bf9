"""Images, with labels and without: where they come from, how they are augmented, and how batches are made of them."""

from .augment import Augment
from .batches import (
    Batch,
    DiskBatches,
    MemoryBatches,
    Preprocessing,
    derive,
    measure_input,
    open_batches,
    seed_all,
    synchronize,
)
from .images import MAX_PIXELS, Images, Opened, Opener, Piece, find_images, open_pieces, pixel_limit
from .sources import (
    DataError,
    Digits,
    Folder,
    HubSet,
    Parquet,
    Part,
    Shards,
    Source,
    TorchSet,
    check_same_classes,
    decode,
    list_images,
    open_source,
)

__all__ = [
    'MAX_PIXELS', 'Augment', 'Batch', 'DataError', 'Digits', 'DiskBatches', 'Folder', 'HubSet', 'Images',
    'MemoryBatches', 'Opened', 'Opener', 'Parquet', 'Part', 'Piece', 'Preprocessing', 'Shards', 'Source', 'TorchSet',
    'check_same_classes', 'decode', 'derive', 'find_images', 'list_images', 'measure_input', 'open_batches',
    'open_pieces', 'open_source', 'pixel_limit', 'seed_all', 'synchronize']
