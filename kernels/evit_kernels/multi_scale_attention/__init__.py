"""The `multi_scale_attention` operator; `naive.py` is its definition."""

from evit_kernels.multi_scale_attention.op import multi_scale_attention

__all__ = ["multi_scale_attention"]
