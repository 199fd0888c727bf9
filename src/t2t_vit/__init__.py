from .models.t2t_vit import T2TViT, VARIANTS
