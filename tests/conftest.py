"""What must be there before warnings become errors."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # torch's optimizers import its compiler, which in older versions meets the deprecation of distutils
    warnings.simplefilter("ignore")
    import torch._dynamo  # noqa: F401
