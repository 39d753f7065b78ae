"""The adapters of a running model: loaded by name, chosen by requests, merged into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zoo.components.adapter import hook, merge, uses_of, using
from zoo.components.linear import Linear
from zoo.components.matrix import replace
from zoo.loading.adapters.read import Adapter
from zoo.loading.quantising import quantised_parts
from zoo.registry.errors import RequestError, nearest

AUTO = "auto"
"""The choice of requests that name no adapter: the one that came with the model, if one did."""


class Adapters:
    """Adapters of one module. The module is hooked while any is loaded, and only where one has something to add."""

    def __init__(self, module: nn.Module) -> None:
        # Names that "auto" may mean. Set before requests run, so that no running one changes its adapter.
        self.defaults: list[str] = []
        self._module = module
        self._loaded: dict[str, Adapter] = {}
        self._hooks: list[RemovableHandle] = []
        self.merged: list[str] = []
        self._changes = count()
        self._plain = next(self._changes)
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """Those that a request may choose, in the order in which they came."""
        return [*self._loaded]

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._loaded.values())

    def add(self, name: str, adapter: Adapter) -> None:
        """Raises RequestError for a name that is taken."""
        if name in (*self._loaded, *self.merged, AUTO):
            raise RequestError(
                "this name of an adapter is taken",
                where="adapter",
                found=repr(name),
                expected="another name",
                hint="pass name=..., or unload the other one first",
            )
        self._loaded[name] = adapter
        self._numbers[name] = next(self._changes)
        self._hook()

    def remove(self, name: str, users: Sequence[str | None] = ()) -> None:
        """Raises RequestError for an adapter that is not loaded, merged for good, or chosen by one of `users`."""
        self._named(name)
        unfinished = sum(self.resolve(user) == name for user in users)
        if unfinished:
            raise RequestError(
                f"the adapter {name!r} is in use",
                where="adapter",
                found=f"{unfinished} unfinished requests",
                hint="let them end, or cancel them",
            )
        self._forget(name)

    @torch.no_grad()
    def merge(self, name: str, users: Sequence[str | None] = ()) -> None:
        """Adds an adapter to the weights for good. Raises RequestError as `remove`, and while any request runs."""
        adapter = self._named(name)
        self._check_mergeable(name, adapter, len(users))
        for path, change in adapter.changes.items():
            linear = self._module.get_submodule(path)
            assert isinstance(linear, Linear)
            merge(linear, change)
        for tensor, value in adapter.whole:
            replace(self._module, tensor.param, tensor.index, value)
        self._forget(name)
        self.merged.append(name)
        self._plain = next(self._changes)

    def resolve(self, name: str | None) -> str | None:
        """The adapter that a request's choice means. Raises RequestError when "auto" could mean several."""
        if name != AUTO:
            return name
        if len(self.defaults) > 1:
            raise RequestError(
                "several adapters are loaded, and the request names none",
                where="adapter",
                expected=f"one of {', '.join(self.defaults)}, or None for the plain model",
            )
        return self.defaults[0] if self.defaults else None

    @property
    def keys(self) -> list[str]:
        """What states may depend on: the plain weights, and each adapter with them; never the same for two of them."""
        return [f"{self._plain} {number}" for number in ("", *self._numbers.values())]

    def key(self, choice: str | None) -> str:
        """What the states of a request depend on that makes this choice."""
        name = self.resolve(choice)
        return f"{self._plain} {'' if name is None else self._numbers[name]}"

    def check(self, choice: str | None) -> None:
        """Raises RequestError for a choice that no request can make."""
        name = self.resolve(choice)
        whole = () if name is None else self._named(name).replaced
        if whole:
            raise RequestError(
                f"the adapter {name!r} replaces whole tensors, which cannot be done for single requests",
                where="adapter",
                found=", ".join(whole[:5]),
                hint=f"merge it first: model.merge_adapter({name!r})",
            )

    def applied(
        self, choices: Sequence[str | None], rows: Sequence[int], device: torch.device
    ) -> AbstractContextManager[None]:
        """A block in which each sequence of a step, of so many rows, uses the adapter that it chose."""
        names = [self.resolve(choice) for choice in choices]
        if not any(names):
            return nullcontext()
        chosen = [None if name is None else self._loaded[name].changes for name in names]
        return using(uses_of(chosen, rows, device))

    def _named(self, name: str) -> Adapter:
        if name in self._loaded:
            return self._loaded[name]
        if name in self.merged:
            raise RequestError(
                "this adapter is merged into the weights, for all requests and for good",
                where="adapter",
                found=repr(name),
                hint="leave it out; load the model again to be rid of it",
            )
        raise RequestError(
            "no adapter of this name is loaded",
            where="adapter",
            found=repr(name),
            expected=f"one of {', '.join(self._loaded)}" if self._loaded else "no name: no adapter is loaded",
            hint=nearest(name, self._loaded),
        )

    def _forget(self, name: str) -> None:
        del self._loaded[name], self._numbers[name]
        if name in self.defaults:
            self.defaults.remove(name)
        self._hook()

    def _hook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        paths = {path for adapter in self._loaded.values() for path in adapter.changes}
        self._hooks = hook(self._module, sorted(paths))

    def _check_mergeable(self, name: str, adapter: Adapter, running: int) -> None:
        if running:
            raise RequestError(
                "weights cannot change under unfinished requests",
                where=f"merging {name!r}",
                found=f"{running} of them",
                hint="let them end, or cancel them",
            )
        changed = [*adapter.changes, *(tensor.param.rpartition(".")[0] for tensor, _ in adapter.whole)]
        for path in changed:
            part = next(quantised_parts(self._module.get_submodule(path)), None)
            if part is not None:
                raise RequestError(
                    "an adapter cannot be merged into quantised weights, whose rounding would swallow most of it",
                    where=f"merging {name!r}",
                    found=f"{path} in {part[1].kind.name}",
                    hint="requests can choose it; or load the model without `quantize`, merge, save, and load that",
                )
