"""Which form of each layer runs: the plain one of `t2t_vit.models`, or a fast one that computes the same.

`FORMS` lists them all. A fast form is a subclass of one plain layer and replaces only how it computes: `optimize` and
`plain` change the class of the layers of a model in place, and parameters, names and state stay the same objects. When
a layer runs its fast form and when its plain one is the rule in `rule.py`.
"""

from timm.layers import Mlp
from torch import nn

from ..models.designs import DenseBlock, GhostAttention, GhostBlock, SEBlock
from ..models.t2t_vit import Attention, Block, T2TViT, TokenPerformer, TokensToToken, TokenTransformer
from ..models.timm_api import TimmT2TViT
from .backbone import (
    ClassTokenT2TViT,
    ClassTokenTimmT2TViT,
    FusedAttention,
    FusedGhostAttention,
    RecomputingBlock,
    RecomputingDenseBlock,
    RecomputingGhostBlock,
    RecomputingMlp,
    RecomputingSEBlock,
)
from .folded import FoldedTokensToToken
from .fused import FusedTokenPerformer, FusedTokenTransformer
from .rule import plain_class, plain_twin

__all__ = ['FORMS', 'optimize', 'plain', 'plain_twin']

FORMS: dict[type, type] = {
    TokenTransformer: FusedTokenTransformer,  # Triton kernels on a GPU in half precision, folded elsewhere
    TokenPerformer: FusedTokenPerformer,
    TokensToToken: FoldedTokensToToken,
    Attention: FusedAttention,
    GhostAttention: FusedGhostAttention,
    Mlp: RecomputingMlp,
    Block: RecomputingBlock,
    SEBlock: RecomputingSEBlock,
    GhostBlock: RecomputingGhostBlock,
    DenseBlock: RecomputingDenseBlock,
    T2TViT: ClassTokenT2TViT,
    TimmT2TViT: ClassTokenTimmT2TViT,
}


def optimize(model: nn.Module) -> nn.Module:
    """Give every layer of a model that has a fast form that form, in place, and return the model."""
    for module in model.modules():
        module.__class__ = FORMS.get(type(module), type(module))
    return model


def plain(model: nn.Module) -> nn.Module:
    """Give every layer of a model its plain form, in place, and return the model; undoes `optimize`."""
    for module in model.modules():
        module.__class__ = plain_class(type(module))
    return model
