"""TensorRT's real Python bindings over a simulated core, for contract tests without TensorRT and without a GPU.

The bindings come from PyPI (`setup`); stub libraries stand in for TensorRT's, and behind them are Python objects with
tables of virtual functions (`objects`, `slots`). So whole build and run scripts execute: ONNX goes through the parser's
choice between plugin and function, plugins are created and asked for kernels, launches are evaluated over a profile's
range, and a plan is built, read and run. It shows that names, signatures, attributes, launch arithmetic and the order
of calls are right. It shows nothing about numerics or speed. One process per version of TensorRT.
"""
