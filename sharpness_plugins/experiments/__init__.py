"""Experiments on small real data, written on the public API only."""

from .warm_start import warm_start_curve

__all__ = ["warm_start_curve"]
