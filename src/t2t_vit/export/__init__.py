"""Models as files for other runtimes, proven against PyTorch; and such files as one kind of callable."""

from .metadata import EXPORTED, Metadata, files_of, is_exported
from .runtime import ExportedModel, load_exported

__all__ = ['EXPORTED', 'ExportedModel', 'Metadata', 'files_of', 'is_exported', 'load_exported']
