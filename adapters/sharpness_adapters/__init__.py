"""Adapters that bolt ``sharpness_plugins`` onto a trainer, one module each.

Importing this package imports no trainer; nothing in ``sharpness_plugins`` imports this package.
"""
