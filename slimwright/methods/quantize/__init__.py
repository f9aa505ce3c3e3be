"""Quantization: solvers that put weights on grids."""
