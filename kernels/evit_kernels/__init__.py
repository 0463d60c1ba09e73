"""Fused attention operators of the EfficientViT families: one folder per operator, `naive.py` is the definition."""

__version__ = "0.1.0"
