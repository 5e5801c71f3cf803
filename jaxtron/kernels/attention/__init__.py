"""Attention in several implementations of one meaning: `mask.py` says who attends to whom, `choose.py` who computes."""

from jaxtron.kernels.attention.attention import attention
from jaxtron.kernels.attention.choose import Choice, Implementation, choose
from jaxtron.kernels.attention.mask import Mask

__all__ = ["Choice", "Implementation", "Mask", "attention", "choose"]
