"""The `cascaded_attention` operator; `naive.py` is its definition."""

from evit_kernels.cascaded_attention.op import cascaded_attention

__all__ = ["cascaded_attention"]
