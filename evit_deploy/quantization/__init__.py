"""Choosing INT8 ranges from real images, and finding out what each layer's INT8 costs.

histogram.py    magnitudes of a tensor over any number of images, in constant memory
thresholds.py   from a histogram to the magnitude that becomes 127: minmax, percentile, entropy
calibration.py  images through the FP32 graph, one histogram per tensor
sensitivity.py  the error of the output with one layer quantized, for each layer
report.py       the result as data, as JSON and as text
"""
