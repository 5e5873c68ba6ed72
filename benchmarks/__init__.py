"""Benchmarks of sharpness_plugins: counts and ratios that are compared with a stored baseline. See README.md."""
