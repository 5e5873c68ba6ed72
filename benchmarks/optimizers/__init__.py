"""Sharpness-aware optimizers: what they do to a minimum, what a step costs, and other libraries beside them."""
