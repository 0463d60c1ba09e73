"""Kernels, their PTX and whole models on a GPU, beside what else PyTorch offers: `python -m benchmarks.gpu`.

The tests that need a GPU run first; nothing is measured, let alone written, unless all of them pass. Each case compares
its results with the definition in float64 (a whole model: with the FP32 reference on the CPU) before it is timed.

Never run on a GPU yet: what is tested of it without one is that the program does what it says (`--device cpu`).
"""
