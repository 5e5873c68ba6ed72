"""Sharpness of minima, measured honestly and fast, on any PyTorch model."""
