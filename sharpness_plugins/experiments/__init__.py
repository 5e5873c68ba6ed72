"""Experiments on small real data, written on the public API only."""
