"""What must be there before warnings become errors, and before several processes test side by side."""

from __future__ import annotations

import os
import signal
import warnings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start; more would wait for each other

with warnings.catch_warnings():
    # torch's optimizers import its compiler, which in older versions meets the deprecation of distutils
    warnings.simplefilter("ignore")
    import torch._dynamo  # noqa: F401
