"""Write models as files for other runtimes, compare them with PyTorch, and load them as one kind of callable."""

from .metadata import EXPORTED, Metadata, files_of, is_exported
from .runtime import ExportedModel, load_exported

__all__ = ['EXPORTED', 'ExportedModel', 'Metadata', 'files_of', 'is_exported', 'load_exported']
