"""Kernels on a GPU: right first, then timed against what torch can do without them."""
