"""Callbacks that know their Trainer, and go on from its checkpoints."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ExportableState, TrainerCallback

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Attachable"]

_attached: weakref.WeakKeyDictionary[Any, list[Attachable]] = weakref.WeakKeyDictionary()


class Attachable(TrainerCallback, ExportableState):
    """A callback that knows its Trainer, and goes on from a checkpoint of it.

    Trainer saves what ``state()`` says. It restores it only with ``restore_callback_states_from_checkpoint``, and then by
    building the callback anew; without that flag the callback takes its state up itself, and with it, the new one becomes
    the one that was attached.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._ref: Callable[[], Any] = _nobody

    @property
    def _trainer(self) -> Any:
        return self._ref()

    def attach(self, trainer: Any) -> Self:
        """Add this to ``trainer``'s callbacks. Returns itself.

        Raises:
            ValueError: it, or another of its kind, is among them.
        """
        others = [type(one) for one in trainer.callback_handler.callbacks]
        if type(self) in others:
            raise ValueError(f"the trainer has a {type(self).__name__} already. Take it off with remove_callback first")
        self._ref = weakref.ref(trainer)
        trainer.add_callback(self)
        _attached.setdefault(trainer, []).append(self)
        return self

    def state(self) -> dict[str, Any]:
        """What Trainer puts into its checkpoints: JSON."""
        args = {name: value for name, value in self._settings.items() if _is_json(value)}
        left_out = sorted(self._settings.keys() - args.keys())
        return {"args": args, "attributes": {"_saved": self._state_dict(), "_left_out": left_out}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rebuilt = vars(self).pop("_saved", None)
        left_out = vars(self).pop("_left_out", ())
        if rebuilt is not None:
            self._adopt(args, left_out)
        name = type(self).__name__
        saved = rebuilt
        if saved is None and state.global_step > 0 and name in state.stateful_callbacks:
            found = state.stateful_callbacks[name]
            saved = (found[-1] if isinstance(found, list) else found)["attributes"]["_saved"]
        self._begin(args, state, control, kwargs)
        if saved is not None:
            self._load_state_dict(saved)
        # Trainer looks its callbacks up there when it saves, and a checkpoint from before they were attached has none
        state.stateful_callbacks.setdefault(name, self.state())
        self._began(args, state, control, kwargs)

    def _adopt(self, args: Any, left_out: Iterable[str]) -> None:
        for trainer, callbacks in _attached.items():
            for callback in reversed(callbacks):
                if trainer.args is args and type(callback) is type(self):
                    self.__dict__ = callback.__dict__
                    return
        if left_out:
            raise ValueError(
                f"restore_callback_states_from_checkpoint builds {type(self).__name__} anew from JSON, and "
                f"{', '.join(left_out)} cannot be written as such. Add it with attach(trainer) and not as "
                "callbacks=[...], or leave that flag off: this callback goes on from the checkpoint by itself."
            )

    def _begin(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        """Training begins, anew or from a checkpoint, whose state comes next."""

    def _began(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        """Training has begun, and the state is what it was."""

    def _state_dict(self) -> dict[str, Any]:
        return {}

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _nobody() -> None:
    return None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
