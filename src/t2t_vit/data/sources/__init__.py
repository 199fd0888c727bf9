"""Sources of labelled images: each format in a module, opened by `open_source`."""

from .base import Source, read_channels
from .digits import Digits
from .folder import Folder
from .hub import HubSet
from .labels import check_training_classes
from .lists import LabelledList, listed_paths
from .names import counted, left_out, printable, to_text
from .opening import open_source
from .parquet import Parquet, Rows
from .subset import Part, Subset
from .tar import Shards
from .torchvision import TorchSet

__all__ = [
    'Digits',
    'Folder',
    'HubSet',
    'LabelledList',
    'Parquet',
    'Part',
    'Rows',
    'Shards',
    'Source',
    'Subset',
    'TorchSet',
    'check_training_classes',
    'listed_paths',
    'open_source',
    'printable',
    'read_channels',
    'to_text',
    'counted',
    'left_out',
]
