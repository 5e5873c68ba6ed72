"""Fused operations on flat vectors and lists of tensors: one function each, plain torch beside Triton, chosen by device."""
