"""T2T-ViT for today's PyTorch and timm. Importing it registers the models: `timm.create_model('t2t_vit_14')`."""

__version__ = '0.2.0'

from .custom import trust
from .models.blocks import Block
from .models.checkpoints import CheckpointError, convert_state_dict, load_weights
from .models.pyramid import Pyramid
from .models.t2t_vit import PUBLISHED, VARIANTS, T2TViT
from .models.tokens import TokenLayer

__all__ = [
    'PUBLISHED',
    'VARIANTS',
    'Block',
    'CheckpointError',
    'Pyramid',
    'T2TViT',
    'TokenLayer',
    '__version__',
    'convert_state_dict',
    'load_weights',
    'trust',
]
