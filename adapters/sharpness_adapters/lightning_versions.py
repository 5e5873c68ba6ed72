"""Which Lightning this is."""

from __future__ import annotations

from importlib import metadata

from sharpness_plugins.errors import missing_dependency

__all__ = ["OLDEST", "check_lightning"]

OLDEST = (2, 4)


def check_lightning(module: str, purpose: str) -> None:
    """Import a module of the package lightning.

    Args:
        purpose: who needs it, as the subject of the error's sentence.
    Raises:
        ImportError: there is none, or it is too old.
    """
    missing_dependency(module, extra="lightning", purpose=purpose)
    found = metadata.version("lightning")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"{purpose} needs lightning>={OLDEST[0]}.{OLDEST[1]}, and {found} is installed. Install it "
            'with: pip install "sharpness-plugins[lightning]"'
        )
