"""What the script that runs was told: the arguments of timm's train.py, read by its own parser."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["check_optimizer_name", "script_arguments", "set_script"]

_module: Any = None


def set_script(module: Any) -> None:
    """The module of train.py, where it is not ``__main__``; None to forget it."""
    global _module
    _module = module


def script_arguments() -> Mapping[str, Any]:
    """By name, with those of its configuration file; empty where no train.py of timm runs."""
    module: Any = _module or sys.modules.get("__main__")
    if not all(hasattr(module, name) for name in ("_parse_args", "parser", "train_one_epoch")):
        return {}
    arguments, _ = module._parse_args()
    found: dict[str, Any] = vars(arguments)
    return found


def check_optimizer_name() -> None:
    """
    Raises:
        ValueError: the script was told ``--opt sam_sgd``, of which timm keeps the last part only.
    """
    name = str(script_arguments().get("opt", "")).lower()
    *before, base = name.split("_")
    if any(part.endswith("sam") for part in before):
        outer = "lookahead_" if "lookahead" in before else ""
        rule = "".join(part for part in before if part != "lookahead")
        raise ValueError(
            f"--opt {name} would train with plain {base}, as timm keeps what follows the last _. Write {outer}{rule}{base}"
        )
