"""zoo: open-weight language models from declarative cards.

Importing this package is free: each public name is imported from its home on first use,
and torch only when a model is loaded.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zoo.api import inspect as inspect
    from zoo.api import list as list
    from zoo.api import load as load
    from zoo.engine.request import Chunk as Chunk
    from zoo.engine.request import Completion as Completion
    from zoo.inspection import Inspection as Inspection
    from zoo.model import Model as Model
    from zoo.registry.card import Card as Card
    from zoo.registry.errors import ZooError as ZooError

__version__ = "0.1.0"

_HOMES = {
    "Card": "zoo.registry.card",
    "Chunk": "zoo.engine.request",
    "Completion": "zoo.engine.request",
    "Inspection": "zoo.inspection",
    "Model": "zoo.model",
    "ZooError": "zoo.registry.errors",
    "inspect": "zoo.api",
    "list": "zoo.api",
    "load": "zoo.api",
}

__all__ = [*_HOMES, "__version__"]

# A thread that waits for the others first looks again and again whether they are done, then sleeps. By default libgomp
# looks for up to 16 ms, which keeps the processor from those it waits for where other programs run too. 20,000 looks
# are 0.5 to 1 ms, more than lies between two products or two steps; fewer cost more, as to be woken takes a while.
# Read once, when torch is imported.
SPINS = "20000"
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> "Iterable[str]":
    return sorted(__all__)
