"""timm: SAM and its relatives around any of its optimizers, and measuring, on an unmodified train.py.

``python train.py ... --device-modules sharpness_adapters.timm --opt samsgd --opt-kwargs rho=0.1`` imports this module before
anything is built, which offers the optimizers, ``gsamadamw``, ``looksamsgd`` and so on among them; with
``SHARPNESS_METRICS="epsilon_box hessian_topk:k=1"`` in the environment it also measures (``Settings.from_environment``).
``sharpness-timm train.py ...`` changes batch sizes as well.
"""

from __future__ import annotations

import os

from sharpness_plugins.errors import missing_dependency

from .versions import check_version

missing_dependency("timm", extra="timm", purpose="sharpness_adapters.timm")
check_version()

from ..timm_task import bare_task  # noqa: E402
from .arguments import check_optimizer_name  # noqa: E402
from .measuring import Settings, TaskMonitor  # noqa: E402
from .second_pass import SecondPass, register_optimizers, second_pass_of  # noqa: E402

__all__ = [
    "SecondPass",
    "Settings",
    "TaskMonitor",
    "activate",
    "bare_task",
    "deactivate",
    "main",
    "register_optimizers",
    "second_pass_of",
]

_active: TaskMonitor | None = None


def activate() -> TaskMonitor | None:
    """Offer the optimizers, and measure what is trained from now on if the environment names metrics.

    Raises:
        ValueError: the script was told ``--opt sam_sgd``, of which timm keeps the last part only.
    """
    global _active
    deactivate()
    register_optimizers()
    check_optimizer_name()
    settings = Settings.from_environment(os.environ)
    _active = TaskMonitor(settings) if settings.metrics else None
    return _active


def deactivate() -> None:
    """Stop measuring. The optimizers stay."""
    global _active
    if _active is not None:
        _active.close()
    _active = None


def main() -> int:
    """The console script ``sharpness-timm``."""
    from ..timm_script import main as run

    return run()


activate()
