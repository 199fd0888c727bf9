"""T2T-ViT for today's PyTorch and timm. Importing it registers the models: `timm.create_model('t2t_vit_14')`."""

__version__ = '0.2.0'

from typing import TYPE_CHECKING, Any

from .custom import trust
from .fast import optimize, plain
from .models.checkpoints import convert_state_dict, load_weights
from .models.published import PUBLISHED
from .models.safe_load import CheckpointError
from .models.t2t_vit import Block, T2TViT, TokenLayer
from .models.timm_api import Pyramid, TimmT2TViT
from .models.variants import VARIANTS

if TYPE_CHECKING:
    from .classifier import Classifier


def __getattr__(name: str) -> Any:
    """Import `Classifier` when it is first used."""
    if name == 'Classifier':
        from .classifier import Classifier

        return Classifier
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


__all__ = [
    'PUBLISHED',
    'VARIANTS',
    'Block',
    'CheckpointError',
    'Classifier',
    'Pyramid',
    'T2TViT',
    'TimmT2TViT',
    'TokenLayer',
    '__version__',
    'convert_state_dict',
    'load_weights',
    'optimize',
    'plain',
    'trust',
]
