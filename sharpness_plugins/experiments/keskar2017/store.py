"""Work that is kept: weights and numbers by what they depend on, in files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import files

__all__ = ["Store", "key_of"]


def key_of(config: Mapping[str, Any]) -> str:
    """Of all that a piece of work depends on, JSON types: equal settings, equal key, in any order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Store:
    """``<folder>/<kind>/<key>/``: ``done.json`` when the work is complete, and whatever tensors belong to it.

    Safe to share between processes: each file is replaced as a whole, and equal keys mean equal contents.
    """

    folder: Path

    def place(self, kind: str, key: str) -> Path:
        return self.folder / kind / key

    def done(self, kind: str, key: str) -> dict[str, Any] | None:
        """What was written last; None where the work is not complete, or the file is damaged."""
        try:
            found = json.loads((self.place(kind, key) / "done.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return found if isinstance(found, dict) else None

    def finish(self, kind: str, key: str, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """``config`` is there for who looks into the folder."""
        text = json.dumps({"config": config, **found}, indent=1, allow_nan=False)
        self._write(self.place(kind, key) / "done.json", text.encode())

    def save(self, kind: str, key: str, name: str, tensors: Mapping[str, Any], *, durable: bool = True) -> None:
        """``durable``: see ``files.write``."""
        content = io.BytesIO()
        torch.save(dict(tensors), content)
        self._write(self.place(kind, key) / name, content.getvalue(), durable=durable)

    def load(self, kind: str, key: str, name: str) -> dict[str, Any] | None:
        """On the CPU, without running code from the file; None where there is none that can be read."""
        path = self.place(kind, key) / name
        try:
            found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception:  # torch.load stumbles over cut files in many ways, and the work is then done again
            return None
        return found

    def remove(self, kind: str, key: str, name: str) -> None:
        (self.place(kind, key) / name).unlink(missing_ok=True)

    def _write(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content, durable=durable)
