"""An example of a package that adds metrics to ``sharpness_plugins``."""
