"""Models as files for other runtimes, proven against PyTorch; and such files as one kind of callable."""

from .metadata import EXPORTED, Metadata, is_exported
from .runtime import ExportedModel, load_exported

__all__ = ['EXPORTED', 'ExportedModel', 'Metadata', 'is_exported', 'load_exported']
