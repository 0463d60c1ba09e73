"""Names and defaults of the program, for modules that must not import torch."""

from __future__ import annotations

CEILINGS, KERNELS, PTX, MODELS = NAMES = ("gpu-ceilings", "gpu-kernels", "gpu-ptx", "gpu-models")
KEY_MODELS = ("msa-m3", "mit-b1", "msra-m3")
DEFAULT_BUDGET_S = 540.0  # for the tests and the benchmarks together
