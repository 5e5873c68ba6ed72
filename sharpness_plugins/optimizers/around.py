"""An optimizer around another one: to all who look at it, that one."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

__all__ = ["OptimizerAround"]

KEY = "sharpness_aware"  # in the state_dict, beside what the base has there


class OptimizerAround(Optimizer):
    """Abstract. Groups, state and defaults *are* those of ``base``; its own hooks run beside those of ``base``, each once.

    Neither ``pickle`` nor ``deepcopy`` takes hooks along, as with torch's optimizers, nor what ``_left_out`` names.
    """

    _left_out: tuple[str, ...] = ()
    _group_keys: tuple[str, ...] = ()  # that it adds to groups

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self._attach()

    def _attach(self) -> None:
        """Make anew what copies do not take along."""
        Optimizer.__setstate__(self, {})
        me = weakref.ref(self)  # base may live longer

        def stepped(base: Optimizer, args: Any, kwargs: Any) -> None:
            if (optimizer := me()) is not None:
                optimizer._base_stepped()

        self.base.register_step_post_hook(stepped)

    @abstractmethod
    def _base_stepped(self) -> None:
        """Called after each step of ``base``, whoever makes it."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _check_own_state(self, own: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _load_own_state(self, own: Mapping[str, Any] | None) -> None: ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of ``base``."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of ``base``."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of ``base``."""
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of ``base``, and under ``"sharpness_aware"`` what is added to it; loads with ``weights_only=True``.

        ``base`` alone loads it, too. Of functions of the step it holds the current values only; of sharded parameters, what
        this rank has.
        """
        for hook in list(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)
        saved = {**self.base.state_dict(), KEY: self._own_state()}
        for post in list(self._optimizer_state_dict_post_hooks.values()):
            saved = post(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was saved, bit for bit. A state of ``base`` alone is taken, too: the rest begins anew.

        Raises:
            ValueError: it is of another rule, or of a later version.
        """
        given = dict(state_dict)
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            given = hook(self, given) or given
        own = given.pop(KEY, None)
        if own is not None:
            self._check_own_state(own)
        added = [{key: group[key] for key in self._group_keys} for group in self.param_groups]
        self.base.load_state_dict(given)
        for group, keys in zip(self.param_groups, added, strict=True):
            for key, value in keys.items():
                group.setdefault(key, value)
        self._load_own_state(own)
        for post in list(self._optimizer_load_state_dict_post_hooks.values()):
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        of_torch = ("_optimizer_", "_zero_grad", "_warned")
        left_out = (*self._left_out, "step")  # schedulers put a step of their own there
        return {k: value for k, value in vars(self).items() if k not in left_out and not k.startswith(of_torch)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()

    # torch's own wrapper of step() would run global hooks here, too, and base's does

    def _before_step(self, closure: Any) -> Any:
        """Run the hooks; returns the closure, which they may change."""
        for hook in list(self._optimizer_step_pre_hooks.values()):
            if (changed := hook(self, (self, closure), {})) is not None:
                args, kwargs = changed
                closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        return closure

    def _after_step(self, closure: Any) -> None:
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (self, closure), {})
