"""The `projected_multi_scale_attention` operator; `naive.py` is its definition."""

from evit_kernels.projected_multi_scale_attention.op import projected_multi_scale_attention

__all__ = ["projected_multi_scale_attention"]
