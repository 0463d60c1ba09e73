"""The `lite_mla` operator; `naive.py` is its definition."""

from evit_kernels.lite_mla.op import lite_mla

__all__ = ["lite_mla"]
