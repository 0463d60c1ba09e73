"""The benchmark engine: `measure.run_bench` compares backends of one bundle; importing this package imports nothing."""
