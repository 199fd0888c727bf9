"""The plain forms of two models, for `t2t-vit bench scripts/plain.py:plain_14`."""

import timm

import t2t_vit  # noqa: F401  (registers the models)


def plain_14(img_size):
    """Build T2T-ViT-14 as the paper prints it."""
    return timm.create_model('t2t_vit_14', img_size=img_size, fast=False)


def plain_t_14(img_size):
    """Build T2T-ViT_t-14 as the paper prints it."""
    return timm.create_model('t2t_vit_t_14', img_size=img_size, fast=False)
