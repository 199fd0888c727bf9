"""T2T-ViT for today's PyTorch and timm. Importing it registers the models: `timm.create_model('t2t_vit_14')`."""

__version__ = '0.1.0'

from .models.t2t_vit import PUBLISHED, VARIANTS, T2TViT

__all__ = ['PUBLISHED', 'VARIANTS', 'T2TViT', '__version__']
