"""Load a user's own layers; see `t2t_vit.custom`."""

from ..custom import load_code as load_own

__all__ = ['load_own']
